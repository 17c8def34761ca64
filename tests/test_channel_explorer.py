"""Every interleaving of giver and taker, with trouble at every step; each check is shown to notice a wrong table."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest

from channel_explorer import Check, Connection, End, Rules, World, walk
from explorer import Violation, Walk
from takeover.protocol import GIVER, TAKER, Action, Do, Event, Local, State, Table
from takeover.wire import Type


def nothing_is_served_twice(world: World, end: bool) -> bool:
    return not any(c.giver == c.taker == "s" for c in world.connections)


def who_goes_on_knows_all_that_was_read(world: World, end: bool) -> bool:
    """What one has served after it was exported, the other one must not go on with: it would know an older state."""
    return not any((c.started and c.giver == "s") or (c.resumed and c.taker == "s") for c in world.connections)


def nothing_starts_before_it_was_adopted(world: World, end: bool) -> bool:
    return all(c.adopted for c in world.connections if c.started)


def everything_is_served(world: World, end: bool) -> bool:
    return not end or all(_is_served(world, number) for number in range(len(world.connections)))


def _is_served(world: World, number: int) -> bool:
    c, giver, taker = world.connections[number], world.giver, world.taker
    if "s" in (c.giver, c.taker) or (giver.gone and taker.gone):
        return True
    if taker.gone:
        return c.adopted  # and so gone with the taker, or not the giver's to go on with
    if giver.gone:
        return giver.leaving or world.token == "giver" or not c.sent or c.refused or c.stays or _rests(taker)
    return (_rests(taker) and world.token == "taker") or (_rests(taker) and c.giver == "-") or _rests(giver)


def _rests(end: End) -> bool:
    return end.mode == "stopped"


def what_was_adopted_and_given_up_is_the_takers(world: World, end: bool) -> bool:
    return not end or all(
        c.taker == "s" or c.giver == "s" or _rests(world.taker) for c in world.connections if _is_given(world, c)
    )


def _is_given(world: World, c: Connection) -> bool:
    return c.adopted and c.giver == "-" and not (world.giver.gone or world.taker.gone or c.stays)


def what_was_refused_or_stays_is_the_givers(world: World, end: bool) -> bool:
    runs = world.giver.mode == "running" and not _rests(world.taker)
    claimed = world.token == "taker"
    return not (end and runs) or all(
        c.giver == "s" for c in world.connections if c.refused or (c.stays and not claimed and not world.taker.gone)
    )


def nobody_waits_for_what_cannot_come(world: World, end: bool) -> bool:
    if not end:
        return True
    giver, taker = world.giver, world.taker
    giver_waits = giver.mode == "running" and giver.state != "CLOSED"
    taker_waits = taker.mode == "running" and taker.state != "CLOSED"
    may_wait = giver.state == "OUTRUN" and _rests(taker)
    may_be_waiting = _rests(giver) and not (taker.state == "TAKING" and taker.batches)
    return (may_wait or not giver_waits) and (may_be_waiting or not taker_waits)


SAFE: tuple[Check, ...] = (
    nothing_is_served_twice,
    who_goes_on_knows_all_that_was_read,
    nothing_starts_before_it_was_adopted,
    nobody_waits_for_what_cannot_come,
)
ALL = (
    *SAFE,
    everything_is_served,
    what_was_adopted_and_given_up_is_the_takers,
    what_was_refused_or_stays_is_the_givers,
)


def _named(checks: tuple[Check, ...]) -> dict[str, Check]:
    return {check.__name__: check for check in checks}


THREE = ((0,), (1,), (2,))
WALKS = {
    "one fault": (Rules(), ALL),
    "one fault, and refusals": (Rules(refusable=(0, 2)), ALL),
    "one fault, and handlers that end": (Rules(endable=(0, 2)), ALL),
    "one fault, refusals, and handlers that end": (Rules(refusable=(1,), endable=(2,)), ALL),
    "one fault, three batches": (Rules(batches=THREE, refusable=(2,), endable=(0,)), ALL),
    "one fault, three batches at a time": (Rules(batches=THREE, window=3, refusable=(1,), endable=(0,)), ALL),
    "time limits that strike for no reason": (Rules(faults=0, spurious=True, refusable=(0, 2), endable=(1,)), ALL),
    "a stop, and time limits that strike for no reason": (
        Rules(kinds=("stop",), spurious=True, refusable=(2,), endable=(0,)),
        ALL,
    ),
    "two faults, and time limits that strike for no reason": (
        Rules(faults=2, spurious=True, refusable=(2,), endable=(0,)),
        SAFE,
    ),
}


@functools.cache
def _walked(name: str) -> Walk:
    rules, checks = WALKS[name]
    return walk(rules, _named(checks))


@pytest.mark.parametrize("name", WALKS)
def test_every_connection_is_served_once_in_every_interleaving(
    name: str, record_property: Callable[[str, object], None]
) -> None:
    walked = _walked(name)
    record_property("worlds", walked.worlds)
    assert walked.ends > 20, f"only {walked.ends} of {walked.worlds} worlds are an end: too few to be everything"


def test_every_row_fires_somewhere() -> None:
    fired = {row for name in WALKS for row in _walked(name).rows}
    rows = {("giver", state.name, event.name) for state, event in GIVER}
    rows |= {("taker", state.name, event.name) for state, event in TAKER}
    assert rows == fired


def _with(table: Table, state: State, event: Event, after: State, *actions: Action) -> Table:
    return {**table, (state, event): (after, actions)}


def _without(table: Table, *rows: tuple[State, Event]) -> Table:
    return {row: then for row, then in table.items() if row not in rows}


FORGIVING = _with(GIVER, State.RECLAIMING, Local.GOT_NOTHING, State.CLOSED, Do.RELINQUISH_ALL, Do.CLOSE)
SILENT = _with(TAKER, State.CLAIMED, Type.CONNECTIONS, State.CLAIMED, Do.ADOPT, Do.START_ALL)
HASTY = _with(GIVER, State.GIVING, Type.ADOPTED, State.GIVING, Do.RELINQUISH, Do.SERVE_ON, Type.RELEASED)
GREEDY = _with(GIVER, State.RECLAIMING, Local.GOT_NOTHING, State.CLOSED, Do.CLOSE, Do.PUT_BACK)
TRUSTING = _with(GIVER, State.OUTRUN, Local.FAIL, State.CLOSED, Do.PUT_BACK, Do.CLOSE)
STAYING = _with(GIVER, State.OUTRUN, Local.LEAVING, State.CLOSED, Do.PUT_BACK, Do.CLOSE)
EAGER = _with(TAKER, State.TAKING, Type.CONNECTIONS, State.TAKING, Do.ADOPT, Do.START_ALL, Type.ADOPTED)
SERVING = _with(TAKER, State.OUTRUN, Local.LOST, State.CLOSED, Do.START_ALL, Do.CLOSE)
WASTEFUL = _with(TAKER, State.RESOLVING, Local.GOT_CHANNEL, State.CLAIMED, Do.DROP_ALL)
DULL = _with(TAKER, State.OUTRUN, Type.RELEASED, State.OUTRUN)
CARELESS = _with(GIVER, State.OUTRUN, Type.DROPPED, State.OUTRUN)
PATIENT = _without(GIVER, (State.GIVING, Local.SILENT))
DEAF = _without(TAKER, (State.TAKING, Local.LOST))
STRICT = _without(GIVER, (State.OUTRUN, Type.DROPPED))
RESTLESS = _with(GIVER, State.RECLAIMING, Local.GOT_NOTHING, State.GIVING)

BOTH = Rules(refusable=(0, 2), endable=(1,))
WRONG = {
    "a giver that drops what is on its way to a taker that has claimed it": (
        everything_is_served,
        BOTH._replace(giver=FORGIVING, kinds=("garble",)),
    ),
    "a giver that does not wait for refusals": (
        what_was_refused_or_stays_is_the_givers,
        BOTH._replace(giver=FORGIVING, taker=SILENT, kinds=("stop",)),
    ),
    "a giver that serves on what stays before the taker has dropped it": (
        nothing_is_served_twice,
        BOTH._replace(giver=HASTY, kinds=("stop",)),
    ),
    "a giver that serves on without the token": (nothing_is_served_twice, BOTH._replace(giver=GREEDY, spurious=True)),
    "a giver that serves on what a dead taker may have read": (
        who_goes_on_knows_all_that_was_read,
        BOTH._replace(giver=GREEDY, faults=2),
    ),
    "a giver that takes a garbled answer for the last one": (
        nothing_is_served_twice,
        BOTH._replace(giver=TRUSTING, spurious=True),
    ),
    "a giver that leaves, and serves for a last moment": (
        nothing_is_served_twice,
        BOTH._replace(giver=STAYING, spurious=True),
    ),
    "a taker that starts at once": (nothing_starts_before_it_was_adopted, BOTH._replace(taker=EAGER, faults=0)),
    "a taker that serves without the token": (nothing_is_served_twice, BOTH._replace(taker=SERVING)),
    "a taker that claims and drops": (everything_is_served, BOTH._replace(taker=WASTEFUL, kinds=("kill",))),
    "a taker that forgets what was released before": (
        what_was_adopted_and_given_up_is_the_takers,
        BOTH._replace(taker=DULL, kinds=("stop",)),
    ),
    "a giver that does not listen to what was dropped": (
        everything_is_served,
        Rules(giver=CARELESS, endable=(0,), faults=0, spurious=True),
    ),
    "a giver that waits for a taker that is stopped": (
        nobody_waits_for_what_cannot_come,
        BOTH._replace(giver=PATIENT),
    ),
    "a taker that waits for a dead giver": (nobody_waits_for_what_cannot_come, BOTH._replace(taker=DEAF)),
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
    with pytest.raises(Violation, match="DROPPED is out of turn for the giver in the state OUTRUN"):
        walk(Rules(giver=STRICT, endable=(0,), spurious=True), {})


def test_going_round_in_a_circle_is_noticed() -> None:
    with pytest.raises(Violation, match="everything comes to an end"):
        walk(BOTH._replace(giver=RESTLESS, spurious=True), {})
