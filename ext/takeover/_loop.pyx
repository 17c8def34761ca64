# cython: language_level=3, boundscheck=False, wraparound=False
"""The event loop on epoll(7), level-triggered. `_loop_py` is the same interface in plain Python."""

from cpython.exc cimport PyErr_CheckSignals
from libc.errno cimport EINTR, errno
from libc.math cimport INFINITY
from libc.stdint cimport uint8_t
from libc.stdlib cimport calloc, free, malloc
from posix.unistd cimport close

from takeover._connections cimport (
    CLOSING, EPOLL_CLOEXEC, EPOLLIN, EPOLLOUT, EVENTS, HELD, LOST, NATIVE, PROTOCOL, PROTOCOL_LISTENER, RECEIVE, SLAB,
    STAYS, WATCH, Acceptor, Chunk, Connection, Core, doom, drop_backlog, epoll_create1, epoll_event, find,
    open_connection, place, reap, release, watch,
)
from takeover._listener cimport Listener, make_listener
from takeover._moving cimport Mover
from takeover._native cimport monotonic, wait
from takeover._transport cimport Transport

import os

from takeover import _listener, _native
from takeover._schedule import Schedule, Timer
from takeover._sockets import prepare_listener

__all__ = ["ECHO", "Handler", "Listener", "Loop", "Timer"]

ECHO = _native.ECHO
globals()["Handler"] = _native.Handler  # as Python names too
globals()["Listener"] = _listener.Listener


cdef class Watch:
    """What to call when a descriptor can be read or written that is not the loop's."""

    cdef object reader
    cdef object writer


