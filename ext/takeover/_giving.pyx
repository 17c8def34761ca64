# cython: language_level=3, boundscheck=False, wraparound=False
"""Connections out of a loop, a batch at a time; those of compiled handlers without the GIL.

A connection that is exported stays in the table, HELD: its descriptor is open, out of the epoll set, and what its
handler writes is queued behind what is in its record. So it can be put back at any moment as if nothing had happened.
When the other process has adopted it, it is relinquished: only then its descriptor is closed here. No descriptor of a
batch can change hands in between, so an array of them stands for the batch.
"""

from cpython.bytes cimport PyBytes_FromStringAndSize
from libc.stdint cimport uint8_t, uint16_t, uint32_t
from libc.stdlib cimport free
from libc.string cimport memset
from posix.unistd cimport close

from takeover._addresses cimport INET_NAME, pack_inet
from takeover._connections cimport (
    CLOSING, EOF_QUEUED, EOF_RECEIVED, FULL, HELD, LOST, NATIVE, PAUSED, PROTOCOL, SLAB, STAYS, Callbacks, Chunk,
    Connection, arm, place, reap,
)
from takeover._fdpass cimport MOST, descriptor_array
from takeover._ledger cimport note
from takeover._native cimport forget_native
from takeover._reasons cimport BROKEN, BUSY, CLOSED, FINE, NO_MEMORY, REASONS, UNMOVABLE, Reason
from takeover._records cimport (
    FIXED, R_CLOSING, R_EOF_RECEIVED, R_EOF_WRITTEN, R_FULL, R_HAS_STATE, R_PAUSED, Output, Record, extend, pack,
)
from takeover._transport cimport Transport, forget_connection, resume_connection

from takeover._schedule import log
from takeover.records import LARGEST_PART, NOT_NOW, WORDS, pack_peer, version_of

cdef extern from "<sys/socket.h>" nogil:
    enum: AF_UNIX

cdef size_t LARGEST = LARGEST_PART


cdef inline uint8_t wire_flags(const Connection *connection) noexcept nogil:
    cdef uint8_t flags = 0
    flags |= R_EOF_RECEIVED if connection.flags & EOF_RECEIVED else 0
    flags |= R_EOF_WRITTEN if connection.flags & EOF_QUEUED else 0
    flags |= R_PAUSED if connection.flags & PAUSED else 0
    flags |= R_FULL if connection.flags & FULL else 0
    flags |= R_CLOSING if connection.flags & CLOSING else 0
    return flags


cdef inline void describe(Core *core, const Connection *connection, Record *record) noexcept nogil:
    memset(record, 0, sizeof(Record))
    record.listener = core.origins[connection.origin].inode
    record.flags = wire_flags(connection)
    record.moves = connection.moves


cdef inline void hold(Core *core, Connection *connection, int *descriptors, int *count) noexcept nogil:
    connection.flags |= HELD
    arm(core, connection)
    descriptors[count[0]] = connection.fd
    count[0] += 1


cdef Reason export_native(Core *core, Connection *connection, Output *output) noexcept nogil:
    cdef const Callbacks *handler = connection.handler
    cdef size_t before = output.size
    cdef size_t room = 256
    cdef char *at
    cdef ssize_t size = 0
    cdef Record record
    describe(core, connection, &record)
    record.high = <uint32_t>handler.high
    record.low = <uint32_t>handler.low
    if handler.exported == NULL:
        if connection.state != NULL:
            return UNMOVABLE
        return FINE if pack(output, connection, &record) else NO_MEMORY
    # The state is written to where it is going to be, behind the record's other parts, and packed onto itself.
    while True:
        at = extend(output, FIXED + connection.unsent + room)
        if at == NULL:
            return NO_MEMORY
        at += FIXED + connection.unsent
        size = handler.exported(core, connection, at, room)
        output.size = before
        if size < 0:
            return BUSY if size == -1 else BROKEN
        if <size_t>size <= room:
            break
        room = <size_t>size
    record.flags |= R_HAS_STATE
    record.version = handler.version
    record.state = at
    record.state_size = <uint32_t>size
    return FINE if pack(output, connection, &record) else NO_MEMORY


