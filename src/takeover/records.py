"""Live connections as bytes and back: the bodies of CONNECTIONS and RELEASED, as docs/protocol.md specifies them.

The compiled loop writes and reads the records of CONNECTIONS itself (ext/takeover/_records.pxd); this is the format in
plain Python, for the plain loop and for asyncio. Numbers are big-endian.
"""

from __future__ import annotations

import enum
import fcntl
import itertools
import mmap
import os
import socket
import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from .errors import RemoteProtocolError

if TYPE_CHECKING:
    from typing_extensions import Buffer

MOST_CONNECTIONS = 251
"""In one batch: one descriptor of the 252 that a message can have is kept for records that travel in a file."""

LARGEST_INLINE = 1 << 20
"""Bytes of records that a message carries; what is larger travels in a sealed memfd beside the connections."""

BATCH = struct.Struct("!IQIQ")
"""Number of the batch, when it was taken out of the loop (CLOCK_MONOTONIC, ns), connections, bytes of their records."""

RECORD = struct.Struct("!IQBBHiIIIII")
"""Bytes of the whole record, inode of the listener, flags, moves, bytes of the peer's name, version of the state, high
and low water mark, and the bytes of what was read and not consumed, of what is unsent, and of the state."""

EOF_RECEIVED, EOF_WRITTEN, PAUSED, FULL, CLOSING, HAS_STATE = 1, 2, 4, 8, 16, 32

LARGEST_PART = (1 << 32) - (1 << 20)
"""Bytes; a record has 32 bits for its size."""

WORDS = ("", "busy", "unmovable", "closing", "state", "memory", "listener", "handler", "version", "socket", "unread")
"""Why a connection does not move: it says not now, it cannot, it is closing, its state could not be written or read, no
memory; the successor does not have its listener, has another kind of handler there, cannot read this version of the
state, got something that is not a stream socket, or has no use for bytes that were read and not consumed."""

_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


class NotNow(enum.Enum):
    """What export_state() may return instead of bytes."""

    NOT_NOW = "in the middle of something; ask again"


NOT_NOW = NotNow.NOT_NOW


def version_of(protocol: object) -> int:
    """The version of the state that a protocol exports: its `state_version`. Raises TypeError where that is none."""
    version = getattr(protocol, "state_version", 0)
    if not isinstance(version, int) or not -(1 << 31) <= version < 1 << 31:
        raise TypeError(f"state_version must be an int of 32 bits, not {version!r}")
    return version


def reads_version(protocol: object, version: int) -> bool:
    """Whether a protocol's class says that it can read a version of the state: its own, unless it names several."""
    own = getattr(protocol, "state_version", 0)
    return version in getattr(protocol, "readable_state_versions", (own,))


class Moved(NamedTuple):
    """What a handler may know of its connection's travels: the generation it came from, and how often it has moved."""

    generation: int
    times: int


class Record(NamedTuple):
    """One connection. The descriptor travels beside it."""

    listener: int
    flags: int
    times: int
    peer: bytes
    version: int
    high: int
    low: int
    unread: bytes | memoryview
    unsent: bytes | memoryview
    state: bytes | memoryview

    def pack(self) -> bytes:
        """Raises OverflowError where a part is larger than a record can tell."""
        parts = (self.unread, self.unsent, self.state)
        sizes = [len(part) for part in parts]
        size = RECORD.size + len(self.peer) + sum(sizes)
        if size > LARGEST_PART:
            raise OverflowError(f"a connection with {size:,} bytes of state and unsent data")
        times = min(self.times, 255)
        fixed = (size, self.listener, self.flags, times, len(self.peer), self.version, self.high, self.low, *sizes)
        return b"".join((RECORD.pack(*fixed), self.peer, *parts))


