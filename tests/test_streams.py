"""The verifying client itself: it is content with an echo, and counts each way in which a server can betray it."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator

import pytest

from clients import eventually
from streams import Idle, Slow, Streams


@contextlib.contextmanager
def server(betray: Callable[[socket.socket, bytes], object]) -> Iterator[tuple[str, int]]:
    """Echoes with a thread for each connection, through `betray(sock, data)`."""

    def serve(sock: socket.socket) -> None:
        with sock, contextlib.suppress(OSError):
            while data := sock.recv(65536):
                betray(sock, data)
            if betray is trailing:
                sock.sendall(b"the end")

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, _ = listener.accept()
                threading.Thread(target=serve, args=(sock,), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        yield listener.getsockname()
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


def honest(sock: socket.socket, data: bytes) -> None:
    sock.sendall(data)


def trailing(sock: socket.socket, data: bytes) -> None:
    sock.sendall(data)


def reset(sock: socket.socket, _data: bytes) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    sock.close()


def test_an_echo_that_is_right_has_no_failure_whatever_the_kind_of_stream() -> None:
    with server(honest) as address:
        streams = Streams(address, bursty=5, idle=3, slow=2, endless=1)
        streams.goes_on()
        streams.stop()
    assert streams.failures == []
    assert all(stream.back for stream in streams.streams)
    assert [stream.back for stream in streams.streams if isinstance(stream, Idle)] == [32] * 3
    assert [stream.trailer for stream in streams.streams] == [b""] * 11


def test_what_comes_after_the_echo_is_kept_as_the_trailer() -> None:
    with server(trailing) as address:
        streams = Streams(address, bursty=1)
        streams.goes_on()
        streams.stop()
    assert streams.streams[0].trailer == b"the end"


@pytest.mark.parametrize(
    ("betray", "counts"),
    [
        (lambda sock, data: sock.sendall(data[1:]), (1, 0, 0)),
        (lambda sock, data: sock.sendall(data[::-1]), (0, 1, 0)),
        (lambda sock, data: sock.sendall(data + data), (0, 1, 0)),
        (lambda sock, data: sock.shutdown(socket.SHUT_WR), (0, 0, 1)),
        (reset, (0, 0, 1)),
    ],
    ids=["a byte too few", "reversed", "doubled", "closed", "reset"],
)
def test_each_betrayal_is_counted_as_what_it_is(
    betray: Callable[[socket.socket, bytes], object], counts: tuple[int, int, int]
) -> None:
    with server(betray) as address:
        streams = Streams(address, bursty=1, seed=3)
        eventually(lambda: streams.failures, "the streams notice")
        streams.close()
    assert (streams.lost, streams.reordered, streams.reset) == counts, streams.failures


def test_a_slow_stream_leaves_what_it_does_not_read_in_the_servers_backlog() -> None:
    with server(honest) as address:
        streams = Streams(address, slow=1)
        (stream,) = streams.streams
        assert isinstance(stream, Slow)
        eventually(lambda: stream._due_size > 1 << 18, "it is far behind")
        streams.stop()
    assert streams.failures == []
