"""The transport behaves as asyncio's does: each claim is made of both backends and of asyncio itself."""

from __future__ import annotations

import array
import contextlib
import gc
import os
import random
import socket
import struct
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from conftest import CYTHON_IS_BUILT
from loop_cases import LIMIT, Case, Recorder, make_case, read_to_the_end


@pytest.fixture(params=["cython", "python", "asyncio"])
def case(request: pytest.FixtureRequest) -> Iterator[Case]:
    if request.param == "cython" and not CYTHON_IS_BUILT:
        pytest.skip("the compiled modules are not built")
    running = make_case(request.param)
    yield running
    running.close()


def reset(client: socket.socket) -> None:
    """Close with RST instead of FIN."""
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()


def fill(case: Case, recorder: Recorder) -> int:
    """Write until the kernel takes no more and the high-water mark is passed. Returns the bytes written."""

    def write() -> int:
        written = 0
        while recorder.transport.get_write_buffer_size() <= 65536:
            recorder.transport.write(b"x" * 65536)
            written += 65536
        return written

    return int(case.call(write))


def test_callbacks_come_in_order_and_each_once(case: Case) -> None:
    recorder = Recorder()
    client = case.pair(recorder)
    client.sendall(b"one")
    assert recorder.next() == ("data", b"one")
    client.shutdown(socket.SHUT_WR)
    assert recorder.next() == ("eof",)
    assert recorder.next() == ("lost", None)
    assert client.recv(1) == b""
    case.call(lambda: None)
    assert recorder.events.empty()


def test_a_true_eof_received_keeps_our_half_open(case: Case) -> None:
    recorder = Recorder()
    recorder.keep_open = True
    client = case.pair(recorder)
    client.shutdown(socket.SHUT_WR)
    assert recorder.next() == ("eof",)
    assert not case.call(recorder.transport.is_closing)
    case.call(recorder.transport.write, b"still here")
    assert client.recv(64) == b"still here"
    case.call(recorder.transport.close)
    assert client.recv(64) == b""
    assert recorder.next() == ("lost", None)


def test_write_eof_ends_our_half_only(case: Case) -> None:
    recorder = Recorder()
    client = case.pair(recorder)

    def write() -> None:
        assert recorder.transport.can_write_eof()
        recorder.transport.write(b"last")
        recorder.transport.write_eof()
        recorder.transport.write_eof()
        with pytest.raises(RuntimeError, match="after write_eof"):
            recorder.transport.write(b"too late")

    case.call(write)
    assert read_to_the_end(client) == b"last"
    client.sendall(b"heard")
    assert recorder.next() == ("data", b"heard")
    client.shutdown(socket.SHUT_WR)
    assert [recorder.next(), recorder.next()] == [("eof",), ("lost", None)]


def test_write_eof_goes_out_behind_the_backlog(case: Case) -> None:
    recorder = Recorder()
    client = case.pair(recorder)
    written = fill(case, recorder)
    case.call(recorder.transport.write_eof)
    assert len(read_to_the_end(client)) == written
    assert [recorder.next(), recorder.next()] == [("pause",), ("resume",)]
    assert not case.call(recorder.transport.is_closing)


def test_writing_pauses_above_the_high_mark_and_resumes_at_the_low_one(case: Case) -> None:
    recorder = Recorder()
    client = case.pair(recorder)
    assert case.call(recorder.transport.get_write_buffer_limits) == (16384, 65536)
    written = fill(case, recorder)
    assert recorder.next() == ("pause",)
    written += fill(case, recorder)
    assert recorder.events.empty()
    received = 0
    while received < written:
        received += len(client.recv(1 << 16))
    assert recorder.next() == ("resume",)
    assert case.call(recorder.transport.get_write_buffer_size) == 0
    assert recorder.events.empty()


def test_the_marks_can_be_set_and_are_checked(case: Case) -> None:
    recorder = Recorder()
    case.pair(recorder)

    def limits(*args: Any, **kwargs: Any) -> Any:
        recorder.transport.set_write_buffer_limits(*args, **kwargs)
        return recorder.transport.get_write_buffer_limits()

    assert case.call(limits, 100) == (25, 100)
    assert case.call(lambda: limits(low=100)) == (100, 400)
    assert case.call(limits, 0) == (0, 0)
    with pytest.raises(ValueError, match="must be >="):
        case.call(limits, 1, 2)
    assert case.call(limits) == (16384, 65536)


