"""Connections out of one asyncio loop and into another, on what every loop promises: what _moving_py does for ours.

A connection that is on its way is paused and under a Hold, and a duplicate of its descriptor is what travels. It is let
go by aborting its transport: that closes the loop's descriptor and sends nothing, since the duplicate keeps the
connection alive.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import weakref
from array import array
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any

from ._moving_py import Stays, protocol_for, state_of
from .aio_streams import Stream
from .borrowed import BorrowedSocket
from .errors import RemoteProtocolError
from .records import EOF_RECEIVED, EOF_WRITTEN, HAS_STATE, PAUSED, Moved, Record, pack_peer, unpack

if TYPE_CHECKING:
    from typing_extensions import Buffer

log = logging.getLogger("takeover")

FIN_SENT = frozenset({4, 5, 6, 9, 11})
"""FIN_WAIT1, FIN_WAIT2, TIME_WAIT, LAST_ACK and CLOSING of tcp_states.h."""

_moved: weakref.WeakKeyDictionary[asyncio.BaseTransport, Moved] = weakref.WeakKeyDictionary()


def moved(transport: asyncio.BaseTransport) -> Moved | None:
    """Where a connection came from, and how often it has moved; None for one that was accepted in this process.

    On the native loop transport.get_extra_info("takeover") tells it; a transport of asyncio takes no such addition.
    """
    return _moved.get(transport)


class Home:
    """A listener as the connections know it that came from it: how their protocols are made."""

    native = False

    def __init__(self, inode: int, factory: Callable[[], Any]) -> None:
        self.inode = inode
        self.factory = factory
        self.accepted = 0


class Seat:
    """One connection of this loop, from its connection_made() until its socket is closed. `stays` for good, or not."""

    __slots__ = ("hold", "home", "socket", "stays", "stream", "times", "transport")

    def __init__(self, transport: Any, home: Home, protocol: Any, times: int) -> None:
        self.transport = transport
        self.socket = transport.get_extra_info("socket")
        self.home = home
        self.stream = protocol if isinstance(protocol, Stream) else None
        self.times = times
        self.stays = False
        self.hold: Hold | None = None

    @property
    def empty(self) -> bool:
        """Whether the connection is over: its socket is closed, and its handler has ended."""
        return self.socket.fileno() < 0 and (self.stream is None or self.stream.over)


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
        pausing = None
        if record.flags & PAUSED:
            transport.pause_reading()
            pausing = asyncio.get_running_loop().call_soon(self._pause)
        heard_end = record.flags & EOF_RECEIVED and not isinstance(self.protocol, Stream)
        if not heard_end:
            transport.set_protocol(self.protocol)
        self.protocol.connection_made(transport)
        if self._full:
            self._full = False
            self.protocol.pause_writing()
        if pausing is not None and transport.is_reading():
            pausing.cancel()

    def _pause(self) -> None:
        """Once more: uvloop begins to read after connection_made() even where that has paused reading."""
        if not self.transport.is_closing():
            self.transport.pause_reading()

    def pause_writing(self) -> None:
        self._full = True

    def resume_writing(self) -> None:
        if self._full:
            self._full = False
        else:
            self.protocol.resume_writing()

    def eof_received(self) -> bool:
        """The protocol knew of the end before the connection moved."""
        self.transport.set_protocol(self.protocol)
        return True

    def connection_lost(self, error: Exception | None) -> None:
        if self.protocol is not None:
            self.protocol.connection_lost(error)


class Hold(asyncio.Protocol):
    """The protocol of a connection on its way. Whatever nevertheless happens to it goes to its own protocol.

    `disturbed` says whether anything has happened that the record does not tell.
    """

    def __init__(self, seat: Seat, protocol: Any, was_reading: bool, eof_written: bool) -> None:
        self.seat = seat
        self.protocol = protocol
        self.was_reading = was_reading
        self.eof_written = eof_written
        self._heard = False
        self._turns = 0
        if isinstance(protocol, Stream):
            self._turns = protocol.reader.turns
            protocol.reader.hold()
        seat.hold = self
        seat.transport.set_protocol(self)

    def disturbed(self, descriptor: int) -> bool:
        transport = self.seat.transport
        if self._heard or transport.is_closing() or transport.is_reading() or transport.get_write_buffer_size():
            return True
        if isinstance(self.protocol, Stream) and self.protocol.reader.turns != self._turns:
            return True
        return _eof_written(descriptor) is not self.eof_written

    def undo(self) -> None:
        """The connection is served here again."""
        self.seat.hold = None
        transport = self.seat.transport
        if transport.get_protocol() is self:
            transport.set_protocol(self.protocol)
        if isinstance(self.protocol, Stream):
            self.protocol.reader.free()
        if self.was_reading and not transport.is_closing():
            transport.resume_reading()

    def let_go(self) -> None:
        """The connection is the successor's."""
        self.seat.transport.set_protocol(Gone(self.protocol))
        self.seat.transport.abort()
        moved = getattr(self.protocol, "connection_moved", None)
        if moved is not None:
            try:
                moved()
            except Exception:
                log.exception("connection_moved raised")
        if isinstance(self.protocol, Stream):
            self.protocol.reader.free()

    def data_received(self, data: bytes) -> None:
        self._heard = True
        if not isinstance(self.protocol, asyncio.BufferedProtocol):
            self.protocol.data_received(data)
            return
        while data:
            room = memoryview(self.protocol.get_buffer(len(data))).cast("B")
            part = data[: len(room)]
            room[: len(part)] = part
            self.protocol.buffer_updated(len(part))
            data = data[len(part) :]

    def eof_received(self) -> bool | None:
        self._heard = True
        return bool(self.protocol.eof_received())

    def pause_writing(self) -> None:
        self.protocol.pause_writing()

    def resume_writing(self) -> None:
        self.protocol.resume_writing()

    def connection_lost(self, error: Exception | None) -> None:
        self._heard = True
        self.protocol.connection_lost(error)


