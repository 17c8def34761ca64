"""What both loops do with sockets on the Python side of the hot path."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import time
from collections.abc import Callable
from typing import Any

from ._schedule import Schedule, Timer, log
from .errors import UsageError

# accept(2): errors of the one connection that was to be accepted, already gone; the next one may be all right.
PASSING_ERRORS = frozenset(
    (
        errno.ECONNABORTED,
        errno.EHOSTDOWN,
        errno.EHOSTUNREACH,
        errno.ENETDOWN,
        errno.ENETUNREACH,
        errno.ENONET,
        errno.ENOPROTOOPT,
        errno.EOPNOTSUPP,
        errno.EPERM,
        errno.EPROTO,
        errno.ETIMEDOUT,
    )
)
# The same page: what accepts is no listener any more. Any other error, of a shortage or of a filter, may pass.
UNUSABLE = frozenset((errno.EBADF, errno.EINVAL, errno.ENOTSOCK))


def prepare_listener(sock: socket.socket) -> None:
    """Make a listening stream socket fit for a loop: non-blocking, and TCP_NODELAY, which what it accepts inherits."""
    if sock.type != socket.SOCK_STREAM or not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        raise UsageError(f"{sock!r} is not a listening stream socket; bind it and call its listen() first")
    sock.setblocking(False)
    if sock.family in (socket.AF_INET, socket.AF_INET6):
        with contextlib.suppress(OSError):  # short of memory it is served all the same
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def name_of(sock: socket.socket) -> str:
    """A listener as log lines call it."""
    try:
        return str(sock.getsockname())
    except OSError:
        return repr(sock)


class Backoff:
    """A listener's pause when the process or the system is short of descriptors or memory, or accepts nothing.

    `resume` puts the listener back into the poll set after 0.1 s, then 0.2 s and so on to 1 s. Said once when it
    begins, and once when a connection was accepted again.
    """

    __slots__ = ("_delay", "_refusals", "_resume", "_schedule", "_sock", "_timer", "began")

    def __init__(self, schedule: Schedule, sock: socket.socket, resume: Callable[[], object]) -> None:
        self._schedule = schedule
        self._sock = sock
        self._resume = resume
        self._refusals = 0
        self._delay = 0.0
        self.began = 0.0
        self._timer: Timer | None = None

    def refused(self, error: int) -> None:
        if not self._refusals:
            self.began, self._delay = time.monotonic(), 0.1
            log.warning(
                "accept on %s: %s; new connections wait in its queue until it works again",
                name_of(self._sock),
                os.strerror(error),
            )
        self._refusals += 1
        self._timer = self._schedule.call_at(time.monotonic() + self._delay, self._resume)
        self._delay = min(2 * self._delay, 1.0)

    def over(self) -> None:
        seconds = time.monotonic() - self.began
        log.info("accept on %s: goes on after %d refusals in %.1f s", name_of(self._sock), self._refusals, seconds)
        self.cancel()

    def cancel(self) -> None:
        self._refusals = 0
        self.began = 0.0
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class TransportSocket:
    """What get_extra_info("socket") gives: the options and names of a transport's socket, but not its descriptor.

    It asks the transport for the descriptor at each call, so it can neither close it nor use one that was closed:
    after the connection is lost, fileno() is -1 and everything else raises OSError (EBADF).
    """

    __slots__ = ("_fileno", "family", "proto", "type")

    def __init__(self, fileno: Callable[[], int], family: int) -> None:
        self._fileno = fileno
        self.family = socket.AddressFamily(family)
        self.type = socket.SOCK_STREAM
        self.proto = socket.IPPROTO_TCP if family in (socket.AF_INET, socket.AF_INET6) else 0

    def fileno(self) -> int:
        """The descriptor, which stays the transport's; -1 when the connection is over."""
        return self._fileno()

    def dup(self) -> socket.socket:
        """A socket of the caller's own for the same connection, non-blocking."""
        duplicate = socket.socket(self.family, self.type, self.proto, fileno=os.dup(self._checked()))
        duplicate.setblocking(False)
        return duplicate

    def getsockopt(self, *args: Any) -> Any:
        return self._call("getsockopt", *args)

    def setsockopt(self, *args: Any) -> None:
        self._call("setsockopt", *args)

    def getpeername(self) -> Any:
        return self._call("getpeername")

    def getsockname(self) -> Any:
        return self._call("getsockname")

    def __repr__(self) -> str:
        return f"<TransportSocket fd={self.fileno()} family={self.family.name}>"

    def _checked(self) -> int:
        fd = self._fileno()
        if fd < 0:
            raise OSError(errno.EBADF, "the connection of this socket is closed")
        return fd

    def _call(self, name: str, *args: Any) -> Any:
        borrowed = socket.socket(self.family, self.type, self.proto, fileno=self._checked())
        try:
            return getattr(borrowed, name)(*args)
        finally:
            borrowed.detach()
