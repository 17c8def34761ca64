"""A sample of tests/chaos: another one at each run, whose seed is printed; TAKEOVER_TEST_SEED repeats one."""

from __future__ import annotations

import os
import platform
import random
import subprocess
import sys
from collections import Counter

import pytest

from chaos.calls import ERRORS, NUMBERS
from chaos.scenes import STAGES, Point, Scene, play
from chaos.stage import Stage
from chaos.sweep import KINDS, Case, cases, record, report, run_all, sample
from processes import PROGRAMS, STEP, sampled

SEED = int(os.environ.get("TAKEOVER_TEST_SEED") or random.randrange(1 << 32))
COUNT = max(4, 10 // STEP)
PARALLEL = 4


def _why_not() -> str:
    """Why processes cannot be traced here; empty where they can."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return "the tracer knows the registers of x86-64 Linux only"
    scope = "/proc/sys/kernel/yama/ptrace_scope"
    if os.geteuid() and os.path.exists(scope):
        with open(scope) as file:
            if file.read().strip() != "0":
                return "kernel.yama.ptrace_scope lets only root trace what is no child"
    command = [sys.executable, "-c", "import ctypes, sys; sys.exit(ctypes.CDLL(None).ptrace(0, 0, 0, 0) != 0)"]
    return "" if subprocess.run(command, check=False).returncode == 0 else "ptrace(2) is not allowed here"


pytestmark = pytest.mark.skipif(bool(_why_not()), reason=_why_not())


@pytest.mark.timeout(300)
@pytest.mark.parametrize("action", ["kill", "stop"])
def test_whichever_system_call_one_process_is_killed_or_stopped_at_one_owner_remains(backend: str, action: str) -> None:
    print(f"seed {SEED}")
    todo = sample(list(cases([backend], KINDS, [action])), COUNT, SEED)
    results = list(run_all(todo, PARALLEL))
    failures = [f"{result.case}: {result.failure}" for result in results if result.failure]
    assert not failures, "\n\n".join(failures)
    assert report(results)["all"]["not reached"] <= len(todo) // 4


FAILED_ONCE = (
    *("listeners/EMFILE/successor/0/epoll_create1/1", "listeners/EMFILE/successor/0/pipe2/1"),
    *("listeners/ENOMEM/successor/0/flock/1", "listeners/EMFILE/successor/0/socket/1"),
    *("listeners/EAGAIN/successor/0/clone3/1", "listeners/ENOMEM/incumbent/1/getsockopt/1"),
    *("listeners/ENOMEM/incumbent/1/sendto/1", "listeners/ENOMEM/incumbent/1/epoll_ctl/1"),
    *("listeners/ENOSPC/incumbent/1/epoll_ctl/2", "listeners/ENOBUFS/successor/0/getsockopt/1"),
    *("live/ETOOMANYREFS/successor/1/sendmsg/1", "live/ENOMEM/successor/1/memfd_create/1"),
    *("live/ENOBUFS/successor/1/socketpair/1", "live/ENOSPC/successor/0/epoll_ctl/2"),
    *("live/ECONNRESET/incumbent/0/recvmsg/3", "listeners/EMFILE/successor/0/fcntl/1"),
    *("listeners/ETOOMANYREFS/successor/0/accept4/1", "listeners/EPIPE/incumbent/0/accept4/2"),
    *("live/ENOMEM/successor/0/sendto/3", "live/ENOBUFS/successor/0/sendto/4"),
    "listeners/EMFILE/incumbent/1/sendto/2",
)
"""Errors of the kernel, and some that only a filter makes, that had once cost the service, the connections or a
traceback."""


@pytest.mark.timeout(300)
def test_a_call_that_fails_once_costs_neither_the_service_nor_a_traceback(backend: str) -> None:
    results = list(run_all([Case.parse(f"{backend}/{text}") for text in sampled(FAILED_ONCE)], PARALLEL))
    failures = [f"{result.case}: {result.failure}" for result in results if result.failure]
    assert not failures, "\n\n".join(failures)


def test_the_points_are_every_call_of_both_processes_and_both_threads_of_each(backend: str) -> None:
    points = record(backend, "live").points
    threads = {(point.role, point.thread) for point in points}
    assert threads == {(role, thread) for role in ("incumbent", "successor") for thread in (0, 1)}
    assert len(set(points)) == len(points) > 300
    calls = Counter(point.call for point in points)
    assert {"sendmsg", "recvmsg", "accept4", "epoll_ctl", "flock", "exit_group"} <= set(calls)
    assert not [call for call in calls if call.startswith("call ")], "a call without a name"


def test_what_is_not_as_it_must_be_after_a_play_is_a_failure_that_names_its_point(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(backend, "listeners", Point("successor", 0, "connect", 1), "kill")
    monkeypatch.setattr("chaos.own.Takeover.left_behind", lambda _: ["a file that was left"])
    (result,) = run_all([case], 1)
    assert result.reached and "AssertionError" in result.failure
    assert Case.parse(str(result.case)) == case
    assert report([result])["all"]["failed"] == 1


def test_any_server_that_takes_over_from_itself_can_be_played_by_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    command = f"{sys.executable} -m takeover echo --listen tcp://{{host}}:{{port}} --control {{folder}}/takeover.sock"
    monkeypatch.setitem(STAGES, "takeover echo", lambda kind: Stage(f"{command} --probation 0"))
    points = record("takeover echo", "listeners").points
    assert {point.role for point in points} == {"incumbent", "successor"}
    todo = [Case("takeover echo", "listeners", point, "kill") for point in points if point.call in ("flock", "sendmsg")]
    failures = [f"{result.case}: {result.failure}" for result in run_all(todo[:2], PARALLEL) if result.failure]
    assert not failures, "\n\n".join(failures)


def test_what_another_server_does_not_survive_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """If the original script is killed before it has sent its listener, the next one ends too."""
    command = f"{sys.executable} {PROGRAMS / 'original.py'} {{host}} {{port}}"
    monkeypatch.setitem(STAGES, "original", lambda kind: Stage(command))
    points = [point for point in record("original", "listeners").points if point.call == "unlink"]
    assert [point.role for point in points] == ["incumbent"]
    (result,) = run_all([Case("original", "listeners", points[0], "kill")], 1)
    assert result.failure.startswith("AssertionError: the survivor has ended"), result


def test_an_error_or_a_short_call_is_seen_by_the_process_alone(backend: str) -> None:
    """The tracer fails the call as the kernel would: the takeover tells which, and the incumbent serves on."""
    with pytest.raises(AssertionError, match="a deliberate end") as failed:
        _play_and_fail(backend, Point("successor", 0, "flock", 1), "ENOMEM")
    assert "ControlPathError: flock" in str(failed.value) and "Cannot allocate memory" in str(failed.value)


def _play_and_fail(backend: str, point: Point, action: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Scene, "_check_clients", _end)
        play(backend, "listeners", point, action)


def _end(*_: object) -> None:
    raise AssertionError("a deliberate end")


def test_each_call_that_is_made_to_fail_has_a_number() -> None:
    assert set(ERRORS) <= set(NUMBERS)
