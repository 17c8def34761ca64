"""Each protocol is told once that its connection is over here: moved away or lost, on whichever way it leaves."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from aio_rooms import Aio, Client
from clients import Talker, eventually
from processes import FAST, Boundaries, Program, Room, stop


def farewells(program: Program) -> list[str]:
    return sorted(line.removeprefix("farewell ") for line in program.lines if line.startswith("farewell "))


def told(*farewells: str) -> list[str]:
    return sorted(farewells)


ALL_MOVED = told("1 moved", "2 moved", "3 moved")
ALL_LOST = told("1 lost", "2 lost", "3 lost")


class Stage:
    """A room with servers by name and three clients, whose handlers say farewell by how many lines they have had."""

    def __init__(self, room: Room) -> None:
        self.room = room
        room.tracebacks_allowed = True  # of states that cannot be read
        self.programs: dict[str, Program] = {}
        self.boundaries: list[Boundaries] = []
        self.talkers: list[Talker | Client] = []

    def start(self, name: str, **wishes: Any) -> Program:
        raise NotImplementedError

    def come(self) -> None:
        raise NotImplementedError

    def at(self, acts: dict[str, Callable[[], bool]]) -> str:
        """What is to be done at which boundary; the name is for a server's wish "boundaries"."""
        self.boundaries.append(Boundaries(acts))
        return self.boundaries[-1].name

    def stop(self, name: str) -> Callable[[], bool]:
        def act() -> bool:
            stop(eventually(lambda: self.programs.get(name), "the program is started"))
            return False

        return act

    def claimed(self) -> None:
        """The successor serves all; the incumbent is stopped, and has not been told."""
        eventually(lambda: self.room.status()["moved"]["in"] == 3, "the successor has claimed all")

    def wait_for_start(self, program: Program, wishes: dict[str, Any]) -> None:
        """A successor that is to stop in the middle may do so before it has logged anything."""
        if len(self.programs) == 1:
            program.wait_for("serving")
        elif "boundaries" not in wishes:
            program.wait_for("took over")

    def go(self) -> None:
        """All clients leave."""
        for talker in self.talkers:
            talker.sock.close()
            if isinstance(talker, Talker):
                talker.close()

    def gone(self, name: str, expected: list[str]) -> None:
        program = self.programs[name]
        eventually(lambda: len(farewells(program)) >= len(expected), f"pid {program.pid} is told")
        assert farewells(program) == expected

    def ended(self, name: str, expected: list[str]) -> None:
        assert self.programs[name].wait() == 0, self.programs[name].text
        assert farewells(self.programs[name]) == expected


class Native(Stage):
    """On the native loop."""

    def start(self, name: str, **wishes: Any) -> Program:
        options = wishes.pop("options", {})
        program = self.room.protocols({"farewells": True, "limits": FAST, **wishes}, **options)
        self.programs[name] = program
        self.wait_for_start(program, wishes)
        return program

    def come(self) -> None:
        for lines in (1, 2, 3):
            talker = self.room.talker()
            self.talkers.append(talker)
            for _ in range(lines):
                talker.say()


class Hosted(Stage):
    """On asyncio or uvloop, with protocols or coroutines."""

    def __init__(self, aio: Aio, kind: str) -> None:
        super().__init__(aio.room)
        self.aio = aio
        self.kind = kind

    def start(self, name: str, **wishes: Any) -> Program:
        program = self.aio.start(self.kind, settled=not self.programs, **wishes)
        self.programs[name] = program
        self.wait_for_start(program, wishes)
        return program

    def come(self) -> None:
        for lines in (1, 2, 3):
            client = Client(self.room)
            self.talkers.append(client)
            for _ in range(lines):
                client.ask()


@pytest.fixture(params=["native-cython", "native-python", "asyncio", "asyncio-stream", "uvloop", "uvloop-stream"])
def stage(request: pytest.FixtureRequest) -> Iterator[Stage]:
    loop, _, kind = request.param.partition("-")
    if loop == "uvloop":
        pytest.importorskip("uvloop", reason="uvloop cannot be imported here")
    if request.param == "native-cython":
        pytest.importorskip("takeover._loop", reason="the compiled modules are not built")
    with Room("python" if kind == "python" else "cython") as room:
        stage = Native(room) if loop == "native" else Hosted(Aio(room, loop), "lines-stream" if kind else "lines")
        yield stage
        for talker in stage.talkers:
            talker.sock.close()
        for boundaries in stage.boundaries:
            boundaries.close()


def test_who_has_moved_is_told_so_and_nothing_else(stage: Stage) -> None:
    stage.start("old")
    stage.come()
    stage.start("new")
    stage.ended("old", ALL_MOVED)
    assert farewells(stage.programs["new"]) == []
    stage.go()
    stage.gone("new", ALL_LOST)


