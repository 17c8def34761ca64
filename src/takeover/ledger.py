"""What is written to connections on their way, noted where it outlives the process that wrote it.

The ledger is a memfd that goes with a channel. The giver appends to it, each entry with one write(2). The taker reads
it only when it has claimed what stands still, and seals it before that, so that nothing more can be noted. The kernel
does one after the other: what a handler has written is either noted, and the taker's to send, or refused, and too late.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct

ENTRY = struct.Struct("!QI")
"""Inode of the connection's socket, and the bytes that follow; none: forget what was noted of it before."""

PART = 1 << 20
_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


def open_ledger() -> int:
    """An empty one; the descriptor is the caller's. Raises OSError."""
    return os.memfd_create("takeover-ledger", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)


def note(ledger: int, connection: int, data: bytes) -> bool:
    """Appends an entry for a connection's descriptor. False where it cannot be: nothing more is to be noted then.

    A ledger that is sealed takes nothing and that is no failure: the connection is another's.
    """
    entry = ENTRY.pack(os.fstat(connection).st_ino, len(data)) + data
    try:
        return os.write(ledger, entry) == len(entry)
    except OSError as error:
        return error.errno == errno.EPERM


def close_and_read(ledger: int) -> dict[int, bytes]:
    """Seals it, and returns by inode what was noted; the end of an entry that is not whole was never written."""
    fcntl.fcntl(ledger, fcntl.F_ADD_SEALS, _SEALS)
    size = os.fstat(ledger).st_size
    noted: dict[int, bytes] = {}
    at = 0
    while at + ENTRY.size <= size:
        inode, length = ENTRY.unpack(os.pread(ledger, ENTRY.size, at))
        at += ENTRY.size
        if at + length > size:
            break
        noted[inode] = noted.get(inode, b"") + _read(ledger, length, at) if length else b""
        at += length
    return {inode: data for inode, data in noted.items() if data}


def _read(ledger: int, length: int, at: int) -> bytes:
    parts = []
    while length:
        parts.append(os.pread(ledger, min(length, PART), at))
        at += len(parts[-1])
        length -= len(parts[-1])
    return b"".join(parts)
