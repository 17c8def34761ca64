# cython: language_level=3

from takeover._connections cimport Core

cdef class Mover:
    cdef Core *core
    cdef object schedule

    cdef int check_open(self) except -1