cdef class Loop(Mover):
    """One thread's event loop. Only call_soon_threadsafe may be called from another thread.

    close() it: that delivers connection_lost to every protocol and gives the descriptors back.
    """

    cdef object ready         # of the schedule
    cdef list timers          # of the schedule
    cdef set listeners
    cdef set handlers         # connections point into them
    cdef list homes           # every listener, also one that does not listen any more
    cdef dict watches
    cdef object empty
    cdef bint running
    cdef bint stopping

    def __cinit__(self):
        self.core = <Core *>calloc(1, sizeof(Core))
        if self.core == NULL:
            raise MemoryError
        self.core.epoll = self.core.ledger = -1
        self.core.buffer = <char *>malloc(RECEIVE)
        self.core.events = <epoll_event *>calloc(EVENTS, sizeof(epoll_event))
        if self.core.buffer == NULL or self.core.events == NULL:
            raise MemoryError

    def __init__(self):
        if self.schedule is not None:
            raise RuntimeError("a loop is made once")
        self.listeners, self.handlers, self.homes, self.watches = set(), set(), [], {}
        self.core.epoll = epoll_create1(EPOLL_CLOEXEC)
        if self.core.epoll < 0:
            raise OSError(errno, f"epoll_create1: {os.strerror(errno)}")
        self.schedule = Schedule()
        self.ready, self.timers = self.schedule.ready, self.schedule.timers
        self.add_reader(self.schedule.wakeup, self.schedule.woken)

    def __dealloc__(self):
        """For a loop that was never closed: its descriptors go, and no transport may use it any more."""
        cdef Connection *connection
        cdef size_t index
        cdef Chunk *chunk
        if self.core == NULL:
            return
        for index in range(SLAB * self.core.slab_count):
            connection = self.connection_at(index)
            if connection != NULL and connection.kind == PROTOCOL:
                (<Transport>connection.state).let_go()
            elif connection != NULL and connection.kind == NATIVE:
                doom(self.core, connection, 0)
        reap(self.core)
        for index in range(self.core.slab_count):
            free(self.core.slabs[index])
        while self.core.spare != NULL:
            chunk = self.core.spare
            self.core.spare = chunk.next
            free(chunk)
        if self.core.epoll >= 0:
            close(self.core.epoll)
        free(self.core.slabs)
        free(self.core.buffer)
        free(self.core.events)
        free(self.core.origins)
        free(self.core)

    def time(self):
        """CLOCK_MONOTONIC, in seconds; what call_at counts in."""
        return monotonic()

    def run(self):
        """Serve until stop(). What a callback raises is logged; KeyboardInterrupt and SystemExit leave run()."""
        cdef bint catching
        cdef double deadline
        cdef int left
        self.check_open()
        if self.running:
            raise RuntimeError("the loop is running")
        self.running = True
        catching = self.schedule.catch_signals()
        try:
            while True:
                if self.core.attention:
                    self.attend()
                if self.stopping or self.ready:
                    deadline = 0
                else:
                    deadline = (<tuple>self.timers[0])[0] if self.timers else INFINITY
                with nogil:
                    left = wait(self.core, deadline)
                if left < 0:
                    if errno != EINTR:
                        raise OSError(errno, f"epoll_wait: {os.strerror(errno)}")
                    PyErr_CheckSignals()
                else:
                    self.dispatch(left)
                if self.ready or self.timers:
                    self.schedule.run_due()
                if self.stopping:
                    return
        finally:
            self.running = self.stopping = False
            if catching:
                self.schedule.release_signals()

    def stop(self):
        """Have run() return after the callbacks that are ready now."""
        self.stopping = True

    def close(self):
        """End every connection (connection_lost(None) is delivered), let go of the listeners, close the loop's own
        descriptors. The listening sockets stay open, they are their caller's.
        """
        if self.running:
            raise RuntimeError("the loop is running: stop() it first")
        if self.core.epoll < 0:
            return
        for listener in list(self.listeners):
            listener.stop()
        self.empty = None
        self.schedule.say_farewell()
        self.release_held()
        while self.abort_connections() or self.core.open:
            self.schedule.run_due()
        self.schedule.close()
        close(self.core.epoll)
        self.core.epoll = -1

    def listen(self, sock, handler, *, accepting=True):
        """Serve the connections of a listening stream socket, made non-blocking here and owned by the caller still.

        `handler`: a Handler, or what makes an asyncio.Protocol for each connection. Raises UsageError if the socket
        does not listen.
        """
        cdef Listener listener
        self.check_open()
        if not isinstance(handler, Handler) and not callable(handler):
            raise TypeError(f"handler must be a Handler or a protocol factory, not {handler!r}")
        prepare_listener(sock)
        listener = make_listener(self.core, self, self.schedule, sock, handler, self.listeners)
        self.homes.append(listener)
        if isinstance(handler, Handler):
            self.handlers.add(handler)
        if accepting:
            listener.start()
        return listener

    @property
    def connections(self):
        """How many connections are open."""
        return self.core.open

    def when_empty(self, callback):
        """Call back once when no connection is open, which may be at once; None takes that back."""
        if callback is not None and not callable(callback):
            raise TypeError(f"a callable is required, not {callback!r}")
        self.check_open()
        self.empty = callback
        self.attend()

    def abort_connections(self):
        """End all connections without sending what they have not sent. Returns how many."""
        cdef Connection *connection
        cdef size_t index
        cdef size_t count = 0
        for index in range(SLAB * self.core.slab_count):
            connection = self.connection_at(index)
            if connection == NULL or connection.flags & LOST:
                continue
            if connection.kind == PROTOCOL:
                (<Transport>connection.state).lose(None)
                count += 1
            elif connection.kind == NATIVE:
                if connection.flags & HELD:  # whoever holds it knows it by its descriptor
                    connection.flags |= CLOSING | STAYS
                    drop_backlog(self.core, connection)
                else:
                    doom(self.core, connection, 0)
                count += 1
        with nogil:
            reap(self.core)
        if self.core.attention:
            self.attend()
        return count

    cdef int release_held(self) except -1:
        """Nobody is going to put back or start what is on its way."""
        cdef Connection *connection
        cdef size_t index
        for index in range(SLAB * self.core.slab_count):
            connection = self.connection_at(index)
            if connection != NULL and connection.kind in (PROTOCOL, NATIVE):
                connection.flags &= <uint8_t>~HELD
        return 0

    def call_soon(self, callback, *args):
        """Call back in the next turn of the loop."""
        return self.schedule.call_soon(callback, *args)

    def call_soon_threadsafe(self, callback, *args):
        """The same, from any thread."""
        return self.schedule.call_soon_threadsafe(callback, *args)

    def call_later(self, delay, callback, *args):
        """Call back in `delay` seconds."""
        return self.schedule.call_at(monotonic() + delay, callback, *args)

    def call_at(self, when, callback, *args):
        """Call back when time() has reached `when`."""
        return self.schedule.call_at(when, callback, *args)

    def add_reader(self, fd, callback, *args):
        """Call back whenever a descriptor, which stays the caller's, can be read; in place of a former callback."""
        self.watch_for(fd, Timer(0.0, callback, args), self.watched(fd)[1])

    def remove_reader(self, fd):
        """Undo add_reader(), before the descriptor is closed. Returns whether there was a callback."""
        reader, writer = self.watched(fd)
        self.watch_for(fd, None, writer)
        return reader is not None

    def add_writer(self, fd, callback, *args):
        """Call back whenever a descriptor, which stays the caller's, can be written; in place of a former callback."""
        self.watch_for(fd, self.watched(fd)[0], Timer(0.0, callback, args))

    def remove_writer(self, fd):
        """Undo add_writer(), before the descriptor is closed. Returns whether there was a callback."""
        reader, writer = self.watched(fd)
        self.watch_for(fd, reader, None)
        return writer is not None

    def add_signal_handler(self, signum, callback, *args):
        """Call back in the loop when a signal has come. Main thread only; close() puts back what was there."""
        self.schedule.add_signal_handler(signum, callback, args)

    def remove_signal_handler(self, signum):
        """Put back what handled the signal before. Returns whether there was a handler."""
        return self.schedule.remove_signal_handler(signum)

    cdef int dispatch(self, int left) except -1:
        """Serve the events that need the GIL. An event of one that has gone meanwhile is dropped."""
        cdef Connection *connection
        cdef int index
        for index in range(left):
            connection = find(self.core, self.core.events[index].data.u64)
            if connection == NULL or connection.flags & (LOST | HELD):
                continue
            if connection.kind == PROTOCOL:
                (<Transport>connection.state).ready(self.core.events[index].events)
            elif connection.kind == PROTOCOL_LISTENER:
                (<Listener>(<Acceptor *>connection.state).listener).accept()
            else:
                self.notify(connection, self.core.events[index].events)
        return 0

    cdef int notify(self, Connection *connection, unsigned int events) except -1:
        """A watched descriptor; its reader may have put an end to the watch before the writer's turn."""
        cdef Watch watcher = <Watch>connection.state
        reader, writer = watcher.reader, watcher.writer
        if reader is not None and events & <unsigned int>~EPOLLOUT:
            reader.run()
        if writer is not None and watcher.writer is writer and events & <unsigned int>~EPOLLIN:
            writer.run()
        return 0

    cdef int watch_for(self, object fileobj, object reader, object writer) except -1:
        """Has the Timers run when the descriptor can be read or written; None for neither ends it."""
        cdef int fd = fileobj if isinstance(fileobj, int) else fileobj.fileno()
        cdef Watch watcher = self.watches.get(fd)
        cdef Connection *connection
        cdef int wanted = (EPOLLIN if reader is not None else 0) | (EPOLLOUT if writer is not None else 0)
        cdef int error
        if watcher is None and not wanted:
            return 0
        if watcher is None:
            self.check_open()
            watcher = self.watches[fd] = Watch()
            connection = open_connection(self.core, fd, WATCH)
            if connection == NULL:
                raise MemoryError
            connection.state = <void *>watcher
        else:
            connection = place(self.core, fd)
        watcher.reader, watcher.writer = reader, writer
        error = watch(self.core, connection, <unsigned char>wanted)
        if error or not wanted:
            release(self.core, connection)
            del self.watches[fd]
        if error:
            raise OSError(error, f"epoll_ctl on descriptor {fd}: {os.strerror(error)}")
        return 0

    cdef tuple watched(self, object fileobj):
        cdef Watch watcher = self.watches.get(fileobj if isinstance(fileobj, int) else fileobj.fileno())
        return (None, None) if watcher is None else (watcher.reader, watcher.writer)

    cdef int attend(self) except -1:
        self.core.attention = False
        if self.empty is not None and self.core.open == 0:
            self.schedule.call_soon(self.empty)
            self.empty = None
        for listener in list(self.listeners):
            (<Listener>listener).look_after()
        return 0

    cdef Connection *connection_at(self, size_t fd) noexcept:
        cdef Connection *slab = self.core.slabs[fd // SLAB] if fd // SLAB < self.core.slab_count else NULL
        return &slab[fd % SLAB] if slab != NULL else NULL
