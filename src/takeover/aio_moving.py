"""Connections out of one asyncio loop and into another, on what every loop promises: what _moving_py does for ours.

A connection that is on its way is paused and under a Hold, and a duplicate of its descriptor is what travels. It is let
go by aborting its transport: that closes the loop's descriptor and sends nothing, since the duplicate keeps the
connection alive.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import weakref
from array import array
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from ._moving_py import Stays, adopt_each, protocol_for, state_of
from .aio_entrance import Arrival, Entrance, Home, Porch, Seat, behind, feed
from .aio_halves import end_is_next, end_is_sent
from .aio_streams import Stream
from .borrowed import let_go, own
from .connections import Connections
from .records import EOF_RECEIVED, EOF_WRITTEN, HAS_STATE, PAUSED, Moved, Record, pack_peer

if TYPE_CHECKING:
    from typing_extensions import Buffer

log = logging.getLogger("takeover")


class Hold(asyncio.Protocol):
    """The protocol of a connection on its way. Whatever nevertheless happens to it goes to its own protocol.

    `disturbed` says whether anything has happened that the record does not tell. It owns the duplicate that travels.
    """

    def __init__(
        self, seat: Seat, protocol: Any, duplicate: socket.SocketType, flags: int, *, was_reading: bool
    ) -> None:
        self.seat = seat
        self.protocol = protocol
        self.duplicate = duplicate
        self.was_reading = was_reading
        self.eof_written = bool(flags & EOF_WRITTEN)
        self.knows_end = bool(flags & EOF_RECEIVED)
        self._heard = self._lost = False
        self._turns = 0
        if isinstance(protocol, Stream):
            self._turns = protocol.reader.turns
            protocol.reader.hold()
        seat.hold = self
        seat.transport.set_protocol(self)

    def disturbed(self) -> bool:
        transport = self.seat.transport
        if self._heard or transport.is_closing() or transport.is_reading() or transport.get_write_buffer_size():
            return True
        if isinstance(self.protocol, Stream) and self.protocol.reader.turns != self._turns:
            return True
        return end_is_sent(self.duplicate, self.seat.family) is not self.eof_written

    def undo(self) -> None:
        """The connection is served here again."""
        self.duplicate.close()
        self.seat.hold = None
        transport = self.seat.transport
        if transport.get_protocol() is self:
            if self.knows_end and self.was_reading and not isinstance(self.protocol, Porch):
                Porch(transport, self.protocol, EOF_RECEIVED)
            else:
                transport.set_protocol(self.protocol)
        if isinstance(self.protocol, Stream):
            self.protocol.reader.free()
        if self.was_reading and not transport.is_closing():
            transport.resume_reading()
        if isinstance(self.protocol, Porch):
            self.protocol.step_aside()

    def let_go(self) -> None:
        """The connection is the successor's."""
        self.seat.transport.set_protocol(Gone(self.protocol))
        self.seat.transport.abort()
        self.duplicate.close()
        moved = getattr(behind(self.protocol), "connection_moved", None)
        if isinstance(self.protocol, Stream):
            self.protocol.connection_moved()
            self.protocol.reader.give_away()
        elif moved is not None and not self._lost:
            asyncio.get_running_loop().call_soon(moved)

    def data_received(self, data: bytes) -> None:
        self._heard = True
        feed(self.protocol, data)

    def eof_received(self) -> bool | None:
        self._heard = True
        return self.knows_end or bool(self.protocol.eof_received())

    def pause_writing(self) -> None:
        self.protocol.pause_writing()

    def resume_writing(self) -> None:
        self.protocol.resume_writing()

    def connection_lost(self, error: Exception | None) -> None:
        self._heard = self._lost = True
        self.protocol.connection_lost(error)


class Gone(asyncio.Protocol):
    """The protocol of a transport whose connection has moved: a stream handler's writer may wait for its end."""

    def __init__(self, protocol: Any) -> None:
        self._stream = protocol if isinstance(protocol, Stream) else None

    def connection_lost(self, error: Exception | None) -> None:
        if self._stream is not None:
            self._stream.connection_lost(None)


