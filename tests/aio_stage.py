"""Two loops' connections in one loop: a giver that clients are connected to, and a taker that they move to by steps."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from array import array
from collections.abc import Callable, Sequence
from typing import Any

from takeover.aio_entrance import Entrance, Home
from takeover.aio_moving import Mover
from takeover.records import HAS_STATE, Record, pack_peer

INODE = 1
PEER = pack_peer(socket.AF_INET, ("127.0.0.1", 1))
MUCH = b"x" * (8 << 20)
"""More than the kernel takes for a client that does not read."""


class Guest(asyncio.Protocol):
    """Notes what it is told."""

    def __init__(self) -> None:
        self.events: list[Any] = []
        self.transport: Any = None

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.events.append("made")

    def data_received(self, data: bytes) -> None:
        self.events.append(data)

    def eof_received(self) -> bool:
        self.events.append("eof")
        return True

    def pause_writing(self) -> None:
        self.events.append("pause")

    def resume_writing(self) -> None:
        self.events.append("resume")

    def connection_lost(self, error: Exception | None) -> None:
        self.events.append("lost")

    def connection_moved(self) -> None:
        self.events.append("moved")

    def export_state(self) -> Any:
        return b""

    def import_state(self, state: bytes) -> None:
        assert state == b""


class Batch:
    """What one export has given, and what the taker has of it."""

    def __init__(self, records: bytes, descriptors: array[int], following: int, reasons: dict[str, int]) -> None:
        self.records = records
        self.descriptors = descriptors
        self.following = following
        self.reasons = reasons
        self.copies = array("i")


class Stage:
    """A block of it leaves nothing open. The protocols of both sides are in `giving` and `taking`, as they are made."""

    def __init__(self, factory: Callable[[], Any] = Guest, taking: Callable[[], Any] | None = None) -> None:
        self.giving: list[Any] = []
        self.taking: list[Any] = []
        self.clients: list[socket.socket] = []
        loop = asyncio.get_running_loop()
        self.giver, self.taker = Mover(loop), Mover(loop)
        given, taken, second = self.giving, self.taking, taking or factory
        self._homes = (
            Home(INODE, lambda: keep(given, factory())),
            Home(INODE, lambda: keep(taken, second())),
        )
        self.giver.homes[INODE], self.taker.homes[INODE] = self._homes

    async def accept(self, *, tcp: bool = False) -> Any:
        """The protocol of a connection more, whose client is the last of `clients`."""
        client, served = pair(tcp)
        self.clients.append(client)
        loop = asyncio.get_running_loop()
        await loop.connect_accepted_socket(lambda: Entrance(self.giver, self._homes[0]), served)
        return self.giving[-1]

    def export(self, start: int = 0, most: int = 100) -> Batch:
        reasons: dict[str, int] = {}
        return Batch(*self.giver.export_connections(start, most, 1 << 20, reasons), reasons)

    def adopt(self, batch: Batch) -> list[list[Any]]:
        """Has the taker adopt copies, as if they had come from another process."""
        batch.copies = array("i", map(os.dup, batch.descriptors))
        return self.taker.adopt_connections(batch.records, batch.copies, 1)

    async def move(self, batch: Batch) -> Any:
        """All of a batch, of which nothing is in the way; the protocol of the last one."""
        before = len(self.taking)
        assert self.adopt(batch) == []
        assert self.giver.relinquish_connections(batch.descriptors, ()) == ([], {})
        self.taker.start_connections(batch.copies, (), {})
        assert len(self.taking) == before + len(batch.descriptors)
        await until(lambda: all(seated(protocol) for protocol in self.taking[before:]))
        return self.taking[-1]

    async def arrive(
        self,
        flags: int = 0,
        unread: bytes = b"",
        unsent: bytes = b"",
        ends: tuple[socket.socket, socket.socket] | None = None,
    ) -> Any:
        """The protocol of a connection that has come to the taker, from nowhere in particular, and has been started."""
        client, served = ends or pair(tcp=False)
        self.clients.append(client)
        record = Record(INODE, HAS_STATE | flags, 0, PEER, 0, 65536, 16384, unread, unsent, b"")
        batch = array("i", [served.detach()])
        assert self.taker.adopt_connections(record.pack(), batch, 1) == []
        self.taker.start_connections(batch, (), {})
        protocol = self.taking[-1]
        await until(lambda: protocol.transport is not None)
        return protocol

    def turn_round(self) -> None:
        """Who was the taker gives from now on."""
        self.giver, self.taker = self.taker, self.giver
        self.giving, self.taking = self.taking, self.giving

    async def __aenter__(self) -> Stage:  # noqa: PYI034 - typing.Self needs Python 3.11
        return self

    async def __aexit__(self, *_: object) -> None:
        for mover in (self.giver, self.taker):
            mover.abort()
        await turns()
        for client in self.clients:
            client.close()


def pair(tcp: bool) -> tuple[socket.socket, socket.socket]:
    """A client's end and a server's, neither of which blocks."""
    if tcp:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            client = socket.create_connection(listener.getsockname())
            served = listener.accept()[0]
    else:
        client, served = socket.socketpair()
    client.setblocking(False)
    served.setblocking(False)
    return client, served


def keep(protocols: list[Any], protocol: Any) -> Any:
    protocols.append(protocol)
    return protocol


def seated(protocol: Any) -> bool:
    return getattr(protocol, "transport", True) is not None


async def until(question: Callable[[], object]) -> None:
    """Turns the loop until the answer is true; whoever runs the test has a limit."""
    while not question():  # noqa: ASYNC110 - nothing tells
        await asyncio.sleep(0)


async def turns(count: int = 20) -> None:
    """Time enough for whatever is to come without a wait."""
    for _ in range(count):
        await asyncio.sleep(0)


async def read_all(client: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        try:
            part = client.recv(size - len(data))
        except BlockingIOError:
            await asyncio.sleep(0)
            continue
        assert part, f"the end after {len(data)} bytes of {size}"
        data += part
    return bytes(data)


def texts(events: Sequence[Any]) -> bytes:
    """What was received, of all that happened."""
    return b"".join(event for event in events if isinstance(event, bytes))


def unread(client: socket.socket) -> bytes | None:
    """What has come for a client; None where nothing has, not even the end of file."""
    with contextlib.suppress(BlockingIOError):
        return client.recv(1000)
    return None
