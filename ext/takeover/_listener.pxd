# cython: language_level=3
"""A listening socket in a loop."""

from takeover._connections cimport Acceptor, Core

cdef class Listener:
    cdef Acceptor acceptor
    cdef Core *core
    cdef object loop          # keeps the core alive
    cdef object schedule
    cdef object backoff
    cdef readonly object socket
    cdef readonly object handler
    cdef set accepting_ones   # of the loop

    cdef int accept(self) except -1
    cdef int look_after(self) except -1

cdef Listener make_listener(Core *core, object loop, object schedule, object sock, object handler, set accepting_ones)
