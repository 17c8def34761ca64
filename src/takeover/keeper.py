"""A conversation with a keeper, the process that holds copies of the listeners and outlives its owner: docs/keeper.md.

Only the holder of the lock beside the control socket starts a keeper, registers with it, ends it, or unlinks its path.
Messages are packets with at most one descriptor each, and every one of them has one answer.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import signal
import socket
import struct
from array import array
from collections.abc import Sequence
from typing import Any

from ._backend import backend, fdpass
from .control import ControlPath, peer_of, remove_own
from .descriptors import expect_listener
from .errors import LocalError, PeerLost, RemoteProtocolError, TimedOut
from .link import close_all
from .namespaces import mapping_hint
from .successor import Inherited
from .wire import is_listener

VERSION = 1
PATIENCE = 2.0
"""Seconds for an answer, which a keeper that is not stopped has at once."""

LONGEST = 32768
"""Bytes of a message."""

HELLO = struct.Struct("!cBII")
INDEX = struct.Struct("!cI")


def path_of_keeper(control: ControlPath) -> ControlPath:
    """Where the keeper of a service listens; raises UsageError where that path is too long."""
    return control.beside(".keeper", socket.SOCK_SEQPACKET)


class Keeper:
    """A connection to a keeper; owns it, and a pidfd of the process. `pid` is 0 where that is in another namespace.

    Each method that asks raises PeerLost where the keeper has died, TimedOut where it does not answer.
    """

    def __init__(self, sock: socket.socket, path: ControlPath) -> None:
        sock.setblocking(False)
        self.sock = sock
        self.path = path
        self.peer = peer_of(sock)
        if self.peer.uid not in path.allowed:
            uid = self.peer.uid
            self.close()
            raise LocalError(f"the process at {path.path} belongs to uid {uid}, not to us{mapping_hint(uid)}")

    @property
    def pid(self) -> int:
        """Its pid as this process sees it."""
        return self.peer.pid

    def greet(self) -> int:
        """How many listeners it holds. Raises RemoteProtocolError for what is not a keeper, or a newer one."""
        answer, descriptors = self._ask(b"H")
        close_all(descriptors)
        if len(answer) < HELLO.size or answer[:1] != b"H":
            raise RemoteProtocolError(f"who listens at {self.path.path} is not a keeper; end it, and remove the file")
        _, version, _, held = HELLO.unpack_from(answer)
        if version != VERSION:
            raise RemoteProtocolError(f"the keeper ({self.peer}) speaks version {version}, this process {VERSION}")
        return int(held)

    def register(self, items: Sequence[tuple[dict[str, Any], int]]) -> None:
        """Gives it copies of these listeners, in place of those that it holds; they stay the caller's.

        An item has "name", "url", "device" and "inode" as in LISTENERS of docs/protocol.md.
        """
        self._tell(b"B")
        for item, descriptor in items:
            self._tell(b"K" + json.dumps(item, separators=(",", ":")).encode(), descriptor)
        self._tell(b"C")

    def listeners(self) -> list[Inherited]:
        """Copies of all that it holds, checked against the kernel; the descriptors are the caller's."""
        found: list[Inherited] = []
        try:
            while True:
                answer, descriptors = self._ask(INDEX.pack(b"G", len(found)))
                if answer[:1] != b"G":
                    return found
                found.append(_inherited(answer[1:], descriptors))
        except BaseException:
            close_all([kept.descriptor for kept in found])
            raise

    def end(self) -> None:
        """Ends the process, by force where it does not answer, and returns when it has hung up."""
        try:
            self._tell(b"E")
            self._receive()
        except PeerLost:
            self.reap()
        except (TimedOut, RemoteProtocolError):
            self.kill()

    def kill(self) -> None:
        """Ends a keeper that does not answer. Raises TimedOut where nothing tells which process that is."""
        if self.peer.pidfd is None:
            raise TimedOut(f"the keeper at {self.path.path} does not answer, nor can it be killed from here")
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.peer.pidfd, signal.SIGKILL)
        with contextlib.suppress(PeerLost):
            self._receive()
        self.reap()

    def reap(self) -> None:
        """Waits for the process that has hung up, where it is a child of ours: of PID 1, or of a subreaper."""
        if self.peer.pidfd is not None:
            poll = select.poll()
            poll.register(self.peer.pidfd, select.POLLIN)
            poll.poll(PATIENCE * 1000)
            with contextlib.suppress(ChildProcessError):
                os.waitid(os.P_PIDFD, self.peer.pidfd, os.WEXITED | os.WNOHANG)

    def close(self) -> None:
        """Hangs up."""
        self.sock.close()
        if self.peer.pidfd is not None:
            close_all([self.peer.pidfd])
            self.peer = self.peer._replace(pidfd=None)

    def _tell(self, message: bytes, descriptor: int = -1) -> None:
        answer, descriptors = self._ask(message, descriptor)
        close_all(descriptors)
        if answer[:1] != b"O":
            raise LocalError(f"the keeper ({self.peer}) has no room for that, or somebody else registers with it")

    def _ask(self, message: bytes, descriptor: int = -1) -> tuple[bytes, array[int]]:
        try:
            fdpass.send_descriptors(self.sock.fileno(), message, () if descriptor < 0 else (descriptor,))
        except (BrokenPipeError, ConnectionResetError):
            raise PeerLost(f"the keeper ({self.peer}) has died") from None
        except BlockingIOError:
            raise TimedOut(f"the keeper ({self.peer}) does not read; is it stopped?") from None
        return self._receive()

    def _receive(self) -> tuple[bytes, array[int]]:
        poll = select.poll()
        poll.register(self.sock, select.POLLIN)
        if not poll.poll(PATIENCE * 1000):
            raise TimedOut(f"the keeper ({self.peer}) does not answer; is it stopped?")
        try:
            answer, descriptors = fdpass.receive_descriptors(self.sock.fileno(), LONGEST, 1)
        except ConnectionResetError:
            answer, descriptors = b"", array("i")
        if not answer:
            close_all(descriptors)
            raise PeerLost(f"the keeper ({self.peer}) has died")
        return answer, descriptors


