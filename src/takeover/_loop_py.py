"""The event loop in plain Python: `_loop` without a compiler. May be slower, never different."""

from __future__ import annotations

import logging
import selectors
import socket
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from ._listener_py import Listener
from ._moving_py import Mover
from ._schedule import Schedule, Timer
from ._sockets import prepare_listener
from ._transport_py import Transport

if TYPE_CHECKING:
    import asyncio


__all__ = ["ECHO", "Handler", "Listener", "Loop", "Timer"]

log = logging.getLogger("takeover")

EVENT_READ, EVENT_WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE


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


class Watch:
    """What to call when a descriptor can be read or written that is not the loop's."""

    __slots__ = ("reader", "writer")

    def __init__(self) -> None:
        self.reader: Timer | None = None
        self.writer: Timer | None = None

    @property
    def wanted(self) -> int:
        return (EVENT_READ if self.reader else 0) | (EVENT_WRITE if self.writer else 0)

    def ready(self, events: int) -> None:
        """The reader may put an end to the watch before the writer's turn."""
        reader, writer = self.reader, self.writer
        if reader is not None and events & EVENT_READ:
            reader.run()
        if writer is not None and self.writer is writer and events & EVENT_WRITE:
            writer.run()


class Loop(Mover):
    """One thread's event loop. Only call_soon_threadsafe may be called from another thread.

    close() it: that delivers connection_lost to every protocol and gives the descriptors back.
    """

    def __init__(self) -> None:
        self.schedule = Schedule()
        self.listeners: dict[int, Listener] = {}
        self.transports: dict[int, Transport] = {}
        self.homes: dict[int, Listener] = {}
        self._selector = selectors.DefaultSelector()
        self._watches: dict[int, Watch] = {}
        self._empty: Callable[[], object] | None = None
        self._running = self._stopping = self._closed = False
        self.add_reader(self.schedule.wakeup, self.schedule.woken)

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
        self.schedule.say_farewell()
        for transport in self.transports.values():
            transport.let_go()
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
        native = isinstance(handler, Handler)
        listener = Listener(self, sock, handler.factory if isinstance(handler, Handler) else handler, native)
        self.homes[listener.inode] = listener
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

    def add_reader(self, fd: Any, callback: Callable[..., object], *args: Any) -> None:
        """Call back whenever a descriptor, which stays the caller's, can be read; in place of a former callback."""
        self._watch_for(fd, Timer(0.0, callback, args), self._watched(fd).writer)

    def remove_reader(self, fd: Any) -> bool:
        """Undo add_reader(), before the descriptor is closed. Returns whether there was a callback."""
        watched = self._watched(fd)
        had = watched.reader is not None
        self._watch_for(fd, None, watched.writer)
        return had

    def add_writer(self, fd: Any, callback: Callable[..., object], *args: Any) -> None:
        """Call back whenever a descriptor, which stays the caller's, can be written; in place of a former callback."""
        self._watch_for(fd, self._watched(fd).reader, Timer(0.0, callback, args))

    def remove_writer(self, fd: Any) -> bool:
        """Undo add_writer(), before the descriptor is closed. Returns whether there was a callback."""
        watched = self._watched(fd)
        had = watched.writer is not None
        self._watch_for(fd, watched.reader, None)
        return had

    def _watched(self, fileobj: Any) -> Watch:
        return self._watches.get(fileobj if isinstance(fileobj, int) else fileobj.fileno(), Watch())

    def _watch_for(self, fileobj: Any, reader: Timer | None, writer: Timer | None) -> None:
        fd = fileobj if isinstance(fileobj, int) else fileobj.fileno()
        watcher = self._watches.get(fd)
        if watcher is None:
            if reader is None and writer is None:
                return
            self.check_open()
            watcher = Watch()
        before = watcher.wanted
        watcher.reader, watcher.writer = reader, writer
        self.watch(fd, before, watcher.wanted, watcher)
        if watcher.wanted:
            self._watches[fd] = watcher
        else:
            del self._watches[fd]

    def add_signal_handler(self, signum: int, callback: Callable[..., object], *args: Any) -> None:
        """Call back in the loop when a signal has come. Main thread only; close() puts back what was there."""
        self.schedule.add_signal_handler(signum, callback, args)

    def remove_signal_handler(self, signum: int) -> bool:
        """Put back what handled the signal before. Returns whether there was a handler."""
        return self.schedule.remove_signal_handler(signum)

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
        """A connection is new in the loop."""
        fd = transport.fileno()
        self.take_place(fd)
        self.transports[fd] = transport

    def forget(self, fd: int) -> None:
        """A connection is over; its descriptor is about to be closed."""
        del self.transports[fd]
        self._look_whether_empty()

    def _look_whether_empty(self) -> None:
        if self._empty is not None and not self.transports:
            self.call_soon(self._empty)
            self._empty = None
