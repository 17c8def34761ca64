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
from typing import Any

import pytest

import takeover
from clients import LIMIT, eventually
from kernel import failing, opened
from processes import Room
from takeover import errors
from takeover.control_thread import ControlThread, CpuAllowance
from takeover.incumbent import Incumbent
from takeover.link import Link


@pytest.fixture
def thread() -> Iterator[ControlThread]:
    made = ControlThread(takeover.Limits())
    made.start()
    yield made
    made.close()


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


def test_a_question_of_the_thread_to_itself_is_answered_at_once(thread: ControlThread) -> None:
    """A server may ask for the status in what it is called for at a takeover."""
    assert thread.ask(lambda: thread.ask(lambda: 42)) == 42
    with pytest.raises(ZeroDivisionError):
        thread.ask(lambda: thread.ask(lambda: 1 // 0))


def test_what_was_asked_before_the_end_is_answered(thread: ControlThread, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether the thread has ended by itself, or is being closed while somebody asks."""
    post = thread.post

    def post_and_close(callback: Callable[[], object]) -> None:
        monkeypatch.setattr(thread, "post", post)
        post(callback)
        thread.close()

    monkeypatch.setattr(thread, "post", post_and_close)
    assert thread.ask(lambda: 42) == 42
    with pytest.raises(errors.LocalError, match="the service has been closed"):
        thread.ask(lambda: 42)


def test_what_was_posted_behind_the_end_is_run_too(thread: ControlThread) -> None:
    """Whoever has posted it may wait for an answer."""
    both_are_posted, last = threading.Event(), threading.Event()
    thread.post(lambda: both_are_posted.wait(LIMIT))
    thread.post(thread.ended.set)
    thread.post(last.set)
    both_are_posted.set()
    assert last.wait(LIMIT)
    thread.close_after_fork()


def test_a_thread_that_has_had_its_cpu_time_answers_its_own_process_and_no_peer(
    thread: ControlThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    debts, heard = [600.0], threading.Event()
    monkeypatch.setattr(CpuAllowance, "debt", lambda _: debts[0])
    ours, theirs = socket.socketpair()
    with ours, theirs:
        thread.ask(lambda: thread.selector.register(ours, selectors.EVENT_READ, lambda _: heard.set()))
        theirs.send(b"x")
        assert [thread.ask(lambda: 42) for _ in range(3)] == [42] * 3
        assert not heard.is_set()
        debts[0] = 0.0
        thread.post(lambda: None)
        assert heard.wait(LIMIT)
        thread.ask(lambda: thread.selector.unregister(ours))


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
    before = opened()
    monkeypatch.setattr("os.set_blocking", failing(errno.ENOMEM))
    with pytest.raises(errors.LocalError, match="selector and pipe for the control thread: Cannot allocate"):
        ControlThread(takeover.Limits())
    monkeypatch.setattr("selectors.DefaultSelector", failing(errno.EMFILE))
    with pytest.raises(errors.LocalError, match="Too many open files"):
        ControlThread(takeover.Limits())
    assert opened() == before


def test_where_no_thread_can_be_started_that_is_said_and_nothing_is_left_open(
    monkeypatch: pytest.MonkeyPatch, tmp_path: os.PathLike[str]
) -> None:
    def refuse(_: object) -> None:
        raise RuntimeError("can't start new thread")

    before = opened()
    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(errors.LocalError, match="can't start new thread; see RLIMIT_NPROC"):
        takeover.join(os.path.join(tmp_path, "takeover.sock"))
    assert opened() == before


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


def test_who_comes_while_there_is_no_descriptor_left_is_greeted_when_there_is_one(
    room: Room, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with takeover.join(room.control, limits=takeover.Limits(heartbeat=0.01)) as member:
        member.ready()
        accept, refusals = socket.socket.accept, threading.Semaphore(0)

        def refuse(_: socket.socket) -> None:
            refusals.release()
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

        monkeypatch.setattr(socket.socket, "accept", refuse)
        with room.connect_control() as sock:
            assert all(refusals.acquire(timeout=LIMIT) for _ in range(3)), "it is tried again"
            monkeypatch.setattr(socket.socket, "accept", accept)
            assert sock.recv(1) != b""
        assert room.status(LIMIT)["state"] == "serving"
    assert caplog.text.count("Too many open files; trying again") == 1


def test_a_takeover_goes_on_while_there_is_no_descriptor_left_for_who_asks(
    room: Room, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Who waits is the successor's to answer, also when the older process would have tried again."""
    with takeover.join(room.control, probation=0, limits=takeover.Limits(heartbeat=LIMIT)) as old:
        old.ready()
        with takeover.join(room.control) as new:
            accept = socket.socket.accept
            monkeypatch.setattr(socket.socket, "accept", failing(errno.EMFILE))
            with room.connect_control() as sock:
                eventually(lambda: "trying again" in caplog.text, "nobody is answered")
                monkeypatch.setattr(socket.socket, "accept", accept)
                new.ready()
                assert old.wait(LIMIT)
                assert sock.recv(1) != b""
            thread, tried = old._controller, threading.Event()
            thread.ask(lambda: thread.at_next_tick(tried.set))
            thread.ask(lambda: setattr(thread, "_next_tick", 0.0))
            assert tried.wait(LIMIT)
            assert room.status(LIMIT)["generation"] == 2
    assert "failed" not in caplog.text


def test_who_cannot_be_asked_after_is_hung_up_on_and_the_next_one_is_served(
    room: Room, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with takeover.join(room.control) as member:
        member.ready()
        with monkeypatch.context() as patched:
            patched.setattr("takeover.link.peer_of", failing(errno.EMFILE))
            with room.connect_control() as sock:
                assert sock.recv(1) == b""
        said = f"nobody knows who asks at {room.control}: Too many open files"
        eventually(lambda: said in caplog.text, "it is said who was hung up on")
        assert room.status(LIMIT)["state"] == "serving"


def test_an_incumbent_without_a_descriptor_for_the_offer_says_so_and_serves_on(
    room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    with takeover.join(room.control) as old:
        old.ready()
        with monkeypatch.context() as patched:
            patched.setattr(Incumbent, "_prepare", failing(errno.EMFILE))
            with pytest.raises(errors.Aborted, match="serves on: OFFER: Too many open files"):
                takeover.join(room.control)
        eventually(lambda: old.status()["last_takeover"], "the takeover is over")
        assert old.status()["last_takeover"]["reason"] == "OFFER: Too many open files"
        with takeover.join(room.control) as new:
            assert new.ready().generation == 2


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


@pytest.mark.parametrize("number", [errno.ENOMEM, errno.ENOBUFS])
def test_what_the_kernel_has_no_memory_to_send_is_sent_later(number: int) -> None:
    class Short(socket.socket):
        short = True

        def send(self, *arguments: Any) -> int:
            if self.short:
                raise OSError(number, os.strerror(number))
            return super().send(*arguments)

    ours, theirs = socket.socketpair()
    sock = Short(fileno=ours.detach())
    with contextlib.closing(Link(sock)) as link, contextlib.closing(Link(theirs)) as peer:
        link.send(takeover.wire.Type.ALIVE)
        link.send(takeover.wire.Type.HEARTBEAT)
        assert link.unsent and peer.receive() == []
        sock.short = False
        link.flush()
        assert not link.unsent
        assert [frame.type for frame in peer.receive()] == [takeover.wire.Type.ALIVE, takeover.wire.Type.HEARTBEAT]


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


def test_an_error_that_time_does_not_mend_is_not_waited_for(
    fdpass: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("takeover.link.fdpass", fdpass)
    ours, theirs = socket.socketpair()
    link = Link(ours)
    with theirs, contextlib.closing(link):
        monkeypatch.setattr(fdpass, "receive_descriptors", failing(errno.ENOTCONN))
        with pytest.raises(OSError, match="not connected"):
            link.receive()


def test_what_came_whole_before_nonsense_is_closed_with_it(fdpass: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("takeover.link.fdpass", fdpass)
    ours, theirs = socket.socketpair()
    link, peer = Link(ours), Link(theirs)
    with contextlib.closing(link), contextlib.closing(peer):
        before = opened()
        peer.send(takeover.wire.Type.BLOB, {"name": "whole"}, [ours.fileno()])
        theirs.send(b"nonsense")
        with pytest.raises(errors.RemoteProtocolError):
            link.receive()
        assert opened() == before


def test_the_next_byte_of_a_connection_that_was_reset_is_its_end() -> None:
    ours, theirs = socket.socketpair()
    link = Link(ours)
    with contextlib.closing(link):
        assert link.first_byte() is None
        ours.send(b"unread")
        theirs.close()
        assert link.first_byte() == b""


def test_the_rest_is_waited_for_as_long_as_was_said_and_goes_out_when_there_is_room() -> None:
    ours, theirs = socket.socketpair()
    link, peer = Link(ours), Link(theirs)
    with contextlib.closing(link), contextlib.closing(peer):
        sent = 0
        while not link.unsent:
            link.send(takeover.wire.Type.ALIVE)
            sent += 1
        link.finish(0.0)
        assert link.unsent, "nobody has read, and the time is over"
        received: list[object] = []

        def read() -> None:
            while len(received) < sent:
                received.extend(peer.receive())

        reader = threading.Thread(target=read)
        reader.start()
        link.finish(LIMIT)
        reader.join(LIMIT)
        assert not link.unsent and len(received) == sent


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
