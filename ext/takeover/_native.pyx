# cython: language_level=3, boundscheck=False, wraparound=False
"""What the loop does without the GIL: wait, accept, and serve the connections of compiled handlers."""

from libc.errno cimport EAGAIN, EINTR, ENOMEM, errno
from libc.math cimport INFINITY, ceil
from libc.stdint cimport uint8_t, uint32_t
from posix.fcntl cimport F_GETFL, F_SETFL, O_NONBLOCK, fcntl
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec
from posix.unistd cimport close

from takeover._connections cimport (
    CLOSING, EOF_QUEUED, EOF_RECEIVED, EPOLLERR, EPOLLHUP, EPOLLOUT, EVENTS, FULL, HELD, LOST,
    NATIVE, NATIVE_LISTENER, PAUSED, RECEIVE, SHUT_WR, STAYS, arm, doom, epoll_wait, find, flush, open_connection, reap,
    recv, release, shutdown, write,
)
from takeover._ledger cimport note
from takeover._messages cimport MSG_DONTWAIT

cdef extern from "<sys/socket.h>" nogil:
    enum: SOCK_CLOEXEC, SOCK_NONBLOCK
    int accept4(int fd, sockaddr *peer, socklen_t *size, int flags)

cdef extern from "<errno.h>" nogil:
    enum: ECONNABORTED, EHOSTDOWN, EHOSTUNREACH, ENETDOWN, ENETUNREACH, ENONET, ENOPROTOOPT, EOPNOTSUPP, EPERM, EPROTO
    enum: ETIMEDOUT


cdef class Handler:
    """A compiled connection handler; see the C-level interface in _loop.pxd. Made by extension modules only."""

    def __cinit__(self):
        self.callbacks.high = 65536
        self.callbacks.low = 16384


cdef inline void rearm(Core *core, Connection *connection) noexcept nogil:
    cdef int error = 0 if connection.flags & LOST else arm(core, connection)
    if error:
        doom(core, connection, error)


cdef inline void stay_if_held(Connection *connection) noexcept nogil:
    """What is done to a connection on its way is not in its record: it has to come back."""
    if connection.flags & HELD:
        connection.flags |= STAYS


cdef void connection_write(Core *core, Connection *connection, const char *data, size_t size) noexcept nogil:
    cdef int error
    if size == 0 or connection.flags & (EOF_QUEUED | CLOSING | LOST):
        return
    if connection.flags & HELD:
        connection.flags |= STAYS
        note(core, connection, data, size)
    error = write(core, connection, data, size)
    if error:
        doom(core, connection, error)
    elif connection.unsent > connection.handler.high and not connection.flags & FULL:
        connection.flags |= FULL
        if connection.handler.filled != NULL:
            connection.handler.filled(core, connection)
        else:
            connection_pause_reading(core, connection)


cdef void connection_write_eof(Core *core, Connection *connection) noexcept nogil:
    if connection.flags & (EOF_QUEUED | CLOSING | LOST):
        return
    connection.flags |= EOF_QUEUED
    stay_if_held(connection)
    if connection.unsent == 0 and not connection.flags & HELD:
        shutdown(connection.fd, SHUT_WR)


cdef void connection_pause_reading(Core *core, Connection *connection) noexcept nogil:
    connection.flags |= PAUSED
    rearm(core, connection)


cdef void connection_resume_reading(Core *core, Connection *connection) noexcept nogil:
    connection.flags &= <uint8_t>~PAUSED
    rearm(core, connection)


cdef void connection_close(Core *core, Connection *connection) noexcept nogil:
    if connection.flags & LOST:
        return
    connection.flags |= CLOSING
    stay_if_held(connection)
    if connection.unsent == 0:
        doom(core, connection, 0)
    else:
        rearm(core, connection)


cdef void connection_abort(Core *core, Connection *connection) noexcept nogil:
    doom(core, connection, 0)


cdef void echo_received(Core *core, Connection *connection, const char *data, size_t size) noexcept nogil:
    connection_write(core, connection, data, size)


cdef Handler make_echo():
    cdef Handler handler = Handler()
    handler.callbacks.received = echo_received
    return handler


ECHO = make_echo()


cdef inline void serve(Core *core, Connection *connection, uint32_t events) noexcept nogil:
    """One event of a native connection."""
    cdef const Callbacks *handler = connection.handler
    cdef ssize_t size
    cdef int error
    if connection.unsent and events & <uint32_t>(EPOLLOUT | EPOLLERR | EPOLLHUP):
        error = flush(core, connection)
        if error:
            doom(core, connection, error)
            return
        if connection.flags & FULL and connection.unsent <= handler.low:
            connection.flags &= <uint8_t>~FULL
            if handler.drained != NULL:
                handler.drained(core, connection)
            elif handler.filled == NULL:
                connection.flags &= <uint8_t>~PAUSED
        rearm(core, connection)
        if connection.unsent == 0 and not connection.flags & LOST:
            if connection.flags & CLOSING:
                doom(core, connection, 0)
            elif connection.flags & EOF_QUEUED:
                shutdown(connection.fd, SHUT_WR)
    if events == EPOLLOUT or connection.flags & (PAUSED | EOF_RECEIVED | CLOSING | LOST):
        return
    size = recv(connection.fd, core.buffer, RECEIVE, MSG_DONTWAIT)
    if size > 0:
        handler.received(core, connection, core.buffer, <size_t>size)
    elif size == 0:
        connection.flags |= EOF_RECEIVED
        if handler.ended != NULL and handler.ended(core, connection):
            rearm(core, connection)
        else:
            connection_close(core, connection)
    elif errno != EAGAIN and errno != EINTR:
        doom(core, connection, errno)