cdef Connection *export_natives(Core *core, size_t *cursor, int most, size_t size, Output *output, int *descriptors,
                                int *count, size_t *tally) noexcept nogil:
    """Exports on, up to the limits, to the end of the table, or to a connection that needs the GIL."""
    cdef size_t end = SLAB * core.slab_count
    cdef Connection *slab
    cdef Connection *connection
    cdef Reason reason
    while cursor[0] < end and count[0] < most and output.size < size:
        slab = core.slabs[cursor[0] // SLAB]
        if slab == NULL:
            cursor[0] = (cursor[0] // SLAB + 1) * SLAB
            continue
        connection = &slab[cursor[0] % SLAB]
        if connection.flags & (LOST | HELD | STAYS) == 0:
            if connection.kind == PROTOCOL:
                return connection
            if connection.kind == NATIVE:
                reason = export_native(core, connection, output)
                if reason == FINE:
                    hold(core, connection, descriptors, count)
                else:
                    tally[<int>reason] += 1
                    if reason != BUSY:
                        connection.flags |= STAYS
        cursor[0] += 1
    return NULL


cdef object OLDEST = -(1 << 31)
cdef object NEWEST = (1 << 31) - 1


cdef Reason export_protocol(Core *core, Connection *connection, Output *output) except *:
    cdef Transport transport = <Transport>connection.state
    cdef char inet[INET_NAME]
    cdef bytes path, content
    cdef Record record
    protocol = transport.protocol
    export = getattr(protocol, "export_state", None)
    if connection.flags & CLOSING:
        return CLOSED
    if export is None or getattr(protocol, "import_state", None) is None:
        return UNMOVABLE
    try:
        version = getattr(protocol, "state_version", 0)
        if type(version) is not int or not OLDEST <= version <= NEWEST:
            version = version_of(protocol)  # which knows what else will do, and says what will not
        state = export()
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException:
        log.exception("the state of %r cannot be exported; its connection is drained", protocol)
        return BROKEN
    if state is NOT_NOW:
        return BUSY
    if not isinstance(state, (bytes, bytearray, memoryview)):
        kind = type(state).__name__
        log.error("export_state of %r returned %s, not bytes; its connection is drained", protocol, kind)
        return BROKEN
    if connection.flags & (CLOSING | LOST):
        return CLOSED
    content = state if type(state) is bytes else bytes(state)
    if <size_t>len(content) + connection.unsent > LARGEST:
        log.error("the state of %r has %d bytes, too many to move; its connection is drained", protocol, len(content))
        return BROKEN
    describe(core, connection, &record)
    record.flags |= R_HAS_STATE
    record.version = version
    record.high, record.low = <uint32_t>min(transport.high, 0xffffffff), <uint32_t>min(transport.low, 0xffffffff)
    if transport.family == AF_UNIX:
        path = pack_peer(AF_UNIX, transport.peer_path)
        record.peer, record.peer_size = path, <uint16_t>len(path)
    else:
        record.peer, record.peer_size = inet, <uint16_t>pack_inet(transport.peer, transport.family, inet)
    record.state, record.state_size = content, <uint32_t>len(content)
    transport.exported = connection.unsent
    return FINE if pack(output, connection, &record) else NO_MEMORY


cdef tuple export_batch(Core *core, size_t start, int most, size_t size, dict reasons):
    """The records, the descriptors, and where to go on (-1 at the end of the table); `reasons` counts who stays."""
    cdef Output output
    cdef int[MOST] descriptors
    cdef size_t[REASONS] tally
    cdef int count = 0
    cdef int which
    cdef Reason reason
    cdef Connection *connection
    memset(&output, 0, sizeof(output))
    memset(tally, 0, sizeof(tally))
    try:
        with nogil:
            connection = export_natives(core, &start, most, size, &output, descriptors, &count, tally)
        while connection != NULL:
            try:
                reason = export_protocol(core, connection, &output)
            except MemoryError:
                reason = NO_MEMORY
            if reason == FINE:
                hold(core, connection, descriptors, &count)
            else:
                tally[<int>reason] += 1
                if reason != BUSY:
                    connection.flags |= STAYS
            start += 1
            connection = export_natives(core, &start, most, size, &output, descriptors, &count, tally)
        for which in range(1, REASONS):
            if tally[which]:
                reasons[WORDS[which]] = reasons.get(WORDS[which], 0) + tally[which]
        end = start >= SLAB * core.slab_count
        found = descriptor_array(descriptors, count)
        return PyBytes_FromStringAndSize(output.data, output.size), found, -1 if end else start
    except BaseException:
        put_back_batch(core, descriptor_array(descriptors, count), False)
        raise
    finally:
        free(output.data)


cdef bytes tail_of(const Connection *connection, size_t start):
    """What was queued behind the first `start` bytes of the backlog."""
    cdef Chunk *chunk = connection.head
    cdef size_t size = connection.unsent
    cdef size_t part
    cdef bytes joined
    parts = []
    while chunk != NULL and size:
        part = chunk.end - chunk.start
        parts.append((<char *>(chunk + 1) + chunk.start)[:part])
        size -= part
        chunk = chunk.next
    joined = b"".join(parts)
    return joined[start:]


cdef bint keep_tail(const Connection *connection, dict tails, int index) except -1:
    """What was written since the export goes along; False where there is no memory for that."""
    cdef Transport transport
    if connection.kind != PROTOCOL:
        return True
    transport = <Transport>connection.state
    if connection.unsent > transport.exported:
        try:
            tails[index] = tail_of(connection, transport.exported)
        except MemoryError:
            return False
    return True


cdef tuple relinquish_batch(Core *core, object schedule, array.array descriptors, object skip):
    """Closes our copies of what the other process has adopted; those in `skip`, which it refused, are served on.

    Returns, by index, who is to stay after all since its handler has ended it meanwhile, and is held still; and what
    was written to others.
    """
    cdef int *fds = descriptors.data.as_ints
    cdef int count = <int>len(descriptors)
    cdef int index = 0
    cdef Connection *connection
    kept, tails = [], {}
    while index < count:
        if not skip:
            with nogil:
                while index < count:
                    connection = place(core, fds[index])
                    if connection.kind != NATIVE or connection.flags & STAYS:
                        break
                    forget_native(core, connection)
                    close(fds[index])
                    index += 1
            if index == count:
                break
        connection = place(core, fds[index])
        if index in skip:
            connection.flags |= STAYS
            resume_connection(core, connection)
        elif connection.flags & STAYS or not keep_tail(connection, tails, index):
            kept.append(index)
        else:
            part(core, schedule, connection)
        index += 1
    reap(core)
    return kept, tails


cdef int part(Core *core, object schedule, Connection *connection) except -1:
    """The connection lives on elsewhere, of which its protocol may want to know."""
    cdef int fd = connection.fd
    cdef Transport transport
    moved = None
    if connection.kind == PROTOCOL:
        transport = <Transport>connection.state
        transport.learn_local_name()
        moved = getattr(transport.protocol, "connection_moved", None)
    forget_connection(core, connection)
    close(fd)
    if moved is not None:
        schedule.bid_farewell(moved)
    return 0


cdef int forgo_batch(Core *core, object schedule, array.array descriptors) except -1:
    """Closes our copies of what the other process serves by now."""
    cdef int *fds = descriptors.data.as_ints
    cdef int index
    for index in range(<int>len(descriptors)):
        part(core, schedule, place(core, fds[index]))
    return 0


cdef int put_back_batch(Core *core, array.array descriptors, bint stay) except -1:
    """Serves on, as if nothing had happened. With `stay` they are not exported again."""
    cdef int *fds = descriptors.data.as_ints
    cdef int index
    cdef Connection *connection
    for index in range(<int>len(descriptors)):
        connection = place(core, fds[index])
        if connection.kind == PROTOCOL and connection.unsent > (<Transport>connection.state).exported:
            note(core, connection, NULL, 0)  # it is sent from here
        if stay:
            connection.flags |= STAYS
        resume_connection(core, connection)
    reap(core)
    return 0
