# cython: language_level=3
"""What the loop does to connections that come from another process; all of it on the loop's thread."""

from cpython cimport array

from takeover._connections cimport Core

cdef list adopt_batch(Core *core, object schedule, const char *records, size_t size, array.array descriptors,
                      object generation)
cdef int start_batch(Core *core, array.array descriptors, object skip, dict tails) except -1
cdef int drop_batch(Core *core, array.array descriptors, object skip) except -1
