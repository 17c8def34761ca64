"""A server around one event loop, as a takeover sees it: it accepts, ends, and moves what it holds along channels."""

from __future__ import annotations

import socket
import struct
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from . import listeners
from .channel import Account, Channel, End
from .connections import Connections
from .errors import Aborted, ListenError
from .exchange import logger
from .giver import Giver
from .hosted import Server
from .protocol import Limits
from .service import Service
from .taker import Taker

GUARD = struct.pack("@ll", 0, 1000)
"""A struct timeval of one millisecond. As SO_RCVTIMEO of a listener it bounds accept(2) even where another process that
shares the listener has made it blocking: O_NONBLOCK belongs to the open file, not to the descriptor."""


class LoopServer(Server, ABC):
    """What servers on different loops share. The methods of Server hop from the control thread to the loop's.

    `loop` has call_soon_threadsafe() and what an End needs of it; `mover` moves its connections. `listeners` are by
    name, and have `socket`, `accepted` (how often), start() and stop(). A loop of its own kind says in connections(),
    when_empty(), abort_connections() and over() how it counts them, waits for their end, ends them, and ends itself.
    """

    def __init__(
        self,
        loop: Any,
        mover: Connections,
        drain_timeout: float,
        live: bool,
        observer: Callable[[Account], object] | None,
    ) -> None:
        self.loop = loop
        self.mover = mover
        self.drain_timeout = drain_timeout
        self.live = live
        self.account = Account()
        self.account.observer = observer
        self.ends: list[End] = []
        self.listeners: dict[str, Any] = {}
        self.failure: Aborted | None = None
        self._kept: frozenset[str] = frozenset()
        self._ending = False

    @abstractmethod
    def when_empty(self, callback: Callable[[], object]) -> None:
        """Has the callback called, in the loop, as soon as no connection is open."""

    @abstractmethod
    def abort_connections(self) -> int:
        """Aborts every connection that is open, and returns how many."""

    @abstractmethod
    def over(self) -> None:
        """Nothing is left to serve."""

    def start_accepting(self) -> None:
        self._soon(self._start)

    def stop_accepting(self, kept: frozenset[str]) -> None:
        self._kept = kept
        self._soon(self._stop)

    def drain(self) -> None:
        self._soon(self.end)

    def undone(self, reason: str) -> None:
        self.failure = Aborted(f"the takeover was undone: {reason or 'the incumbent took the service back'}")
        self._soon(self.end)

    def stop(self) -> None:
        self._soon(self.end)

    def alive(self, answer: Callable[[], object]) -> None:
        self._soon(answer)

    def moves(self) -> dict[str, Any]:
        return self.account.report()

    def take_connections(self, channel: Channel, limits: Limits) -> None:
        self._hop(channel, Taker, limits)

    def give_connections(self, channel: Channel, limits: Limits) -> None:
        if self.live:
            self._hop(channel, Giver, limits)
        else:
            channel.close()

    def _hop(self, channel: Channel, kind: type[End], limits: Limits) -> None:
        if not self._soon(self._open, channel, kind, limits):
            channel.close()

    def _soon(self, callback: Callable[..., object], *arguments: Any) -> bool:
        """Whether the loop will call it: one that is closed does not."""
        try:
            self.loop.call_soon_threadsafe(callback, *arguments)
        except RuntimeError:
            return False
        return True

    def _open(self, channel: Channel, kind: type[End], limits: Limits) -> None:
        try:
            end = kind(self.loop, self.mover, channel, limits, self.account, self.look_whether_done)
        except OSError as error:
            logger.warning("no channel to pid %d: %s", channel.pid, error.strerror)
            channel.close()
            if channel.again is not None:
                channel.again()
            return
        if isinstance(end, Giver):
            end.more_to_come = self._takes
        self.ends.append(end)

    def _takes(self) -> bool:
        """Whether an older process may still move connections here."""
        return any(isinstance(end, Taker) and not end.finished for end in self.ends)

    def leave_channels(self) -> None:
        """The end of the loop: what is on its way stays with whoever has it."""
        for end in self.ends:
            end.leave()

    def after_fork(self) -> None:
        for end in self.ends:
            end.close_after_fork()
        for listener in self.listeners.values():
            listener.socket.close()

    def end(self) -> None:
        """Stops accepting and serves what is left, to its end or to the deadline; then it is over()."""
        if self._ending:
            return
        self._ending = True
        for name, listener in self.listeners.items():
            if name in self._kept:
                listeners.refuse_new(listener.socket)
                self.loop.call_later(0.2, self._retire, name, listener.accepted)
            else:
                listener.stop()
                listener.socket.close()
        self._close_when_empty()
        self.loop.call_later(self.drain_timeout, self._deadline)

    def _start(self) -> None:
        if not self._ending:
            self._kept = frozenset()
            for listener in self.listeners.values():
                listener.start()

    def _stop(self) -> None:
        for name, listener in self.listeners.items():
            if name not in self._kept:
                listener.stop()

    def _retire(self, name: str, accepted: int) -> None:
        """Closes a listener that the successor has no use for, once nobody has come out of its queue for a while."""
        listener = self.listeners[name]
        if listener.accepted != accepted:
            self.loop.call_later(0.2, self._retire, name, listener.accepted)
            return
        listener.stop()
        listener.socket.close()
        self._kept -= {name}
        self._close_when_empty()

    def _close_when_empty(self) -> None:
        if not self._kept:
            self.when_empty(self.look_whether_done)

    def look_whether_done(self) -> None:
        """A server that ends is over when nothing is open, and nothing is on its way out."""
        self.ends = [end for end in self.ends if not end.over]
        giving = any(isinstance(end, Giver) for end in self.ends)
        if self._ending and not self._kept and not giving and not self.connections():
            self.over()

    def _deadline(self) -> None:
        self.leave_channels()
        aborted = self.abort_connections()
        logger.warning("drain deadline of %g s: closed %d connections", self.drain_timeout, aborted)
        self.over()


def listen_for_streams(member: Service, url: str) -> list[socket.socket]:
    """The stream sockets of an address, from Service.listen_all(); raises ListenError for others."""
    socks = member.listen_all(url)
    for sock in socks:
        if sock.type != socket.SOCK_STREAM:
            raise ListenError(f"listen {url}: stream sockets only are served here")
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, GUARD)
        except OSError as error:
            raise ListenError(f"setsockopt SO_RCVTIMEO of {url}: {error.strerror}") from None
    return socks
