# cython: language_level=3
"""What the loop does to connections that move to another process; all of it on the loop's thread."""

from cpython cimport array

from takeover._connections cimport Core

cdef tuple export_batch(Core *core, size_t start, int most, size_t size, dict reasons)
cdef tuple relinquish_batch(Core *core, object schedule, array.array descriptors, object skip)
cdef int put_back_batch(Core *core, array.array descriptors, bint stay) except -1
cdef int forgo_batch(Core *core, object schedule, array.array descriptors) except -1
