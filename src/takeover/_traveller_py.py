"""A connection of the plain loop on its way between two processes: held, taken back, parted from, or started anew."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Any

from .borrowed import let_go
from .ledger import note

if TYPE_CHECKING:
    from ._loop_py import Loop


class Traveller:
    """The part of a transport that its loop's mover uses."""

    __slots__ = (
        "_backlog",
        "_closing",
        "_eof_written",
        "_full",
        "_held",
        "_loop",
        "_lost",
        "_protocol",
        "_sock",
        "_unsent",
        "exported",
        "stays",
    )

    exported: int
    stays: bool
    _backlog: list[memoryview]
    _closing: bool
    _eof_written: bool
    _full: bool
    _held: bool
    _loop: Loop
    _lost: bool
    _protocol: Any
    _sock: socket.socket
    _unsent: int

    def hold(self) -> None:
        """Neither read nor write: the connection is on its way between two processes, and may come back."""
        self._held = True
        self.exported = self._unsent
        self._arm()

    def let_go(self) -> None:
        """Nobody is going to put back or start a connection on its way: it can be ended."""
        self._held = False

    def take_back(self) -> None:
        """It has not moved: what was written to it on the way is sent from here."""
        if self._unsent > self.exported and self._loop.ledger >= 0:
            note(self._loop.ledger, self._sock.fileno(), b"")
        self.resume()

    def resume(self) -> None:
        """Read and write again, after the connection was held."""
        self._held = False
        if not self._unsent:
            if self._closing:
                self._lose(None)
                return
            if self._eof_written:
                self._shut_down()
        self._arm()

    def start(self) -> None:
        """The first callbacks of a connection that has moved here; who was told to pause writing is told again."""
        was_full, self._full = self._full, False
        self.resume()
        self._tell("connection_made", self)
        if was_full and not (self._lost or self._full):
            self._full = True
            self._tell("pause_writing")
        elif not self._lost:
            self._fill()

    def part(self) -> int:
        """Out of the loop, without a word to the protocol: the connection lives on elsewhere. The caller's to close."""
        self._learn_local_name()
        self._loop.forget(self._sock.fileno())
        self._protocol = None
        self._lost = True
        self._backlog.clear()
        self._unsent = 0
        return let_go(self._sock)

    def append(self, data: bytes) -> None:
        """Queue bytes behind the backlog of a held connection."""
        self._backlog += [memoryview(data)] if data else []
        self._unsent += len(data)

    def backlog(self, start: int = 0) -> bytes:
        """What is unsent, from a byte on."""
        return b"".join(self._backlog)[start:]

    def _arm(self) -> None:
        raise NotImplementedError

    def _fill(self) -> None:
        raise NotImplementedError

    def _learn_local_name(self) -> None:
        raise NotImplementedError

    def _lose(self, error: BaseException | None) -> None:
        raise NotImplementedError

    def _shut_down(self) -> None:
        raise NotImplementedError

    def _tell(self, callback: str, *args: Any) -> Any:
        raise NotImplementedError
