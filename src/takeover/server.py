"""serve(): the native loop and a takeover's part in one call."""

from __future__ import annotations

import signal
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import FrameType
from typing import TYPE_CHECKING, Any

from ._backend import backend
from ._backend import loop as native
from .announcement import tell_start
from .channel import Account
from .errors import Interrupted, LocalError
from .exchange import logger
from .loop_server import LoopServer, listen_for_streams
from .service import Service, join

if TYPE_CHECKING:
    import asyncio

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class NativeServer(LoopServer):
    """The native loop as a takeover sees it."""

    def __init__(self, drain_timeout: float, live: bool, observer: Callable[[Account], object] | None) -> None:
        self.native = native.Loop()
        super().__init__(self.native, self.native, drain_timeout, live, observer)
        self.member: Service | None = None
        self.signals: list[int] = []

    def connections(self) -> int:
        return int(self.native.connections)

    def when_empty(self, callback: Callable[[], object]) -> None:
        self.native.when_empty(callback)

    def abort_connections(self) -> int:
        return int(self.native.abort_connections())

    def over(self) -> None:
        self.native.stop()


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
                socks = [sock for url in listen for sock in listen_for_streams(member, url)]
                report = member.ready(partial(_start, server, member, socks, handler))
                tell_start(report, listen, backend, dry_run=dry_run)
                if dry_run:
                    return
                server.loop.run()
                member.leave()
                logger.info("ended")
        finally:
            server.leave_channels()
            server.loop.close()
    if server.failure is not None:
        raise server.failure


def _start(server: NativeServer, member: Service, socks: list[socket.socket], handler: Any) -> None:
    try:
        for sock in socks:
            server.listeners[member.name_of(sock)] = server.loop.listen(sock, handler)
        _handle_signals(server, member)
    except OSError as error:
        raise LocalError(f"what was taken over cannot be served here: {error.strerror}") from None


def _handle_signals(server: NativeServer, member: Service) -> None:
    left: list[int] = []

    def leave(signum: int) -> None:
        left.append(signum)
        if len(left) > 1:
            server.loop.stop()
            return
        logger.info("%s: draining %d connections", signal.Signals(signum).name, server.connections())
        member.leave()
        server.end()

    for signum in SIGNALS:
        server.loop.add_signal_handler(signum, leave, signum)
    for early in server.signals:
        server.loop.call_soon(leave, early)