cdef void resume_native(Core *core, Connection *connection) noexcept nogil:
    """Read and write again, after the connection was held."""
    cdef int error
    connection.flags &= <uint8_t>~HELD
    if connection.unsent == 0:
        if connection.flags & CLOSING:
            doom(core, connection, 0)
            return
        if connection.flags & EOF_QUEUED:
            shutdown(connection.fd, SHUT_WR)
    error = arm(core, connection)
    if error:
        doom(core, connection, error)


cdef void forget_native(Core *core, Connection *connection) noexcept nogil:
    """Out of the table: the connection lives on in another process. The descriptor is the caller's to close."""
    if connection.handler.moved != NULL:
        connection.handler.moved(core, connection)
    release(core, connection)


cdef int accept_one(Acceptor *acceptor, sockaddr_storage *peer, socklen_t *size) noexcept nogil:
    """A descriptor, -1 if none waits, -2 with acceptor.error set if the listener has to pause or to end.

    Errors that accept(2) ascribes to the one connection that it has just thrown away only lead to the next one.
    """
    cdef int fd, _turn
    for _turn in range(BATCH):
        size[0] = sizeof(sockaddr_storage)
        fd = accept4(acceptor.fd, <sockaddr *>peer, size, SOCK_CLOEXEC | SOCK_NONBLOCK)
        if fd >= 0:
            return fd
        if errno == EAGAIN:
            return -1
        if errno not in (EINTR, ECONNABORTED, EHOSTDOWN, EHOSTUNREACH, ENETDOWN, ENETUNREACH, ENONET, ENOPROTOOPT,
                         EOPNOTSUPP, EPERM, EPROTO, ETIMEDOUT):
            acceptor.error = errno
            return -2
    return -1


cdef Connection *admit(Core *core, Acceptor *acceptor, int fd, Kind kind) noexcept nogil:
    """A record for an accepted descriptor, watched; NULL with acceptor.error set, and then the descriptor is closed."""
    cdef Connection *connection = open_connection(core, fd, kind)
    if connection == NULL:
        acceptor.error = ENOMEM
    else:
        acceptor.error = arm(core, connection)
        if acceptor.error:
            release(core, connection)
    if acceptor.error:
        close(fd)
        return NULL
    connection.handler = acceptor.callbacks
    connection.origin = acceptor.origin
    acceptor.accepted += 1
    if acceptor.pausing:
        acceptor.pausing = False
        core.attention = True
    return connection


cdef void keep_non_blocking(int fd) noexcept nogil:
    """O_NONBLOCK belongs to the open file, which other processes may hold and may have made blocking again."""
    cdef int flags = fcntl(fd, F_GETFL)
    if flags >= 0 and not flags & O_NONBLOCK:
        fcntl(fd, F_SETFL, flags | O_NONBLOCK)


cdef void accept_native(Core *core, Acceptor *acceptor) noexcept nogil:
    cdef Connection *connection
    cdef sockaddr_storage peer
    cdef socklen_t size
    cdef int fd, _turn
    keep_non_blocking(acceptor.fd)
    for _turn in range(BATCH):
        fd = accept_one(acceptor, &peer, &size)
        connection = admit(core, acceptor, fd, NATIVE) if fd >= 0 else NULL
        if connection == NULL:
            break
        if connection.handler.opened != NULL:
            connection.handler.opened(core, connection)
    if acceptor.error:
        core.attention = True


cdef int poll(Core *core, int timeout) noexcept nogil:
    """Wait, and serve every native event. Returns how many events, now at the head of core.events, need the GIL.

    -1 with errno if epoll_wait failed. core.attention tells of anything else that needs the GIL.
    """
    cdef Connection *connection
    cdef int index
    cdef int left = 0
    cdef int count = epoll_wait(core.epoll, core.events, EVENTS, timeout)
    if count < 0:
        return -1
    for index in range(count):
        connection = find(core, core.events[index].data.u64)
        if connection == NULL or connection.flags & (LOST | HELD):
            continue
        if connection.kind == NATIVE:
            serve(core, connection, core.events[index].events)
        elif connection.kind == NATIVE_LISTENER:
            accept_native(core, <Acceptor *>connection.state)
        else:
            core.events[left] = core.events[index]
            left += 1
    reap(core)
    return left


cdef double monotonic() noexcept nogil:
    cdef timespec now
    clock_gettime(CLOCK_MONOTONIC, &now)
    return <double>now.tv_sec + 1e-9 * <double>now.tv_nsec


cdef int wait(Core *core, double deadline) noexcept nogil:
    """poll() until something needs the GIL or the deadline (CLOCK_MONOTONIC seconds; 0 not to wait) has come."""
    cdef int left, milliseconds
    while True:
        if deadline == 0:
            milliseconds = 0
        elif deadline == INFINITY:
            milliseconds = -1
        else:
            milliseconds = <int>max(0, min(ceil(1e3 * (deadline - monotonic())), 1e6))
        left = poll(core, milliseconds)
        if left or core.attention or milliseconds == 0:
            return left
