"""How one takeover is played with one process in trouble, and what must be true after it, whatever the trouble was."""

from __future__ import annotations

import functools
import json
import pathlib
import signal
import subprocess
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from clients import Pounder, eventually
from processes import Program, descriptors_at_rest
from streams import Streams

from .own import Takeover
from .stage import Stage

TRACER = str(pathlib.Path(__file__).with_name("tracer.py"))
STREAMS = {"bursty": 3, "slow": 1, "idle": 8}
THE_LIMITS = 3.0
"""Seconds after which a stopped process goes on, if the other one has shown nothing before: longer than every limit."""

ON_A_CONNECTION = frozenset(
    {"accept4", "recvfrom", "sendto", "read", "write", "sendmsg", "recvmsg", "epoll_ctl", "setsockopt", "getsockopt"}
    | {"fcntl", "shutdown", "getpeername", "getsockname"}
)
"""Calls of which a connection is the object: if it fails there, that one connection may end."""


class Point(NamedTuple):
    """The `nth` time that the thread at this place of the process makes the call, since counting began."""

    role: str
    thread: int
    call: str
    nth: int

    def __str__(self) -> str:
        return f"{self.role}/{self.thread}/{self.call}/{self.nth}"

    @classmethod
    def parse(cls, text: str) -> Point:
        role, thread, call, nth = text.split("/")
        return cls(role, int(thread), call, int(nth))


class Outcome(NamedTuple):
    """What came of one play. `calls`: those counted until the point, or all."""

    reached: bool
    seconds: float
    """From the trouble until that process accepted that owned the service in the end, and clients were served.

    Where it was itself stopped, from the moment when it went on; 0 if no process was left.
    """
    calls: list[tuple[str, int, str]]
    held: dict[str, int]


class Convergence:
    """Sees who accepts, and when the last one that did had served some new clients of the load."""

    def __init__(self, stage: Stage, load: Pounder) -> None:
        self._stage = stage
        self._load = load
        self.begin()

    def begin(self) -> None:
        """From now on it is measured."""
        self._began = time.monotonic()
        self._accepting: int | None = None
        self._served_before = self._load.good
        self.seconds: float | None = None

    def until(self, question: Callable[[], Any], what: str) -> None:
        """Looks until the answer is true."""

        def look_and_ask() -> Any:
            self._look()
            return question()

        eventually(look_and_ask, what, pause=0.02)

    def _look(self) -> None:
        accepting = self._stage.accepting()
        if accepting != self._accepting:
            self._accepting, self._served_before, self.seconds = accepting, self._load.good, None
        elif accepting is not None and self.seconds is None and self._load.good > self._served_before + 2:
            self.seconds = time.monotonic() - self._began


