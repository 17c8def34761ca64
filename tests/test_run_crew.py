"""A crew in this process, whose checks say what a test has them say, and whose processes do nothing but live."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

import pytest

from clients import eventually
from supervised import is_gone
from takeover.run import crew as crews
from takeover.run.crew import Crew, Plan
from takeover.run.events import Events
from takeover.run.options import Options
from takeover.run.readiness import parse
from takeover.run.supervisor import Supervisor

SLEEP = (sys.executable, "-c", "import time; time.sleep(100)")


class Scripted:
    """A check that a test decides about."""

    probe = None
    descriptors: Sequence[tuple[str, int]] = ()

    def __init__(self, way: object, events: object, listeners: object, on_ready: Any, on_failed: Any, *_: Any) -> None:
        self.environment: dict[str, str] = {}
        self.succeed: Callable[[str], None] = on_ready
        self.fail: Callable[[str], None] = on_failed
        self.pid = 0
        self.before_the_reason: Callable[[], object] = lambda: None

    def started(self, pid: int) -> None:
        self.pid = pid

    def output(self, data: bytes) -> None:
        pass

    def why_not(self, status: int | None = None) -> str:
        self.before_the_reason()
        return "for no reason"

    def close(self) -> None:
        pass


class Stage:
    """One crew, its checks in the order of their processes, and what it has told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events = Events()
        self.checks: list[Scripted] = []
        self.told: list[str] = []
        self.crew: Crew | None = None
        self._monkeypatch = monkeypatch
        monkeypatch.setattr(crews, "Check", self._check)

    def _check(self, *arguments: Any) -> Scripted:
        self.checks.append(Scripted(*arguments))
        return self.checks[-1]

    def start(self, command: Sequence[str] = SLEEP, ready: str = "delay:0", **options: Any) -> Crew:
        plan = Plan(Options((), tuple(command), ready=ready, **options), [], parse(ready), frozenset())
        self.crew = Crew(
            plan,
            self.events,
            lambda: self.told.append("ready"),
            lambda reason: self.told.append(f"failed: {reason}"),
            lambda status: True,
        )
        self.crew.start()
        return self.crew

    def fail_at(self, where: Any, name: str, error: BaseException) -> None:
        def fail(*_: object, **__: object) -> NoReturn:
            raise error

        self._monkeypatch.setattr(where, name, fail)

    def run_until(self, question: Callable[[], object], what: str) -> None:
        def ask() -> object:
            self.events.reap()
            self.events.run_once(0.01)
            return question()

        eventually(ask, what)

    def close(self) -> None:
        if self.crew is not None:
            self.crew.stop(lambda: None, 0.0)
            self.crew.kill()
            self.run_until(lambda: not self.crew or not self.crew.trees, "nothing of the crew is left")
        self.events.close()


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stage]:
    with contextlib.closing(Stage(monkeypatch)) as made:
        yield made


TOO_MANY = OSError(24, "Too many open files")


@pytest.mark.parametrize(
    ("name", "said"),
    [("Check", "a socket to tell whether the command is ready"), ("Relay", "a pipe for the output of the command")],
)
def test_without_descriptors_a_crew_is_not_formed_and_says_what_they_were_for(
    stage: Stage, name: str, said: str
) -> None:
    stage.fail_at(crews, name, TOO_MANY)
    stage.start(ready="line:up")
    stage.run_until(lambda: stage.told, "the failure is told")
    assert stage.told == [f"failed: {said}: Too many open files"]


