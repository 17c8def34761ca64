# cython: language_level=3
"""The transport of a protocol object; the loop tells it of events through `ready`."""

from libc.stdint cimport uint16_t, uint32_t

from takeover._addresses cimport ADDRESS
from takeover._connections cimport Connection, Core, sockaddr, socklen_t

cdef class Transport:
    cdef Core *core
    cdef Connection *connection  # NULL once connection_lost was delivered
    cdef object schedule
    cdef object protocol
    cdef object peer_path        # names of AF_UNIX sockets
    cdef object local_path
    cdef object moved            # a Moved, if it has
    cdef size_t exported         # bytes of the backlog that are in the record of a connection on its way
    cdef size_t high
    cdef size_t low
    cdef uint32_t expected       # bytes that the next read may bring
    cdef uint16_t family
    cdef bint eof_written
    cdef bint local_known
    cdef char peer[ADDRESS]
    cdef char local[ADDRESS]

    cdef bint closing(self) noexcept
    cdef int ready(self, uint32_t events) except -1
    cdef int receive(self) except -1
    cdef int end_of_file(self) except -1
    cdef int send(self, const char *data, size_t size) except -1
    cdef int send_backlog(self) except -1
    cdef int fill(self) except -1
    cdef int lose(self, object error) except -1
    cdef int begin(self) except -1
    cdef int resume(self) except -1
    cdef int failed(self, str callback, object error) except -1
    cdef int learn_local_name(self) except -1
    cdef int let_go(self) except -1

cdef Transport make_transport(Core *core, Connection *connection, object schedule, object protocol,
                              const sockaddr *peer, socklen_t size)
cdef int forget_connection(Core *core, Connection *connection) except -1
cdef int resume_connection(Core *core, Connection *connection) except -1