class Mover(Connections):
    """The connections of one loop: all of them, those on their way out, and those on their way in.

    `homes` are by the inode of the listener. It is used in the loop only, but for `connections`.
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

    def note_late_writes(self, ledger: int) -> None:
        """A loop hands what is written to the kernel at once, and tells nobody."""

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
            if seat.stays or seat.hold is not None or seat.ends:
                continue
            try:
                record, descriptor = _export(seat)
                self._leaving[descriptor] = seat
                descriptors.append(descriptor)
                records.append(record)
            except (Stays, MemoryError) as error:
                self._not_this_one(seat, descriptors, len(records))
                why = error.args[0] if isinstance(error, Stays) else "memory"
                reasons[why] = reasons.get(why, 0) + 1
                seat.stays = why != "busy"
                continue
            except BaseException:
                self.put_back_connections(descriptors, False)
                raise
            total += len(record)
        self._round = []
        return b"".join(records), descriptors, -1

    def _not_this_one(self, seat: Seat, descriptors: array[int], count: int) -> None:
        """Undoes the export of a connection of which something is missing: only so many are on their way."""
        del descriptors[count:]
        if seat.hold is not None:
            self._leaving.pop(seat.hold.duplicate.fileno(), None)
            seat.hold.undo()

    def relinquish_connections(
        self, descriptors: array[int], skip: Collection[int]
    ) -> tuple[list[int], dict[int, bytes]]:
        kept = []
        for index, descriptor in enumerate(descriptors):
            seat = self._leaving[descriptor]
            assert seat.hold is not None
            if index in skip:
                self._bring_back(descriptor, stay=True)
            elif seat.hold.disturbed():
                kept.append(index)
            else:
                self._let_go(descriptor)
        return kept, {}

    def put_back_connections(self, descriptors: array[int], stay: bool) -> None:
        for descriptor in descriptors:
            self._bring_back(descriptor, stay=stay)

    def _bring_back(self, descriptor: int, *, stay: bool) -> None:
        seat = self._leaving.pop(descriptor)
        assert seat.hold is not None
        seat.stays = seat.stays or stay
        seat.hold.undo()

    def _let_go(self, descriptor: int) -> None:
        seat = self._leaving.pop(descriptor)
        assert seat.hold is not None
        seat.hold.let_go()

    def forgo_connections(self, descriptors: array[int]) -> None:
        for descriptor in descriptors:
            self._let_go(descriptor)

    def adopt_connections(self, records: Buffer, descriptors: array[int], generation: int) -> list[list[Any]]:
        def forget(descriptor: int) -> None:
            if descriptor in self._arrivals:
                let_go(self._arrivals.pop(descriptor).socket)

        return adopt_each(
            records, descriptors, lambda descriptor, record: self._adopt(descriptor, record, generation), forget
        )

    def _adopt(self, descriptor: int, record: Record, generation: int) -> None:
        """Whatever it raises, the descriptor is the caller's then."""
        home = self.homes.get(record.listener)
        if home is None:
            raise Stays("listener")
        try:
            os.set_blocking(descriptor, False)
            sock = own(descriptor)
        except OSError:
            raise Stays("socket") from None
        try:
            if sock.type != socket.SOCK_STREAM:
                raise Stays("socket")
            protocol = protocol_for(home, record)
            moved = Moved(generation, min(record.times + 1, 255))
            if isinstance(protocol, Stream):
                protocol.connection.moved = moved
                protocol.reader.feed_data(bytes(record.unread))
                if record.flags & EOF_RECEIVED:
                    protocol.reader.feed_eof()
            # The parts of a record lead into a buffer that is large, or is gone when the batch is.
            record = record._replace(unread=bytes(record.unread), unsent=bytes(record.unsent), state=b"")
            self._arrivals[descriptor] = Arrival(home, record, sock, protocol, moved)
        except BaseException:
            let_go(sock)
            raise

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
            if index not in skip:
                self._arrivals.pop(descriptor).socket.close()


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
    if isinstance(protocol, Porch) and not protocol.settled:
        raise Stays("busy")
    version, state = state_of(behind(protocol))
    if transport.is_closing():
        raise Stays("closing")
    if transport.get_write_buffer_size():
        raise Stays("busy")
    try:
        descriptor = os.dup(seat.socket.fileno())
    except OSError:
        raise Stays("busy") from None  # no descriptor left at the moment
    # The bare type: socket.socket looks up three enumerations, which takes longer than all that is asked of it here.
    duplicate = socket.SocketType(seat.family, socket.SOCK_STREAM, 0, descriptor)
    try:
        flags = EOF_WRITTEN * end_is_sent(duplicate, seat.family)
        if not isinstance(protocol, Stream):
            flags |= EOF_RECEIVED * _end_was_told(seat, protocol, duplicate)
        record = _record(seat, protocol, version, state, flags)
        Hold(seat, protocol, duplicate, flags, was_reading=transport.is_reading())
    except OverflowError as error:
        duplicate.close()
        log.error("%s is too much to move; it is drained", error)
        raise Stays("state") from None
    except BaseException:
        duplicate.close()
        raise
    transport.pause_reading()
    return record, descriptor


def _end_was_told(seat: Seat, protocol: Any, duplicate: socket.SocketType) -> bool:
    """Whether the protocol was told that its peer has sent its end of file. Raises Stays where that is about to be.

    A loop that reads tells of it in its next turn, and asks for nothing more. So where nothing but the end is left to
    be read, and the same was so some turns ago, it was told.
    """
    if isinstance(protocol, Porch) and protocol.knows_end:
        return True
    seen = seat.end_seen
    seat.end_seen = seat.transport.is_reading() and end_is_next(duplicate, seat.family)
    if seat.end_seen and not seen:
        raise Stays("busy")
    return seat.end_seen


def _record(seat: Seat, protocol: Any, version: int, state: bytes, flags: int) -> bytes:
    transport = seat.transport
    flags |= HAS_STATE
    unread = b""
    if isinstance(protocol, Stream):
        unread = bytes(protocol.reader.buffer)
        flags |= EOF_RECEIVED * protocol.reader.ended
    elif not transport.is_reading():
        flags |= PAUSED
    if isinstance(protocol, Porch):
        unread = b"".join(protocol.early)
    low, high = (min(mark, 0xFFFFFFFF) for mark in transport.get_write_buffer_limits())
    name = transport.get_extra_info("peername")
    peer = b"" if name is None else pack_peer(seat.family, name)
    return Record(seat.home.inode, flags, seat.times, peer, version, high, low, unread, b"", state).pack()
