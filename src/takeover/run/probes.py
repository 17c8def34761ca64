"""A probe: one connection to a listener, and the answer to who has accepted it.

The old command and the new one share the listener, so that a connection was accepted proves nothing. A probe asks the
kernel which socket is the server's end of it (sock_diag.py), and looks for the process that has a descriptor of that.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
from collections.abc import Sequence
from typing import Any, NamedTuple

from . import proc, sock_diag
from .waiting import holder_of

_UNDER_WAY = frozenset({errno.EINPROGRESS, errno.EALREADY})


class Endpoint(NamedTuple):
    """Where a command is to accept.

    address: where to connect to. inode: of the listener; 0 where the command binds the port itself. private: nobody
    but this command has been given the listener or told the port.
    """

    url: str
    family: int
    type: int
    address: Any
    inode: int
    private: bool = False


def endpoint(url: str, sock: socket.socket, private: bool = False) -> Endpoint:
    """Where a bound socket can be reached from this machine."""
    address = sock.getsockname()
    if sock.family == socket.AF_INET and address[0] == "0.0.0.0":
        address = ("127.0.0.1", *address[1:])
    elif sock.family == socket.AF_INET6 and address[0] == "::":
        address = ("::1", *address[1:])
    return Endpoint(url, sock.family, sock.type, address, os.fstat(sock.fileno()).st_ino, private)


class Taken(NamedTuple):
    """Who has accepted a probe. pid: a process of the command; None: somebody else. hidden: why that cannot be seen."""

    pid: int | None
    hidden: str = ""


class Probe:
    """One connection; whoever has it closes it.

    lost: why it has come to nothing. vanished: it was accepted, and closed before anybody could look who it was.
    """

    def __init__(self, target: Endpoint) -> None:
        self.target = target
        self.lost = ""
        self.vanished = False
        self._connected = False
        self.sock = socket.socket(target.family, socket.SOCK_STREAM)
        self.sock.setblocking(False)
        self._connect()

    def _connect(self) -> None:
        number = self.sock.connect_ex(self.target.address)
        self._connected = number in (0, errno.EISCONN)
        if not self._connected and number not in _UNDER_WAY:
            full = number == errno.EAGAIN
            self.lost = f"connect {self.target.url}: {'its queue is full' if full else os.strerror(number)}"

    def taken(self, pids: Sequence[int]) -> Taken | None:
        """Who has accepted it; None while nobody has, or when it is lost. pids: the processes of the command."""
        if not self._connected and not self.lost:
            self._connect()
        if not self._connected:
            return None
        try:
            inode = sock_diag.server_end(self.sock)
        except sock_diag.Unknown as error:
            return self._by_elimination(str(error))
        if inode == sock_diag.IN_QUEUE:
            return self._by_elimination("")
        try:
            return Taken(holder_of(pids, inode))
        except proc.Hidden as error:
            others = [process.pid for process in proc.all_processes() if process.pid not in pids]
            with contextlib.suppress(proc.Hidden):
                if holder_of(others, inode) is not None:
                    return Taken(None)
            return Taken(None, str(error))

    def _by_elimination(self, reason: str) -> Taken | None:
        """The kernel names no socket at the other end: it is not there yet, or not any more."""
        try:
            talks = bool(self.sock.recv(1, socket.MSG_PEEK))
        except BlockingIOError:
            self.lost = reason
            return None
        except OSError as error:
            self.lost, self.vanished = f"it was accepted and ended with {error.strerror}", True
            return None
        if talks and reason and not self._has_ended():
            return Taken(None, reason)
        self.lost, self.vanished = "it was accepted and closed at once", True
        return None

    def _has_ended(self) -> bool:
        poll = select.poll()
        poll.register(self.sock, select.POLLRDHUP)
        return bool(poll.poll(0))

    def close(self) -> None:
        self.sock.close()