def unpack(records: Buffer, count: int) -> list[Record]:
    """The records of one batch, parts of which lead into the bytes given. Raises RemoteProtocolError."""
    view = memoryview(records).cast("B")
    found: list[Record] = []
    at = 0
    for _ in range(count):
        if at + RECORD.size > len(view):
            raise RemoteProtocolError(f"{count} connections are announced, and {len(found)} records came")
        size, listener, flags, times, peer, version, high, low, *sizes = RECORD.unpack_from(view, at)
        ends = [at + RECORD.size + peer]
        for part in sizes:
            ends.append(ends[-1] + part)
        if ends[-1] != at + size or ends[-1] > len(view):
            raise RemoteProtocolError("the record of a connection is not as long as its parts")
        parts = [view[begin:end] for begin, end in itertools.pairwise(ends)]
        name = bytes(view[at + RECORD.size : ends[0]])
        found.append(Record(listener, flags, times, name, version, high, low, *parts))
        at += size
    if at != len(view):
        raise RemoteProtocolError(f"{len(view) - at} bytes too many came with {count} records")
    return found


def pack_peer(family: int, name: Any) -> bytes:
    """The name of a connection's peer: 4, 6 or 1 for the family, then what getpeername() gives, packed."""
    if family == socket.AF_INET:
        return b"\4" + socket.inet_pton(family, name[0]) + struct.pack("!H", name[1])
    if family == socket.AF_INET6:
        host = name[0].partition("%")[0]
        return b"\6" + socket.inet_pton(family, host) + struct.pack("!HII", *name[1:])
    return b"\1" + (name if isinstance(name, bytes) else os.fsencode(name))


def unpack_peer(peer: bytes) -> Any:
    """What getpeername() gave; None where that was not told, or is garbled."""
    family, name = peer[:1], peer[1:]
    if family == b"\4" and len(name) == 6:
        return socket.inet_ntop(socket.AF_INET, name[:4]), *struct.unpack("!H", name[4:])
    if family == b"\6" and len(name) == 26:
        return socket.inet_ntop(socket.AF_INET6, name[:16]), *struct.unpack("!HII", name[16:])
    if family == b"\1":
        return name if name[:1] == b"\0" else os.fsdecode(name)
    return None


def seal(name: str, data: Buffer) -> int:
    """A descriptor of the caller's own for a sealed memfd that holds the data. Raises OSError."""
    descriptor = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        with memoryview(data).cast("B") as view:
            done = 0
            while done < len(view):
                done += os.write(descriptor, view[done:])
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)
        return descriptor
    except BaseException:
        os.close(descriptor)
        raise


def unseal(descriptor: int) -> memoryview:
    """What a sealed memfd holds, without a copy; the descriptor stays the caller's, and need not stay open.

    Raises RemoteProtocolError where it is not sealed: whoever can still shrink it could kill us with SIGBUS.
    """
    try:
        seals = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
    except OSError as error:
        raise RemoteProtocolError(f"descriptor {descriptor} of the peer is not a memfd: {error.strerror}") from None
    if seals & _SEALS != _SEALS:
        raise RemoteProtocolError(f"descriptor {descriptor} of the peer is a memfd that is not sealed")
    size = os.fstat(descriptor).st_size
    return memoryview(mmap.mmap(descriptor, size, access=mmap.ACCESS_READ) if size else b"")


class Release(NamedTuple):
    """The body of RELEASED: by index who stays, and the tails of the others."""

    batch: int
    kept: list[int]
    tails: dict[int, bytes]


def pack_release(batch: int, kept: Sequence[int], tails: Mapping[int, bytes]) -> bytes:
    """The body of RELEASED: which connections stay after all, and what was written to the others in the meantime."""
    parts = [struct.pack(f"!IH{len(kept)}H", batch, len(kept), *kept)]
    for index, tail in tails.items():
        parts += (struct.pack("!HI", index, len(tail)), tail)
    return b"".join(parts)


def unpack_release(body: bytes) -> Release:
    """Raises RemoteProtocolError."""
    try:
        batch, count = struct.unpack_from("!IH", body)
        kept = list(struct.unpack_from(f"!{count}H", body, 6))
        return Release(batch, kept, dict(_tails(body, 6 + 2 * count)))
    except (struct.error, ValueError) as error:
        raise RemoteProtocolError(f"the body of a RELEASED is garbled: {error}") from None


def _tails(body: bytes, at: int) -> Iterator[tuple[int, bytes]]:
    while at < len(body):
        index, size = struct.unpack_from("!HI", body, at)
        at += 6 + size
        if at > len(body):
            raise ValueError(f"{at - len(body)} bytes are missing")
        yield index, body[at - size : at]
