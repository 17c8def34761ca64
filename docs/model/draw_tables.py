"""Writes the tables of the models from those of the package: `python docs/model/draw_tables.py [--check]`.

With --check nothing is written, and the exit status is 1 where a file is not what would be written. --without
ROLE.STATE.EVENT leaves a row out and --folder writes elsewhere: what shows that the model notices.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
from collections.abc import Iterable, Iterator

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent / "src"))

from takeover.incumbent import UNDECIDED  # noqa: E402
from takeover.protocol import (  # noqa: E402
    FINAL,
    GIVER,
    INCUMBENT,
    SUCCESSOR,
    TAKER,
    Action,
    Event,
    Local,
    State,
    Table,
)
from takeover.wire import Type  # noqa: E402

FILES: dict[str, dict[str, Table]] = {
    "tables.pml": {"incumbent": INCUMBENT, "successor": SUCCESSOR},
    "channel_tables.pml": {"giver": GIVER, "taker": TAKER},
}
ASKED_FOR = (
    *(Local.LOST, Local.SILENT, Local.OVERTIME, Local.LEAVING, Local.FAIL),
    *(Local.WARM, Local.ACCEPTING, Local.PROBATION_OVER),
)
"""Events that the model brings about by itself: it has to know which states have a row for them."""


def state_name(role: str, state: State) -> str:
    return f"{role[0].upper()}_{state.name}"


def action_name(action: Action) -> str:
    return action.name if isinstance(action, Type) else f"DO_{action.name}"


def states_of(table: Table) -> Iterable[State]:
    return dict.fromkeys([*(state for state, _ in table), *(after for after, _ in table.values())])


def names(roles: dict[str, Table]) -> list[str]:
    """Everything that a model knows by name, each once."""
    found: dict[str, None] = {}
    for role, table in roles.items():
        found.update((state_name(role, state), None) for state in states_of(table))
        found.update((event.name, None) for _, event in table)
        found.update((action_name(action), None) for _, actions in table.values() for action in actions)
    return list(found)


def lines(roles: dict[str, Table], left_out: frozenset[tuple[str, State, Event]]) -> Iterator[str]:
    yield "/* Written by draw_tables.py from src/takeover/protocol.py. */"
    yield ""
    yield "mtype = {"
    yield ",\n".join(f"    {name}" for name in names(roles))
    yield "}"
    for role, whole in roles.items():
        table = {key: row for key, row in whole.items() if (role, *key) not in left_out}
        place = f"{role}[link]"
        for event in ASKED_FOR:
            having = [f"{place} == {state_name(role, state)}" for state, each in table if each is event]
            yield ""
            yield f"#define {role}_has_{event.name}(link) ({' || '.join(having) or 'false'})"
        for name, group in (("is_final", FINAL), ("is_undecided", UNDECIDED)):
            inside = [f"{place} == {state_name(role, state)}" for state in states_of(whole) if state in group]
            yield ""
            yield f"#define {role}_{name}(link) ({' || '.join(inside) or 'false'})"
        yield ""
        yield f"inline {role}_row(link, event) {{"
        yield "    if"
        for (state, event), (after, actions) in table.items():
            steps = "".join(f"; {role}_todo[link]!{action_name(action)}" for action in actions)
            yield f"    :: {place} == {state_name(role, state)} && event == {event.name} ->"
            yield f"        {place} = {state_name(role, after)}{steps}"
        yield "    :: else -> assert(false) /* nothing comes out of turn */"
        yield "    fi"
        yield "}"


def row(text: str) -> tuple[str, State, Event]:
    role, state, event = text.split(".")
    known: dict[str, Event] = {each.name: each for kind in (Local, Type) for each in kind}
    return role, State[state], known[event]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--without", action="append", default=[], type=row, metavar="ROLE.STATE.EVENT")
    parser.add_argument("--folder", type=pathlib.Path, default=HERE)
    options = parser.parse_args()
    for name, roles in FILES.items():
        path = options.folder / name
        text = "\n".join(lines(roles, frozenset(options.without))) + "\n"
        if not options.check:
            path.write_text(text)
        elif path.read_text() != text:
            sys.exit(f"{name} is not what the tables say; run {pathlib.Path(__file__).name}")


if __name__ == "__main__":
    main()
