"""Memory runs out in a move, on either side: what there is no memory for stays and is counted, all else moves."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import pytest

from aio_rooms import Aio, Client
from channel_cases import Scene, Tally
from clients import LIMIT, Talker, eventually
from processes import Program, Room
from takeover.taker import Taker

MIB = 1 << 20


def serving(room: Room, **wishes: Any) -> Program:
    program = room.protocols(wishes)
    program.wait_for("serving")
    return program


def some(room: Room, *orders: str) -> tuple[Talker, list[Talker]]:
    """One client that gives orders, between others."""
    talkers = [room.talker() for _ in range(5)]
    for talker in talkers:
        talker.say()
    for order in orders:
        talkers[2].say(order)
    return talkers.pop(2), talkers


def only_one_stays(room: Room, old: Program, new: Program, staying: Talker, others: list[Talker]) -> None:
    """It is counted under its word on both sides, said plainly, and served on where it is."""
    room.wait_for_owner(new)
    assert "the rest drains (1 memory)" in old.wait_for("moved 4 connections to pid")
    new.wait_for("moved 4 connections from pid")
    assert {talker.pid() for talker in others} == {new.pid}
    assert staying.pid() == old.pid
    moved = room.status()["moved"]
    assert (moved["in"], moved["drained"]) == (4, {"memory": 1})
    staying.close()
    assert old.wait() == 0, old.text


def test_an_incumbent_that_has_no_memory_for_a_state_keeps_that_one(room: Room) -> None:
    """RLIMIT_AS: the state is half as large again as what is left."""
    old = serving(room, memory=100)
    staying, others = some(room, f"poison huge {150 * MIB}")
    only_one_stays(room, old, room.protocols(), staying, others)


@pytest.mark.parametrize("poison", ["memory", "refuse memory"])
def test_a_handler_that_has_no_memory_to_write_or_read_its_state_stays(room: Room, poison: str) -> None:
    old = serving(room)
    staying, others = some(room, f"poison {poison}")
    only_one_stays(room, old, room.protocols(), staying, others)


def test_a_successor_with_little_memory_takes_what_it_has_memory_for(room: Room) -> None:
    """RLIMIT_AS: each state fits, and not all of them together; nobody is lost, and everybody is counted."""
    old = serving(room)
    talkers = [room.talker() for _ in range(8)]
    for talker in talkers:
        talker.say(f"poison huge {30 * MIB}")
    new = room.protocols({"memory": 130, "keep": True})
    room.wait_for_owner(new)

    def all_are_decided() -> Any:
        moved = room.status(LIMIT)["moved"]
        return moved["in"] + sum(moved["refused"].values()) == len(talkers) and moved

    moved = eventually(all_are_decided, "each has moved, or was refused")
    pids = [talker.pid() for talker in talkers]
    assert set(pids) <= {old.pid, new.pid}
    assert (moved["in"], sum(moved["refused"].values())) == (pids.count(new.pid), pids.count(old.pid))
    assert set(moved["refused"]) <= {"memory"}
    assert old.pid in pids


def test_on_other_loops_too_only_what_there_is_no_memory_for_stays(aio: Aio) -> None:
    first = aio.start("lines")
    with Client(aio.room) as staying, Client(aio.room) as other:
        staying.ask("break memory")
        other.ask()
        second = aio.start("lines")
        assert "the rest drains (1 memory)" in first.wait_for("moved 1 connections to pid")
        assert (other.served_by(), staying.served_by()) == (second.pid, first.pid)
        assert aio.moved()["drained"] == {"memory": 1}


def test_on_other_loops_too_what_the_successor_has_no_memory_for_goes_back(aio: Aio) -> None:
    first = aio.start("lines")
    with Client(aio.room) as one, Client(aio.room) as other:
        one.ask()
        other.ask()
        aio.start("lines", notes=["no memory"])
        first.wait_for("the rest drains (2 memory)")
        assert (one.served_by(), other.served_by()) == (first.pid, first.pid)
        assert aio.moved()["refused"] == {"memory": 2}


# Each allocation of the interpreter fails in its turn, in one step of the one side or the other.


@contextmanager
def failing(number: int) -> Iterator[None]:
    testcapi = pytest.importorskip("_testcapi", reason="this Python cannot fail allocations")
    testcapi.set_nomemory(number, number + 1)
    try:
        yield
    finally:
        testcapi.remove_mem_hooks()


def steps() -> dict[str, tuple[type, str]]:
    from takeover.giver import Giver

    return {
        "export": (Giver, "_export"),
        "send": (Giver, "_send_batch"),
        "relinquish": (Giver, "_relinquish"),
        "adopt": (Taker, "_adopt"),
        "start": (Taker, "_start"),
    }


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="this interpreter itself does not survive it")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("step", ["export", "send", "adopt"])
def test_whichever_allocation_fails_every_connection_is_served_by_one_side(
    loop_module: ModuleType, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    owner, name = steps()[step]
    work: Callable[..., Any] = getattr(owner, name)
    for number in range(1, 90, 2):
        left = [number]

        def fail_once(self: Any, *arguments: Any, left: list[int] = left) -> Any:
            if not left:
                return work(self, *arguments)
            with failing(left.pop()):
                return work(self, *arguments)

        monkeypatch.setattr(owner, name, fail_once)
        scene = Scene(loop_module, loop_module, Tally)
        try:
            scene.connect(3)
            giver, taker = scene.move()
            scene.until(lambda: giver.finished and taker.finished)  # noqa: B023
            assert sum(scene.counts()) == 3
            scene.answers()
        finally:
            scene.close()
