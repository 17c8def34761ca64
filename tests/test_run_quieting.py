"""Before the stop signal the old command loses its listeners unnoticed, and what it has accepted becomes a request."""

from __future__ import annotations

import fcntl
import gc
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest

from clients import LIMIT, eventually, receive_exactly
from processes import Program, Room
from takeover.run import conversations, hush, proc, quieting, waiting
from takeover.run.events import Events


@pytest.fixture
def room() -> Iterator[Room]:
    with Room("python") as room:
        yield room


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        sock.setblocking(False)
        yield sock


@pytest.fixture
def start(room: Room, listener: socket.socket) -> Callable[..., Program]:
    def start(**options: Any) -> Program:
        options["descriptor"] = listener.fileno()
        program = room.program("dropping.py", options, pass_fds=[listener.fileno()])
        program.wait_for("waiting")
        return program

    return start


def connect(listener: socket.socket) -> socket.socket:
    sock = socket.create_connection(listener.getsockname(), LIMIT)
    sock.settimeout(LIMIT)
    return sock


def stop_quietly(program: Program, listener: socket.socket, **options: Any) -> None:
    """What a supervisor does with an old command; returns when the stop signal has been sent."""
    events = Events()

    def stop() -> None:
        program.signal(signal.SIGTERM)
        events.stop()

    try:
        quieting.Quieting(events, lambda: [program.pid], [listener], stop, **options)
        events.run()
    finally:
        events.close()


def is_waiting(sock: socket.socket) -> bool:
    return bool(select.select([sock], [], [], 0)[0])


def test_a_hushed_server_accepts_nobody_and_serves_whom_it_has(
    start: Callable[..., Program], listener: socket.socket
) -> None:
    program = start()
    with connect(listener) as early:
        program.wait_for("accepted")
        assert [entry.pid for entry in hush.hush([program.pid], [listener])] == [program.pid]
        assert hush.find([program.pid], [listener]) == []
        with connect(listener) as late:
            early.sendall(b"hello\n")
            assert receive_exactly(early, 6) == b"hello\n"
            assert program.lines.count("accepted") == 1
            with listener.accept()[0] as ours:
                assert ours.getpeername() == late.getsockname()


def test_hushing_leaves_each_descriptor_of_this_process_as_it_was(
    start: Callable[..., Program], listener: socket.socket
) -> None:
    program = start()
    (entry,) = hush.find([program.pid], [listener])
    before = {number: os.readlink(f"/proc/self/fd/{number}") for number in (0, 1, 2, entry.number, listener.fileno())}
    count = len(os.listdir("/proc/self/fd"))
    assert hush.hush([program.pid], [listener])
    assert before == {number: os.readlink(f"/proc/self/fd/{number}") for number in before}
    assert len(os.listdir("/proc/self/fd")) == count


def test_a_server_in_use_of_another_number_for_the_listener_is_hushed_too(room: Room, listener: socket.socket) -> None:
    os.set_inheritable(listener.fileno(), True)
    number = 300
    taken = os.dup2(0, number)
    copy = os.dup(listener.fileno())
    try:
        os.dup2(copy, number)
        program = room.program("dropping.py", {"descriptor": number}, pass_fds=[number])
        program.wait_for("waiting")
        os.dup2(0, number)
        here = os.readlink(f"/proc/self/fd/{number}")
        assert [entry.number for entry in hush.hush([program.pid], [listener])] == [number]
        assert os.readlink(f"/proc/self/fd/{number}") == here
    finally:
        os.close(taken)
        os.close(copy)


def test_a_process_that_has_gone_or_has_no_epoll_set_is_left_alone(listener: socket.socket, room: Room) -> None:
    gone = room.run("true")
    gone.wait()
    assert hush.hush([gone.pid, os.getpid()], [listener]) == []


def refuse(*_: object) -> NoReturn:
    raise OSError(1, "Operation not permitted")


def refuse_threads(*_: object) -> NoReturn:
    raise RuntimeError("can't start new thread")


