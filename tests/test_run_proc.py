"""What /proc tells of processes, and what is made of it where they have gone, or the kernel is another."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from takeover.run import orphans, proc, remains, running
from takeover.run.events import Events


@pytest.fixture
def gone() -> int:
    """The pid of a process that has ended and was waited for."""
    with subprocess.Popen(["true"]) as process:
        process.wait()
    return process.pid


@pytest.fixture
def child() -> Iterator[int]:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        yield process.pid
        process.communicate(b"\n")


@pytest.fixture
def reading(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Any], None]:
    """Has each file of /proc whose path ends so give these bytes, or this error."""

    def reading(name: str, answer: bytes | OSError) -> None:
        def open_another(path: str, *mode: Any, **options: Any) -> Any:
            if not path.endswith(f"/{name}"):
                return open(path, *mode, **options)
            if isinstance(answer, OSError):
                raise answer
            return io.BytesIO(answer)

        monkeypatch.setattr(proc, "open", open_another, raising=False)

    return reading


def test_of_a_process_that_has_gone_nothing_is_told(gone: int) -> None:
    assert proc.look_at(gone) is None and not proc.is_there(gone)
    assert (proc.threads(gone), proc.children(gone), proc.targets(gone, 3), proc.words(gone)) == ([], [], [], [])
    assert (proc.descriptors(gone), proc.environment(gone)) == ({}, {})
    assert proc.asleep_in(gone) == "" and proc.sleeps(gone) is None and proc.waiting_call(gone, gone) is None
    assert proc.memory(gone, 4096, 8) == b""
    assert not proc.Tree(os.getpid()).has(gone)


def test_memory_that_is_not_there_is_no_bytes() -> None:
    assert [proc.memory(os.getpid(), address, 8) for address in (0, (1 << 64) - 8)] == [b"", b""]


def test_a_process_that_may_not_be_signalled_is_there_nevertheless(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(pid: int, signum: int) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "kill", refuse)
    assert proc.is_there(1)


def test_children_are_found_without_a_list_of_them_in_the_kernel(
    child: int, reading: Callable[[str, Any], None]
) -> None:
    assert child in proc.children(os.getpid())
    reading("children", FileNotFoundError(2, "No such file or directory"))
    assert child in proc.children(os.getpid())


def test_a_thread_that_ends_while_it_is_looked_at_has_no_children(
    gone: int, child: int, reading: Callable[[str, Any], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as ended:
        ended.setattr(proc, "threads", lambda pid: [gone])
        assert proc.children(os.getpid()) == []
    reading("children", ProcessLookupError(3, "No such process"))
    assert proc.children(os.getpid()) == []


@pytest.mark.parametrize("answer", [PermissionError(13, "Permission denied"), b"Name:\tpython\n"])
def test_sleeps_that_are_not_told_are_not_guessed(answer: Any, reading: Callable[[str, Any], None]) -> None:
    assert proc.sleeps(os.getpid())
    reading("status", answer)
    assert proc.sleeps(os.getpid()) is None


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (FileNotFoundError(2, "No such file or directory"), "this kernel does not tell system calls"),
        (PermissionError(1, "Operation not permitted"), "Operation not permitted"),
    ],
)
def test_a_call_that_may_not_be_seen_is_hidden_and_not_none(
    error: OSError, said: str, reading: Callable[[str, Any], None]
) -> None:
    reading("syscall", error)
    with pytest.raises(proc.Hidden, match=said):
        proc.waiting_call(os.getpid(), os.getpid())


def test_without_a_proc_the_process_itself_is_still_known(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> Iterator[proc.Process]:
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setattr(orphans, "all_processes", fail)
    assert orphans.tree(4711) == [4711]
    assert orphans.tree(4711, ended=True) == []


def test_only_what_a_supervisor_that_has_ended_has_left_is_remains(gone: int) -> None:
    control = "/nowhere/takeover.sock"
    ours = remains.mark(control)
    dead = ours.replace(str(os.getpid()), str(gone), 1)
    marked = [
        subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, env={remains.MARK: mark})
        for mark in (ours, dead, dead.replace(control, "/elsewhere"))
    ]
    try:
        assert remains.find(control) == [marked[1].pid]
    finally:
        for process in marked:
            process.communicate(b"\n")


def test_an_exit_status_is_put_in_words_for_signals_without_a_name_too() -> None:
    assert [running.in_words(status) for status in (3, -9, -60)] == ["exit status 3", "SIGKILL", "signal 60"]


def test_at_the_deadline_nothing_is_said_of_processes_that_wait_to_be_reaped(caplog: pytest.LogCaptureFixture) -> None:
    events = Events()
    try:
        with subprocess.Popen(["true"]) as process:
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
            tree = running.Running(
                events, process.pid, lambda status: None, lambda: None, stop_signal=15, stop_timeout=0.0
            )
            tree.stop()
            events.run_once(0)
            assert caplog.text == ""
    finally:
        events.close()


class Family:
    """A started process, 10, and what it leaves behind, without any real one: who lives, and who was sent what."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.living = [10]
        self.sent: list[tuple[int, int]] = []
        self.gone = 0
        self.events = Events()
        monkeypatch.setattr(orphans, "tree", lambda root, ended: list(self.living))
        monkeypatch.setattr(orphans, "kill", self._kill)
        self.running = running.Running(
            self.events, 10, lambda status: None, self._is_gone, stop_signal=signal.SIGTERM, stop_timeout=60.0
        )

    def _kill(self, pids: list[int], signum: int = signal.SIGKILL) -> None:
        self.sent += [(pid, signum) for pid in pids]

    def _is_gone(self) -> None:
        self.gone += 1

    def one_ends(self, pid: int, *born: int) -> list[tuple[int, int]]:
        """A process ends, and others have come to light by then; what was sent because of it."""
        self.living = [each for each in self.living if each != pid] + list(born)
        before = len(self.sent)
        self.events._children.pop(pid)(0)
        return self.sent[before:]


@pytest.fixture
def family(monkeypatch: pytest.MonkeyPatch) -> Iterator[Family]:
    family = Family(monkeypatch)
    yield family
    family.events.close()


def test_what_comes_to_light_only_after_everything_was_killed_is_killed_too(family: Family) -> None:
    """A process may have started another between the look at the processes and its end."""
    family.running.kill()
    assert family.one_ends(10, 11) == [(11, signal.SIGKILL)]
    assert family.one_ends(11) == [] and family.gone == 1


def test_each_that_is_left_behind_is_asked_to_end_once(family: Family) -> None:
    family.running.stop()
    ask = [signal.SIGTERM, signal.SIGCONT]
    assert family.sent == [(10, signum) for signum in ask]
    assert family.one_ends(10, 11, 12) == [(pid, signum) for signum in ask for pid in (11, 12)]
    assert family.one_ends(11) == [], "12 was asked already"
    assert family.one_ends(12, 13) == [(13, signum) for signum in ask]
    assert family.one_ends(13) == [] and family.gone == 1
