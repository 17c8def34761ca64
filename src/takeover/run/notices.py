"""The socket on which a command says READY=1 and STATUS=…: sd_notify(3), and we are the manager.

A datagram socket of the abstract namespace, one for each started process: nothing is left behind, and a command under
another user or in another root folder reaches it. Anybody on the machine may send there, so the kernel's word on the
sender's pid counts (SCM_CREDENTIALS, unix(7)): it must belong to the command. A helper that sends and ends at once,
before it could be looked at, is not believed; `systemd-notify` waits (BARRIER=1) until its descriptor has been closed.
"""

from __future__ import annotations

import array
import os
import secrets
import socket
import struct
from collections.abc import Callable

from .events import Events
from .proc import Tree

_CREDENTIALS = struct.Struct("=iII")
_ROOM = socket.CMSG_SPACE(_CREDENTIALS.size) + socket.CMSG_SPACE(253 * 4)
_LONGEST = 65536
_IN_ONE_TURN = 64


class Notices:
    """Reads what the processes of one command send. `status` is its last STATUS=, `refused` why a READY=1 was not."""

    def __init__(self, events: Events, on_ready: Callable[[int], object]) -> None:
        """on_ready: called in the loop with the pid that sent READY=1, each time."""
        self.status = ""
        self.refused = ""
        self._tree: Tree | None = None
        self._events = events
        self._on_ready = on_ready
        self._name = f"takeover/notify/{os.getpid()}/{secrets.token_hex(8)}"
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            self._sock.setblocking(False)
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
            self._sock.bind(f"\0{self._name}")
        except BaseException:
            self._sock.close()
            raise

    @property
    def address(self) -> str:
        """The value for NOTIFY_SOCKET."""
        return f"@{self._name}"

    def started(self, tree: Tree) -> None:
        """The processes that are believed; what came before waits in the socket."""
        self._tree = tree
        self._events.watch(self._sock.fileno(), self.read)

    def read(self) -> None:
        """Takes in what has come so far; only between started() and close()."""
        for _ in range(_IN_ONE_TURN):
            try:
                data, control, _, _ = self._sock.recvmsg(_LONGEST, _ROOM, socket.MSG_CMSG_CLOEXEC)
            except (BlockingIOError, InterruptedError):
                return
            came = {kind: body for _, kind, body in control}
            barriers = array.array("i", came.get(socket.SCM_RIGHTS, b""))
            try:
                self._take(_CREDENTIALS.unpack(came[socket.SCM_CREDENTIALS])[0], data.decode(errors="replace"))
            finally:
                for descriptor in barriers:
                    os.close(descriptor)

    def _take(self, sender: int, text: str) -> None:
        says = [line for line in text.splitlines() if line == "READY=1" or line.startswith("STATUS=")]
        if not says:
            return
        assert self._tree is not None
        if not self._tree.has(sender):
            if "READY=1" in says:
                self.refused = f"READY=1 came from pid {sender}, which is none of its processes"
            return
        for line in says:
            if line.startswith("STATUS="):
                self.status = line.partition("=")[2][:200]
        if "READY=1" in says:
            self._on_ready(sender)

    def close(self) -> None:
        """Frees the socket; harmless a second time."""
        self._events.unwatch(self._sock.fileno())
        self._sock.close()
