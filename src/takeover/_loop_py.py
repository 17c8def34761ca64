"""The event loop in plain Python: `_loop` without a compiler. May be slower, never different."""

from __future__ import annotations

import errno
import logging
import os
import selectors
import socket
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from ._schedule import Schedule, Timer
from ._sockets import PASSING_ERRORS, SHORTAGES, Backoff, name_of, prepare_listener
from ._transport_py import Transport

if TYPE_CHECKING:
    import asyncio

__all__ = ["ECHO", "Handler", "Listener", "Loop", "Timer"]

log = logging.getLogger("takeover")

BATCH = 128  # connections that are accepted before others get their turn
EVENT_READ = selectors.EVENT_READ


class Echo:
    """Sends back what it receives; reads no further while the peer does not."""

    __slots__ = ("transport",)

    transport: Any

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.transport.write(data)

    def eof_received(self) -> None:
        pass

    def pause_writing(self) -> None:
        self.transport.pause_reading()

    def resume_writing(self) -> None:
        self.transport.resume_reading()

    def connection_lost(self, error: Exception | None) -> None:
        pass


class Handler:
    """What the built-in handlers are, in place of a compiled one."""

    __slots__ = ("factory",)

    def __init__(self) -> None:
        self.factory: Callable[[], Any] = Echo


ECHO: Final = Handler()


class Listener:
    """A listening socket in a loop. The socket stays its caller's; the listener closes and shuts down nothing."""

    def __init__(self, loop: Loop, sock: socket.socket, factory: Callable[[], asyncio.Protocol]) -> None:
        self.socket = sock
        self.accepted = 0
        self._loop = loop
        self._factory = factory
        self._place = -1  # the descriptor, -1 when stopped
        self._watched = 0
        self._pausing = False
        self._backoff = Backoff(loop.schedule, sock, self._resume)

    @property
    def accepting(self) -> bool:
        """Whether it is in the poll set, or will be again after a pause for want of descriptors or memory."""
        return self._place >= 0

    def start(self) -> None:
        """Put the listener into the poll set; what waits in its queue is accepted first."""
        if self._place >= 0:
            return
        self._loop.check_open()
        if self.socket.fileno() < 0:
            raise OSError(errno.EBADF, f"cannot accept on {self.socket!r}: it was closed")
        self._loop.take_place(self.socket.fileno())
        self._place = self.socket.fileno()
        self._watch(EVENT_READ)
        self._loop.listeners[self._place] = self

    def stop(self) -> None:
        """Take the listener out of the poll set; new connections wait in the kernel's queue."""
        if self._place >= 0:
            self._watch(0)
            del self._loop.listeners[self._place]
            self._place = -1
        self._backoff.cancel()
        self._pausing = False

    def ready(self, _events: int) -> None:
        """Accept a batch."""
        if self._place < 0:
            return
        os.set_blocking(self._place, False)  # O_NONBLOCK belongs to the open file, which other processes may hold
        for _ in range(BATCH):
            try:
                sock, peer = self.socket.accept()
            except BlockingIOError:
                break
            except OSError as error:
                if error.errno in PASSING_ERRORS:
                    continue
                self._troubled(error)
                break
            sock.setblocking(False)
            try:
                protocol = self._factory()
            except (KeyboardInterrupt, SystemExit):
                sock.close()
                raise
            except BaseException:
                log.exception("protocol factory %r raised; the connection that it was for is closed", self._factory)
                sock.close()
                continue
            self.accepted += 1
            self._pausing = False
            self._loop.admit(Transport(self._loop, sock, peer, protocol))
            if self._place < 0:
                break
        if self._backoff.began and not self._pausing:
            self._backoff.over()

    def _troubled(self, error: OSError) -> None:
        if error.errno in SHORTAGES:
            self._pausing = True
            self._watch(0)
            self._backoff.refused(error.errno)
        else:
            log.error("accept on %s: %s; nothing more is accepted there", name_of(self.socket), error.strerror)
            self.stop()

    def _resume(self) -> None:
        if self._place >= 0:
            self._watch(EVENT_READ)

    def _watch(self, wanted: int) -> None:
        self._loop.watch(self._place, self._watched, wanted, self)
        self._watched = wanted


