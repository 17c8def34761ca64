"""What a descriptor is, asked of the kernel: a received one is checked before it is believed."""

from __future__ import annotations

import contextlib
import fcntl
import os
import resource
import socket
import stat
from typing import Any, NamedTuple

from .borrowed import BorrowedSocket
from .errors import RemoteProtocolError


class Description(NamedTuple):
    """`kind` is "socket", "fifo", "file" or "other"; what only a socket has is None for the rest.

    `address` is where it is bound, as getsockname() gives it: "" for a UNIX socket without a name. Two descriptors with
    the same `device` and `inode` are the same socket, pipe or file.
    """

    kind: str
    device: int
    inode: int
    family: int | None = None
    type: int | None = None
    protocol: int | None = None
    address: Any = None
    listening: bool = False
    v6only: bool = False
    reuseport: bool = False


def describe(descriptor: int) -> Description:
    """Reads what a descriptor is; it stays the caller's, open and unchanged. Raises OSError for a closed one."""
    status = os.fstat(descriptor)
    if not stat.S_ISSOCK(status.st_mode):
        kind = "fifo" if stat.S_ISFIFO(status.st_mode) else "file" if stat.S_ISREG(status.st_mode) else "other"
        return Description(kind, status.st_dev, status.st_ino)
    with BorrowedSocket(descriptor) as sock:
        internet = sock.family in (socket.AF_INET, socket.AF_INET6)
        return Description(
            "socket",
            status.st_dev,
            status.st_ino,
            sock.family,
            sock.type,
            sock.proto,
            sock.getsockname(),
            bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)),
            sock.family == socket.AF_INET6 and bool(sock.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY)),
            internet and bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT)),
        )


def expect(
    descriptor: int,
    *,
    kind: str,
    family: int | None = None,
    type: int | None = None,
    listening: bool | None = None,
) -> Description:
    """Checks a received descriptor, which stays the caller's; None stands for any.

    Returns what it is. Raises RemoteProtocolError that names everything that differs.
    """
    found = describe(descriptor)
    wanted = {"kind": kind, "family": family, "type": type, "listening": listening}
    differences = [
        f"{name} {_name(getattr(found, name))} instead of {_name(value)}"
        for name, value in wanted.items()
        if value is not None and value != getattr(found, name)
    ]
    if differences:
        raise RemoteProtocolError(f"descriptor {descriptor} of the peer has {', '.join(differences)}")
    return found


def expect_listener(descriptor: int, url: str) -> None:
    """Checks a received listener, which stays the caller's, and makes it non-blocking. Raises RemoteProtocolError."""
    datagram = url.startswith("udp:")
    kind = socket.SOCK_DGRAM if datagram else socket.SOCK_STREAM
    expect(descriptor, kind="socket", type=kind, listening=not datagram)
    os.set_blocking(descriptor, False)


def _name(value: object) -> object:
    return getattr(value, "name", value)


def limit_and_held() -> tuple[int, int]:
    """How many descriptors this process may have (RLIMIT_NOFILE), and how many it has; 64 where nothing tells that."""
    limit = int(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    try:
        return limit, len(os.listdir("/proc/self/fd"))
    except OSError:
        return limit, 64


LARGEST_TABLE = 1 << 16
"""Descriptors that the kernel has room for at once, at eight bytes each."""


def grow_table() -> None:
    """Has the kernel make room for as many descriptors as this process may have, before it has a second thread.

    As soon as threads share the table, each doubling of it waits until no CPU is looking at the old one
    (expand_fdtable() in fs/file.c calls synchronize_rcu()): some milliseconds each, while connections come in.
    """
    highest = min(int(resource.getrlimit(resource.RLIMIT_NOFILE)[0]), LARGEST_TABLE) - 1
    with contextlib.suppress(OSError), open(os.devnull, "rb", buffering=0) as any_file:
        os.close(fcntl.fcntl(any_file.fileno(), fcntl.F_DUPFD_CLOEXEC, highest))
