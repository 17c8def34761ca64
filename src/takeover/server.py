"""serve(): the native loop and a takeover's part in one call."""

from __future__ import annotations

import signal
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any

from . import listeners
from ._backend import backend
from ._backend import loop as native
from .channel import Account, Channel, End
from .controller import Server
from .errors import Aborted, Interrupted, ListenError
from .exchange import logger
from .giver import Giver
from .protocol import Limits
from .service import Report, Service, join
from .taker import Taker

if TYPE_CHECKING:
    import asyncio

SIGNALS = (signal.SIGTERM, signal.SIGINT)

GUARD = b"\0" * 8 + (1000).to_bytes(8, "little")
"""A struct timeval of one millisecond. As SO_RCVTIMEO of a listener it bounds accept(2) even where another process that
shares the listener has made it blocking: O_NONBLOCK belongs to the open file, not to the descriptor."""


class NativeServer(Server):
    """The native loop as a takeover sees it. The methods of Server hop from the control thread to the loop's."""

    def __init__(self, drain_timeout: float, live: bool, observer: Callable[[Account], object] | None) -> None:
        self.loop = native.Loop()
        self.drain_timeout = drain_timeout
        self.live = live
        self.account = Account()
        self.account.observer = observer
        self.ends: list[End] = []
        self.listeners: dict[str, Any] = {}
        self.failure: Aborted | None = None
        self.member: Service | None = None
        self.signals: list[int] = []
        self._kept: frozenset[str] = frozenset()
        self._ending = False

    def start_accepting(self) -> None:
        self.loop.call_soon_threadsafe(self._start)

    def stop_accepting(self, kept: frozenset[str]) -> None:
        self._kept = kept
        self.loop.call_soon_threadsafe(self._stop)

    def drain(self) -> None:
        self.loop.call_soon_threadsafe(self.end)

    def undone(self, reason: str) -> None:
        self.failure = Aborted(f"the takeover was undone: {reason or 'the incumbent took the service back'}")
        self.loop.call_soon_threadsafe(self.end)

    def stop(self) -> None:
        self.loop.call_soon_threadsafe(self.end)

    def connections(self) -> int:
        return int(self.loop.connections)

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
        try:
            self.loop.call_soon_threadsafe(self._open, channel, kind, limits)
        except RuntimeError:  # the loop is closed
            channel.close()

    def _open(self, channel: Channel, kind: type[End], limits: Limits) -> None:
        end = kind(self.loop, self.loop, channel, limits, self.account, self._look_whether_done)
        if isinstance(end, Giver):
            end.more_to_come = self._takes
        self.ends.append(end)

    def _takes(self) -> bool:
        """Whether an older process may still move connections here."""
        return any(isinstance(end, Taker) and not end.finished for end in self.ends)

    def leave_channels(self) -> None:
        """What is on its way is put back, or stays with whoever has it."""
        for end in self.ends:
            end.leave()

    def after_fork(self) -> None:
        for end in self.ends:
            end.close_after_fork()
        for listener in self.listeners.values():
            listener.socket.close()

    def end(self) -> None:
        """Stops accepting and serves what is left, to its end or to the deadline; then the loop stops."""
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
            self.loop.when_empty(self._look_whether_done)

    def _look_whether_done(self) -> None:
        """Stops the loop of a server that ends when nothing is open, and nothing is on its way out."""
        self.ends = [end for end in self.ends if not end.over]
        giving = any(isinstance(end, Giver) for end in self.ends)
        if self._ending and not self._kept and not giving and not self.loop.connections:
            self.loop.stop()

    def _deadline(self) -> None:
        self.leave_channels()
        aborted = self.loop.abort_connections()
        logger.warning("drain deadline of %g s: closed %d connections", self.drain_timeout, aborted)
        self.loop.stop()


