# cython: language_level=3
"""Socket addresses between the kernel's form, Python's, and that of a record (records.py)."""

from takeover._connections cimport socklen_t

cdef enum:
    ADDRESS = 28      # sizeof(struct sockaddr_in6), ipv6(7)
    INET_NAME = 27    # the longest name of an internet peer in a record

cdef object inet_address(const char *name, int family)
cdef object unix_address(const char *name, socklen_t size)
cdef int pack_inet(const char *name, int family, char *into) noexcept nogil
cdef int unpack_inet(const char *packed, size_t size, char *name) noexcept nogil
