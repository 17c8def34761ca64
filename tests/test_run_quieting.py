"""Before the stop signal the old command loses its listeners unnoticed, and what it has accepted becomes a request."""

from __future__ import annotations

import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from clients import LIMIT, eventually, receive_exactly
from processes import Program, Room
from takeover.run import conversations, hush, quieting
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
