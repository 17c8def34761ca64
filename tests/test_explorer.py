"""Every interleaving of both roles, with a fault at every step; each check is shown to notice a wrong table."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest

from explorer import RESTING, Check, Link, Process, Rules, Side, Violation, Walk, World, is_locked, walk
from takeover.protocol import INCUMBENT, SUCCESSOR, Action, Do, Event, Local, State, Table
from takeover.wire import Type


def _sides(world: World, number: int) -> list[Side]:
    return [side for link in world.links for side in (link.incumbent, link.successor) if side.process == number]


def _accepting(world: World) -> list[int]:
    return [n for n, process in enumerate(world.processes) if process.accepting and process.mode == "running"]


def _is_willing(world: World, number: int, process: Process) -> bool:
    """Whether a process is to own the service if nobody else does: it was told nothing else, and has all it takes."""
    if process.mode != "running" or process.told:
        return False
    if number == 0:
        return process.estate
    last = _sides(world, number)[-1]
    if process.may_start_cold:
        return not is_locked(world)
    return not (last.state == "FAILED" and last.before in ("GREETING", "JOINING"))


def one_owner_in_the_end(world: World, end: bool, rules: Rules) -> bool:
    willing = [n for n, process in enumerate(world.processes) if _is_willing(world, n, process)]
    return not end or not willing or len(_accepting(world)) == 1


def at_most_one_owner_in_the_end(world: World, end: bool, rules: Rules) -> bool:
    return not end or len(_accepting(world)) <= 1


def never_two_settled_owners(world: World, end: bool, rules: Rules) -> bool:
    settled = 0
    for number, process in enumerate(world.processes):
        sides = _sides(world, number)
        offered = any(link.incumbent.process == number and link.incumbent.state in UNSETTLED for link in world.links)
        waits = number > 0 and not any(side.state == "OWNER" for side in sides)
        lives = process.mode in ("running", "stopped")
        settled += lives and process.estate and not offered and not waits and not process.told
    return settled <= 1


COMMITTED = frozenset({"STARTING", "PROBATION", "SETTLING", "OWNER", "UNDONE"})
UNSETTLED = frozenset({"OFFERING", "WARMING", "COMMITTED", "PROBATION", "TAKING_BACK", "DRAINING"})


def a_failure_before_the_commit_changes_nothing(world: World, end: bool, rules: Rules) -> bool:
    incumbent = world.processes[0]
    committed = any(map(_is_committed, world.links))
    untouched = incumbent.mode == "running" and not incumbent.told
    return not end or committed or not untouched or incumbent.accepting


def who_was_undone_does_not_accept(world: World, end: bool, rules: Rules) -> bool:
    return not any(
        link.successor.state in ("FAILED", "UNDONE")
        and not link.successor.actions
        and world.processes[link.successor.process].accepting
        and world.processes[link.successor.process].word in ("failed", "undone")
        for link in world.links
    )


def nobody_accepts_without_the_token(world: World, end: bool, rules: Rules) -> bool:
    return all(_is_committed(link) or link.successor.state not in COMMITTED for link in world.links)


def who_commits_finds_its_path(world: World, end: bool, rules: Rules) -> bool:
    return world.path_removed_by != 0 or not any(map(_is_committed, world.links))


def _is_committed(link: Link) -> bool:
    return link.readers.startswith("s")


def nobody_waits_for_what_cannot_come(world: World, end: bool, rules: Rules) -> bool:
    running = [n for n, process in enumerate(world.processes) if process.mode == "running"]
    return not end or all(side.state in RESTING for n in running for side in _sides(world, n))


SAFE: tuple[Check, ...] = (
    at_most_one_owner_in_the_end,
    never_two_settled_owners,
    who_was_undone_does_not_accept,
    nobody_accepts_without_the_token,
    who_commits_finds_its_path,
    nobody_waits_for_what_cannot_come,
)
ALL = (*SAFE, one_owner_in_the_end, a_failure_before_the_commit_changes_nothing)


def _named(checks: tuple[Check, ...]) -> dict[str, Check]:
    return {check.__name__: check for check in checks}


ONE_SUCCESSOR = {
    "one fault": (Rules(heartbeats=True), ALL),
    "one fault, two batches": (Rules(batches=2, heartbeats=True, decisions=False), ALL),
    "time limits that strike for no reason": (Rules(spurious=True, faults=0, heartbeats=True), ALL),
    "two faults, and time limits that strike for no reason": (Rules(spurious=True, faults=2), SAFE),
}
TWO_SUCCESSORS = {
    "a death beside a second successor": (Rules(successors=2, kinds=("kill",), decisions=False), ALL),
    "a stop beside a second successor": (Rules(successors=2, kinds=("stop",), decisions=False), ALL),
}
WALKS = ONE_SUCCESSOR | TWO_SUCCESSORS


@functools.cache
def _walked(name: str) -> Walk:
    rules, checks = WALKS[name]
    return walk(rules, _named(checks))


@pytest.mark.parametrize("name", WALKS)
def test_one_owner_comes_of_every_interleaving(name: str, record_property: Callable[[str, object], None]) -> None:
    walked = _walked(name)
    record_property("worlds", walked.worlds)
    assert walked.ends > 50, f"only {walked.ends} of {walked.worlds} worlds are an end: too few to be everything"


OUTSIDE = {
    ("incumbent", "GREETING", "STATUS"): "asked by `takeover status`",
    ("incumbent", "GREETING", "STOP"): "asked by `takeover stop`",
    ("incumbent", "STOPPING", "LOST"): "what comes after STOP",
    ("successor", "GREETING", "REFUSE"): "another implementation may refuse before it says HELLO",
    ("successor", "OWNER", "BLOB"): "sent to a successor that is settled already, and nothing hangs on it",
}
"""Rows that no walk can reach, and why they exist."""


def test_every_row_fires_somewhere() -> None:
    fired = {row for name in WALKS for row in _walked(name).rows}
    rows = {("incumbent", state.name, event.name) for state, event in INCUMBENT}
    rows |= {("successor", state.name, event.name) for state, event in SUCCESSOR}
    assert rows - fired == set(OUTSIDE)


def test_a_second_successor_is_refused_and_gets_its_turn_later() -> None:
    outcomes = _walked("a death beside a second successor").outcomes
    refused = (0, 2, "FAILED", "REFUSE")
    after_the_first = ((0, 1, "OWNER", "DONE"), refused, (1, 2, "OWNER", "DONE"))
    in_its_place = ((0, 1, "JOINING", "HELLO"), refused, (0, 2, "OWNER", "DONE"))
    assert outcomes >= {after_the_first, in_its_place}


def _with(table: Table, state: State, event: Event, after: State, *actions: Action) -> Table:
    return {**table, (state, event): (after, actions)}


def _without(table: Table, *rows: tuple[State, Event]) -> Table:
    return {row: then for row, then in table.items() if row not in rows}


KEEPS_QUIET = _with(INCUMBENT, State.TAKING_BACK, Local.GOT_COMMIT, State.CLOSED, Type.ABORT, Do.CLOSE)
LATE = _with(INCUMBENT, State.TAKING_BACK, Local.GOT_NOTHING, State.CLOSED, Do.START_ACCEPTING, Do.CLOSE)
NEVER_STOPS = _with(SUCCESSOR, State.PROBATION, Type.UNDO, State.UNDONE, Do.CLOSE)
BRAZEN = _with(SUCCESSOR, State.SETTLING, Local.GOT_NOTHING, State.OWNER)
UNPAID = _with(SUCCESSOR, State.CLAIMING, Local.GOT_NOTHING, State.STARTING, Do.START_ACCEPTING)
HASTY = _with(INCUMBENT, State.OFFERING, Local.LEAVING, State.CLOSED, Do.CLOSE)
PATIENT = _without(INCUMBENT, *((State.COMMITTED, event) for event in (Local.LOST, Local.SILENT, Local.OVERTIME)))
STRICT = _without(INCUMBENT, (State.DRAINING, Type.ALIVE))
RESTLESS = _with(SUCCESSOR, State.SETTLING, Local.GOT_NOTHING, State.PROBATION)

WRONG = {
    "an incumbent that takes back and does not accept leaves nobody": (
        one_owner_in_the_end,
        Rules(incumbent=KEEPS_QUIET),
    ),
    "an incumbent that takes back and does not accept": (
        a_failure_before_the_commit_changes_nothing,
        Rules(incumbent=KEEPS_QUIET),
    ),
    "a successor that accepts on after an UNDO": (who_was_undone_does_not_accept, Rules(successor=NEVER_STOPS)),
    "a successor that settles without the token": (never_two_settled_owners, Rules(successor=BRAZEN, spurious=True)),
    "an incumbent that takes back too late": (at_most_one_owner_in_the_end, Rules(incumbent=LATE, spurious=True)),
    "a successor that commits without the token": (nobody_accepts_without_the_token, Rules(successor=UNPAID)),
    "an incumbent that takes the path away from an orphan": (who_commits_finds_its_path, Rules(incumbent=HASTY)),
    "an incumbent that waits for a dead successor": (nobody_waits_for_what_cannot_come, Rules(incumbent=PATIENT)),
    "an incumbent that lets two have the service": (
        never_two_settled_owners,
        Rules(successors=2, denies=False, faults=0, decisions=False),
    ),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_each_check_notices_a_table_that_is_wrong(mistake: str) -> None:
    check, rules = WRONG[mistake]
    with pytest.raises(Violation) as caught:
        walk(rules, _named((check,)))
    assert caught.value.name == check.__name__


def test_each_check_is_shown_to_fail() -> None:
    assert {check for check, _ in WRONG.values()} == set(ALL)


def test_a_message_out_of_turn_is_noticed() -> None:
    with pytest.raises(Violation, match="ALIVE is out of turn in the state DRAINING"):
        walk(Rules(incumbent=STRICT), {})


def test_going_round_in_a_circle_is_noticed() -> None:
    with pytest.raises(Violation, match="everything comes to an end"):
        walk(Rules(successor=RESTLESS, faults=0, spurious=True, decisions=False), {})
