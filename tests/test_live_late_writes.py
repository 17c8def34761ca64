"""What a handler writes while its connection is on its way reaches the client, also if its process fails just then."""

from __future__ import annotations

import signal

import pytest

from clients import Talker, eventually
from processes import FAST, Boundaries, Program, Room, stopping

STEPS = pytest.mark.parametrize("step", ["giver at ADOPTED", "giver after RELINQUISH", "giver before RELEASED"])


def begin(room: Room, boundaries: Boundaries, poison: str, count: int = 3) -> tuple[Program, list[Talker]]:
    """A server, and clients whose handlers write as soon as they have been sent off."""
    old = room.protocols({"limits": FAST, "boundaries": boundaries.name})
    old.wait_for("serving")
    talkers = [room.talker() for _ in range(count)]
    for talker in talkers:
        talker.say(f"poison {poison}")
    return old, talkers


def heard_all(talker: Talker, old: Program, new: Program, size: int) -> None:
    """What was written on the way comes once and whole, before all that the next process writes."""
    talker.send("hello\n")
    answer = talker.hear()
    assert (answer["in flight"], len(answer["padding"])) == (old.pid, size)
    answer = talker.hear()
    assert (answer["line"], answer["pid"]) == ("hello", new.pid)


@STEPS
@pytest.mark.parametrize("size", [0, 300_000])
def test_what_is_written_on_the_way_survives_the_process_that_wrote_it(room: Room, step: str, size: int) -> None:
    programs: list[Program] = []

    def act() -> bool:
        programs[0].signal(signal.SIGKILL)
        programs[0].process.wait()
        return False

    boundaries = Boundaries({step: act})
    try:
        old, talkers = begin(room, boundaries, f"write {size}")
        programs.append(old)
        new = room.protocols({"limits": FAST})
        assert old.wait() == -signal.SIGKILL
        for talker in talkers:
            heard_all(talker, old, new, size)
    finally:
        boundaries.close()


@STEPS
def test_what_is_written_on_the_way_comes_once_where_the_process_that_wrote_it_was_stopped(
    room: Room, step: str
) -> None:
    programs: list[Program] = []

    boundaries = Boundaries({step: stopping(programs, 0)})
    try:
        old, talkers = begin(room, boundaries, "write 1000")
        programs.append(old)
        new = room.protocols({"limits": FAST})
        eventually(lambda: room.owner() == new.pid and room.status()["moved"]["in"] == 3, "it has claimed them")
        for talker in talkers:
            heard_all(talker, old, new, 1000)
        old.signal(signal.SIGCONT)
        assert old.wait() == 0
        for talker in talkers:
            assert talker.pid() == new.pid
    finally:
        boundaries.close()


def test_what_is_written_too_late_is_not_mixed_into_what_the_next_process_writes(room: Room) -> None:
    """The incumbent is stopped before its handlers write: when it goes on, the connections are the successor's."""
    programs: list[Program] = []

    boundaries = Boundaries({"giver after CONNECTIONS": stopping(programs, 0)})
    try:
        old, talkers = begin(room, boundaries, "write 1000")
        programs.append(old)
        new = room.protocols({"limits": FAST})
        eventually(lambda: room.owner() == new.pid and room.status()["moved"]["in"] == 3, "it has claimed them")
        old.signal(signal.SIGCONT)
        assert old.wait() == 0
        for talker in talkers:
            assert talker.pid() == new.pid
    finally:
        boundaries.close()


def test_what_was_written_and_taken_back_is_not_written_again(room: Room) -> None:
    """The successor is stopped, the incumbent takes back, writes on, and gives again along a second channel."""
    programs: list[Program] = []

    boundaries = Boundaries({"taker before ADOPTED": stopping(programs, 1)})
    try:
        old, talkers = begin(room, boundaries, "write 1000")
        new = room.protocols({"limits": FAST, "boundaries": boundaries.name})
        programs += [old, new]
        old.wait_for("moved 0 connections")
        for talker in talkers:
            assert len(talker.hear()["padding"]) == 1000
            assert talker.pid() == old.pid
        new.signal(signal.SIGCONT)
        assert old.wait() == 0
        for talker in talkers:
            answer = talker.hear()
            assert answer["in flight"] == old.pid  # that of the second time
            assert talker.pid() == new.pid
    finally:
        boundaries.close()
