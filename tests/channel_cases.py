"""Two loops in one thread, turned by hand, and a channel between them, or between one of them and a stranger."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

from takeover import records
from takeover.channel import Account, Channel, open_channel
from takeover.control import Peer
from takeover.exchange import read_token
from takeover.giver import Giver
from takeover.link import Link
from takeover.protocol import CHANNEL_BYTE, Limits
from takeover.records import BATCH, Record
from takeover.taker import Taker
from takeover.wire import Body, Frame, Type

LIMIT = 20.0  # seconds after which what a test waits for has failed to come
QUICK = Limits(heartbeat=0.005, silence=0.04)
PATIENT = Limits(heartbeat=0.1, silence=1000.0)


class Tally(asyncio.Protocol):
    """Answers in capitals, and knows all that its connection has received, wherever it was received."""

    def __init__(self) -> None:
        self.received = b""
        self.made = 0
        self.lost = False
        self.transport: Any = None

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.made += 1

    def data_received(self, data: bytes) -> None:
        self.received += data
        self.transport.write(data.upper())

    def connection_lost(self, error: Exception | None) -> None:
        self.lost = True

    def export_state(self) -> bytes:
        return self.received

    def import_state(self, state: bytes) -> None:
        self.received = state


class Stranger:
    """An end of a channel that says whatever it is told to."""

    def __init__(self, sock: int, token: int, ledger: int) -> None:
        self.link = Link(socket.socket(fileno=sock), Peer(os.getpid(), os.geteuid(), None))
        self.token = token
        self.ledger = ledger
        os.set_blocking(token, False)

    def say(self, kind: Type, body: Body | bytes | None = None, descriptors: Sequence[int] = ()) -> None:
        self.link.send(kind, body, descriptors)
        assert not self.link.unsent

    def adopted(self, batch: int, room: int = 1000, refused: Sequence[object] = ()) -> None:
        self.say(Type.ADOPTED, {"batch": batch, "room": room, "refused": list(refused)})

    def connections(self, number: int, descriptors: Sequence[int], several: Sequence[Record]) -> None:
        body = b"".join(record.pack() for record in several)
        self.say(Type.CONNECTIONS, BATCH.pack(number, 0, len(descriptors), len(body)) + body, descriptors)

    def hears(self) -> list[Frame]:
        frames: list[Frame] = []
        while more := self.link.receive():
            frames += more
        return frames

    def claims(self) -> bool:
        return read_token(self.token) == CHANNEL_BYTE

    def hang_up(self) -> None:
        if self.token >= 0:
            self.link.close()
            os.close(self.token)
            os.close(self.ledger)
            self.token = -1


class Scene:
    def __init__(self, giving: ModuleType, taking: ModuleType, handler: Any = Tally) -> None:
        self.protocols: tuple[list[Any], list[Any]] = ([], [])
        self.account = (Account(), Account())
        self.loops = (giving.Loop(), taking.Loop())
        listener = socket.create_server(("127.0.0.1", 0))
        self.listeners = (listener, listener.dup())
        self.handlers = (handler, handler)
        for which, (module, loop) in enumerate(zip((giving, taking), self.loops, strict=True)):
            if isinstance(handler, module.Handler):
                made = handler
            else:
                made = module.ECHO if handler == "echo" else lambda which=which: self._make(which)
            loop.listen(self.listeners[which], made, accepting=which == 0)
        self.clients: list[socket.socket] = []
        self.ends: list[Giver | Taker] = []
        self.strangers: list[Stranger] = []
        self.ended: list[str] = []

    @property
    def inode(self) -> int:
        return os.fstat(self.listeners[0].fileno()).st_ino

    def _make(self, which: int) -> Any:
        protocol = self.handlers[which]()
        self.protocols[which].append(protocol)
        return protocol

    def connect(self, count: int) -> list[socket.socket]:
        """Clients, all of them served by the giving loop."""
        for _ in range(count):
            wanted = self.loops[0].connections + 1
            self.clients.append(socket.create_connection(self.listeners[0].getsockname()))
            self.clients[-1].settimeout(LIMIT)
            self.until(lambda wanted=wanted: self.loops[0].connections == wanted)  # type: ignore[misc]
        return self.clients[-count:]

    def giver(self, sock: int, token: int, ledger: int, limits: Limits, room: int = 1000) -> Giver:
        channel = Channel(sock, token, ledger, os.getpid(), 2, room)
        end = Giver(self.loops[0], self.loops[0], channel, limits, self.account[0], lambda: self.ended.append("giver"))
        self.ends.append(end)
        return end

    def taker(self, sock: int, token: int, ledger: int, limits: Limits, expected: int = 0) -> Taker:
        channel = Channel(sock, token, ledger, os.getpid(), 1, 1000, expected)
        end = Taker(self.loops[1], self.loops[1], channel, limits, self.account[1], lambda: self.ended.append("taker"))
        self.ends.append(end)
        return end

    def move(self, limits: Limits = PATIENT) -> tuple[Giver, Taker]:
        ours, theirs = open_channel()
        return self.giver(*ours, limits), self.taker(*theirs, limits)

    def give(self, limits: Limits = PATIENT, room: int = 1000) -> tuple[Giver, Stranger]:
        ours, theirs = open_channel()
        self.strangers.append(Stranger(*theirs))
        return self.giver(*ours, limits, room), self.strangers[-1]

    def take(self, limits: Limits = PATIENT) -> tuple[Stranger, Taker]:
        ours, theirs = open_channel()
        self.strangers.append(Stranger(*ours))
        return self.strangers[-1], self.taker(*theirs, limits)

    def turn(self, times: int = 1) -> None:
        """Both loops do what there is to do now."""
        for _ in range(times):
            for loop in self.loops:
                loop.call_soon(loop.stop)
                loop.run()

    def until(self, done: Callable[[], object]) -> None:
        deadline = time.monotonic() + LIMIT
        while not done():
            assert time.monotonic() < deadline, "what a test waits for does not come"
            self.turn()

    def counts(self) -> tuple[int, int]:
        return self.loops[0].connections, self.loops[1].connections

    def answers(self, clients: Sequence[socket.socket] | None = None) -> None:
        """Each client gets its answer, and nothing else."""
        for number, client in enumerate(self.clients if clients is None else clients):
            said = b"ask %d" % number
            client.sendall(said)
            expected = said if self.handlers[0] == "echo" else said.upper()
            assert self.read(client, len(expected)) == expected

    def read(self, client: socket.socket, size: int) -> bytes:
        """So many bytes, or fewer at the end of the stream."""
        found = b""
        client.setblocking(False)

        def more() -> bool:
            nonlocal found
            try:
                data = client.recv(size - len(found))
            except BlockingIOError:
                return False
            found += data
            return not data or len(found) == size

        self.until(more)
        client.settimeout(LIMIT)
        return found

    def close(self) -> None:
        for end in self.ends:
            end.leave()
        for stranger in self.strangers:
            stranger.hang_up()
        for loop in self.loops:
            loop.close()
        for sock in (*self.listeners, *self.clients):
            sock.close()


def a_record(scene: Scene, state: bytes = b"", **more: Any) -> Record:
    name = records.pack_peer(socket.AF_INET, ("127.0.0.1", 1))
    fixed = Record(scene.inode, records.HAS_STATE, 0, name, 0, 65536, 16384, b"", b"", state)
    return fixed._replace(**more)


def some_connections(scene: Scene, count: int) -> tuple[list[socket.socket], list[socket.socket]]:
    """Clients, and the accepted sockets of a process that is not one of the scene's loops."""
    clients, accepted = [], []
    for _ in range(count):
        client, server = socket.socketpair()
        clients.append(client)
        accepted.append(server)
    scene.clients += [*clients, *accepted]
    return clients, accepted


def offer(scene: Scene, stranger: Stranger, number: int, count: int = 1, **more: Any) -> list[socket.socket]:
    """The stranger sends a batch, and keeps no copies; its clients."""
    clients, accepted = some_connections(scene, count)
    stranger.connections(number, [sock.fileno() for sock in accepted], [a_record(scene, **more)] * count)
    for sock in accepted:
        sock.close()
    return clients


def heard(scene: Scene, stranger: Stranger, *kinds: Type, keep: bool = False) -> list[Frame]:
    """Waits for these messages, and no others; the descriptors that came are closed, unless they are to `keep`."""
    frames: list[Frame] = []

    def come() -> bool:
        frames.extend(stranger.hears())
        return len(frames) >= len(kinds)

    scene.until(come)
    assert tuple(frame.type for frame in frames) == kinds
    for frame in frames:
        for descriptor in () if keep else frame.descriptors:
            os.close(descriptor)
    return frames


MakeScene = Callable[..., Scene]