@contextmanager
def _interruptible(server: NativeServer) -> Iterator[None]:
    """While the loop does not have the signals: SIGTERM and SIGINT raise Interrupted, which undoes what has been done.

    Once the service is ours there is nothing to undo, and they wait for the loop; once it was, there is nothing to end.
    """

    def interrupt(signum: int, _frame: FrameType | None) -> None:
        if server.member is not None and server.member.state not in ("joining", "warming"):
            server.signals.append(signum)
            return
        raise Interrupted(f"{signal.Signals(signum).name} before the service was ready")

    previous = [signal.signal(signum, interrupt) for signum in SIGNALS]
    try:
        yield
    finally:
        for signum, handler in zip(SIGNALS, previous, strict=True):
            signal.signal(signum, handler)


def serve(
    handler: Callable[[], asyncio.Protocol] | Any,
    listen: Sequence[str] = ("tcp://127.0.0.1:9999",),
    control: str = "./takeover.sock",
    *,
    dry_run: bool = False,
    drain_timeout: float = 30.0,
    live: bool = True,
    observer: Callable[[Account], object] | None = None,
    **settings: Any,
) -> None:
    """Serves on the native loop until a successor has taken over and the rest has drained, or until stopped.

    handler: an asyncio protocol factory, or a compiled handler like ECHO. listen: URLs. live: whether established
    connections move, those of protocols with export_state() and import_state() (docs/live-moves.md); else they drain.
    observer: called in the loop with the Account of what has moved, when it has changed. The other arguments, and the
    rest of the settings, are those of join(). Call it in the main thread: it handles SIGTERM and SIGINT (stop
    accepting, drain to the deadline; the second one ends at once).

    Raises what join(), Service.listen() and Service.ready() raise, and Aborted when the incumbent took the service back
    in the probation.
    """
    server = NativeServer(drain_timeout, live, observer)
    with _interruptible(server):
        try:
            with join(control, server=server, dry_run=dry_run, drain_timeout=drain_timeout, **settings) as member:
                server.member = member
                socks = [sock for url in listen for sock in _listen(member, url)]
                report = member.ready()
                _tell(report, listen, dry_run=dry_run)
                if dry_run:
                    return
                for sock in socks:
                    server.listeners[member.name_of(sock)] = server.loop.listen(sock, handler)
                _run(server, member)
        finally:
            server.leave_channels()
            server.loop.close()
    if server.failure is not None:
        raise server.failure


def _listen(member: Service, url: str) -> list[socket.socket]:
    socks = member.listen_all(url)
    for sock in socks:
        if sock.type != socket.SOCK_STREAM:
            raise ListenError(f"listen {url}: the native loop serves stream sockets only")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, GUARD)
    return socks


def _run(server: NativeServer, member: Service) -> None:
    def leave(signum: int) -> None:
        logger.info("%s: draining %d connections", signal.Signals(signum).name, server.connections())
        for each in SIGNALS:
            server.loop.add_signal_handler(each, server.loop.stop)
        member.leave()
        server.end()

    for signum in SIGNALS:
        server.loop.add_signal_handler(signum, leave, signum)
    for early in server.signals[:1]:
        server.loop.call_soon(leave, early)
    server.loop.run()
    member.leave()
    logger.info("ended")


def _tell(report: Report, urls: Sequence[str], *, dry_run: bool) -> None:
    """What the operator reads: which generation this is, and what became of the listeners."""
    where = ", ".join(urls)
    if dry_run:
        whom = f"from pid {report.incumbent}" if report.incumbent else "cold: nothing is running here"
        logger.info("dry run: a takeover of %s would have worked (%s)", where, whom)
        return
    if report.generation == 1:
        logger.info("serving %s (generation 1, %s)", where, backend)
        return
    logger.info(
        "took over %d listener%s from pid %d (generation %d, %s) in %.0f ms",
        len(report.adopted),
        "" if len(report.adopted) == 1 else "s",
        report.incumbent,
        report.generation,
        backend,
        report.milliseconds,
    )
    if report.bound:
        logger.warning("bound anew, not adopted: %s", ", ".join(report.bound))
    if report.unused:
        logger.warning("not used by this version, drained by pid %d: %s", report.incumbent, ", ".join(report.unused))
