"""The thread in which every exchange lives: what fails in it costs one exchange, and nothing else."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import selectors
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from types import ModuleType

import pytest

import takeover
from clients import LIMIT, eventually
from processes import Room
from takeover import errors
from takeover.control_thread import ControlThread
from takeover.link import Link

OPENED = "/proc/self/fd" if sys.platform == "linux" else "/dev/fd"


@pytest.fixture
def thread() -> Iterator[ControlThread]:
    made = ControlThread(takeover.Limits())
    made.start()
    yield made
    made.close()


def failing(number: int) -> Callable[..., None]:
    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


def test_an_event_that_cannot_be_dealt_with_leaves_the_thread_at_work(
    thread: ControlThread, caplog: pytest.LogCaptureFixture
) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        thread.ask(lambda: thread.selector.register(ours, selectors.EVENT_READ, failing(errno.ENOMEM)))
        theirs.send(b"x")
        eventually(lambda: "Cannot allocate memory" in caplog.text, "the event came")
        thread.ask(lambda: thread.selector.unregister(ours))
        assert thread.ask(lambda: 42) == 42
    assert "Traceback" not in caplog.text


def test_who_posts_to_a_thread_that_is_just_closed_writes_into_nobody_elses_descriptor(thread: ControlThread) -> None:
    """Between the question whether it has ended and the post lies a moment."""
    thread.close()
    with contextlib.ExitStack() as stack:
        pairs = [socket.socketpair() for _ in range(8)]  # one of them has the number that the thread's pipe had
        for sock in (sock for pair in pairs for sock in pair):
            stack.enter_context(sock)
            sock.setblocking(False)
        thread.post(lambda: None)
        for sock in (sock for pair in pairs for sock in pair):
            with pytest.raises(BlockingIOError):
                sock.recv(1)


def test_where_there_is_no_descriptor_left_for_it_none_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    before = len(os.listdir(OPENED))
    monkeypatch.setattr("os.set_blocking", failing(errno.ENOMEM))
    with pytest.raises(errors.LocalError, match="selector and pipe for the control thread: Cannot allocate"):
        ControlThread(takeover.Limits())
    monkeypatch.setattr("selectors.DefaultSelector", failing(errno.EMFILE))
    with pytest.raises(errors.LocalError, match="Too many open files"):
        ControlThread(takeover.Limits())
    assert len(os.listdir(OPENED)) == before


def test_where_no_thread_can_be_started_that_is_said_and_nothing_is_left_open(
    monkeypatch: pytest.MonkeyPatch, tmp_path: os.PathLike[str]
) -> None:
    def refuse(_: object) -> None:
        raise RuntimeError("can't start new thread")

    before = len(os.listdir(OPENED))
    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(errors.LocalError, match="can't start new thread; see RLIMIT_NPROC"):
        takeover.join(os.path.join(tmp_path, "takeover.sock"))
    assert len(os.listdir(OPENED)) == before


def test_a_lock_that_the_kernel_has_no_memory_for_is_no_traceback(
    monkeypatch: pytest.MonkeyPatch, tmp_path: os.PathLike[str]
) -> None:
    monkeypatch.setattr(fcntl, "flock", failing(errno.ENOMEM))
    with pytest.raises(errors.ControlPathError, match=r"flock .*takeover.sock.lock: Cannot allocate memory"):
        takeover.join(os.path.join(tmp_path, "takeover.sock"))


def test_who_cannot_be_greeted_is_hung_up_on_and_the_next_one_is_served(
    room: Room, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with takeover.join(room.control) as member:
        member.ready()
        flush = Link.flush
        monkeypatch.setattr(Link, "flush", failing(errno.ENOBUFS))
        with room.connect_control() as sock:
            assert sock.recv(1) == b""
        assert "failed: No buffer space available" in caplog.text
        monkeypatch.setattr(Link, "flush", flush)
        assert room.status(LIMIT)["state"] == "serving"


def test_what_the_kernel_has_no_memory_to_receive_is_received_later(
    fdpass: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("takeover.link.fdpass", fdpass)
    ours, theirs = socket.socketpair()
    link, peer = Link(ours), Link(theirs)
    try:
        peer.send(takeover.wire.Type.ALIVE)
        receive = fdpass.receive_descriptors
        monkeypatch.setattr(fdpass, "receive_descriptors", failing(errno.ENOMEM))
        assert link.receive() == [] and not link.lost
        monkeypatch.setattr(fdpass, "receive_descriptors", receive)
        assert [frame.type for frame in link.receive()] == [takeover.wire.Type.ALIVE]
    finally:
        link.close()
        peer.close()


def test_a_link_that_cannot_be_written_to_any_more_is_at_its_end_when_the_rest_has_been_read() -> None:
    ours, theirs = socket.socketpair()
    link, peer = Link(ours), Link(theirs)
    try:
        peer.send(takeover.wire.Type.ALIVE)
        peer.sock.shutdown(socket.SHUT_RD)
        link.send(takeover.wire.Type.ALIVE)
        assert [frame.type for frame in link.receive()] == [takeover.wire.Type.ALIVE]
        assert link.lost
    finally:
        link.close()
        peer.close()


FAILS_WHEN_READY = """
import sys, takeover
with takeover.join(sys.argv[1], service="echo") as member:
    member.listen(sys.argv[2])
    member.ready()
    raise ValueError("a version that does not work")
"""


def test_a_version_that_raises_in_its_probation_gives_the_service_back(room: Room) -> None:
    old = room.echo(probation=60)
    room.wait_for_owner(old)
    load = room.pound()
    room.tracebacks_allowed = True
    new = room.run(sys.executable, "-c", FAILS_WHEN_READY, room.control, room.url)
    assert new.wait() == 1
    old.wait_for("a version that does not work")
    room.wait_for_owner(old)
    load.goes_on()
    load.stop()
    assert not load.refused, load.lost