def test_setting_a_mark_below_the_backlog_pauses_at_once(case: Case) -> None:
    recorder = Recorder()
    case.pair(recorder)
    case.call(recorder.transport.set_write_buffer_limits, 1 << 30)
    fill(case, recorder)
    assert recorder.events.empty()
    case.call(recorder.transport.set_write_buffer_limits, 0)
    assert recorder.next() == ("pause",)


def test_close_sends_the_backlog_first(case: Case) -> None:
    recorder = Recorder()
    client = case.pair(recorder)
    written = fill(case, recorder)
    case.call(recorder.transport.close)
    assert case.call(recorder.transport.is_closing)
    assert len(read_to_the_end(client)) == written
    assert recorder.until("lost") == ("lost", None)


def test_abort_drops_the_backlog(case: Case) -> None:
    recorder = Recorder()
    client = case.pair(recorder)
    written = fill(case, recorder)
    case.call(recorder.transport.abort)
    assert recorder.until("lost") == ("lost", None)
    with contextlib.suppress(ConnectionResetError):
        assert len(read_to_the_end(client)) < written


@pytest.mark.parametrize("method", ["close", "abort"])
def test_connection_lost_is_never_called_from_within(case: Case, method: str) -> None:
    recorder = Recorder()
    case.pair(recorder)

    def end() -> bool:
        getattr(recorder.transport, method)()
        getattr(recorder.transport, method)()
        return recorder.events.empty() and bool(recorder.transport.is_closing())

    assert case.call(end)
    assert recorder.next() == ("lost", None)
    case.call(recorder.transport.abort)
    case.call(lambda: None)
    assert recorder.events.empty()


def test_a_write_after_close_is_ignored(case: Case) -> None:
    recorder = Recorder()
    client = case.pair(recorder)

    def write() -> None:
        recorder.transport.write(b"said")
        recorder.transport.close()
        recorder.transport.write(b"unsaid")

    case.call(write)
    assert read_to_the_end(client) == b"said"
    assert recorder.next() == ("lost", None)
    case.call(recorder.transport.write, b"unsaid")


def test_nothing_is_received_after_close(case: Case) -> None:
    recorder = Recorder()
    client = case.pair(recorder)
    fill(case, recorder)
    case.call(recorder.transport.close)
    client.sendall(b"unheard")
    read = threading.Thread(target=read_quietly, args=(client,))
    read.start()
    recorder.until("lost")
    read.join(LIMIT)
    assert recorder.received == b""


def read_quietly(client: socket.socket) -> None:
    with contextlib.suppress(ConnectionResetError):  # our bytes were unread when it closed
        read_to_the_end(client)


def test_write_takes_every_bytes_like_object_and_nothing_else(case: Case) -> None:
    recorder = Recorder()
    client = case.pair(recorder)

    def write() -> None:
        for data in (b"a", bytearray(b"b"), memoryview(b"c"), b"", bytearray(), memoryview(array.array("i", [1]))):
            recorder.transport.write(data)
        for wrong in ("text", 1, None, [b"x"]):
            with pytest.raises(TypeError):
                recorder.transport.write(wrong)
        recorder.transport.writelines([b"d", bytearray(b"e"), memoryview(b"f")])
        recorder.transport.writelines([])
        recorder.transport.close()

    case.call(write)
    assert read_to_the_end(client) == b"abc" + struct.pack("i", 1) + b"def"


OURS = pytest.mark.parametrize("case", ["cython", "python"], indirect=True)


@OURS
def test_a_memoryview_with_gaps_is_written_without_them(case: Case) -> None:
    """asyncio takes none."""
    recorder = Recorder()
    client = case.pair(recorder)
    case.call(recorder.transport.write, memoryview(b"a-b-c")[::2])
    case.call(recorder.transport.close)
    assert read_to_the_end(client) == b"abc"


def test_what_the_kernel_has_no_room_for_at_all_is_sent_later(case: Case) -> None:
    recorder = Recorder()
    client = case.pair(recorder)

    def write() -> int:
        sent = 0
        with recorder.transport.get_extra_info("socket").dup() as sock, contextlib.suppress(BlockingIOError):
            while True:
                sent += sock.send(b"x" * 65536)
        recorder.transport.write(b"late")
        assert recorder.transport.get_write_buffer_size() == 4
        recorder.transport.close()
        return sent

    sent = case.call(write)
    assert read_to_the_end(client) == b"x" * sent + b"late"