@pytest.mark.parametrize(
    ("where", "name", "instead", "said"),
    [
        (threading.Thread, "start", refuse_threads, "not hushed: can't start new thread"),
        (hush, "_libc", SimpleNamespace(unshare=lambda flags: -1), "not hushed: unshare CLONE_FILES"),
        (fcntl, "fcntl", refuse, "not hushed: dup of a listener"),
        (hush, "fetch", refuse, "not hushed: [Errno 1] Operation not permitted"),
    ],
)
def test_what_cannot_be_hushed_stays_as_it_is_and_the_reason_is_logged(
    start: Callable[..., Program],
    listener: socket.socket,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    where: Any,
    name: str,
    instead: Any,
    said: str,
) -> None:
    program = start()
    caplog.set_level("DEBUG")
    with monkeypatch.context() as broken:
        broken.setattr(where, name, instead)
        assert hush.hush([program.pid], [listener]) == []
    assert said in caplog.text and gc.isenabled()
    assert len(hush.find([program.pid], [listener])) == 1


def test_a_listener_that_the_server_has_taken_out_meanwhile_is_nothing_to_tell(
    start: Callable[..., Program],
    listener: socket.socket,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    program = start()
    entries = hush.find([program.pid], [listener])
    assert hush.hush([program.pid], [listener]) == entries
    caplog.set_level("DEBUG")
    monkeypatch.setattr(hush, "find", lambda *_: entries)
    assert hush.hush([program.pid], [listener]) == []
    assert caplog.text == ""


def test_a_garbage_collector_that_was_off_stays_off(start: Callable[..., Program], listener: socket.socket) -> None:
    program = start()
    gc.disable()
    try:
        assert hush.hush([program.pid], [listener])
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_a_descriptor_that_is_not_there_cannot_be_fetched_and_leaves_none(listener: socket.socket) -> None:
    before = os.listdir("/proc/self/fd")
    with pytest.raises(OSError, match="pidfd_getfd: Bad file descriptor"):
        hush.fetch(os.getpid(), 1 << 20)
    assert os.listdir("/proc/self/fd") == before


def test_the_program_of_these_tests_drops_at_the_signal_who_has_not_asked_yet(
    start: Callable[..., Program], listener: socket.socket
) -> None:
    program = start()
    with connect(listener) as sock:
        program.wait_for("accepted")
        program.signal(signal.SIGTERM)
        program.wait()
        assert sock.recv(1) == b""


def test_who_was_accepted_last_and_asks_late_is_answered(
    start: Callable[..., Program], listener: socket.socket
) -> None:
    program = start()
    with connect(listener) as sock:
        program.wait_for("accepted")
        later = threading.Timer(0.2, sock.sendall, [b"hello\n"])
        later.start()
        stop_quietly(program, listener)
        assert receive_exactly(sock, 6) == b"hello\n"
        later.join()
    assert program.wait() == 0


def test_who_is_accepted_in_the_turn_that_is_going_on_is_answered(
    start: Callable[..., Program], listener: socket.socket
) -> None:
    """While it sleeps in its turn another is waiting in the queue, whom it must not accept any more."""
    program = start(turn=0.3)
    with connect(listener) as sock:
        program.wait_for("accepted")
        sock.sendall(b"hello\n")
        with connect(listener):
            stop_quietly(program, listener)
            assert receive_exactly(sock, 6) == b"hello\n"
            assert program.wait() == 0
            assert is_waiting(listener)
    assert program.lines.count("accepted") == 1


def test_who_never_asks_holds_the_signal_up_for_a_moment_only(
    start: Callable[..., Program], listener: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quieting, "PATIENCE", 0.3)
    program = start()
    with connect(listener) as sock:
        program.wait_for("accepted")
        stop_quietly(program, listener)
        assert program.wait() == 0
        assert sock.recv(1) == b""


def test_a_server_that_waits_in_accept_gets_the_signal_at_once(room: Room, listener: socket.socket) -> None:
    code = "import socket, sys; s = socket.socket(fileno=int(sys.argv[1])); s.settimeout(None); print('up'); s.accept()"
    with socket.create_server(("127.0.0.1", 0)) as blocking:
        number = blocking.fileno()
        program = room.run("python3", "-uc", code, str(number), pass_fds=[number])
        program.wait_for("up")
        began = time.monotonic()
        stop_quietly(program, blocking)
        assert program.wait() == -signal.SIGTERM
        assert time.monotonic() - began < quieting.PATIENCE


def test_a_server_that_cuts_everything_at_the_signal_is_drained_first(
    start: Callable[..., Program], listener: socket.socket
) -> None:
    program = start(answer=0.5, cuts=True)
    with connect(listener) as idle, connect(listener) as asking:
        idle.sendall(b"hello\n")
        assert receive_exactly(idle, 6) == b"hello\n"
        asking.sendall(b"how are you?\n")
        eventually(lambda: program.lines.count("read") == 2, "the second request has been read")
        stopping = threading.Thread(target=stop_quietly, args=(program, listener), kwargs={"drain": LIMIT})
        stopping.start()
        assert receive_exactly(asking, 13) == b"how are you?\n"
        assert idle.recv(1) == b""
        assert asking.recv(1) == b""
        stopping.join(LIMIT)
    assert program.wait() == 0
    assert program.lines.count("closed") == 2


def test_idle_connections_that_are_to_be_spared_stay_until_they_leave(
    start: Callable[..., Program], listener: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quieting, "PATIENCE", 0.1)
    looks: list[float] = []
    monkeypatch.setattr(conversations, "of", lambda *where, of=conversations.of: (looks.append(0), of(*where))[1])
    program = start(cuts=True)
    stopping = threading.Thread(
        target=stop_quietly, args=(program, listener), kwargs={"drain": LIMIT, "spare_idle": True}
    )
    with connect(listener) as idle:
        idle.sendall(b"hello\n")
        assert receive_exactly(idle, 6) == b"hello\n"
        stopping.start()
        eventually(lambda: len(looks) > 3, "the idle connection was looked at")
        idle.sendall(b"still here\n")
        assert receive_exactly(idle, 11) == b"still here\n"
    stopping.join(LIMIT)
    assert program.wait() == 0


def test_a_conversation_tells_who_waits_for_an_answer(listener: socket.socket) -> None:
    def look() -> conversations.Conversation:
        (found,) = conversations.of(conversations.holders([os.getpid()]), [listener])
        return found

    with connect(listener) as client:
        eventually(lambda: is_waiting(listener), "the connection is in the queue")
        with listener.accept()[0] as server:
            assert look().awaits_its_first_answer
            client.sendall(b"hello\n")
            eventually(lambda: look().unread == 6, "the request has come")
            assert look().awaits_its_first_answer and not look().is_idle
            receive_exactly(server, 6)
            assert look().awaits_its_first_answer
            time.sleep(0.05)  # more than a step of the kernel's clock
            server.sendall(b"hello\n")
            assert look().is_idle
            eventually(lambda: not look().unsent, "the answer is acknowledged")
            assert look().is_idle
            assert not look().awaits_its_first_answer
            time.sleep(0.05)
            client.sendall(b"again\n")
            eventually(lambda: look().unread == 6, "the next request has come")
            receive_exactly(server, 6)
            assert not look().is_idle


def test_a_client_that_has_left_is_not_waited_for(listener: socket.socket) -> None:
    with connect(listener) as client, connect(listener) as silent:
        eventually(lambda: is_waiting(listener), "the connections are in the queue")
        with listener.accept()[0] as server, listener.accept()[0]:
            client.sendall(b"hello\n")
            server.sendall(receive_exactly(server, 6))
            receive_exactly(client, 6)
            client.shutdown(socket.SHUT_WR)
            silent.shutdown(socket.SHUT_WR)
            assert server.recv(1) == b""
            found = conversations.of(conversations.holders([os.getpid()]), [listener])
            assert [each.client_is_done for each in found] == [True, True]
            assert not any(each.awaits_its_first_answer for each in found)


@pytest.mark.parametrize("error", [OSError(1, "Operation not permitted"), proc.Hidden("pid 1: Permission denied")])
def test_where_nothing_can_be_seen_the_signal_is_sent_at_once(
    start: Callable[..., Program],
    listener: socket.socket,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: Exception,
) -> None:
    def fail(*_: object) -> NoReturn:
        raise error

    monkeypatch.setattr(conversations, "of", fail)
    caplog.set_level("DEBUG")
    program = start()
    stop_quietly(program, listener, drain=LIMIT)
    assert program.wait() == 0
    assert f"not waiting for what was accepted: {error}" in caplog.text


def test_who_stays_to_the_end_of_the_drain_is_counted_and_cut_off(
    start: Callable[..., Program],
    listener: socket.socket,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(quieting, "PATIENCE", 0.1)
    caplog.set_level("INFO")
    program = start(cuts=True)
    with connect(listener) as idle:
        idle.sendall(b"hello\n")
        assert receive_exactly(idle, 6) == b"hello\n"
        stop_quietly(program, listener, drain=0.3, spare_idle=True)
        assert program.wait() == 0
        assert idle.recv(1) == b""
    assert "1 connections are left after" in caplog.text


SEEN = conversations.Conversation(
    pid=4711,
    descriptor=7,
    inode=1,
    unread=0,
    unsent=0,
    received=1,
    sent=1,
    since_received=10_000,
    since_sent=10_000,
    since_heard=10_000,
    client_is_done=False,
)


@pytest.mark.parametrize(
    ("spent", "since", "certain", "sleeps", "due"),
    [
        (0.0, 110, True, False, True),
        (0.0, 90, True, True, False),
        (0.5, 50, True, True, True),
        (0.5, 50, True, False, False),
        (0.98, 50, True, False, True),
        (0.4, 600, False, True, False),
        (0.6, 600, False, False, True),
        (0.6, 400, False, True, False),
    ],
)
def test_an_answer_counts_as_complete_the_sooner_the_later_it_is_in_the_drain(
    monkeypatch: pytest.MonkeyPatch, spent: float, since: int, certain: bool, sleeps: bool, due: bool
) -> None:
    """certain: that the last data was an answer. sleeps: whether the event loop of its process does."""
    events = Events()
    try:
        quiet = quieting.Quieting(events, list, [], lambda: None, drain=1000.0)
        quiet._began = time.monotonic() - 1000.0 * spent
        quiet._epolls = {(SEEN.pid, 3)}
        monkeypatch.setattr(waiting, "sleeps_on", lambda pid, epoll: sleeps)
        assert quiet._is_due(SEEN._replace(since_sent=since, since_received=since + 10 * certain)) is due
    finally:
        events.close()


@pytest.fixture
def idle(listener: socket.socket) -> Iterator[tuple[socket.socket, conversations.Conversation]]:
    """A client of this process that got its answer, and how it is seen from outside."""
    with connect(listener) as client:
        eventually(lambda: is_waiting(listener), "the connection is in the queue")
        with listener.accept()[0] as server:
            client.sendall(b"hello\n")
            server.sendall(receive_exactly(server, 6))
            (seen,) = conversations.of(conversations.holders([os.getpid()]), [listener])
            yield client, seen


@pytest.mark.parametrize("change", [{}, {"inode": 1}, {"descriptor": 1 << 20}])
def test_only_the_connection_that_was_seen_idle_and_still_is_gets_ended(
    idle: tuple[socket.socket, conversations.Conversation],
    change: dict[str, Any],
    caplog: pytest.LogCaptureFixture,
) -> None:
    client, seen = idle
    assert receive_exactly(client, 6) == b"hello\n"
    caplog.set_level("DEBUG")
    events = Events()
    try:
        quiet = quieting.Quieting(events, list, [], lambda: None, drain=1000.0)
        quiet._began -= 2000.0
        if change:
            quiet._end(seen._replace(**change))
            assert not is_waiting(client) and not quiet._ended
            assert ("an idle connection of pid" in caplog.text) is ("descriptor" in change)
            return

        def ended() -> set[int]:
            quiet._end(seen)
            return quiet._ended

        assert eventually(ended, "it has been idle for long enough") == {seen.inode}
        assert client.recv(1) == b""
    finally:
        events.close()


def test_a_connection_that_is_at_work_again_when_it_would_be_ended_lives_on(
    idle: tuple[socket.socket, conversations.Conversation], listener: socket.socket
) -> None:
    client, seen = idle
    with socket.socket(fileno=os.dup(seen.descriptor)) as server:
        assert not conversations.end(server, seen, lambda each: False)
        client.sendall(b"again\n")
        assert receive_exactly(server, 6) == b"again\n"
