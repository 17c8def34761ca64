"""Listeners: they accept what waits, leave the socket to its caller, and live through shortages."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import logging
import os
import resource
import socket
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from kernel import open_descriptors
from loop_cases import LIMIT, OurCase, Recorder, read_to_the_end
from takeover import _loop_py
from takeover._sockets import Backoff, name_of
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


@pytest.mark.parametrize("count", [20, 300], ids=["a few", "more than are accepted at a time"])
def test_connections_that_wait_already_are_accepted(case: OurCase, handler: object, count: int) -> None:
    listener = case.bind(backlog=count)
    waiting = [case.connect(listener) for _ in range(count)]
    for client in waiting:
        client.sendall(b"ping")
    served = case.serve(listener, handler)
    assert all(client.recv(16) == b"ping" for client in waiting)
    assert case.call(lambda: served.accepted) == count
    assert case.call(lambda: case.loop.connections) == count


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


def test_an_abstract_name_of_a_peer_is_bytes(case: OurCase, tmp_path: Path) -> None:
    listener = case.bind(socket.AF_UNIX, address=str(tmp_path / "s"))
    recorder = Recorder()
    case.serve(listener, lambda: recorder)
    client = socket.socket(socket.AF_UNIX)
    case.sockets.append(client)
    client.bind("")  # to a name that the kernel chooses
    client.connect(listener.getsockname())
    assert recorder.next() == ("made",)
    assert case.call(recorder.transport.get_extra_info, "peername") == client.getsockname() != b""


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
    before = sorted(open_descriptors())
    for _ in range(3):
        case = OurCase(loop_module)
        listener = case.bind()
        case.serve(listener, handler)
        clients = [case.connect(listener) for _ in range(10)]
        assert all(echoes(client) for client in clients)
        for client in clients[:5]:
            client.close()
        case.close()
        assert sorted(open_descriptors()) == before


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


def test_a_listener_that_is_stopped_while_it_accepts_leaves_the_rest_in_the_queue(case: OurCase) -> None:
    class Last(Recorder):
        def connection_made(self, transport: Any) -> None:
            served[0].stop()
            super().connection_made(transport)

    recorders: list[Last] = []

    def factory() -> Last:
        recorders.append(Last())
        return recorders[-1]

    listener = case.bind()
    clients = [case.connect(listener) for _ in range(3)]
    served: list[Any] = []
    case.call(lambda: served.append(case.loop.listen(listener, factory)))
    for number in range(1, 4):
        case.call(lambda: None)
        case.call(lambda: None)
        assert len(recorders) == number
        assert not case.call(lambda: served[0].accepting)
        if number < 3:
            case.call(served[0].start)
    for client in clients:
        client.sendall(b"x")
    assert [recorder.until("data")[1] for recorder in recorders] == [b"x"] * 3


def test_of_two_listeners_that_stop_each_other_one_accepts(case: OurCase) -> None:
    """Connections wait at both, so both are ready when the first is served."""
    listeners = [case.bind(), case.bind()]
    served: list[Any] = []

    def recorder_of(which: int) -> Recorder:
        served[1 - which].stop()
        return Recorder()

    for listener in listeners:
        case.connect(listener)

    def serve() -> None:
        for which, listener in enumerate(listeners):
            served.append(case.loop.listen(listener, functools.partial(recorder_of, which)))

    case.call(serve)
    case.call(lambda: None)
    case.call(lambda: None)
    assert sorted(case.call(lambda: [each.accepted for each in served])) == [0, 1]
    assert sorted(case.call(lambda: [each.accepting for each in served])) == [False, True]


def test_a_socket_can_be_listened_on_again_with_another_handler(case: OurCase) -> None:
    listener = case.bind()
    first, second = Recorder(), Recorder()
    case.call(case.serve(listener, lambda: first).stop)
    case.serve(listener, lambda: second)
    case.connect(listener).sendall(b"x")
    assert second.until("data") == ("data", b"x")
    assert first.events.empty()


def test_a_listener_whose_socket_was_closed_cannot_be_started(case: OurCase, handler: object) -> None:
    listener = case.bind()
    served = case.call(lambda: case.loop.listen(listener, handler, accepting=False))
    listener.close()
    with pytest.raises(OSError, match="it was closed") as raised:
        case.call(served.start)
    assert raised.value.errno == errno.EBADF
    assert not case.call(lambda: served.accepting)


def test_a_listener_of_a_closed_loop_cannot_be_started(loop_module: ModuleType) -> None:
    loop = loop_module.Loop()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        served = loop.listen(listener, Recorder, accepting=False)
        loop.close()
        with pytest.raises(RuntimeError, match="closed"):
            served.start()


def test_only_the_loop_makes_listeners(loop_module: ModuleType) -> None:
    with pytest.raises(TypeError):
        loop_module.Listener()


@contextlib.contextmanager
def replaced(sock: socket.socket) -> Iterator[None]:
    """A file is in the place of the socket, which epoll_ctl does not take."""
    with sock.dup() as kept, tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), sock.fileno(), inheritable=False)
        try:
            yield
        finally:
            os.dup2(kept.fileno(), sock.fileno(), inheritable=False)


def test_a_listener_that_epoll_does_not_take_can_be_started_later(case: OurCase, handler: object) -> None:
    listener = case.bind()
    served = case.call(lambda: case.loop.listen(listener, handler, accepting=False))
    with replaced(listener), pytest.raises(PermissionError):
        case.call(served.start)
    assert not case.call(lambda: served.accepting)
    case.call(served.start)
    assert echoes(case.connect(listener))


def test_a_pause_of_a_listener_that_epoll_does_not_take_goes_on(
    case: OurCase, handler: object, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """accept(2) is out of descriptors; then epoll_ctl(2) fails; at last both work."""
    caplog.set_level(logging.INFO, "takeover")
    told = {errno.EMFILE: threading.Event(), errno.EPERM: threading.Event()}
    refused = Backoff.refused

    def watch(self: Backoff, error: int) -> None:
        refused(self, error)
        told[error].set()

    monkeypatch.setattr(Backoff, "refused", watch)
    listener = case.bind()
    case.serve(listener, handler)
    client = socket.socket()
    case.sockets.append(client)
    client.settimeout(LIMIT)
    with contextlib.ExitStack() as stack:

        def fall_short() -> None:
            client.connect(listener.getsockname())
            limits = resource.getrlimit(resource.RLIMIT_NOFILE)
            stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, limits)
            resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))

        case.call(fall_short)
        assert told[errno.EMFILE].wait(LIMIT)
        stack.close()
        case.call(lambda: stack.enter_context(replaced(listener)))
        assert told[errno.EPERM].wait(LIMIT)
    assert echoes(client)
    case.call(lambda: None)
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2
    assert "goes on after" in messages[1]


def test_a_connection_that_is_gone_before_it_is_accepted_costs_the_next_one_nothing() -> None:
    """The plain loop's accept, which can be had to fail so."""

    class Aborting(socket.socket):
        aborted = 0

        def accept(self) -> Any:
            if not self.aborted:
                self.aborted = 1
                raise ConnectionAbortedError(errno.ECONNABORTED, "gone")
            return super().accept()

    case = OurCase(_loop_py)
    recorder = Recorder()
    listener = Aborting()
    case.sockets.append(listener)
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    try:
        case.serve(listener, lambda: recorder)
        client = case.connect(listener)
        client.sendall(b"x")
        assert recorder.until("data") == ("data", b"x")
        assert listener.aborted
    finally:
        case.close()


def test_a_listener_that_was_closed_is_named_in_the_log_all_the_same() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        assert name_of(listener) == str(listener.getsockname())
    assert "closed" in name_of(listener)