@OURS
def test_what_was_written_can_be_changed_afterwards(case: Case) -> None:
    """Not so on asyncio, whose 3.12 keeps a view of what it could not send at once."""
    recorder = Recorder()
    client = case.pair(recorder)
    written = fill(case, recorder)
    data = bytearray(b"y" * 100_000)

    def write() -> None:
        recorder.transport.write(data)
        data[:] = b"z" * len(data)
        recorder.transport.close()

    case.call(write)
    assert read_to_the_end(client)[written:] == b"y" * 100_000


def test_reading_pauses_and_resumes(case: Case) -> None:
    recorder = Recorder()
    client = case.pair(recorder)
    assert case.call(recorder.transport.is_reading)
    case.call(recorder.transport.pause_reading)
    case.call(recorder.transport.pause_reading)
    assert not case.call(recorder.transport.is_reading)
    client.sendall(b"patience")
    for _ in range(10):
        case.call(lambda: None)
    assert recorder.events.empty()
    case.call(recorder.transport.resume_reading)
    assert recorder.next() == ("data", b"patience")
    assert case.call(recorder.transport.is_reading)


def test_bytes_that_somebody_else_has_read_meanwhile_are_no_end(case: Case) -> None:
    """Two connections can be read at once, and whoever is told first reads what is there for the other."""
    recorders = [Thief(), Thief()]
    clients = [case.pair(recorder) for recorder in recorders]
    recorders[0].other, recorders[1].other = recorders[1], recorders[0]

    def send() -> None:
        for client in clients:
            client.sendall(b"one")

    case.call(send)
    case.call(lambda: None)
    case.call(lambda: None)
    (received,) = [recorder for recorder in recorders if recorder.received]
    assert (received.received, received.stolen) == (b"one", b"one")
    robbed = received.other
    clients[recorders.index(robbed)].sendall(b"two")
    assert robbed.next() == ("data", b"two")


class Thief(Recorder):
    other: Thief | None = None
    stolen = b""

    def data_received(self, data: bytes) -> None:
        if self.other is not None and not self.other.received:
            self.other.other = None
            with self.other.transport.get_extra_info("socket").dup() as sock:
                self.stolen = sock.recv(10)
        super().data_received(data)


def test_pausing_resuming_and_setting_marks_after_close_are_ignored(case: Case) -> None:
    recorder = Recorder()
    client = case.pair(recorder)
    written = fill(case, recorder)
    assert recorder.next() == ("pause",)

    def close() -> None:
        recorder.transport.close()
        recorder.transport.pause_reading()
        recorder.transport.resume_reading()
        recorder.transport.set_write_buffer_limits(high=1)
        assert not recorder.transport.is_reading()

    case.call(close)
    assert len(read_to_the_end(client)) == written
    assert recorder.until("lost") == ("lost", None)


@OURS
def test_a_descriptor_that_was_replaced_costs_its_connection_only(case: Case, tmp_path: os.PathLike[str]) -> None:
    """By a file, which epoll_ctl does not take. Nothing can be told of a socket that is gone."""
    recorder, other = Recorder(), Recorder()
    client, healthy = case.pair(recorder), case.pair(other)

    def replace() -> None:
        recorder.transport.pause_reading()
        with open(os.path.join(tmp_path, "file"), "wb") as file:
            os.dup2(file.fileno(), recorder.transport.get_extra_info("socket").fileno(), inheritable=False)
        assert recorder.transport.get_extra_info("sockname", "unknown") == "unknown"
        recorder.transport.resume_reading()

    case.call(replace)
    assert type(recorder.until("lost")[1]) is PermissionError
    assert client.recv(1) == b""
    healthy.sendall(b"on")
    assert other.next() == ("data", b"on")


def test_a_reset_is_told_to_connection_lost(case: Case) -> None:
    recorder = Recorder()
    reset(case.pair(recorder))
    event = recorder.next()
    assert event[0] == "lost"
    assert type(event[1]) is ConnectionResetError


def test_a_reset_in_the_middle_of_a_write_is_told_to_connection_lost(case: Case) -> None:
    recorder = Recorder()
    client = case.pair(recorder)
    fill(case, recorder)
    assert recorder.next() == ("pause",)
    reset(client)
    event = recorder.next()
    assert event[0] == "lost"
    assert isinstance(event[1], (ConnectionResetError, BrokenPipeError))


def test_a_reset_while_reading_is_paused_waits_for_the_next_write(case: Case) -> None:
    recorder = Recorder()
    client = case.pair(recorder)
    case.call(recorder.transport.pause_reading)
    reset(client)
    for _ in range(10):
        case.call(lambda: None)
    assert recorder.events.empty()
    case.call(recorder.transport.write, b"anybody there?")
    event = recorder.next()
    assert event[0] == "lost"
    assert isinstance(event[1], (ConnectionResetError, BrokenPipeError))


