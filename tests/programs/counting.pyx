# cython: language_level=3
"""Somebody else's compiled handler: answers each line with how many lines its connection has had."""

from libc.stdint cimport int64_t
from libc.stdio cimport snprintf
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy

from takeover._loop cimport Connection, Core, Handler, connection_close, connection_write

cdef int64_t states = 0  # that are not freed yet


cdef void opened(Core *core, Connection *connection) noexcept nogil:
    global states
    connection.state = calloc(1, sizeof(int64_t))
    if connection.state == NULL:
        connection_close(core, connection)
    else:
        states += 1


cdef void received(Core *core, Connection *connection, const char *data, size_t size) noexcept nogil:
    cdef int64_t *count = <int64_t *>connection.state
    cdef char answer[32]
    cdef size_t index
    for index in range(size):
        if data[index] == c"\n":
            count[0] += 1
            connection_write(core, connection, answer, snprintf(answer, sizeof(answer), "%lld\n", <long long>count[0]))


cdef void freed(Core *core, Connection *connection) noexcept nogil:
    global states
    if connection.state != NULL:
        free(connection.state)
        states -= 1


cdef void closed(Core *core, Connection *connection, int error) noexcept nogil:
    freed(core, connection)


cdef ssize_t exported(Core *core, Connection *connection, char *room, size_t size) noexcept nogil:
    if size >= sizeof(int64_t):
        memcpy(room, connection.state, sizeof(int64_t))
    return sizeof(int64_t)


cdef bint imported(Core *core, Connection *connection, const char *state, size_t size) noexcept nogil:
    if size != sizeof(int64_t):
        return False
    opened(core, connection)
    if connection.state != NULL:
        memcpy(connection.state, state, size)
    return connection.state != NULL


cdef Handler make(bint moves):
    cdef Handler handler = Handler()
    handler.callbacks.opened = opened
    handler.callbacks.received = received
    handler.callbacks.closed = closed
    if moves:
        handler.callbacks.exported = exported
        handler.callbacks.imported = imported
        handler.callbacks.moved = freed
    return handler


MOVING = make(True)
STAYING = make(False)


def not_freed():
    return states
