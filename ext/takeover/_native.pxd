# cython: language_level=3
"""The part of the loop that runs without the GIL, as _loop.pyx uses it; for handlers of your own see _loop.pxd."""

from takeover._connections cimport Acceptor, Callbacks, Connection, Core, Kind, sockaddr, sockaddr_storage, socklen_t

cdef enum:
    BATCH = 128  # connections that are accepted before others get their turn

cdef class Handler:
    cdef Callbacks callbacks

cdef void connection_write(Core *core, Connection *connection, const char *data, size_t size) noexcept nogil
cdef void connection_write_eof(Core *core, Connection *connection) noexcept nogil
cdef void connection_pause_reading(Core *core, Connection *connection) noexcept nogil
cdef void connection_resume_reading(Core *core, Connection *connection) noexcept nogil
cdef void connection_close(Core *core, Connection *connection) noexcept nogil
cdef void connection_abort(Core *core, Connection *connection) noexcept nogil

cdef void resume_native(Core *core, Connection *connection) noexcept nogil
cdef void forget_native(Core *core, Connection *connection) noexcept nogil
cdef void keep_non_blocking(int fd) noexcept nogil
cdef int accept_one(Acceptor *acceptor, sockaddr_storage *peer, socklen_t *size) noexcept nogil
cdef Connection *admit(Core *core, Acceptor *acceptor, int fd, Kind kind) noexcept nogil
cdef double monotonic() noexcept nogil
cdef int wait(Core *core, double deadline) noexcept nogil