def test_names_are_told_also_after_the_end(case: Case) -> None:
    recorder = Recorder()
    client = case.pair(recorder)
    ours, theirs = client.getpeername(), client.getsockname()
    transport = recorder.transport
    assert case.call(transport.get_extra_info, "peername") == theirs
    client.close()
    recorder.until("lost")
    assert case.call(transport.get_extra_info, "sockname") == ours
    assert case.call(transport.get_extra_info, "peername") == theirs
    assert case.call(transport.get_extra_info, "weather") is None
    assert case.call(transport.get_extra_info, "weather", "rain") == "rain"


def test_the_socket_of_a_transport_cannot_close_it(case: Case) -> None:
    recorder = Recorder()
    client = case.pair(recorder)
    sock = case.call(recorder.transport.get_extra_info, "socket")
    assert sock.family == socket.AF_INET
    assert sock.type == socket.SOCK_STREAM
    assert sock.getpeername() == client.getsockname()
    assert not os.get_inheritable(sock.fileno())
    del sock
    gc.collect()
    client.sendall(b"alive")
    assert recorder.next() == ("data", b"alive")
    sock = case.call(recorder.transport.get_extra_info, "socket")
    client.close()
    recorder.until("lost")
    case.call(lambda: None)
    assert sock.fileno() == -1
    with pytest.raises(OSError, match=r"descriptor|closed"):
        sock.getpeername()


def test_options_and_names_of_the_socket_of_a_transport(case: Case) -> None:
    recorder = Recorder()
    client = case.pair(recorder)
    sock = case.call(recorder.transport.get_extra_info, "socket")
    for value in (1, 0):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, value)
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == value
    assert sock.getsockname() == client.getpeername()
    assert f"fd={sock.fileno()}" in repr(sock)


@OURS
def test_a_transport_says_its_descriptor_and_how_far_it_is(case: Case) -> None:
    recorder = Recorder()
    client = case.pair(recorder)
    number = case.call(recorder.transport.get_extra_info, "socket").fileno()
    assert case.call(repr, recorder.transport) == f"<Transport fd={number} open>"
    fill(case, recorder)
    case.call(recorder.transport.close)
    assert case.call(repr, recorder.transport) == f"<Transport fd={number} closing>"
    read_to_the_end(client)
    recorder.until("lost")
    assert case.call(repr, recorder.transport) == "<Transport fd=-1 closed>"


@OURS
def test_only_the_loop_makes_transports(case: Case) -> None:
    recorder = Recorder()
    case.pair(recorder)
    with pytest.raises(TypeError):
        type(recorder.transport)()


def test_another_protocol_can_take_the_place(case: Case) -> None:
    first, second = Recorder(), Recorder()
    client = case.pair(first)
    assert case.call(first.transport.get_protocol) is first
    case.call(first.transport.set_protocol, second)
    client.sendall(b"for the second")
    assert second.next() == ("data", b"for the second")
    client.close()
    second.until("lost")
    assert first.events.empty()


def test_a_stream_arrives_whole_both_ways_at_any_size(case: Case) -> None:
    class Mirror(Recorder):
        def data_received(self, data: bytes) -> None:
            self.transport.write(data)

        def pause_writing(self) -> None:
            self.transport.pause_reading()

        def resume_writing(self) -> None:
            self.transport.resume_reading()

    client = case.pair(Mirror())
    chance = random.Random(2)
    sent = [chance.randbytes(chance.choice((1, 64, 2048, 2049, 16384, 262144, 1 << 20))) for _ in range(40)]

    def send() -> None:
        for part in sent:
            client.sendall(part)
        client.shutdown(socket.SHUT_WR)

    sender = threading.Thread(target=send)
    sender.start()
    received = read_to_the_end(client)
    sender.join(LIMIT)
    assert received == b"".join(sent)


def test_a_transport_and_its_protocol_are_freed_after_the_end(case: Case) -> None:
    freed = threading.Event()

    class Mortal(Recorder):
        def __del__(self) -> None:
            freed.set()

    listener = case.bind()
    case.serve(listener, Mortal)
    client = case.connect(listener)
    client.close()
    getattr(case, "made", []).clear()
    for _ in range(1000):
        case.call(gc.collect)
        getattr(case, "made", []).clear()
        if freed.wait(0.01):
            return
    pytest.fail("the protocol is still there")
