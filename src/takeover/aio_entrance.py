"""How a connection comes into an asyncio loop: accepted by a listener, or moved here from an older process."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .aio_streams import Stream
from .records import EOF_RECEIVED, EOF_WRITTEN, PAUSED, Moved, Record

if TYPE_CHECKING:
    from .aio_moving import Hold, Mover

log = logging.getLogger("takeover")

PAUSE = 0.01
"""Seconds between two looks at whether a protocol that had paused reading reads again."""

_moved: weakref.WeakKeyDictionary[asyncio.BaseTransport, Moved] = weakref.WeakKeyDictionary()


def moved(transport: asyncio.BaseTransport) -> Moved | None:
    """Where a connection came from, and how often it has moved; None for one that was accepted in this process.

    It knows the native loop's transports too, whose get_extra_info("takeover") tells it; asyncio's take no addition.
    """
    known: Moved | None = transport.get_extra_info("takeover")
    if known is None:
        with contextlib.suppress(TypeError):  # a transport without weak references is none of asyncio's
            known = _moved.get(transport)
    return known


class Home:
    """A listener as the connections know it that came from it: how their protocols are made."""

    native = False

    def __init__(self, inode: int, factory: Callable[[], Any]) -> None:
        self.inode = inode
        self.factory = factory
        self.accepted = 0


class Seat:
    """One connection of this loop, from its connection_made() until its socket is closed. `stays` for good, or not.

    `end_seen` says that nothing but the end of file was left to be read when the connection was last looked at.
    """

    __slots__ = ("end_seen", "family", "hold", "home", "socket", "stays", "stream", "times", "transport")

    def __init__(self, transport: Any, home: Home, protocol: Any, times: int) -> None:
        self.transport = transport
        self.socket = transport.get_extra_info("socket")
        self.family = int(self.socket.family)
        self.home = home
        self.stream = protocol if isinstance(protocol, Stream) else None
        self.times = times
        self.stays = False
        self.end_seen = False
        self.hold: Hold | None = None

    @property
    def empty(self) -> bool:
        """Whether the connection is over: its socket is closed, and its handler has ended."""
        return self.socket.fileno() < 0 and (self.stream is None or self.stream.over)

    @property
    def ends(self) -> bool:
        """Whether its socket is closed, or about to be in this turn of the loop."""
        closing = self.transport.is_closing() and not self.transport.get_write_buffer_size()
        return closing or self.socket.fileno() < 0


class Arrival:
    """A connection that was adopted and is not served yet; owns the socket."""

    def __init__(self, home: Home, record: Record, sock: socket.socket, protocol: Any, moved: Moved) -> None:
        self.home = home
        self.record = record
        self.socket = sock
        self.protocol = protocol
        self.moved = moved
        self.tail = b""


class Entrance(asyncio.Protocol):
    """The first protocol of every transport: it makes the connection known, and makes room for the real one.

    A connection that has moved here first sends what was left to send.
    """

    def __init__(self, mover: Mover, home: Home, arrival: Arrival | None = None) -> None:
        self.mover = mover
        self.home = home
        self.arrival = arrival
        self.protocol: Any = None
        self.transport: Any = None
        self._full = False
        mover.coming.add(self)
        task = asyncio.current_task() if arrival is None else None
        if task is not None:
            task.add_done_callback(self._entered)

    def _entered(self, _task: object) -> None:
        """The task of asyncio that accepted us has ended, be it that the handshake failed: nothing else would tell."""
        self.mover.coming.discard(self)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.mover.coming.discard(self)
        self.transport = transport
        try:
            if self.arrival is not None:
                self._restore(self.arrival)
                return
            self.home.accepted += 1
            self.protocol = self.home.factory()
            self.mover.seat(Seat(transport, self.home, self.protocol, 0))
            self.transport.set_protocol(self.protocol)
            self.protocol.connection_made(transport)
        except Exception:
            log.exception("connection_made with %r raised; its connection is aborted", self.home.factory)
            self.transport.abort()

    def _restore(self, arrival: Arrival) -> None:
        record, transport, self.protocol = arrival.record, self.transport, arrival.protocol
        self.mover.seat(Seat(transport, self.home, self.protocol, arrival.moved.times))
        _moved[transport] = arrival.moved
        transport.set_write_buffer_limits(high=record.high, low=record.low)
        for unsent in (record.unsent, arrival.tail):
            if len(unsent):
                transport.write(bytes(unsent))
        if record.flags & EOF_WRITTEN:
            with contextlib.suppress(OSError):  # the peer has reset the connection
                transport.write_eof()
        porch = None
        if not isinstance(self.protocol, Stream) and (record.flags & (PAUSED | EOF_RECEIVED) or len(record.unread)):
            porch = Porch(transport, self.protocol, record.flags, bytes(record.unread))
        else:
            transport.set_protocol(self.protocol)
        self.protocol.connection_made(transport)
        if self._full:
            self._full = False
            self.protocol.pause_writing()
        if porch is not None:
            porch.begin()

    def pause_writing(self) -> None:
        self._full = True


class Porch(asyncio.Protocol):
    """Between the entrance and a protocol that had paused reading or heard the end of file before it moved here.

    Loops begin to read behind connection_made() even where that has paused reading (uvloop, asyncio before 3.11), and
    every loop reads the end of file once more, also where a connection on its way has come back. What comes early waits
    until the protocol reads again, or moves on with it as unread bytes; what the protocol knows it is not told.
    """

    def __init__(self, transport: Any, protocol: Any, flags: int, unread: bytes = b"") -> None:
        self.transport = transport
        self.protocol = protocol
        self.knows_end = bool(flags & EOF_RECEIVED)
        self.early = [unread] if unread else []
        self._pausing: asyncio.Handle | None = None
        transport.set_protocol(self)
        if flags & PAUSED:
            transport.pause_reading()
            self._pausing = asyncio.get_running_loop().call_soon(self._settle)

    def begin(self) -> None:
        """Behind the protocol's connection_made(), which may have wanted to read."""
        if self._pausing is not None and self.transport.is_reading():
            self._pausing.cancel()
            self._pausing = None
        if self._pausing is None:
            asyncio.get_running_loop().call_soon(self.step_aside)  # uvloop does not say before that it reads

    @property
    def settled(self) -> bool:
        """Whether the loop has begun to read, or has not, as the protocol wants it."""
        return self._pausing is None

    def data_received(self, data: bytes) -> None:
        self.early.append(data)
        if self._pausing is None:
            self._deliver()

    def eof_received(self) -> bool:
        if self._pausing is not None:
            return True  # it is read once more when the protocol reads again
        self._deliver()
        return self.knows_end or bool(self.protocol.eof_received())

    def connection_lost(self, error: Exception | None) -> None:
        self._pausing = None
        if error is not None:  # who has closed its connection hears nothing of it any more
            self._deliver()
        self.protocol.connection_lost(error)

    def pause_writing(self) -> None:
        self.protocol.pause_writing()

    def resume_writing(self) -> None:
        self._settle()  # the protocol may want to read now
        self.protocol.resume_writing()

    def _settle(self) -> None:
        if self._pausing is not None:
            self._pausing.cancel()
            self._pausing = None
            self.transport.resume_reading()  # asyncio before 3.11 reads although it knows that it is paused
            self.transport.pause_reading()
            self.step_aside()

    def step_aside(self) -> None:
        """Makes room for the protocol, unless something early waits for it or it is to be spared what it knows."""
        if self.transport.get_protocol() is not self:
            return
        reads = self.transport.is_reading()
        if self.early and not reads:
            asyncio.get_running_loop().call_later(PAUSE, self.step_aside)
        elif not (self.knows_end and reads):
            self._deliver()

    def _deliver(self) -> None:
        self.transport.set_protocol(self.protocol)
        early, self.early = self.early, []
        for data in early:
            feed(self.protocol, data)


def behind(protocol: Any) -> Any:
    """The protocol of a connection, also where it waits behind a porch."""
    return protocol.protocol if isinstance(protocol, Porch) else protocol


def feed(protocol: Any, data: bytes) -> None:
    """Gives data to a protocol of either kind, as a transport does."""
    if not isinstance(protocol, asyncio.BufferedProtocol):
        protocol.data_received(data)
        return
    while data:
        room = memoryview(protocol.get_buffer(len(data))).cast("B")
        part = data[: len(room)]
        room[: len(part)] = part
        protocol.buffer_updated(len(part))
        data = data[len(part) :]
