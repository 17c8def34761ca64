"""Connections out of one plain loop and into another: what the compiled twin does in _moving.pyx."""

from __future__ import annotations

import logging
import os
import socket
from array import array
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any, Protocol, cast

from ._transport_py import Transport
from .borrowed import let_go, own
from .connections import Connections
from .records import (
    CLOSING,
    EOF_RECEIVED,
    EOF_WRITTEN,
    FULL,
    HAS_STATE,
    LARGEST_PART,
    NOT_NOW,
    PAUSED,
    Moved,
    Record,
    pack_peer,
    reads_version,
    unpack,
    unpack_peer,
    version_of,
)

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from ._listener_py import Listener
    from ._loop_py import Loop
    from ._schedule import Schedule

log = logging.getLogger("takeover")


class Home(Protocol):
    """What a connection needs of the listener that it came from: how its handlers are made, and whether in C."""

    native: bool

    @property
    def factory(self) -> Callable[[], Any]: ...


def adopt_each(
    records: Buffer,
    descriptors: array[int],
    adopt: Callable[[int, Record], object],
    forget: Callable[[int], object],
) -> list[list[Any]]:
    """Has each connection adopted with its record; closes those that are refused, and returns their places and reasons.

    Where something else fails, what was adopted is forgotten, and all descriptors are the caller's still.
    """
    refused: list[list[Any]] = []
    try:
        for index, (descriptor, record) in enumerate(zip(descriptors, unpack(records, len(descriptors)), strict=True)):
            try:
                adopt(descriptor, record)
            except Stays as stays:
                refused.append([index, *stays.args])
            except MemoryError:
                refused.append([index, "memory"])
        for index, _ in refused:
            os.close(descriptors[index])
    except BaseException:
        for descriptor in descriptors:
            forget(descriptor)
        raise
    return refused


class Stays(Exception):
    """A connection does not move; its argument is the word for why (records.WORDS)."""


def _flags(transport: Transport) -> int:
    """The state of a connection as its record tells it."""
    return (
        EOF_RECEIVED * transport._eof_received
        | EOF_WRITTEN * transport._eof_written
        | PAUSED * transport._paused
        | FULL * transport._full
        | CLOSING * transport._closing
    )


def _take_on(transport: Transport, record: Record) -> None:
    """Makes a new transport what the record tells, held."""
    transport._held = True
    transport._eof_received = bool(record.flags & EOF_RECEIVED)
    transport._eof_written = bool(record.flags & EOF_WRITTEN)
    transport._paused = bool(record.flags & PAUSED)
    transport._full = bool(record.flags & FULL)
    transport._closing = bool(record.flags & CLOSING)
    transport._high, transport._low = record.high, record.low
    transport.append(bytes(record.unsent))


def _export(loop: Mover, transport: Transport) -> bytes:
    protocol: Any = transport.get_protocol()
    native = loop.homes[transport.origin].native
    version, state, high, low = 0, b"", *reversed(transport.get_write_buffer_limits())
    if not native:
        version, state = _state_of(transport, protocol)
    sock = transport.get_extra_info("socket")
    peer = b"" if native else pack_peer(sock.family, transport.get_extra_info("peername"))
    unsent = transport.backlog()
    if len(state) + len(unsent) > LARGEST_PART:
        log.error("the state of %r has %d bytes, too many to move; its connection is drained", protocol, len(state))
        raise Stays("state")
    flags = _flags(transport) | (0 if native else HAS_STATE)
    times = transport.moved.times if transport.moved else 0
    high, low = min(high, 0xFFFFFFFF), min(low, 0xFFFFFFFF)
    return Record(transport.origin, flags, times, peer, version, high, low, b"", unsent, state).pack()


def _state_of(transport: Transport, protocol: Any) -> tuple[int, bytes]:
    """The version of a protocol's state, and the state."""
    if _flags(transport) & CLOSING:
        raise Stays("closing")
    version, state = state_of(protocol)
    if transport.is_closing():
        raise Stays("closing")
    return version, state


def state_of(protocol: Any) -> tuple[int, bytes]:
    """The version of a protocol's state, and the state; raises Stays."""
    export = getattr(protocol, "export_state", None)
    if export is None or getattr(protocol, "import_state", None) is None:
        raise Stays("unmovable")
    try:
        version = version_of(protocol)
        state = export()
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException:
        log.exception("the state of %r cannot be exported; its connection is drained", protocol)
        raise Stays("state") from None
    if state is NOT_NOW:
        raise Stays("busy")
    if not isinstance(state, (bytes, bytearray, memoryview)):
        log.error(
            "export_state of %r returned %s, not bytes; its connection is drained", protocol, type(state).__name__
        )
        raise Stays("state")
    return version, bytes(state)


def _keep_tail(transport: Transport, tails: dict[int, bytes], index: int) -> bool:
    """What was written since the export goes along; False where there is no memory for that."""
    if transport.get_write_buffer_size() > transport.exported:
        try:
            tails[index] = transport.backlog(transport.exported)
        except MemoryError:
            return False
    return True


