"""What is fuzzed: each target takes any bytes, and raises only for a mistake of the package.

The two roles are the real drivers, on one end of a socket pair, with the real controller around them, whose thread does
not run: what they would do there, they do here, one step after the other. The input says what comes from the peer, as
bytes, frames, descriptors, ticks and ends. After each of them both sides have closed all that they owned, or it fails.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from array import array
from collections.abc import Callable, Iterator

from takeover import records
from takeover.control import ControlPath
from takeover.controller import Controller
from takeover.errors import RemoteProtocolError, TakeoverError
from takeover.exchange import Exchange
from takeover.hosted import Server, Settings
from takeover.incumbent import Incumbent
from takeover.link import Link
from takeover.protocol import Limits, Local
from takeover.successor import Successor
from takeover.wire import SCHEMA, Decoder, Type, encode

ITEMS = [
    {"role": role, "name": "", "url": "tcp://127.0.0.1:1", "device": 0, "inode": 0}
    for role in ("token", "lock", "control", "blob", "listener", "unheard of")
]
BODIES: dict[Type, dict[str, object]] = {
    Type.HELLO: {"versions": [1], "generation": 1, "build": "1", "pid": os.getpid(), "service": ""},
    Type.JOIN: {
        "version": 1,
        "capabilities": [],
        "room": 1000,
        "dry_run": False,
        "build": "1",
        "pid": os.getpid(),
        "service": "",
    },
    Type.LISTENERS: {"items": ITEMS, "left": 0},
    Type.READY: {"adopted": [], "bound": [], "unused": []},
    Type.DONE: {"left": 1, "elders": [{"pid": os.getpid(), "generation": 1, "connections": 0}]},
    Type.UNDO: {"reason": ""},
    Type.ABORT: {"reason": ""},
    Type.REFUSE: {"code": "busy", "reason": ""},
    Type.DRAINING: {"connections": 1},
    Type.BLOB: {"name": "blob"},
    Type.TAKE: {"room": 1, "pid": os.getpid(), "generation": 1},
}
"""A body that is right, of the messages of the two roles; the input changes them where it sends bytes."""

LIMITS = Limits(heartbeat=1.0, silence=3.0, warming_silence=3.0, greeting=3.0, offering=5.0, warming=5.0, starting=3.0)


class Input:
    """Takes numbers and pieces from the bytes of an input, zeros and nothing when they have run out."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def byte(self) -> int:
        return (self.take(1) or b"\0")[0]

    def take(self, size: int) -> bytes:
        taken, self.data = self.data[:size], self.data[size:]
        return taken


def frames(data: bytes) -> None:
    """The parser, fed with pieces of any size; what it takes is taken again when it is encoded."""
    source = Input(data)
    decoder = Decoder()
    with contextlib.suppress(RemoteProtocolError):
        while source.data:
            size, room = decoder.wants()
            piece = source.take(min(1 + source.byte() % 64, size))
            if not piece:
                return
            count = piece[2] if room and len(piece) > 2 else 0
            frame = decoder.feed(piece, array("i", range(min(count, room))))
            if frame is not None:
                body = frame.data if SCHEMA[frame.type].fields is None else frame.body
                with contextlib.suppress(TakeoverError):  # what other spelling is longer than a frame may be
                    again = encode(frame.type, body, len(frame.descriptors))
                    head = Decoder().feed(again[:8], frame.descriptors)
                    assert head is None or head.body == frame.body


def bodies(data: bytes) -> None:
    """The records of live connections, and what RELEASED holds; what is taken is written as it came."""
    with contextlib.suppress(RemoteProtocolError):
        found = records.unpack(data[1:], data[:1][0] % 8 if data else 0)
        assert b"".join(record.pack() for record in found) == data[1:]
        for record in found:
            records.unpack_peer(record.peer)
    with contextlib.suppress(RemoteProtocolError):
        release = records.unpack_release(data)
        assert records.pack_release(*release)[: 6 + 2 * len(release.kept)] == data[: 6 + 2 * len(release.kept)]


def incumbent(data: bytes) -> None:
    """The incumbent's driver, whose successor says anything."""
    with _controller("serving") as controller, _link() as (peer, link):
        exchange = Incumbent(link, controller)
        exchange.greet()
        _drive(exchange, peer, Input(data), (Local.PROBATION_OVER, Local.LEAVING))


def successor(data: bytes) -> None:
    """The successor's driver, whose incumbent says anything."""
    with _controller("joining") as controller, _link() as (peer, link):
        exchange = Successor(link, controller)
        _drive(exchange, peer, Input(data), (Local.WARM, Local.ACCEPTING, Local.FAIL, Local.LEAVING))
        exchange.inherited, left = [], exchange.inherited
        for kept in left:
            os.close(kept.descriptor)


