# cython: language_level=3
"""The records of live connections as bytes and back, in plain C; docs/protocol.md specifies, records.py is the twin."""

from libc.stdint cimport int32_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport realloc
from libc.string cimport memcpy

from takeover._connections cimport Chunk, Connection

cdef extern from "<endian.h>" nogil:
    uint16_t htobe16(uint16_t value)
    uint32_t htobe32(uint32_t value)
    uint64_t htobe64(uint64_t value)
    uint16_t be16toh(uint16_t value)
    uint32_t be32toh(uint32_t value)
    uint64_t be64toh(uint64_t value)

cdef enum:
    FIXED = 40  # bytes of a record before its parts

cdef enum RecordFlag:
    R_EOF_RECEIVED = 1
    R_EOF_WRITTEN = 2
    R_PAUSED = 4
    R_FULL = 8
    R_CLOSING = 16
    R_HAS_STATE = 32

cdef struct Record:
    uint64_t listener
    uint8_t flags
    uint8_t moves
    uint16_t peer_size
    int32_t version
    uint32_t high
    uint32_t low
    uint32_t unread_size
    uint32_t unsent_size
    uint32_t state_size
    const char *peer
    const char *unread
    const char *unsent
    const char *state

cdef struct Output:
    char *data
    size_t size
    size_t room


cdef inline char *extend(Output *output, size_t size) noexcept nogil:
    """Room for more bytes at the end; NULL without memory."""
    cdef size_t room = output.room
    cdef char *data
    if output.size + size > room:
        room = max(2 * room, output.size + size + 16384)
        data = <char *>realloc(output.data, room)
        if data == NULL:
            return NULL
        output.data = data
        output.room = room
    data = output.data + output.size
    output.size += size
    return data


cdef inline char *put_8(char *at, uint8_t value) noexcept nogil:
    at[0] = <char>value
    return at + 1


cdef inline char *put_16(char *at, uint16_t value) noexcept nogil:
    value = htobe16(value)
    memcpy(at, &value, 2)
    return at + 2


cdef inline char *put_32(char *at, uint32_t value) noexcept nogil:
    value = htobe32(value)
    memcpy(at, &value, 4)
    return at + 4


cdef inline char *put_64(char *at, uint64_t value) noexcept nogil:
    value = htobe64(value)
    memcpy(at, &value, 8)
    return at + 8


cdef inline uint16_t get_16(const char *at) noexcept nogil:
    cdef uint16_t value
    memcpy(&value, at, 2)
    return be16toh(value)


cdef inline uint32_t get_32(const char *at) noexcept nogil:
    cdef uint32_t value
    memcpy(&value, at, 4)
    return be32toh(value)


cdef inline uint64_t get_64(const char *at) noexcept nogil:
    cdef uint64_t value
    memcpy(&value, at, 8)
    return be64toh(value)


cdef inline bint pack(Output *output, const Connection *connection, const Record *record) noexcept nogil:
    """One record, with the connection's whole backlog as its unsent bytes. False without memory."""
    cdef Chunk *chunk
    cdef size_t size = FIXED + record.peer_size + connection.unsent + record.state_size
    cdef char *at = extend(output, size)
    if at == NULL:
        return False
    at = put_32(at, <uint32_t>size)
    at = put_64(at, record.listener)
    at = put_8(at, record.flags)
    at = put_8(at, record.moves)
    at = put_16(at, record.peer_size)
    at = put_32(at, <uint32_t>record.version)
    at = put_32(at, record.high)
    at = put_32(at, record.low)
    at = put_32(at, 0)
    at = put_32(at, <uint32_t>connection.unsent)
    at = put_32(at, record.state_size)
    if record.peer_size:  # memcpy(3) takes no null pointer, not even for nothing
        memcpy(at, record.peer, record.peer_size)
    at += record.peer_size
    chunk = connection.head
    while chunk != NULL and connection.unsent:
        memcpy(at, <char *>(chunk + 1) + chunk.start, chunk.end - chunk.start)
        at += chunk.end - chunk.start
        chunk = chunk.next
    if record.state_size and record.state != at:
        memcpy(at, record.state, record.state_size)
    return True


cdef inline size_t unpack(const char *at, size_t left, Record *record) noexcept nogil:
    """The record that begins here, leading into the same bytes. Returns its size, 0 where it is garbled."""
    cdef size_t size
    if left < FIXED:
        return 0
    size = get_32(at)
    record.listener = get_64(at + 4)
    record.flags = <uint8_t>at[12]
    record.moves = <uint8_t>at[13]
    record.peer_size = get_16(at + 14)
    record.version = <int32_t>get_32(at + 16)
    record.high = get_32(at + 20)
    record.low = get_32(at + 24)
    record.unread_size = get_32(at + 28)
    record.unsent_size = get_32(at + 32)
    record.state_size = get_32(at + 36)
    record.peer = at + FIXED
    record.unread = record.peer + record.peer_size
    record.unsent = record.unread + record.unread_size
    record.state = record.unsent + record.unsent_size
    if size > left or size != FIXED + <size_t>record.peer_size + record.unread_size + record.unsent_size + \
            record.state_size:
        return 0
    return size
