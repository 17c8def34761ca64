"""Servers on asyncio or uvloop that take over from each other, their established connections included: docs/aio.md.

create_server() and start_server() are asyncio's of the same names, with a takeover's part in them.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Sequence
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from .aio_entrance import Entrance, Home, moved
from .aio_moving import Mover
from .aio_streams import Connection, Stream, StreamHandler
from .announcement import tell_start
from .channel import Account
from .errors import TakeoverError
from .listeners import BACKLOG
from .loop_server import LoopServer, listen_for_streams
from .service import Service, join

if TYPE_CHECKING:
    from ssl import SSLContext

__all__ = ["Connection", "Server", "create_server", "moved", "start_server"]

log = logging.getLogger("takeover")

SIGNALS = (signal.SIGTERM, signal.SIGINT)
POLL = 0.05
"""Seconds between two looks at whether a server that ends has come to its end; loops tell of no such thing."""

RETRY = 0.1
"""Seconds until accepting is tried again, where the process has no descriptor left for it."""

Result = TypeVar("Result")


class Listener(Home):
    """A listening socket in the loop. The socket stays its caller's: the loop gets a duplicate, which it closes."""

    def __init__(self, mover: Mover, sock: socket.socket, factory: Callable[[], Any], ssl: SSLContext | None) -> None:
        super().__init__(os.fstat(sock.fileno()).st_ino, factory)
        self.socket = sock
        self._mover = mover
        self._ssl = ssl
        self._wanted = False
        self._server: Any = None
        self._duplicate: socket.socket | None = None
        self._opening: asyncio.Task[None] | None = None

    def start(self) -> asyncio.Task[None]:
        """Accepts, from the end of the task on."""
        self._wanted = True
        if self._opening is None or self._opening.done():
            self._opening = asyncio.get_running_loop().create_task(self._open())
        return self._opening

    def stop(self) -> None:
        """Accepts no more; new connections wait in the kernel's queue.

        asyncio makes the transport of what it has accepted one turn of the loop later, in a task that fails, and drops
        the connection, where the server is closed by then. So the server is closed behind those tasks.
        """
        self._wanted = False
        if self._server is not None:
            assert self._duplicate is not None
            loop = asyncio.get_running_loop()
            loop.remove_reader(self._duplicate.fileno())
            loop.call_soon(self._server.close)
            self._server = None

    def close_after_fork(self) -> None:
        """In a forked child. uvloop would not let go of the number before its end, so that is given something else."""
        if self._duplicate is not None and self._duplicate.fileno() >= 0:
            other = os.eventfd(0, os.EFD_CLOEXEC)
            os.dup2(other, self._duplicate.fileno(), inheritable=False)
            os.close(other)

    async def _open(self) -> None:
        while self._wanted and self._server is None:
            try:
                os.set_blocking(self.socket.fileno(), False)
                await self._accept(self.socket.dup())
            except OSError as error:
                log.error("cannot accept on %s: %s; trying again", self.socket.getsockname(), error.strerror)
                await asyncio.sleep(RETRY)
        if not self._wanted:
            self.stop()

    async def _accept(self, sock: socket.socket) -> None:
        self._duplicate = sock
        try:
            self._server = await self._serve(sock)
        except OSError:
            sock.close()
            raise

    async def _serve(self, sock: socket.socket) -> Any:
        loop: Any = asyncio.get_running_loop()
        options: dict[str, Any] = {"sock": sock, "backlog": BACKLOG, "ssl": self._ssl}
        factory = partial(Entrance, self._mover, self)
        if sock.family != socket.AF_UNIX:
            return await loop.create_server(factory, **options)
        try:
            return await loop.create_unix_server(factory, cleanup_socket=False, **options)
        except TypeError:  # before Python 3.13 nobody removes the file
            return await loop.create_unix_server(factory, **options)