def test_who_was_refused_is_told_nothing_until_the_client_leaves(stage: Stage) -> None:
    stage.start("old")
    stage.come()
    stage.start("new", **({"version": 7} if isinstance(stage, Native) else {"versions": [7]}))
    stage.programs["old"].wait_for("the rest drains (3 version)")
    assert farewells(stage.programs["old"]) == []
    stage.go()
    stage.ended("old", ALL_LOST)
    assert farewells(stage.programs["new"]) == []


def test_who_was_put_back_is_told_nothing_until_the_client_leaves(stage: Stage) -> None:
    stage.start("old")
    stage.come()
    stage.start("new", boundaries=stage.at({"taker before ADOPTED": stage.stop("new")}))
    stage.programs["old"].wait_for("moved 0 connections")
    assert farewells(stage.programs["old"]) == []
    stage.go()
    stage.ended("old", ALL_LOST)
    assert farewells(stage.programs["new"]) == []


def test_who_was_claimed_by_a_successor_that_could_not_wait_is_told_that_it_has_moved(stage: Stage) -> None:
    stage.start("old", boundaries=stage.at({"giver at ADOPTED": stage.stop("old")}))
    stage.come()
    stage.start("new")
    stage.claimed()
    stage.programs["old"].signal(signal.SIGCONT)
    stage.ended("old", ALL_MOVED)
    stage.go()
    stage.gone("new", ALL_LOST)


def test_at_the_deadline_who_has_stayed_is_told_that_it_is_lost(stage: Stage) -> None:
    """And the successor, which is stopped, wakes up and drops what it had adopted without a word."""
    stage.start("old", options={"drain_timeout": 0.3}, limits={"silence": 60})
    stage.come()
    stage.start("new", boundaries=stage.at({"taker before ADOPTED": stage.stop("new")}))
    stage.ended("old", ALL_LOST)
    stage.programs["new"].signal(signal.SIGCONT)
    stage.room.wait_for_owner(stage.programs["new"])
    eventually(lambda: stage.room.status()["connections"]["open"] == 0, "the successor holds none")
    assert farewells(stage.programs["new"]) == []


def test_at_the_deadline_who_is_the_successors_by_then_is_told_that_it_has_moved(stage: Stage) -> None:
    """The successor had adopted all, and has claimed them; the incumbent has not read the answer yet."""
    name = stage.at({"giver after CONNECTIONS": stage.stop("old")})
    stage.start("old", options={"drain_timeout": 0.1}, boundaries=name)
    stage.come()
    stage.start("new")
    stage.claimed()
    stage.programs["old"].signal(signal.SIGCONT)
    stage.ended("old", ALL_MOVED)
    stage.go()
    stage.gone("new", ALL_LOST)


def test_when_the_process_is_ended_everybody_is_told_that_it_is_lost(stage: Stage) -> None:
    server = stage.start("old")
    stage.come()
    server.signal(signal.SIGTERM)
    server.wait_for("draining 3 connections")
    server.signal(signal.SIGTERM)
    stage.ended("old", ALL_LOST)


@pytest.mark.parametrize("poison", ["close", "abort", "writes_and_closes"])
def test_who_ends_its_connection_on_the_way_is_told_that_it_is_lost(room: Room, poison: str) -> None:
    stage = Native(room)
    stage.start("old")
    stage.come()
    assert isinstance(stage.talkers[0], Talker)
    stage.talkers[0].say(f"poison {poison}")
    stage.start("new")
    stage.ended("old", told("2 lost", "2 moved", "3 moved"))
    assert farewells(stage.programs["new"]) == []


def test_who_ends_its_connection_on_the_way_when_the_successor_could_not_wait_is_told_that_it_has_moved(
    room: Room,
) -> None:
    """The successor has claimed all: what the handler did is too late."""
    stage = Native(room)
    name = stage.at({"giver before RELEASED": stage.stop("old")})
    try:
        stage.start("old", boundaries=name)
        stage.come()
        assert isinstance(stage.talkers[0], Talker)
        stage.talkers[0].say("poison close")
        stage.start("new")
        stage.claimed()
        stage.programs["old"].signal(signal.SIGCONT)
        stage.ended("old", told("2 moved", "2 moved", "3 moved"))
        stage.go()
        stage.gone("new", told("2 lost", "2 lost", "3 lost"))
    finally:
        stage.boundaries[0].close()


def test_one_that_raises_when_it_is_told_keeps_nobody_from_being_told(room: Room) -> None:
    stage = Native(room)
    stage.start("old", farewells="raise")
    stage.come()
    stage.start("new")
    stage.ended("old", ALL_MOVED)
    assert "connection_moved" in stage.programs["old"].text
