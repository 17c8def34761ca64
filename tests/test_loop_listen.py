"""Listeners: they accept what waits, leave the socket to its caller, and live through shortages."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import resource
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from loop_cases import LIMIT, OurCase, Recorder, read_to_the_end
from takeover.errors import UsageError


@pytest.fixture
def case(loop_module: ModuleType) -> Iterator[OurCase]:
    running = OurCase(loop_module)
    yield running
    running.close()


@pytest.fixture(params=["echo", "protocol"])
def handler(request: pytest.FixtureRequest, loop_module: ModuleType) -> object:
    class Mirror(Recorder):
        def data_received(self, data: bytes) -> None:
            self.transport.write(data)

    return loop_module.ECHO if request.param == "echo" else Mirror


def echoes(client: socket.socket) -> bool:
    client.sendall(b"ping")
    return client.recv(16) == b"ping"


def test_connections_that_wait_already_are_accepted(case: OurCase, handler: object) -> None:
    listener = case.bind()
    waiting = [case.connect(listener) for _ in range(20)]
    for client in waiting:
        client.sendall(b"ping")
    served = case.serve(listener, handler)
    assert all(client.recv(16) == b"ping" for client in waiting)
    assert case.call(lambda: served.accepted) == 20
    assert case.call(lambda: case.loop.connections) == 20


def test_a_stopped_listener_leaves_connections_in_the_queue_and_a_started_one_accepts_them(
    case: OurCase, handler: object
) -> None:
    listener = case.bind()
    served = case.serve(listener, handler)
    first = case.connect(listener)
    assert echoes(first)
    case.call(served.stop)
    case.call(served.stop)
    assert not case.call(lambda: served.accepting)
    second = case.connect(listener)
    second.sendall(b"ping")
    for _ in range(10):
        case.call(lambda: None)
    assert case.call(lambda: served.accepted) == 1
    assert echoes(first)
    case.call(served.start)
    case.call(served.start)
    assert second.recv(16) == b"ping"
    assert case.call(lambda: served.accepted) == 2


def test_a_listener_can_begin_stopped(case: OurCase, handler: object) -> None:
    listener = case.bind()
    served = case.call(lambda: case.loop.listen(listener, handler, accepting=False))
    assert served.socket is listener
    assert not served.accepting
    client = case.connect(listener)
    case.call(served.start)
    assert echoes(client)


def test_the_loop_never_closes_a_listening_socket(loop_module: ModuleType) -> None:
    loop = loop_module.Loop()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        loop.listen(listener, loop_module.ECHO)
        loop.close()
        loop.close()
        assert listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        with socket.create_connection(listener.getsockname()):
            listener.accept()[0].close()


def test_only_a_listening_stream_socket_will_do(loop_module: ModuleType) -> None:
    loop = loop_module.Loop()
    with socket.socket() as stream, socket.socket(type=socket.SOCK_DGRAM) as datagram:
        for sock in (stream, datagram):
            with pytest.raises(UsageError, match="not a listening stream socket"):
                loop.listen(sock, loop_module.ECHO)
    with socket.create_server(("127.0.0.1", 0)) as listener, pytest.raises(TypeError, match="protocol factory"):
        loop.listen(listener, "echo")
    loop.close()


def test_a_listener_that_another_holder_makes_blocking_does_not_freeze_the_loop(case: OurCase, handler: object) -> None:
    listener = case.bind()
    case.serve(listener, handler)
    assert echoes(case.connect(listener))
    flags = fcntl.fcntl(listener, fcntl.F_GETFL)
    fcntl.fcntl(listener, fcntl.F_SETFL, flags & ~os.O_NONBLOCK)
    assert echoes(case.connect(listener))
    assert case.call(lambda: True)


def test_a_connection_that_another_holder_makes_blocking_does_not_freeze_the_loop(case: OurCase) -> None:
    recorder = Recorder()
    client = case.pair(recorder)
    fd = case.call(recorder.transport.get_extra_info, "socket").fileno()
    os.set_blocking(fd, True)

    def write() -> None:
        while recorder.transport.get_write_buffer_size() < 65536:
            recorder.transport.write(b"x" * 65536)

    case.call(write)
    case.call(recorder.transport.close)
    assert read_to_the_end(client)


def test_what_it_accepts_has_nodelay_and_is_not_inheritable(case: OurCase) -> None:
    recorder = Recorder()
    case.pair(recorder)
    sock = case.call(recorder.transport.get_extra_info, "socket")
    assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    assert not os.get_inheritable(sock.fileno())
    assert not os.get_blocking(sock.fileno())
    with sock.dup() as duplicate:
        assert not duplicate.getblocking()


def test_unix_listeners_serve_and_tell_their_path(case: OurCase, tmp_path: Path) -> None:
    recorder = Recorder()
    listener = case.bind(socket.AF_UNIX, address=str(tmp_path / "s"))
    case.serve(listener, lambda: recorder)
    client = case.connect(listener)
    assert recorder.next() == ("made",)
    assert case.call(recorder.transport.get_extra_info, "sockname") == str(tmp_path / "s")
    assert case.call(recorder.transport.get_extra_info, "peername") == ""
    client.close()
    recorder.until("lost")


def test_ipv6_listeners_serve_and_tell_their_names(case: OurCase) -> None:
    try:
        listener = case.bind(socket.AF_INET6, address=("::1", 0))
    except OSError as error:
        pytest.skip(f"no IPv6 here: {error}")
    recorder = Recorder()
    case.serve(listener, lambda: recorder)
    client = case.connect(listener)
    assert recorder.next() == ("made",)
    assert case.call(recorder.transport.get_extra_info, "peername") == client.getsockname()
    assert case.call(recorder.transport.get_extra_info, "sockname") == client.getpeername()


def test_descriptor_numbers_above_1023_are_served(case: OurCase, handler: object) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 3000:
        pytest.skip(f"RLIMIT_NOFILE is {hard}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 3000), hard))
    listener = case.bind()
    held = [os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)]
    try:
        while held[-1] < 2100:
            held.append(os.dup(held[0]))
        high = listener.dup()
        case.sockets.append(high)
        assert high.fileno() > 1023
        served = case.serve(high, handler)
        assert echoes(case.connect(listener))
        case.call(served.stop)
    finally:
        for fd in held:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_shortage_of_descriptors_is_said_once_and_lived_through(
    case: OurCase, handler: object, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "takeover")
    listener = case.bind()
    case.serve(listener, handler)
    client = case.connect(listener)
    assert echoes(client)
    late = [socket.socket() for _ in range(2)]
    case.sockets.extend(late)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(name) for name in os.listdir("/proc/self/fd"))
    held = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1, limits[1]))
    try:
        with contextlib.suppress(OSError):
            while True:
                held.append(os.dup(listener.fileno()))
        for sock in late:
            sock.settimeout(LIMIT)
            sock.connect(listener.getsockname())
        refused = threading.Event()
        for _ in range(200):
            refused.wait(0.02)
            if len(case.call(lambda: [r for r in caplog.records if r.levelno == logging.WARNING])) == 1:
                break
        assert echoes(client)
        refused.wait(0.35)  # long enough for further attempts, which must not be said again
    finally:
        for fd in held:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert all(echoes(sock) for sock in late)
    case.call(lambda: None)
    messages = [(record.levelname, record.getMessage()) for record in caplog.records]
    assert [level for level, _ in messages] == ["WARNING", "INFO"]
    assert "Too many open files" in messages[0][1]
    assert "goes on after" in messages[1][1]


def test_a_listener_that_was_shut_down_is_given_up_and_said_once(
    case: OurCase, handler: object, caplog: pytest.LogCaptureFixture
) -> None:
    listener = case.bind()
    served = case.serve(listener, handler)
    listener.shutdown(socket.SHUT_RDWR)
    for _ in range(500):
        if not case.call(lambda: served.accepting):
            break
    assert not case.call(lambda: served.accepting)
    assert [record.levelname for record in caplog.records] == ["ERROR"]


def test_a_number_that_comes_back_after_its_listener_was_closed_unstopped_is_served(
    case: OurCase, handler: object
) -> None:
    first, second = case.bind(), case.bind()
    served = case.serve(first, handler)
    case.serve(second, handler)
    number = first.fileno()
    client = socket.socket()
    case.sockets.append(client)
    case.call(first.close)
    client.settimeout(LIMIT)
    client.connect(second.getsockname())
    assert echoes(client)
    case.call(served.stop)
    assert echoes(client)
    assert case.call(lambda: case.loop.connections) == 1
    assert os.path.exists(f"/proc/self/fd/{number}")


def test_no_descriptor_is_left_behind(loop_module: ModuleType, handler: object) -> None:
    before = sorted(os.listdir("/proc/self/fd"))
    for _ in range(3):
        case = OurCase(loop_module)
        listener = case.bind()
        case.serve(listener, handler)
        clients = [case.connect(listener) for _ in range(10)]
        assert all(echoes(client) for client in clients)
        for client in clients[:5]:
            client.close()
        case.close()
        assert sorted(os.listdir("/proc/self/fd")) == before


def test_aborting_all_connections_tells_how_many(case: OurCase, handler: object) -> None:
    listener = case.bind()
    case.serve(listener, handler)
    clients = [case.connect(listener) for _ in range(7)]
    assert all(echoes(client) for client in clients)
    empty = threading.Event()
    case.call(case.loop.when_empty, empty.set)
    assert not empty.is_set()
    assert case.call(case.loop.abort_connections) == 7
    assert case.call(case.loop.abort_connections) == 0
    assert empty.wait(LIMIT)
    assert case.call(lambda: case.loop.connections) == 0
    assert [client.recv(1) for client in clients] == [b""] * 7


def test_when_empty_calls_once_and_can_be_taken_back(case: OurCase, handler: object) -> None:
    listener = case.bind()
    case.serve(listener, handler)
    calls: list[int] = []
    case.call(case.loop.when_empty, lambda: calls.append(1))
    case.call(lambda: None)
    assert calls == [1]
    client = case.connect(listener)
    assert echoes(client)
    case.call(case.loop.when_empty, lambda: calls.append(2))
    case.call(case.loop.when_empty, None)
    gone = threading.Event()
    client.close()
    case.call(case.loop.when_empty, gone.set)
    assert gone.wait(LIMIT)
    assert calls == [1]