class Gone(asyncio.Protocol):
    """The protocol of a transport whose connection has moved: a stream handler's writer may wait for its end."""

    def __init__(self, protocol: Any) -> None:
        self._stream = protocol if isinstance(protocol, Stream) else None

    def connection_lost(self, error: Exception | None) -> None:
        if self._stream is not None:
            self._stream.connection_lost(None)


class Arrival:
    """A connection that was adopted and is not served yet; owns the socket."""

    def __init__(self, home: Home, record: Record, sock: socket.socket, protocol: Any, moved: Moved) -> None:
        self.home = home
        self.record = record
        self.socket = sock
        self.protocol = protocol
        self.moved = moved
        self.tail = b""


class Mover:
    """The connections of one loop: all of them, those on their way out, and those on their way in.

    `homes` are by the inode of the listener. It is used in the loop only, but for count().
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.homes: dict[int, Home] = {}
        self.coming: weakref.WeakSet[Entrance] = weakref.WeakSet()
        self._loop = loop
        self._seats: list[Seat] = []
        self._most = 64
        self._round: list[Seat] = []
        self._leaving: dict[int, Seat] = {}
        self._arrivals: dict[int, Arrival] = {}
        self._tasks: set[asyncio.Task[Any]] = set()

    def seat(self, seat: Seat) -> None:
        """Knows one connection more; those that are over are forgotten when there are twice as many as at last."""
        self._seats.append(seat)
        if len(self._seats) > self._most:
            self.sweep()

    def sweep(self) -> None:
        """Forgets the connections that are over."""
        self._seats = [seat for seat in self._seats if not seat.empty]
        self._most = 2 * len(self._seats) + 64

    @property
    def connections(self) -> int:
        """How many connections are open, or about to be; may be called from any thread."""
        seats = sum(not seat.empty for seat in self._seats.copy())
        return seats + len(self.coming) + len(self._arrivals)

    def abort(self) -> int:
        """Ends every connection, and cancels the handlers; returns how many there were."""
        self.sweep()
        for seat in self._seats:
            seat.transport.abort()
            if seat.stream is not None and seat.stream.task is not None:
                seat.stream.task.cancel()
        return len(self._seats)

    # What giver.Giver and taker.Taker call; see channel.Connections.

    def export_connections(
        self, start: int, most: int, size: int, reasons: dict[str, int]
    ) -> tuple[bytes, array[int], int]:
        if start == 0:
            self.sweep()
            self._round = self._seats.copy()
        records: list[bytes] = []
        descriptors = array("i")
        total = 0
        for number in range(start, len(self._round)):
            if len(descriptors) == most or total >= size:
                return b"".join(records), descriptors, number
            seat = self._round[number]
            if seat.stays or seat.hold is not None or seat.socket.fileno() < 0:
                continue
            try:
                record, descriptor = _export(seat)
            except Stays as stays:
                (why,) = stays.args
                reasons[why] = reasons.get(why, 0) + 1
                seat.stays = why != "busy"
                continue
            records.append(record)
            total += len(record)
            descriptors.append(descriptor)
            self._leaving[descriptor] = seat
        self._round = []
        return b"".join(records), descriptors, -1

    def relinquish_connections(
        self, descriptors: array[int], skip: Collection[int]
    ) -> tuple[list[int], dict[int, bytes]]:
        kept = []
        for index, descriptor in enumerate(descriptors):
            seat = self._leaving.pop(descriptor)
            assert seat.hold is not None
            if index not in skip and not seat.hold.disturbed(descriptor):
                seat.hold.let_go()
            else:
                if index not in skip:
                    kept.append(index)
                seat.stays = True
                seat.hold.undo()
            os.close(descriptor)
        return kept, {}

    def put_back_connections(self, descriptors: array[int], stay: bool) -> None:
        for descriptor in descriptors:
            seat = self._leaving.pop(descriptor)
            assert seat.hold is not None
            seat.stays = seat.stays or stay
            seat.hold.undo()
            os.close(descriptor)

    def adopt_connections(self, records: Buffer, descriptors: array[int], generation: int) -> list[list[Any]]:
        try:
            found = unpack(records, len(descriptors))
        except RemoteProtocolError:
            for descriptor in descriptors:
                os.close(descriptor)
            raise
        refused: list[list[Any]] = []
        for index, (descriptor, record) in enumerate(zip(descriptors, found, strict=True)):
            try:
                self._arrivals[descriptor] = self._adopt(descriptor, record, generation)
            except Stays as stays:
                os.close(descriptor)
                refused.append([index, *stays.args])
        return refused

    def _adopt(self, descriptor: int, record: Record, generation: int) -> Arrival:
        home = self.homes.get(record.listener)
        if home is None:
            raise Stays("listener")
        try:
            with BorrowedSocket(descriptor) as borrowed:
                family, kind = borrowed.family, borrowed.type
        except OSError:
            raise Stays("socket") from None
        if kind != socket.SOCK_STREAM:
            raise Stays("socket")
        protocol = protocol_for(home, record)
        moved = Moved(generation, min(record.times + 1, 255))
        if isinstance(protocol, Stream):
            protocol.connection.moved = moved
            protocol.reader.feed_data(bytes(record.unread))
            if record.flags & EOF_RECEIVED:
                protocol.reader.feed_eof()
        elif len(record.unread):
            raise Stays("unread")
        # What is to be sent and the state are part of a buffer that is gone when the batch is.
        record = record._replace(unread=b"", unsent=bytes(record.unsent), state=b"")
        sock = socket.socket(family, kind, fileno=descriptor)
        sock.setblocking(False)
        return Arrival(home, record, sock, protocol, moved)

    def start_connections(self, descriptors: array[int], skip: Collection[int], tails: Mapping[int, bytes]) -> None:
        for index, descriptor in enumerate(descriptors):
            if index not in skip:
                arrival = self._arrivals.pop(descriptor)
                arrival.tail = tails.get(index, b"")
                entrance = Entrance(self, arrival.home, arrival)
                task = self._loop.create_task(self._connect(entrance, arrival.socket))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

    async def _connect(self, entrance: Entrance, sock: socket.socket) -> None:
        try:
            await self._loop.connect_accepted_socket(lambda: entrance, sock)
        except Exception:
            log.exception("a connection that has moved here could not be served")
            sock.close()

    def drop_connections(self, descriptors: array[int], skip: Collection[int]) -> None:
        for index, descriptor in enumerate(descriptors):
            if index in skip:
                continue
            seat = self._leaving.pop(descriptor, None)
            if seat is None:
                self._arrivals.pop(descriptor).socket.close()
                continue
            assert seat.hold is not None
            seat.hold.let_go()
            os.close(descriptor)


def _export(seat: Seat) -> tuple[bytes, int]:
    """The record of a connection, and a duplicate of its descriptor; it is under a Hold then. Raises Stays."""
    transport: Any = seat.transport
    if transport.get_extra_info("sslcontext") is not None:
        raise Stays("tls")
    if transport.is_closing():
        raise Stays("closing")
    protocol = transport.get_protocol()
    if seat.stream is not None and protocol is not seat.stream:
        raise Stays("tls")  # StreamWriter.start_tls()
    if transport.get_write_buffer_size():
        raise Stays("busy")
    version, state = state_of(protocol)
    if transport.is_closing():
        raise Stays("closing")
    if transport.get_write_buffer_size():
        raise Stays("busy")
    try:
        descriptor = os.dup(seat.socket.fileno())
    except OSError:
        raise Stays("busy") from None  # no descriptor left at the moment
    try:
        eof_written = _eof_written(descriptor)
        record = _record(seat, protocol, version, state, EOF_WRITTEN * eof_written)
    except BaseException as error:
        os.close(descriptor)
        if not isinstance(error, OverflowError):
            raise
        log.error("%s is too much to move; it is drained", error)
        raise Stays("state") from None
    was_reading = transport.is_reading()
    transport.pause_reading()
    Hold(seat, protocol, was_reading, eof_written)
    return record, descriptor


def _record(seat: Seat, protocol: Any, version: int, state: bytes, flags: int) -> bytes:
    transport = seat.transport
    flags |= HAS_STATE
    unread = b""
    if isinstance(protocol, Stream):
        unread = bytes(protocol.reader.buffer)
        flags |= EOF_RECEIVED * protocol.reader.ended
    elif not transport.is_reading():
        flags |= PAUSED
    low, high = (min(mark, 0xFFFFFFFF) for mark in transport.get_write_buffer_limits())
    name = transport.get_extra_info("peername")
    peer = b"" if name is None else pack_peer(seat.socket.family, name)
    return Record(seat.home.inode, flags, seat.times, peer, version, high, low, unread, b"", state).pack()


def _eof_written(descriptor: int) -> bool:
    """Whether we have sent FIN; a transport does not tell."""
    with BorrowedSocket(descriptor) as sock:
        try:
            if sock.family != socket.AF_UNIX:
                return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] in FIN_SENT
            sock.send(b"", socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT)
        except BrokenPipeError:
            return True
        except OSError:
            pass
        return False