class Scene:
    """One takeover, from the first server's start to the last one's end."""

    def __init__(self, stage: Stage, point: Point | None, action: str) -> None:
        self.stage = stage
        self.point = point
        self.action = action
        self.reached = False
        self.programs: dict[str, Program] = {}

    def play(self, held: dict[str, int] | None = None) -> Outcome:
        """held: what the last owner is to hold in the end. Raises AssertionError for whatever is not as it must be."""
        stage = self.stage
        first = self.programs["incumbent"] = stage.start()
        stage.wait_for_owner(first)
        load = stage.pound(pause=0.02)
        streams = stage.streams(**STREAMS, largest=20_000, pause=0.02) if stage.kind == "live" else None
        load.goes_on()
        calls = self._take_over()
        # The load's one client may be with the process that was stopped, and waits until that goes on.
        newcomers = stage.pound(pause=0.02) if self.reached and self.action == "stop" else load
        convergence = Convergence(stage, newcomers)
        owner = self._settle(convergence)
        if owner is not None:
            convergence.until(lambda: convergence.seconds is not None, f"clients are served; lost: {load.lost[-3:]}")
        if newcomers is not load:
            newcomers.stop()
            assert not newcomers.lost, newcomers.lost
        ends = self._check_clients(owner, load, streams)
        now = self._take_over_again(owner, load, streams, ends, held)
        return Outcome(self.reached, convergence.seconds or 0.0, calls, now)

    def said(self) -> str:
        return "\n".join(f"--- {role} {program.pid}\n{program.text}" for role, program in self.programs.items())

    def _take_over(self) -> list[tuple[str, int, str]]:
        """Starts the successor under the tracer; returns the calls, when the point is reached or there is no more."""
        stage = self.stage
        wishes = {"mark": stage.mark, "point": self.point, "action": self.action}
        tracer = stage.python(TRACER, wishes, stdin=subprocess.PIPE)
        tracer.wait_for("ready")
        self.programs["successor"] = stage.start(gated=True)
        self.programs["successor"].wait_for("gated")
        tracer.tell(f"{self.programs['incumbent'].pid} {self.programs['successor'].pid}")
        tracer.wait_for("seized")
        self.programs["successor"].tell()
        assert tracer.wait() == 0, tracer.text
        result = json.loads(tracer.lines[-1])
        self.reached = result["hit"]
        return [tuple(call) for call in result["calls"]]

    def _settle(self, convergence: Convergence) -> Program | None:
        """Waits until one process owns the service and the other is over; None if it was killed with the service."""
        incumbent, successor = self.programs["incumbent"], self.programs["successor"]
        if self.reached and self.action == "kill":
            return self._settle_after_death(convergence)
        if self.reached and self.action == "stop":
            victim, survivor = self._victim(), self._survivor()
            deadline = time.monotonic() + THE_LIMITS
            convergence.until(
                lambda: (
                    self.stage.knows_the_end_of(survivor, survivor is successor, self.stage.owner())
                    or time.monotonic() > deadline
                ),
                "the limits pass",
            )
            victim.signal(signal.SIGCONT)
            if self.stage.accepting() != survivor.pid:
                convergence.begin()
        convergence.until(lambda: incumbent.running + successor.running == 1, "one process is left")
        owner, other = (incumbent, successor) if incumbent.running else (successor, incumbent)
        self.stage.wait_for_owner(owner)
        assert (other.wait() == 0) is (other is incumbent), f"the {'incumbent' if other is incumbent else 'successor'}"
        return owner

    def _settle_after_death(self, convergence: Convergence) -> Program | None:
        survivor, incumbent = self._survivor(), self.programs["incumbent"]
        assert self._victim().wait() == -signal.SIGKILL
        convergence.until(
            lambda: self.stage.owner() == survivor.pid or not survivor.running, "the survivor owns the service"
        )
        if survivor.running:
            return survivor
        assert survivor is incumbent and survivor.wait() == 0, "the survivor has ended"
        return None

    def _victim(self) -> Program:
        assert self.point is not None
        return self.programs[self.point.role]

    def _survivor(self) -> Program:
        assert self.point is not None
        return self.programs["successor" if self.point.role == "incumbent" else "incumbent"]

    def _check_clients(self, owner: Program | None, load: Pounder, streams: Streams | None) -> int:
        """A connection ends with the process that has it, and no other; nobody is refused while a process is left.

        Returns how many streams may have ended in the end: one that reads slowly finds out late.
        """
        died = self.reached and self.action == "kill"
        own = self.reached and self.point is not None and self.point.call in ON_A_CONNECTION
        may_end = died or (own and self.action != "stop")
        if owner is not None and not (died and self.stage.started_cold(self.programs["successor"])):
            assert not load.refused and len(load.lost) <= may_end, load.lost
        if streams is None:
            return 0
        assert not streams.lost and not streams.reordered, streams.failures
        if died:
            return self._check_who_ended(owner, streams)
        # An error may cost the two their link, though both live: what has not moved then drains, to the deadline.
        drained = sum(map(self.stage.closed, self.programs.values())) if self.action != "stop" else 0
        assert len(streams.failures) <= may_end + drained, streams.failures
        return may_end + drained

    def _check_who_ended(self, owner: Program | None, streams: Streams) -> int:
        """The killed process had those streams that the survivor does not say it has kept, and no other has ended."""
        count = len(streams.streams)
        gone = count
        if owner is self.programs["incumbent"]:
            gone = self.stage.moved(owner) or 0
        elif owner is not None:
            eventually(lambda: self.stage.moved(owner) is not None or not streams.alive, "it tells what it took")
            gone = count - (self.stage.moved(owner) or 0)
        eventually(lambda: len(streams.failures) >= gone, f"{gone} connections have ended")
        assert len(streams.failures) == gone, (gone, streams.failures)
        return gone

    def _take_over_again(
        self, owner: Program | None, load: Pounder, streams: Streams | None, ends: int, held: dict[str, int] | None
    ) -> dict[str, int]:
        """The next one takes over, or starts where nothing is left; returns what it holds, which is to be `held`."""
        before = len(load.lost)
        last = self.programs["last"] = self.stage.start()
        self.stage.wait_for_owner(last)
        if owner is not None:
            assert owner.wait() == 0, "the owner did not end well"
        load.goes_on()
        if owner is not None:
            assert len(load.lost) == before, load.lost[before:]
        if streams is not None:
            streams.goes_on()
            streams.stop()
            assert not streams.reordered and len(streams.failures) <= ends, streams.failures
        load.stop()
        if held is not None:
            eventually(lambda: descriptors_at_rest(last.pid) == held, f"it holds {held}")
        now = eventually(lambda: descriptors_at_rest(last.pid), "its descriptors are at rest")
        last.signal(signal.SIGTERM)
        assert last.wait() == 0
        assert self.stage.left_behind() == []
        return dict(now)


STAGES: dict[str, Callable[[str], Stage]] = {
    backend: functools.partial(Takeover, backend) for backend in ("cython", "python")
}
"""Makes the stage of a kind, by what plays there: a backend, or another server (`--command`)."""


def play(backend: str, kind: str, point: Point | None, action: str, held: dict[str, int] | None = None) -> Outcome:
    """Plays one scene in a room of its own; what its processes said is in what it raises."""
    with STAGES[backend](kind) as stage:
        scene = Scene(stage, point, action)
        try:
            return scene.play(held)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{scene.said()}") from None