def _adopt(loop: Loop, fd: int, record: Record, generation: int) -> None:
    """Takes one connection in, and all of it: whatever is raised, the loop knows nothing of it then."""
    home = loop.homes.get(record.listener)
    if home is None:
        raise Stays("listener")
    try:
        sock = own(fd)
    except OSError:
        raise Stays("socket") from None
    try:
        if sock.type != socket.SOCK_STREAM:
            raise Stays("socket")
        os.set_blocking(fd, False)
        if len(record.unread):
            raise Stays("unread")
        protocol = protocol_for(home, record)
        peer = unpack_peer(record.peer) if record.peer else None
        transport = Transport(loop, sock, peer, protocol, record.listener)
        _take_on(transport, record)
        transport.moved = Moved(generation, min(record.times + 1, 255))
        loop.admit(transport)
    except OSError:
        let_go(sock)
        raise Stays("socket") from None
    except BaseException:
        let_go(sock)
        raise


def protocol_for(home: Home, record: Record) -> Any:
    """A new handler of a listener, with the state of the record; raises Stays."""
    if home.native is bool(record.flags & HAS_STATE):
        raise Stays("handler")
    try:
        protocol: Any = home.factory()
        if home.native:
            return protocol
        if getattr(protocol, "import_state", None) is None:
            raise Stays("handler")
        if not reads_version(protocol, record.version):
            raise Stays("version")
        protocol.import_state(bytes(record.state))
    except (KeyboardInterrupt, SystemExit, Stays, MemoryError):
        raise
    except BaseException:
        log.exception("import_state in %r raised; the connection goes back", home.factory)
        raise Stays("state") from None
    return protocol


class Mover(Connections):
    """The part of `_loop_py.Loop` that connections move through."""

    schedule: Schedule
    transports: dict[int, Transport]
    homes: dict[int, Listener]
    ledger = -1

    def note_late_writes(self, ledger: int) -> None:
        self.ledger = ledger

    def export_connections(
        self, start: int, most: int, size: int, reasons: dict[str, int]
    ) -> tuple[bytes, array[int], int]:
        records: list[bytes] = []
        descriptors = array("i")
        total = 0
        for fd in sorted(fd for fd in self.transports if fd >= start):
            if len(descriptors) == most or total >= size:
                return b"".join(records), descriptors, fd
            transport = self.transports[fd]
            if transport.stays or not transport.at_rest:
                continue
            try:
                descriptors.append(fd)
                record = _export(self, transport)
                transport.hold()
                records.append(record)
            except (Stays, MemoryError) as error:
                del descriptors[len(records) :]
                if transport._held:
                    transport.resume()
                why = error.args[0] if isinstance(error, Stays) else "memory"
                reasons[why] = reasons.get(why, 0) + 1
                transport.stays = why != "busy"
                continue
            except BaseException:
                self.put_back_connections(descriptors[: len(records)], False)
                raise
            total += len(record)
        return b"".join(records), descriptors, -1

    def relinquish_connections(
        self, descriptors: array[int], skip: Collection[int]
    ) -> tuple[list[int], dict[int, bytes]]:
        kept: list[int] = []
        tails: dict[int, bytes] = {}
        for index, fd in enumerate(descriptors):
            transport = self.transports[fd]
            if index in skip:
                transport.stays = True
                transport.resume()
                continue
            if transport.stays or not _keep_tail(transport, tails, index):
                kept.append(index)
            else:
                self._part(transport)
        return kept, tails

    def put_back_connections(self, descriptors: array[int], stay: bool) -> None:
        for fd in descriptors:
            transport = self.transports[fd]
            transport.stays = transport.stays or stay
            transport.take_back()

    def forgo_connections(self, descriptors: array[int]) -> None:
        for fd in descriptors:
            self._part(self.transports[fd])

    def _part(self, transport: Transport) -> None:
        """The connection lives on elsewhere, of which its protocol may want to know."""
        moved = getattr(transport.get_protocol(), "connection_moved", None)
        os.close(transport.part())
        if moved is not None:
            self.schedule.bid_farewell(moved)

    def adopt_connections(self, records: Buffer, descriptors: array[int], generation: int) -> list[list[Any]]:
        loop = cast("Loop", self)
        loop.check_open()

        def forget(fd: int) -> None:
            if fd in self.transports:
                self.transports[fd].part()

        return adopt_each(records, descriptors, lambda fd, record: _adopt(loop, fd, record, generation), forget)

    def start_connections(self, descriptors: array[int], skip: Collection[int], tails: Mapping[int, bytes]) -> None:
        ending: BaseException | None = None
        for index, fd in enumerate(descriptors):
            if index in skip:
                continue
            transport = self.transports[fd]
            try:
                transport.append(tails.get(index, b""))
                transport.start()
            except MemoryError as error:
                transport.let_go()
                transport.lose(error)
            except BaseException as error:
                ending = ending or error
        if ending is not None:
            raise ending

    def drop_connections(self, descriptors: array[int], skip: Collection[int]) -> None:
        for index, fd in enumerate(descriptors):
            if index not in skip:
                os.close(self.transports[fd].part())
