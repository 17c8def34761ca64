"""At every boundary of a takeover, either process dies, stops or hangs: one owner remains, and the next takeover works.

The boundaries are recorded from a takeover that goes well, so the list cannot go stale. The compiled backend takes
all of them, the plain one through every third: what they differ in is not the protocol. What may happen while live
connections move is in test_live_faults.py.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import NamedTuple

import pytest

from clients import Pounder, eventually
from processes import FAST, STEP, Boundaries, Program, Room, descriptors_at_rest, sampled

CONVERGES = 5.0
"""Seconds; the guarantee is one, and a busy machine gets more."""

PARALLEL = 6
NO_LIMITS: Mapping[str, float] = {}
PROBATION = 0.2
HEARTBEATS = ("HEARTBEAT", "DRAINING", "COUNT")


class Recording(NamedTuple):
    """One takeover that went well: the boundaries in their order, and what its owner held when it was over."""

    boundaries: tuple[str, ...]
    held: dict[str, int]


class Scenario(NamedTuple):
    """At the boundary `step` (of whichever role), `victim` is killed or stopped, or hangs."""

    step: str
    victim: str
    action: str

    def __str__(self) -> str:
        return f"{self.action} the {self.victim} when {self.step!r}"


def start(
    room: Room,
    boundaries: Boundaries | None = None,
    probation: float = PROBATION,
    limits: Mapping[str, float] = NO_LIMITS,
) -> Program:
    """Short limits are for those alone that have to wait for one: on a busy machine they strike without reason."""
    settings: dict[str, object] = {"limits": limits}
    if boundaries is not None:
        settings["boundaries"] = boundaries.name
    return room.echo(settings, probation=probation, live=False)


@cache
def record(backend: str) -> Recording:
    boundaries = Boundaries()
    with Room(backend) as room:
        old = start(room, boundaries)
        old.wait_for("serving")
        new = start(room, boundaries)
        new.wait_for("took over")
        assert old.wait() == 0
        seen = tuple(dict.fromkeys(step for step in boundaries.seen if not step.endswith(HEARTBEATS)))
        last = start(room)
        last.wait_for("took over")
        assert new.wait() == 0
        room.wait_for_owner(last)
        held = eventually(lambda: descriptors_at_rest(last.pid), "the owner has closed the link to its predecessor")
    boundaries.close()
    return Recording(seen, held)


def scenarios(backend: str, action: str) -> Iterator[Scenario]:
    """Both victims at each boundary; a process can hang at its own only."""
    for step in sampled(record(backend).boundaries, STEP if backend == "cython" else 3 * STEP):
        role = step.split()[0]
        for victim in ("incumbent", "successor"):
            if action != "hang" or victim == role:
                yield Scenario(step, victim, action)


def has_settled(step: str, boundaries: tuple[str, ...]) -> bool:
    """Whether the incumbent has let go for good by then, so that the successor's death is the death of the service."""
    return boundaries.index(step) >= boundaries.index("incumbent before RELEASE")


def holds_everything(step: str, boundaries: tuple[str, ...]) -> bool:
    """Whether the successor has got every descriptor by then, so that it can do without the incumbent."""
    return boundaries.index(step) > boundaries.index("successor at LISTENERS")


def play(backend: str, scenario: Scenario) -> None:
    recording = record(backend)
    with Room(backend) as room:
        programs: dict[str, Program] = {}

        def act() -> bool:
            if scenario.action == "hang":
                return True
            programs[scenario.victim].signal(signal.SIGKILL if scenario.action == "kill" else signal.SIGSTOP)
            return False

        boundaries = Boundaries({scenario.step: act})
        limits = NO_LIMITS if scenario.action == "kill" else FAST
        try:
            programs["incumbent"] = start(room, boundaries, limits=limits)
            programs["incumbent"].wait_for("serving")
            load = room.pound()
            programs["successor"] = start(room, boundaries, limits=limits)
            eventually(boundaries.reached.is_set, f"the boundary; the processes said:\n{said(programs)}")
            owner = settle(room, scenario, programs, boundaries)
            if owner is not None:
                load.goes_on(CONVERGES)
                check_load(scenario, recording, load)
            last = start(room)
            last.wait_for("serving" if owner is None else "took over")
            assert owner is None or owner.wait() == 0, said(programs)
            room.wait_for_owner(last)
            load.goes_on()
            if owner is not None:
                check_load(scenario, recording, load)
            load.stop()
            eventually(lambda: descriptors_at_rest(last.pid) == recording.held, f"it holds {recording.held}")
            last.signal(signal.SIGTERM)
            assert last.wait() == 0
            assert room.left_behind() == []
        finally:
            boundaries.let_go()
            boundaries.close()


def said(programs: dict[str, Program]) -> str:
    return "\n".join(f"--- {role}\n{program.text}" for role, program in programs.items())


