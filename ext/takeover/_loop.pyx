# cython: language_level=3, boundscheck=False, wraparound=False
"""The event loop on epoll(7), level-triggered. `_loop_py` is the same interface in plain Python."""

from cpython.exc cimport PyErr_CheckSignals
from libc.errno cimport EBADF, EINTR, errno
from libc.math cimport INFINITY
from libc.stdlib cimport calloc, free, malloc
from posix.unistd cimport close

from takeover._connections cimport (
    EPOLL_CLOEXEC, EPOLLIN, EVENTS, LOST, NATIVE, NATIVE_LISTENER, PROTOCOL, PROTOCOL_LISTENER, RECEIVE, SLAB, WAKEUP,
    Acceptor, Chunk, Connection, Core, doom, epoll_create1, epoll_event, open_connection, find, reap, release, sockaddr,
    sockaddr_storage, socklen_t, watch,
)
from takeover._native cimport BATCH, accept_one, admit, keep_non_blocking, monotonic, wait
from takeover._transport cimport Transport, open_transport

import os

from takeover import _native
from takeover._schedule import Schedule, Timer, log
from takeover._sockets import SHORTAGES, Backoff, name_of, prepare_listener

__all__ = ["ECHO", "Handler", "Listener", "Loop", "Timer"]

ECHO = _native.ECHO
globals()["Handler"] = _native.Handler  # as a Python name too


cdef class Listener:
    """A listening socket in a loop. The socket stays its caller's; the listener closes and shuts down nothing."""

    cdef Acceptor acceptor
    cdef Loop loop
    cdef object backoff
    cdef readonly object socket
    cdef object handler

    def __init__(self):
        raise TypeError("listeners are made by Loop.listen")

    @property
    def accepting(self):
        """Whether it is in the poll set, or will be again after a pause for want of descriptors or memory."""
        return self.acceptor.place != NULL

    @property
    def accepted(self):
        """How many connections it has accepted."""
        return self.acceptor.accepted

    def start(self):
        """Put the listener into the poll set; what waits in its queue is accepted first."""
        cdef int error
        if self.acceptor.place != NULL:
            return
        self.loop.check_open()
        self.acceptor.fd = self.socket.fileno()
        if self.acceptor.fd < 0:
            raise OSError(EBADF, f"cannot accept on {self.socket!r}: it was closed")
        kind = NATIVE_LISTENER if isinstance(self.handler, Handler) else PROTOCOL_LISTENER
        self.acceptor.place = open_connection(self.loop.core, self.acceptor.fd, kind)
        if self.acceptor.place == NULL:
            raise MemoryError
        self.acceptor.place.state = &self.acceptor
        error = watch(self.loop.core, self.acceptor.place, EPOLLIN)
        if error:
            self.stop()
            raise OSError(error, f"epoll_ctl on {self.socket!r}: {os.strerror(error)}")
        self.loop.listeners.add(self)

    def stop(self):
        """Take the listener out of the poll set; new connections wait in the kernel's queue."""
        if self.acceptor.place != NULL:
            release(self.loop.core, self.acceptor.place)
            self.acceptor.place = NULL
        self.loop.listeners.discard(self)
        self.backoff.cancel()
        self.acceptor.pausing = False

    def _resume(self):
        if self.acceptor.place != NULL and watch(self.loop.core, self.acceptor.place, EPOLLIN):
            self.backoff.refused(errno)

    cdef int accept(self) except -1:
        """Accept a batch for the protocol factory."""
        cdef Core *core = self.loop.core
        cdef Connection *connection
        cdef sockaddr_storage peer
        cdef socklen_t size
        cdef int fd, _turn
        keep_non_blocking(self.acceptor.fd)
        for _turn in range(BATCH):
            fd = accept_one(&self.acceptor, &peer, &size)
            if fd < 0:
                break
            try:
                protocol = self.handler()
            except (KeyboardInterrupt, SystemExit):
                close(fd)
                raise
            except BaseException:
                close(fd)
                log.exception("protocol factory %r raised; the connection that it was for is closed", self.handler)
                continue
            connection = admit(core, &self.acceptor, fd, PROTOCOL)
            if connection == NULL:
                break
            open_transport(core, connection, self.loop.schedule, protocol, <sockaddr *>&peer, size)
            if self.acceptor.place == NULL:
                break
        return self.look_after()

    cdef int look_after(self) except -1:
        """Pause or end for an error of accept; say when a pause is over."""
        cdef int error = self.acceptor.error
        self.acceptor.error = 0
        if self.acceptor.place == NULL:
            return 0
        if error in SHORTAGES:
            self.acceptor.pausing = True
            watch(self.loop.core, self.acceptor.place, 0)
            self.backoff.refused(error)
        elif error:
            log.error("accept on %s: %s; nothing more is accepted there", name_of(self.socket), os.strerror(error))
            self.stop()
        elif not self.acceptor.pausing and self.backoff.began:
            self.backoff.over()
        return 0