class AioServer(LoopServer):
    """An asyncio loop as a takeover sees it. `ended` is set when nothing is left to serve."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        drain_timeout: float,
        live: bool,
        observer: Callable[[Account], object] | None,
    ) -> None:
        self.aio = Mover(loop)
        super().__init__(loop, self.aio, drain_timeout, live, observer)
        self.ended = asyncio.Event()

    def connections(self) -> int:
        return self.aio.connections

    def when_empty(self, callback: Callable[[], object]) -> None:
        self.loop.call_later(POLL, self._poll, callback)

    def _poll(self, callback: Callable[[], object]) -> None:
        self.aio.sweep()
        callback()
        if not self.ended.is_set():
            self.when_empty(callback)

    def abort_connections(self) -> int:
        return self.aio.abort()

    def over(self) -> None:
        self.ended.set()

    def add(self, name: str, listener: Listener) -> None:
        """Knows a listener, on which it does not accept yet."""
        self.listeners[name] = listener
        self.aio.homes[listener.inode] = listener

    def let_go(self) -> None:
        """The end on this side of the takeover: what is on its way stays with whoever has it, the rest is aborted."""
        for listener in self.listeners.values():
            listener.stop()
        self.leave_channels()
        self.aio.abort()

    def after_fork(self) -> None:
        super().after_fork()
        for listener in self.listeners.values():
            listener.close_after_fork()


class Server:
    """A server that runs, from create_server() or start_server(), until a successor has taken over or it is stopped.

    `sockets` are its listeners, `service` is its place in the takeover, as join() gives it, and `account` tells what
    has moved. Used in an `async with` block it is closed at the end of it.
    """

    def __init__(self, hosted: AioServer, service: Service) -> None:
        self.service = service
        self.account = hosted.account
        self.sockets = tuple(listener.socket for listener in hosted.listeners.values())
        self._hosted = hosted
        self._interrupted = False
        self._closing: asyncio.Task[None] | None = None

    async def serve_forever(self) -> None:
        """Returns when a successor has taken over and the rest has drained, or after close().

        In the main thread it handles SIGTERM and SIGINT: stop accepting, drain to the deadline; the second one ends at
        once. A task that is cancelled in it ends the server at once too. Raises Aborted when the incumbent took the
        service back in the probation.
        """
        previous = {}
        if threading.current_thread() is threading.main_thread():
            previous = {signum: signal.getsignal(signum) for signum in SIGNALS}
            for signum in SIGNALS:
                self._hosted.loop.add_signal_handler(signum, self._interrupt, signum)
        try:
            await self._hosted.ended.wait()
        finally:
            await self._close()
            for signum, handler in previous.items():
                self._hosted.loop.remove_signal_handler(signum)
                if handler is not None:
                    signal.signal(signum, handler)
        log.info("ended")
        if self._hosted.failure is not None:
            raise self._hosted.failure

    def close(self) -> None:
        """Gives the service up: stops accepting, and drains to the deadline."""
        self.service.leave()
        self._hosted.end()

    async def wait_closed(self) -> None:
        """Returns when everything has drained, and this process has no part in the service any more."""
        await self._hosted.ended.wait()
        await self._close()

    async def __aenter__(self) -> Server:  # noqa: PYI034 - typing.Self needs Python 3.11
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._closing is None:
            self.close()
        await self.wait_closed()

    def _interrupt(self, signum: int) -> None:
        if self._interrupted:
            self._hosted.over()
            return
        self._interrupted = True
        log.info("%s: draining %d connections", signal.Signals(signum).name, self._hosted.connections())
        self.close()

    async def _close(self) -> None:
        if self._closing is None:
            self._hosted.let_go()
            self._hosted.over()
            self._closing = asyncio.ensure_future(_in_thread(self.service.close))
        await asyncio.shield(self._closing)


async def create_server(
    protocol_factory: Callable[[], asyncio.BaseProtocol],
    listen: Sequence[str],
    control: str = "./takeover.sock",
    *,
    live: bool = True,
    drain_timeout: float = 30.0,
    ssl: SSLContext | None = None,
    observer: Callable[[Account], object] | None = None,
    **settings: Any,
) -> Server:
    """A server of protocols in the running loop, asyncio's or uvloop's, which accepts when this returns.

    listen: URLs. control: path of the control socket. live: whether established connections move, those of protocols
    with export_state() and import_state() (docs/aio.md); else they drain. ssl: makes them TLS connections, which drain.
    observer: called in the loop with the Account of what has moved, when it has changed. drain_timeout and the other
    settings are those of join().

    Raises what join(), Service.listen() and Service.ready() raise. Whatever fails in here, or is cancelled, leaves the
    incumbent serving.
    """
    loop = asyncio.get_running_loop()
    hosted = AioServer(loop, drain_timeout, live, observer)
    return await _begin(hosted, protocol_factory, listen, control, ssl, {"drain_timeout": drain_timeout, **settings})


async def start_server(
    handler: StreamHandler,
    listen: Sequence[str],
    control: str = "./takeover.sock",
    *,
    limit: int = 2**16,
    live: bool = True,
    drain_timeout: float = 30.0,
    ssl: SSLContext | None = None,
    observer: Callable[[Account], object] | None = None,
    **settings: Any,
) -> Server:
    """A server of coroutines: `handler(reader, writer, connection)` runs in a task for each connection.

    Its connection moves while the handler waits in a read and is not inside `connection.not_now()`: it is cancelled
    here, and started anew in the successor, with `connection.state` and with what the reader had not handed out. When
    it ends its connection is closed. limit: as asyncio.start_server() has it. The rest is that of create_server().
    """
    loop = asyncio.get_running_loop()
    hosted = AioServer(loop, drain_timeout, live, observer)
    factory = partial(Stream, handler, limit, loop)
    return await _begin(hosted, factory, listen, control, ssl, {"drain_timeout": drain_timeout, **settings})


async def _begin(
    hosted: AioServer,
    factory: Callable[[], Any],
    listen: Sequence[str],
    control: str,
    ssl: SSLContext | None,
    settings: dict[str, Any],
) -> Server:
    if isinstance(listen, str):
        raise TypeError(f"listen is a list of URLs, not {listen!r}")
    dry_run = bool(settings.get("dry_run"))
    member = await _to_the_end(partial(join, control, server=hosted, **settings), Service.close)
    try:
        for url in listen:
            for sock in await _to_the_end(partial(listen_for_streams, member, url)):
                hosted.add(member.name_of(sock), Listener(hosted.aio, sock, factory, ssl))
        report = await _in_thread(partial(member.ready, partial(_start, hosted)))
        tell_start(report, listen, type(hosted.loop).__module__.partition(".")[0], dry_run=dry_run)
        if dry_run:
            hosted.over()
    except BaseException as error:
        hosted.let_go()
        await asyncio.shield(_in_thread(partial(member.__exit__, type(error), error, None)))
        raise
    return Server(hosted, member)


def _start(hosted: AioServer) -> None:
    """Has the loop accept, and waits until it does, or is not to any more; not in the loop's own thread."""

    async def start_all() -> None:
        await asyncio.gather(*(listener.start() for listener in hosted.listeners.values()))

    asyncio.run_coroutine_threadsafe(start_all(), hosted.loop).result()


async def _to_the_end(work: Callable[[], Result], undo: Callable[[Result], object] | None = None) -> Result:
    """Does blocking work in a thread. Who is cancelled meanwhile waits for its end, and undoes it."""
    task = asyncio.ensure_future(_in_thread(work))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        with contextlib.suppress(TakeoverError):
            result = await task
            if undo is not None:
                await _in_thread(partial(undo, result))
        raise


async def _in_thread(work: Callable[[], Result]) -> Result:
    """Does blocking work in a thread that nobody waits for when the process ends."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Result] = loop.create_future()

    def tell(kind: Callable[[Any], None], outcome: Any) -> None:
        if not future.done():
            kind(outcome)

    def run() -> None:
        try:
            kind, outcome = future.set_result, work()
        except BaseException as error:  # noqa: BLE001 - raised in the loop
            kind, outcome = future.set_exception, error  # type: ignore[assignment]
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(tell, kind, outcome)

    threading.Thread(target=run, name="takeover", daemon=True).start()
    return await future