def settle(room: Room, scenario: Scenario, programs: dict[str, Program], boundaries: Boundaries) -> Program | None:
    """Waits until there is one owner and the other process is over; returns the owner, None if that was killed."""
    victim = programs[scenario.victim]
    survivor = programs["successor" if scenario.victim == "incumbent" else "incumbent"]
    if scenario.action == "kill":
        victim.wait()
        if survivor is programs["incumbent"] and has_settled(scenario.step, record(room.backend).boundaries):
            assert survivor.wait() == 0, said(programs)
            return None
        room.wait_for_owner(survivor, CONVERGES)
        return survivor
    eventually(lambda: notices(room, programs, survivor), "the survivor knows", CONVERGES)
    if scenario.action == "stop":
        victim.signal(signal.SIGCONT)
    boundaries.let_go()
    eventually(
        lambda: sum(each.running for each in programs.values()) == 1, f"one is left:\n{said(programs)}", CONVERGES
    )
    owner, other = sorted(programs.values(), key=lambda each: not each.running)
    room.wait_for_owner(owner, CONVERGES)
    assert (other.wait() == 0) is (other is programs["incumbent"]), said(programs)
    return owner


def notices(room: Room, programs: dict[str, Program], survivor: Program) -> bool:
    """Whether the survivor has found out: a successor owns the service or is over, an incumbent has called it off."""
    if not survivor.running:
        return True
    if survivor is programs["successor"]:
        return room.owner() == survivor.pid
    asked = "asks for the service" in survivor.text
    return room.owner() == survivor.pid and ("is off" in survivor.text or not asked)


def check_load(scenario: Scenario, recording: Recording, load: Pounder) -> None:
    """A connection that a killed process had accepted dies with it; nothing else may be lost."""
    if scenario.action != "kill":
        assert not load.lost, load.lost
    elif scenario.victim == "successor" or holds_everything(scenario.step, recording.boundaries):
        assert not load.refused, load.lost
        assert len(load.lost) <= 1, load.lost


def play_taking_back(backend: str, step: str | None) -> list[str]:
    """The successor is stopped in the probation, the incumbent takes back and is killed at `step` of that.

    One owner remains or none, and a new start serves. Without a step nobody is killed; returns the boundaries.
    """
    programs: dict[str, Program] = {}

    def signalling(role: str, signum: int) -> Callable[[], bool]:
        def act() -> bool:
            programs[role].signal(signum)
            return False

        return act

    acts = {"successor after ALIVE": signalling("successor", signal.SIGSTOP)}
    if step is not None:
        acts[step] = signalling("incumbent", signal.SIGKILL)
    boundaries = Boundaries(acts)
    try:
        with Room(backend) as room:
            programs["incumbent"] = start(room, boundaries, probation=60, limits=FAST)
            programs["incumbent"].wait_for("serving")
            programs["successor"] = start(room, boundaries, limits=FAST)
            eventually(boundaries.reached.is_set, f"the boundary; the processes said:\n{said(programs)}")
            if step is None:
                room.wait_for_owner(programs["incumbent"], CONVERGES)
                seen = boundaries.seen[boundaries.seen.index("incumbent before TAKE_BACK") :]
                return seen[: seen.index("incumbent after CLOSE") + 1]
            programs["incumbent"].wait()
            programs["successor"].signal(signal.SIGCONT)
            new = programs["successor"]
            eventually(lambda: room.owner() == new.pid or not new.running, said(programs), CONVERGES)
            last = start(room)
            last.wait_for("took over" if new.running else "generation 1")
            room.wait_for_owner(last)
            room.round_trip()
            assert not new.running or new.wait() == 0, said(programs)
            last.signal(signal.SIGTERM)
            assert last.wait() == 0
            assert room.left_behind() == []
            return []
    finally:
        boundaries.close()


def test_an_incumbent_that_is_killed_while_it_takes_back_does_not_hinder_what_comes_next(backend: str) -> None:
    steps = list(dict.fromkeys(step for step in play_taking_back(backend, None) if step.startswith("incumbent")))
    assert {"incumbent before TAKE_BACK", "incumbent after START_ACCEPTING"} <= set(steps)
    with ThreadPoolExecutor(PARALLEL) as pool:
        list(pool.map(lambda step: play_taking_back(backend, step), steps))


@pytest.mark.timeout(300)
@pytest.mark.parametrize("action", ["kill", "stop", "hang"])
def test_one_owner_remains_whoever_fails_at_whichever_boundary(backend: str, action: str) -> None:
    failures = {}

    def attempt(scenario: Scenario) -> None:
        try:
            play(backend, scenario)
        except AssertionError as error:
            failures[str(scenario)] = str(error)

    todo = list(scenarios(backend, action))
    assert len(todo) >= (30 if backend == "cython" else 10) // STEP
    with ThreadPoolExecutor(PARALLEL) as pool:
        list(pool.map(attempt, todo))
    assert not failures, "\n\n".join(f"{scenario}: {text}" for scenario, text in failures.items())
