"""The built-in echo handler, and one that somebody else compiled against the .pxd files."""

from __future__ import annotations

import importlib
import random
import select
import socket
import struct
import threading
from collections.abc import Iterator
from types import ModuleType

import pytest

from compiled import compiled
from loop_cases import LIMIT, OurCase, read_to_the_end


@pytest.fixture
def case(loop_module: ModuleType) -> Iterator[OurCase]:
    running = OurCase(loop_module)
    yield running
    running.close()


def echo_client(case: OurCase, loop_module: ModuleType) -> socket.socket:
    listener = case.bind()
    case.serve(listener, loop_module.ECHO)
    return case.connect(listener)


@pytest.mark.parametrize("seed", range(3))
def test_every_byte_comes_back_in_order(case: OurCase, loop_module: ModuleType, seed: int) -> None:
    client = echo_client(case, loop_module)
    chance = random.Random(seed)
    sent = [chance.randbytes(chance.choice((1, 64, 4096, 16384, 300_000, 3 << 20))) for _ in range(20)]

    def send() -> None:
        for part in sent:
            client.sendall(part)
        client.shutdown(socket.SHUT_WR)

    sender = threading.Thread(target=send)
    sender.start()
    received = read_to_the_end(client)
    sender.join(LIMIT)
    assert received == b"".join(sent)
    assert case.call(lambda: True)


def test_a_peer_that_does_not_read_is_not_read_from(case: OurCase, loop_module: ModuleType) -> None:
    client = echo_client(case, loop_module)
    client.setblocking(False)
    sent = 0
    idle = 0
    while idle < 20 and sent < 256 << 20:
        if select.select([], [client], [], 0.02)[1]:
            sent += client.send(b"x" * 65536)
            idle = 0
        else:
            idle += 1
    assert sent < 256 << 20
    client.settimeout(LIMIT)
    received = 0
    while received < sent:
        received += len(client.recv(1 << 20))
    client.sendall(b"end")
    assert client.recv(16) == b"end"


def test_the_end_of_the_client_comes_after_what_was_queued(case: OurCase, loop_module: ModuleType) -> None:
    client = echo_client(case, loop_module)
    client.setblocking(False)
    sent = 0
    while sent < 1 << 20:
        sent += client.send(b"x" * 65536)
    client.shutdown(socket.SHUT_WR)
    client.settimeout(LIMIT)
    assert len(read_to_the_end(client)) == sent
    empty = threading.Event()
    case.call(case.loop.when_empty, empty.set)
    assert empty.wait(LIMIT)


def test_resets_leave_nothing_behind(case: OurCase, loop_module: ModuleType) -> None:
    listener = case.bind()
    case.serve(listener, loop_module.ECHO)
    for size in (0, 1, 1 << 20):
        for _ in range(20):
            client = case.connect(listener)
            client.setblocking(False)
            if size:
                client.send(b"x" * size)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            client.close()
    survivor = case.connect(listener)
    survivor.sendall(b"x")
    assert survivor.recv(1) == b"x"
    survivor.close()
    empty = threading.Event()
    case.call(case.loop.when_empty, empty.set)
    assert empty.wait(LIMIT)


SOURCE = """
# cython: language_level=3
from libc.stdlib cimport free, malloc
from takeover._loop cimport (
    Callbacks, Connection, Core, Handler, connection_abort, connection_close, connection_pause_reading,
    connection_resume_reading, connection_write, connection_write_eof,
)

cdef size_t closed_count = 0

cdef void opened(Core *core, Connection *connection) noexcept nogil:
    connection.state = malloc(1)
    (<char *>connection.state)[0] = b'a'
    connection_write(core, connection, b"hello ", 6)

cdef void received(Core *core, Connection *connection, const char *data, size_t size) noexcept nogil:
    cdef size_t index
    cdef char letter
    for index in range(size):
        if data[index] == b'q':
            connection_close(core, connection)
        elif data[index] == b'k':
            connection_abort(core, connection)
        elif data[index] == b'e':
            connection_write_eof(core, connection)
        else:
            letter = (<char *>connection.state)[0]
            connection_write(core, connection, &letter, 1)
            (<char *>connection.state)[0] += 1

cdef bint ended(Core *core, Connection *connection) noexcept nogil:
    connection_write(core, connection, b" bye", 4)
    return False

cdef void closed(Core *core, Connection *connection, int error) noexcept nogil:
    global closed_count
    free(connection.state)
    closed_count += 1

def closings():
    return closed_count

cdef Handler make():
    cdef Handler handler = Handler()
    handler.callbacks.opened = opened
    handler.callbacks.received = received
    handler.callbacks.ended = ended
    handler.callbacks.closed = closed
    return handler

LETTERS = make()
"""


@pytest.fixture(scope="module")
def letters(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    return compiled("letters", SOURCE, tmp_path_factory.mktemp("letters"))


def test_a_handler_that_somebody_else_compiled_is_served(letters: ModuleType) -> None:
    case = OurCase(importlib.import_module("takeover._loop"))
    listener = case.bind()
    case.serve(listener, letters.LETTERS)
    before = letters.closings()
    clients = [case.connect(listener) for _ in range(4)]
    for client, text in zip(clients, (b"...", b"..q.", b".k", b"..e"), strict=True):
        client.sendall(text)
    clients[0].shutdown(socket.SHUT_WR)
    assert read_to_the_end(clients[0]) == b"hello abc bye"
    assert read_to_the_end(clients[1]) == b"hello ab"
    assert read_to_the_end(clients[2]) == b"hello a"
    assert read_to_the_end(clients[3]) == b"hello ab"
    assert case.call(lambda: case.loop.connections) == 1
    case.close()
    assert letters.closings() - before == 4