def _inherited(text: bytes, descriptors: array[int]) -> Inherited:
    try:
        try:
            item = json.loads(text)
        except (ValueError, RecursionError):
            item = None
        if len(descriptors) != 1 or not is_listener(item):
            raise RemoteProtocolError("the keeper holds a listener that it cannot describe")
        expect_listener(descriptors[0], item["url"])
        return Inherited("listener", item["name"], item["url"], descriptors[0], (item["device"], item["inode"]))
    except BaseException:
        close_all(descriptors)
        raise


def find(path: ControlPath) -> Keeper | None:
    """The keeper that listens at the path, None where none does. Raises ControlPathError or LocalError."""
    sock = path.connect()
    return None if sock is None else Keeper(sock, path)


def start(path: ControlPath) -> Keeper:
    """Starts a keeper at the path; for the holder of the lock, when find() returned None. Raises LocalError."""
    listening, own = path.bind(listen=False)
    try:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours:
            with theirs:
                _process().start(listening.fileno(), theirs.fileno(), path.allowed)
            with contextlib.closing(Keeper(ours, path)) as first:
                first.greet()
                keeper = find(path)
        if keeper is None:
            raise LocalError(f"the keeper is up, but somebody has removed {path.path}")
        return keeper
    except BaseException:
        remove_own(path.path, own)
        raise
    finally:
        listening.close()


def _process() -> Any:
    """The module that can start one: compiled where that is to be had."""
    if backend == "cython":
        with contextlib.suppress(ImportError):
            from . import _keeper

            return _keeper
    from . import _keeper_py

    return _keeper_py


def private_memory(pid: int) -> int | None:
    """The private pages of a process in KiB, clean and dirty ones (proc_pid_smaps(5)); None where nothing tells."""
    try:
        with open(f"/proc/{pid}/smaps_rollup", encoding="utf-8") as file:
            return sum(map(int, re.findall(r"^Private_(?:Clean|Dirty): +(\d+) kB", file.read(), re.MULTILINE)))
    except OSError:
        return None