TARGETS: dict[str, Callable[[bytes], None]] = {
    "frames": frames,
    "bodies": bodies,
    "incumbent": incumbent,
    "successor": successor,
}


def check(name: str, data: bytes) -> None:
    """Runs a target on an input. Raises AssertionError where it leaves a descriptor open, or closes one too many."""
    before = len(os.listdir("/proc/self/fd"))
    TARGETS[name](data)
    left = len(os.listdir("/proc/self/fd")) - before
    assert not left, f"{left} descriptors are left of {data!r}"


@contextlib.contextmanager
def _controller(state: str) -> Iterator[Controller]:
    """One that serves has a control socket and a lock; one that joins has neither yet."""
    logger = logging.getLogger("takeover")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    settings = Settings("", False, False, 1.0, 1.0, 3, LIMITS)
    controller = Controller(ControlPath(f"{__file__}.sock"), Server(), settings)
    controller.state = state
    if state == "serving":
        controller._listening = socket.socket(socket.AF_UNIX)
        controller._lock = os.open(__file__, os.O_RDONLY)
    try:
        yield controller
    finally:
        controller.close_after_fork()
        logger.setLevel(level)


@contextlib.contextmanager
def _link() -> Iterator[tuple[socket.socket, Link]]:
    peer, sock = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    peer.setblocking(False)
    with peer, contextlib.closing(Link(sock)) as link:
        yield peer, link


def _drive(exchange: Exchange, peer: socket.socket, source: Input, events: tuple[Local, ...]) -> None:
    try:
        with contextlib.suppress(TakeoverError):
            while source.data and not exchange.finished and not exchange.link.lost:
                _one(exchange, peer, source, events)
        exchange.link.lost = True
        with contextlib.suppress(TakeoverError):
            exchange.lose()
        closed = exchange.link.sock.fileno() < 0
        assert exchange.finished or closed or not exchange.machine.accepts(Local.LOST), exchange.state
    finally:
        if not exchange.finished:
            for descriptor in exchange.owned()[:1]:
                if descriptor >= 0:
                    os.close(descriptor)


def _one(exchange: Exchange, peer: socket.socket, source: Input, events: tuple[Local, ...]) -> None:
    """The next thing that happens, by the input."""
    what = source.byte()
    if what < 128:
        kind = sorted(BODIES.keys() | set(exchange.link._decoder.expected))[what % len(exchange.link._decoder.expected)]
        body = BODIES.get(kind, {}) if SCHEMA[kind].fields is not None else source.take(16)
        count = {Type.LISTENERS: len(ITEMS), Type.TAKE: 3, Type.BLOB: 1, Type.DONE: 1}.get(kind, 0)
        chosen = [source.byte() for _ in range(count)]
        if kind is Type.LISTENERS and chosen[0] % 2:
            chosen = chosen[:3]
            body = {"items": ITEMS[:3], "left": chosen[0] % 3 // 2}
            chosen = [1, 2, 3]
        _send(peer, encode(kind, body, len(chosen)), chosen)
        exchange.readable()
    elif what < 160:
        _send(peer, source.take(1 + what % 32), [])
        exchange.readable()
    elif what < 192:
        _send(peer, source.take(8), [source.byte() for _ in range(what % 5)])
        exchange.readable()
    elif what < 224:
        exchange.tick()
    else:
        event = events[what % len(events)]
        if exchange.machine.accepts(event):
            exchange.step(event)
    with contextlib.suppress(OSError):
        peer.recv(1 << 16)


def _send(peer: socket.socket, data: bytes, chosen: list[int]) -> None:
    """Sends bytes with a descriptor for each number: a file, a pipe with the bytes of a token, sockets, a blob."""
    numbers = [_MAKE[each % len(_MAKE)]() for each in chosen]
    try:
        with contextlib.suppress(OSError):
            socket.send_fds(peer, [data or b"\0"], numbers)
    finally:
        for number in numbers:
            os.close(number)


def _token() -> int:
    reading, writing = os.pipe()
    os.write(writing, b"cs")
    os.close(writing)
    return reading


def _listening() -> int:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind("")
        sock.listen(1)
        return sock.detach()


_MAKE: tuple[Callable[[], int], ...] = (
    lambda: os.open("/", os.O_RDONLY),
    _token,
    lambda: os.open(__file__, os.O_RDONLY),
    _listening,
    lambda: records.seal("blob", b"blob"),
    lambda: socket.socket(socket.AF_UNIX).detach(),
)
