"""Draws the parts of protocol.md that are tables in the code: `python docs/draw_protocol.py [--check]`.

Each part stands between two comments, `<!-- drawn: NAME -->` and `<!-- end -->`. With --check nothing is written, and
the exit status is 1 where the page is not what would be drawn.
"""

from __future__ import annotations

import functools
import pathlib
import re
import sys
from collections.abc import Callable

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "protocol.md"
sys.path.insert(0, str(ROOT / "src"))

from takeover.exchange import HEARTBEATS  # noqa: E402
from takeover.protocol import (  # noqa: E402
    FINAL,
    GIVER,
    INCUMBENT,
    SUCCESSOR,
    TAKER,
    Action,
    Do,
    Event,
    Limits,
    Local,
    State,
    Table,
    budget,
    silence_limit,
)
from takeover.wire import MAX_DESCRIPTORS, SCHEMA, Type  # noqa: E402

CLIENT = frozenset({Type.STATUS, Type.STOP})
"""What a third process may ask the incumbent."""

ROLES: dict[str, Table] = {"incumbent": INCUMBENT, "successor": SUCCESSOR, "giver": GIVER, "taker": TAKER}
PEERS = {"incumbent": "successor", "successor": "incumbent", "giver": "taker", "taker": "giver"}


def sender(kind: Type) -> str:
    """Who says it: whoever's peer has a row for it."""
    if kind in CLIENT:
        return "client"
    senders = [PEERS[role] for role, table in ROLES.items() if any(event is kind for _, event in table)]
    return senders[0] if len(senders) == 1 else "both"


def size(limit: int) -> str:
    for unit, name in ((1 << 20, "MiB"), (1 << 10, "KiB")):
        if limit % unit == 0:
            return f"{limit // unit} {name}"
    return f"{limit} bytes"


def frames() -> str:
    lines = ["| type | message | from | body, at most | descriptors | fields |", "|---|---|---|---|---|---|"]
    for kind, schema in sorted(SCHEMA.items()):
        descriptors = f"up to {MAX_DESCRIPTORS}" if schema.descriptors else "none"
        fields = "bytes" if schema.fields is None else ", ".join(f"`{name}`" for name in schema.fields)
        lines.append(f"| {kind} | {kind.name} | {sender(kind)} | {size(schema.limit)} | {descriptors} | {fields} |")
    return "\n".join(lines)


def time_limits() -> str:
    limits = Limits()
    lines = ["| state | of | sends heartbeats | silence of the peer, s | whole state, s |", "|---|---|---|---|---|"]
    for role, table in ROLES.items():
        for state in states(table):
            silence = silence_limit(state, limits) if (state, Local.SILENT) in table else None
            whole = budget(state, limits) if (state, Local.OVERTIME) in table else None
            beats = "yes" if state in HEARTBEATS else ""
            if beats or silence is not None or whole is not None:
                lines.append(f"| {state.name} | {role} | {beats} | {_seconds(silence)} | {_seconds(whole)} |")
    return "\n".join(lines)


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:g}"


def events() -> str:
    lines = ["| event | what it means |", "|---|---|"]
    return "\n".join(lines + [f"| {event.name} | {event.value} |" for event in Local])


def actions() -> str:
    lines = ["| action | what it means |", "|---|---|"]
    return "\n".join(lines + [f"| {action.name} | {action.value} |" for action in Do])


def states(table: Table) -> list[State]:
    """In the order in which a takeover comes to them."""
    found = dict.fromkeys(state for state, _ in table)
    found.update(dict.fromkeys(after for after, _ in table.values()))
    return list(found)


def _grouped(table: Table) -> dict[tuple[State, State, tuple[Action, ...]], list[Event]]:
    grouped: dict[tuple[State, State, tuple[Action, ...]], list[Event]] = {}
    for (state, event), (after, what) in table.items():
        grouped.setdefault((state, after, what), []).append(event)
    return grouped


def rows(table: Table) -> str:
    lines = ["| state | event | next state | actions, in order |", "|---|---|---|---|"]
    for (state, after, what), found in _grouped(table).items():
        following = "(same)" if after is state else after.name
        lines.append(f"| {state.name} | {_names(found)} | {following} | {_names(what)} |")
    return "\n".join(lines)


def _names(found: list[Event] | tuple[Action, ...]) -> str:
    return ", ".join(each.name if not isinstance(each, Type) else f"**{each.name}**" for each in found)


def diagram(table: Table) -> str:
    lines = ["```mermaid", "stateDiagram-v2", f"    [*] --> {states(table)[0].name}"]
    for (state, after, what), found in _grouped(table).items():
        if after is not state or what:
            label = ", ".join(event.name for event in found)
            done = " / " + ", ".join(action.name for action in what) if what else ""
            lines.append(f"    {state.name} --> {after.name}: {label}{done}")
    lines += [f"    {state.name} --> [*]" for state in states(table) if state in FINAL]
    return "\n".join([*lines, "```"])


PARTS: dict[str, Callable[[], str]] = {
    "frames": frames,
    "time limits": time_limits,
    "events": events,
    "actions": actions,
    **{f"{role}'s diagram": functools.partial(diagram, table) for role, table in ROLES.items()},
    **{f"{role}'s rows": functools.partial(rows, table) for role, table in ROLES.items()},
}
_PART = re.compile(r"<!-- drawn: ([^\n]+) -->\n.*?<!-- end -->", re.DOTALL)


def draw(page: str) -> str:
    """The page with every part as the code has it now. Raises ValueError where a part is missing or unknown."""
    found = [match[1] for match in _PART.finditer(page)]
    if sorted(found) != sorted(PARTS):
        raise ValueError(f"{PAGE.name} has the parts {sorted(found)}, not {sorted(PARTS)}")
    return _PART.sub(lambda match: f"<!-- drawn: {match[1]} -->\n{PARTS[match[1]]()}\n<!-- end -->", page)


def main(arguments: list[str]) -> str | None:
    """Returns what is wrong, if anything."""
    if arguments not in ([], ["--check"]):
        return __doc__
    page = PAGE.read_text(encoding="utf-8")
    drawn = draw(page)
    if not arguments:
        PAGE.write_text(drawn, encoding="utf-8")
    elif drawn != page:
        return f"{PAGE.name} is not what the tables say; run: python docs/draw_protocol.py"
    return None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
