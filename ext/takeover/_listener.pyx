# cython: language_level=3, boundscheck=False, wraparound=False
"""A listening socket in a loop: accepts in batches, and pauses when that fails."""

from libc.errno cimport EBADF
from libc.stdint cimport uint64_t
from libc.stdlib cimport realloc
from posix.unistd cimport close

from takeover._connections cimport (
    EPOLLIN, NATIVE_LISTENER, PROTOCOL, PROTOCOL_LISTENER, Callbacks, Connection, Origin, open_connection, release,
    sockaddr, sockaddr_storage, socklen_t, watch,
)
from takeover._native cimport BATCH, Handler, accept_one, admit, keep_non_blocking
from takeover._transport cimport Transport, make_transport

import os

from takeover._schedule import log
from takeover._sockets import UNUSABLE, Backoff, name_of


cdef int add_origin(Core *core, uint64_t inode, const Callbacks *callbacks, void *listener) noexcept nogil:
    """The place of a listener among the origins that connections name; -1 without memory."""
    cdef size_t index
    cdef Origin *origins
    for index in range(core.origin_count):
        if core.origins[index].inode == inode:
            break
    else:
        index = core.origin_count
        origins = <Origin *>realloc(core.origins, (index + 1) * sizeof(Origin)) if index < 65536 else NULL
        if origins == NULL:
            return -1
        core.origins = origins
        core.origin_count += 1
    core.origins[index].inode = inode
    core.origins[index].callbacks = callbacks
    core.origins[index].listener = listener
    return <int>index


cdef Listener make_listener(Core *core, object loop, object schedule, object sock, object handler, set accepting_ones):
    cdef Listener listener = Listener.__new__(Listener)
    cdef int origin
    listener.core = core
    listener.loop = loop
    listener.schedule = schedule
    listener.socket = sock
    listener.handler = handler
    listener.accepting_ones = accepting_ones
    listener.backoff = Backoff(schedule, sock, listener._resume)
    listener.acceptor.listener = <void *>listener
    if isinstance(handler, Handler):
        listener.acceptor.callbacks = &(<Handler>handler).callbacks
    origin = add_origin(core, os.fstat(sock.fileno()).st_ino, listener.acceptor.callbacks, <void *>listener)
    if origin < 0:
        raise MemoryError
    listener.acceptor.origin = <unsigned short>origin
    return listener


cdef class Listener:
    """A listening socket in a loop. The socket stays its caller's; the listener closes and shuts down nothing."""

    def __init__(self):
        raise TypeError("listeners are made by Loop.listen")

    @property
    def accepting(self):
        """Whether it is in the poll set, or will be again after a pause."""
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
        if self.core.epoll < 0:
            raise RuntimeError("the loop is closed")
        self.acceptor.fd = self.socket.fileno()
        if self.acceptor.fd < 0:
            raise OSError(EBADF, f"cannot accept on {self.socket!r}: it was closed")
        kind = NATIVE_LISTENER if isinstance(self.handler, Handler) else PROTOCOL_LISTENER
        self.acceptor.place = open_connection(self.core, self.acceptor.fd, kind)
        if self.acceptor.place == NULL:
            raise MemoryError
        self.acceptor.place.state = &self.acceptor
        error = watch(self.core, self.acceptor.place, EPOLLIN)
        if error:
            self.stop()
            raise OSError(error, f"epoll_ctl on {self.socket!r}: {os.strerror(error)}")
        self.accepting_ones.add(self)

    def stop(self):
        """Take the listener out of the poll set; new connections wait in the kernel's queue."""
        if self.acceptor.place != NULL:
            release(self.core, self.acceptor.place)
            self.acceptor.place = NULL
        self.accepting_ones.discard(self)
        self.backoff.cancel()
        self.acceptor.pausing = False

    def _resume(self):
        cdef int error = watch(self.core, self.acceptor.place, EPOLLIN) if self.acceptor.place != NULL else 0
        if error:
            self.backoff.refused(error)

    cdef int accept(self) except -1:
        """Accept a batch for the protocol factory."""
        cdef Core *core = self.core
        cdef Transport transport
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
            transport = make_transport(core, connection, self.schedule, protocol, <sockaddr *>&peer, size)
            transport.begin()
            if self.acceptor.place == NULL:
                break
        return self.look_after()

    cdef int look_after(self) except -1:
        """Pause or end for an error of accept; say when a pause is over."""
        cdef int error = self.acceptor.error
        self.acceptor.error = 0
        if self.acceptor.place == NULL:
            return 0
        if error in UNUSABLE:
            log.error("accept on %s: %s; nothing more is accepted there", name_of(self.socket), os.strerror(error))
            self.stop()
        elif error:
            self.acceptor.pausing = True
            watch(self.core, self.acceptor.place, 0)
            self.backoff.refused(error)
        elif not self.acceptor.pausing and self.backoff.began:
            self.backoff.over()
        return 0
