# cython: language_level=3, boundscheck=False, wraparound=False
"""Socket addresses between the kernel's form, Python's, and that of a record (records.py)."""

from libc.stdint cimport uint16_t, uint32_t
from libc.string cimport memcpy, memset

import os
import socket

cdef extern from "<sys/socket.h>" nogil:
    enum: AF_INET, AF_INET6

cdef extern from "<netinet/in.h>" nogil:
    struct in_addr:
        pass
    struct sockaddr_in:
        uint16_t sin_family
        uint16_t sin_port
        in_addr sin_addr
    struct in6_addr:
        pass
    struct sockaddr_in6:
        uint16_t sin6_family
        uint16_t sin6_port
        uint32_t sin6_flowinfo
        in6_addr sin6_addr
        uint32_t sin6_scope_id
    uint16_t ntohs(uint16_t value)
    uint32_t ntohl(uint32_t value)
    uint32_t htonl(uint32_t value)


cdef object inet_address(const char *name, int family):
    """What socket.getpeername() gives, from a sockaddr of ADDRESS bytes."""
    cdef const sockaddr_in *four = <const sockaddr_in *>name
    cdef const sockaddr_in6 *six = <const sockaddr_in6 *>name
    if family == AF_INET:
        return socket.inet_ntop(AF_INET, (<const char *>&four.sin_addr)[:4]), ntohs(four.sin_port)
    host = socket.inet_ntop(AF_INET6, (<const char *>&six.sin6_addr)[:16])
    return host, ntohs(six.sin6_port), ntohl(six.sin6_flowinfo), six.sin6_scope_id


cdef object unix_address(const char *name, socklen_t size):
    """The same for AF_UNIX, unix(7): str for a path, bytes for an abstract name, '' for none."""
    if size <= 2:
        return ""
    if name[2] == 0:
        return name[2:size]
    return os.fsdecode(<bytes>(name + 2))


cdef int pack_inet(const char *name, int family, char *into) noexcept nogil:
    """Writes at most INET_NAME bytes, and returns how many."""
    cdef const sockaddr_in *four = <const sockaddr_in *>name
    cdef const sockaddr_in6 *six = <const sockaddr_in6 *>name
    cdef uint32_t scope
    into[0] = 4 if family == AF_INET else 6
    if family == AF_INET:
        memcpy(into + 1, &four.sin_addr, 4)
        memcpy(into + 5, &four.sin_port, 2)
        return 7
    scope = htonl(six.sin6_scope_id)
    memcpy(into + 1, &six.sin6_addr, 16)
    memcpy(into + 17, &six.sin6_port, 2)
    memcpy(into + 19, &six.sin6_flowinfo, 4)
    memcpy(into + 23, &scope, 4)
    return 27


cdef int unpack_inet(const char *packed, size_t size, char *name) noexcept nogil:
    """Writes a sockaddr of ADDRESS bytes; returns its family, 0 for what is not the name of an internet peer."""
    cdef sockaddr_in *four = <sockaddr_in *>name
    cdef sockaddr_in6 *six = <sockaddr_in6 *>name
    cdef uint32_t scope
    memset(name, 0, ADDRESS)
    if size == 7 and packed[0] == 4:
        four.sin_family = AF_INET
        memcpy(&four.sin_addr, packed + 1, 4)
        memcpy(&four.sin_port, packed + 5, 2)
        return AF_INET
    if size == 27 and packed[0] == 6:
        six.sin6_family = AF_INET6
        memcpy(&six.sin6_addr, packed + 1, 16)
        memcpy(&six.sin6_port, packed + 17, 2)
        memcpy(&six.sin6_flowinfo, packed + 19, 4)
        memcpy(&scope, packed + 23, 4)
        six.sin6_scope_id = ntohl(scope)
        return AF_INET6
    return 0