def test_a_restart_without_descriptors_is_tried_again_and_touches_no_relay_of_before(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    crew = stage.start(ready="line:up")
    stage.checks[0].succeed("it wrote: up")
    with monkeypatch.context() as broken:
        broken.setattr(crews, "Check", lambda *_: (_ for _ in ()).throw(TOO_MANY))
        os.kill(stage.checks[0].pid, signal.SIGKILL)
        stage.run_until(lambda: "Too many open files" in caplog.text, "a restart has failed")
    stage.run_until(lambda: len(stage.checks) == 2, "it was started again")
    stage.checks[1].succeed("it wrote: up")
    assert crew.any_ready and crew.pids == [stage.checks[1].pid]
    assert stage.told == ["ready"]


def test_a_crew_that_fails_twice_tells_the_first_reason_only(stage: Stage) -> None:
    stage.start(["no-such-command"], workers=2)
    stage.run_until(lambda: stage.told, "the failure is told")
    stage.events.run_once(0)
    assert len(stage.told) == 1 and "command not found" in stage.told[0]


def test_a_failure_that_comes_when_the_crew_is_being_stopped_is_told_to_nobody(stage: Stage) -> None:
    crew = stage.start(["no-such-command"])
    crew.stop(lambda: stage.told.append("gone"))
    stage.run_until(lambda: stage.told, "it is gone")
    assert stage.told == ["gone"]


def test_what_a_check_says_of_a_process_that_is_being_stopped_is_told_to_nobody(stage: Stage) -> None:
    crew = stage.start()
    crew.stop(lambda: stage.told.append("gone"))
    stage.checks[0].fail("too late")
    stage.checks[0].succeed("too late")
    stage.run_until(lambda: stage.told, "it is gone")
    assert stage.told == ["gone"]


def test_a_command_that_turns_out_to_be_ready_when_its_time_is_over_is_ready(stage: Stage) -> None:
    crew = stage.start(ready_timeout=0.0)
    stage.checks[0].before_the_reason = lambda: stage.checks[0].succeed("READY=1 had not been read yet")
    stage.run_until(lambda: stage.told, "its time is over")
    assert stage.told == ["ready"] and crew.formed


def test_a_restart_that_does_not_get_ready_is_killed_and_started_once_more(
    stage: Stage, caplog: pytest.LogCaptureFixture
) -> None:
    crew = stage.start()
    stage.checks[0].succeed("up")
    os.kill(stage.checks[0].pid, signal.SIGKILL)
    stage.run_until(lambda: len(stage.checks) == 2 and stage.checks[1].pid, "it was started again")
    stage.checks[1].fail("it will never be ready")
    stage.run_until(lambda: len(stage.checks) == 3 and stage.checks[2].pid, "and once more")
    assert is_gone(stage.checks[1].pid)
    assert f"pid {stage.checks[1].pid}: it will never be ready" in caplog.text
    assert crew.formed and stage.told == ["ready"]


@pytest.mark.parametrize(("healthy", "pauses"), [(0.0, ["0.1", "0.1"]), (1000.0, ["0.1", "0.2"])])
def test_the_pause_before_a_restart_grows_unless_the_process_has_served_for_a_while(
    stage: Stage,
    healthy: float,
    pauses: list[str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(crews, "HEALTHY", healthy)
    caplog.set_level("INFO")
    stage.start()
    for number in range(len(pauses)):
        stage.run_until(lambda: len(stage.checks) == number + 1 and stage.checks[number].pid, "started")  # noqa: B023
        stage.checks[number].succeed("up")
        os.kill(stage.checks[number].pid, signal.SIGKILL)
    stage.run_until(lambda: caplog.text.count("starting it again in") == len(pauses), "it has ended each time")
    said = [message.split()[4] for message in caplog.messages if message.startswith("starting it again in")]
    assert said == pauses


def test_a_signal_between_two_processes_is_for_nobody(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crews, "FIRST_PAUSE", 1000.0)
    crew = stage.start()
    stage.checks[0].succeed("up")
    os.kill(stage.checks[0].pid, signal.SIGKILL)
    stage.run_until(lambda: not crew.pids, "it has ended")
    crew.signal(signal.SIGUSR1)
    assert crew.pids == []


def test_a_crew_can_be_killed_without_having_been_stopped(stage: Stage) -> None:
    crew = stage.start()
    crew.kill()
    stage.run_until(lambda: is_gone(stage.checks[0].pid), "it is gone")


class Probation:
    """A service that has just been taken over; whether it can go back still, a test says."""

    state = "probation"

    def __init__(self, goes_back: bool) -> None:
        self.goes_back = goes_back
        self.reasons: list[str] = []

    def give_back(self, reason: str) -> bool:
        self.reasons.append(reason)
        return self.goes_back


@pytest.fixture
def supervisor(stage: Stage) -> Iterator[Supervisor]:
    made = Supervisor(Options((), SLEEP))
    made.crew = stage.start()
    yield made
    made.events.close()


def test_a_command_that_ends_when_the_service_cannot_go_back_any_more_is_started_again(supervisor: Supervisor) -> None:
    service = Probation(goes_back=False)
    supervisor.service = service  # type: ignore[assignment]
    supervisor._serving = True
    assert supervisor._on_died(3)
    assert service.reasons == ["the command ended in the probation with exit status 3"]


def test_who_was_stopped_while_the_last_ones_were_accepted_does_not_stop_twice(
    supervisor: Supervisor, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    supervisor._end()
    supervisor._end_taken_over()
    assert caplog.text == ""