cdef class Loop:
    """One thread's event loop. Only call_soon_threadsafe may be called from another thread.

    close() it: that delivers connection_lost to every protocol and gives the descriptors back.
    """

    cdef Core *core
    cdef object schedule
    cdef object ready         # of the schedule
    cdef list timers          # of the schedule
    cdef set listeners
    cdef set handlers         # connections point into them
    cdef object empty
    cdef bint running
    cdef bint stopping

    def __cinit__(self):
        self.core = <Core *>calloc(1, sizeof(Core))
        if self.core == NULL:
            raise MemoryError
        self.core.epoll = -1
        self.core.buffer = <char *>malloc(RECEIVE)
        self.core.events = <epoll_event *>calloc(EVENTS, sizeof(epoll_event))
        if self.core.buffer == NULL or self.core.events == NULL:
            raise MemoryError

    def __init__(self):
        cdef Connection *connection
        if self.schedule is not None:
            raise RuntimeError("a loop is made once")
        self.listeners, self.handlers = set(), set()
        self.core.epoll = epoll_create1(EPOLL_CLOEXEC)
        if self.core.epoll < 0:
            raise OSError(errno, f"epoll_create1: {os.strerror(errno)}")
        self.schedule = Schedule()
        self.ready, self.timers = self.schedule.ready, self.schedule.timers
        connection = open_connection(self.core, self.schedule.wakeup, WAKEUP)
        if connection == NULL:
            raise MemoryError
        if watch(self.core, connection, EPOLLIN):
            raise OSError(errno, f"epoll_ctl: {os.strerror(errno)}")

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
        listener = Listener.__new__(Listener)
        listener.loop = self
        listener.socket = sock
        listener.handler = handler
        listener.backoff = Backoff(self.schedule, sock, listener._resume)
        listener.acceptor.listener = <void *>listener
        if isinstance(handler, Handler):
            listener.acceptor.callbacks = &(<Handler>handler).callbacks
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
                doom(self.core, connection, 0)
                count += 1
        with nogil:
            reap(self.core)
        if self.core.attention:
            self.attend()
        return count

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
            if connection == NULL or connection.flags & LOST:
                continue
            if connection.kind == PROTOCOL:
                (<Transport>connection.state).ready(self.core.events[index].events)
            elif connection.kind == PROTOCOL_LISTENER:
                (<Listener>(<Acceptor *>connection.state).listener).accept()
            else:
                self.schedule.woken()
        return 0

    cdef int attend(self) except -1:
        self.core.attention = False
        if self.empty is not None and self.core.open == 0:
            self.schedule.call_soon(self.empty)
            self.empty = None
        for listener in list(self.listeners):
            (<Listener>listener).look_after()
        return 0

    cdef int check_open(self) except -1:
        if self.core.epoll < 0:
            raise RuntimeError("the loop is closed")
        return 0

    cdef Connection *connection_at(self, size_t fd) noexcept:
        cdef Connection *slab = self.core.slabs[fd // SLAB] if fd // SLAB < self.core.slab_count else NULL
        return &slab[fd % SLAB] if slab != NULL else NULL