class Loop:
    """One thread's event loop. Only call_soon_threadsafe may be called from another thread.

    close() it: that delivers connection_lost to every protocol and gives the descriptors back.
    """

    def __init__(self) -> None:
        self.schedule = Schedule()
        self.listeners: dict[int, Listener] = {}
        self.transports: dict[int, Transport] = {}
        self._selector = selectors.DefaultSelector()
        self._selector.register(self.schedule.wakeup, EVENT_READ, self)
        self._empty: Callable[[], object] | None = None
        self._running = self._stopping = self._closed = False

    def time(self) -> float:
        """CLOCK_MONOTONIC, in seconds; what call_at counts in."""
        return time.monotonic()

    def run(self) -> None:
        """Serve until stop(). What a callback raises is logged; KeyboardInterrupt and SystemExit leave run()."""
        self.check_open()
        if self._running:
            raise RuntimeError("the loop is running")
        self._running = True
        schedule = self.schedule
        catching = schedule.catch_signals()
        try:
            while True:
                if self._stopping or schedule.ready:
                    timeout: float | None = 0
                elif schedule.timers:
                    timeout = max(0.0, min(schedule.timers[0][0] - time.monotonic(), 1000.0))
                else:
                    timeout = None
                for key, events in self._selector.select(timeout):
                    key.data.ready(events)
                schedule.run_due()
                if self._stopping:
                    return
        finally:
            self._running = self._stopping = False
            if catching:
                schedule.release_signals()

    def stop(self) -> None:
        """Have run() return after the callbacks that are ready now."""
        self._stopping = True

    def close(self) -> None:
        """End every connection (connection_lost(None) is delivered), let go of the listeners, close the loop's own
        descriptors. The listening sockets stay open, they are their caller's.
        """
        if self._running:
            raise RuntimeError("the loop is running: stop() it first")
        if self._closed:
            return
        for listener in list(self.listeners.values()):
            listener.stop()
        self._empty = None
        while self.abort_connections() or self.transports:
            self.schedule.run_due()
        self._selector.close()
        self.schedule.close()
        self._closed = True

    def listen(
        self,
        sock: socket.socket,
        handler: Handler | Callable[[], asyncio.Protocol],
        *,
        accepting: bool = True,
    ) -> Listener:
        """Serve the connections of a listening stream socket, made non-blocking here and owned by the caller still.

        `handler`: a Handler, or what makes an asyncio.Protocol for each connection. Raises UsageError if the socket
        does not listen.
        """
        self.check_open()
        if not isinstance(handler, Handler) and not callable(handler):
            raise TypeError(f"handler must be a Handler or a protocol factory, not {handler!r}")
        prepare_listener(sock)
        listener = Listener(self, sock, handler.factory if isinstance(handler, Handler) else handler)
        if accepting:
            listener.start()
        return listener

    @property
    def connections(self) -> int:
        """How many connections are open."""
        return len(self.transports)

    def when_empty(self, callback: Callable[[], object] | None) -> None:
        """Call back once when no connection is open, which may be at once; None takes that back."""
        if callback is not None and not callable(callback):
            raise TypeError(f"a callable is required, not {callback!r}")
        self.check_open()
        self._empty = callback
        self._look_whether_empty()

    def abort_connections(self) -> int:
        """End all connections without sending what they have not sent. Returns how many."""
        return sum(transport.lose() for transport in list(self.transports.values()))

    def call_soon(self, callback: Callable[..., object], *args: Any) -> Timer:
        """Call back in the next turn of the loop."""
        return self.schedule.call_soon(callback, *args)

    def call_soon_threadsafe(self, callback: Callable[..., object], *args: Any) -> Timer:
        """The same, from any thread."""
        return self.schedule.call_soon_threadsafe(callback, *args)

    def call_later(self, delay: float, callback: Callable[..., object], *args: Any) -> Timer:
        """Call back in `delay` seconds."""
        return self.schedule.call_at(time.monotonic() + delay, callback, *args)

    def call_at(self, when: float, callback: Callable[..., object], *args: Any) -> Timer:
        """Call back when time() has reached `when`."""
        return self.schedule.call_at(when, callback, *args)

    def add_signal_handler(self, signum: int, callback: Callable[..., object], *args: Any) -> None:
        """Call back in the loop when a signal has come. Main thread only; close() puts back what was there."""
        self.schedule.add_signal_handler(signum, callback, args)

    def remove_signal_handler(self, signum: int) -> bool:
        """Put back what handled the signal before. Returns whether there was a handler."""
        return self.schedule.remove_signal_handler(signum)

    def ready(self, _events: int) -> None:
        """The wakeup pipe is readable."""
        self.schedule.woken()

    def check_open(self) -> None:
        if self._closed:
            raise RuntimeError("the loop is closed")

    def watch(self, fileobj: Any, watched: int, wanted: int, data: Any) -> None:
        """Have the selector report `wanted`, where it reported `watched`; 0 is not being in its set at all."""
        if wanted == watched:
            return
        if not watched:
            self._selector.register(fileobj, wanted, data)
        elif not wanted:
            self._selector.unregister(fileobj)
        else:
            self._selector.modify(fileobj, wanted, data)

    def take_place(self, fd: int) -> None:
        """A descriptor is new: if a listener has its number, that one's socket was closed without stopping it."""
        former = self.listeners.get(fd)
        if former is not None:
            former.stop()

    def admit(self, transport: Transport) -> None:
        """Serve a connection."""
        fd = transport.fileno()
        self.take_place(fd)
        self.transports[fd] = transport
        transport.begin()

    def forget(self, transport: Transport) -> None:
        """A connection is over; its descriptor is about to be closed."""
        del self.transports[transport.fileno()]
        self._look_whether_empty()

    def _look_whether_empty(self) -> None:
        if self._empty is not None and not self.transports:
            self.call_soon(self._empty)
            self._empty = None
