# cython: language_level=3, boundscheck=False, wraparound=False
"""Connections into a loop, a batch at a time; those of compiled handlers without the GIL.

A connection that was adopted is HELD, in the table and not in the epoll set: it is neither read nor written until it
is started. No descriptor of a batch can change hands in between, so an array of them stands for the batch.
"""

from cpython cimport array
from libc.errno cimport ENOMEM
from libc.stdint cimport uint8_t, uint16_t, uint64_t
from libc.string cimport memset
from posix.unistd cimport close

from takeover._addresses cimport unpack_inet
from takeover._connections cimport (
    CLOSING, EOF_QUEUED, EOF_RECEIVED, FULL, HELD, LOST, NATIVE, PAUSED, PROTOCOL, Callbacks, Connection, Kind,
    doom, open_connection, place, queue, reap, release, sockaddr, sockaddr_storage, socklen_t,
)
from takeover._fdpass cimport MOST
from takeover._listener cimport Listener
from takeover._native cimport resume_native
from takeover._reasons cimport (
    BROKEN, FINE, NO_LISTENER, NO_MEMORY, NO_SOCKET, OTHER_HANDLER, OTHER_VERSION, UNREAD, Reason,
)
from takeover._records cimport (
    R_CLOSING, R_EOF_RECEIVED, R_EOF_WRITTEN, R_FULL, R_HAS_STATE, R_PAUSED, Record, unpack,
)
from takeover._transport cimport Transport, forget_connection, make_transport

from takeover._schedule import log
from takeover.errors import RemoteProtocolError
from takeover.records import WORDS, Moved, reads_version, unpack_peer

cdef extern from "<sys/socket.h>" nogil:
    enum: AF_UNIX, SOL_SOCKET, SO_TYPE, SOCK_STREAM
    int getsockopt(int fd, int level, int option, void *value, socklen_t *size)


cdef inline uint8_t own_flags(uint8_t flags) noexcept nogil:
    cdef uint8_t own = HELD
    own |= EOF_RECEIVED if flags & R_EOF_RECEIVED else 0
    own |= EOF_QUEUED if flags & R_EOF_WRITTEN else 0
    own |= PAUSED if flags & R_PAUSED else 0
    own |= FULL if flags & R_FULL else 0
    own |= CLOSING if flags & R_CLOSING else 0
    return own


cdef int home_of(Core *core, uint64_t inode) noexcept nogil:
    """The place of one of our own listeners among the origins, -1 if it is none."""
    cdef int index
    for index in range(<int>core.origin_count):
        if core.origins[index].inode == inode and core.origins[index].listener != NULL:
            return index
    return -1


cdef bint is_stream(int fd) noexcept nogil:
    cdef int kind = 0
    cdef socklen_t size = sizeof(kind)
    return getsockopt(fd, SOL_SOCKET, SO_TYPE, &kind, &size) == 0 and kind == SOCK_STREAM


cdef inline int moves_then(const Record *record) noexcept nogil:
    return record.moves + 1 if record.moves < 255 else 255


cdef Connection *take_in(Core *core, int fd, int kind, const Record *record, int home) noexcept nogil:
    """A record in the table, HELD, with the unsent bytes; NULL without memory."""
    cdef Connection *connection = open_connection(core, fd, <Kind>kind)
    if connection == NULL:
        return NULL
    connection.handler = core.origins[home].callbacks
    connection.origin = <uint16_t>home
    connection.moves = <uint8_t>moves_then(record)
    connection.flags = own_flags(record.flags)
    if queue(core, connection, record.unsent, record.unsent_size):
        release(core, connection)
        return NULL
    return connection


cdef Reason adopt_native(Core *core, int fd, const Record *record, int home) noexcept nogil:
    cdef const Callbacks *handler = core.origins[home].callbacks
    cdef Connection *connection
    cdef bint reads = handler.imported != NULL
    if (record.flags & R_HAS_STATE != 0) != reads:
        return OTHER_HANDLER
    if reads and (record.version < handler.oldest or record.version > handler.version):
        return OTHER_VERSION
    connection = take_in(core, fd, NATIVE, record, home)
    if connection == NULL:
        return NO_MEMORY
    if reads and not handler.imported(core, connection, record.state, record.state_size):
        release(core, connection)
        return BROKEN
    return FINE


cdef object UNSAID = object()


cdef Reason adopt_protocol(Core *core, object schedule, int fd, const Record *record, int home,
                           object moved) except *:
    cdef Connection *connection
    cdef Transport transport
    cdef sockaddr_storage peer
    path = None
    factory = (<Listener>core.origins[home].listener).handler
    if not record.flags & R_HAS_STATE:
        return OTHER_HANDLER
    try:
        protocol = factory()
        take = getattr(protocol, "import_state", None)
        if take is None:
            return OTHER_HANDLER
        if getattr(protocol, "readable_state_versions", UNSAID) is UNSAID:
            if getattr(protocol, "state_version", 0) != record.version:
                return OTHER_VERSION
        elif not reads_version(protocol, record.version):
            return OTHER_VERSION
        take(record.state[:record.state_size])
    except (KeyboardInterrupt, SystemExit):
        raise
    except MemoryError:
        return NO_MEMORY
    except BaseException:
        log.exception("import_state in %r raised; the connection goes back", factory)
        return BROKEN
    connection = take_in(core, fd, PROTOCOL, record, home)
    if connection == NULL:
        return NO_MEMORY
    memset(&peer, 0, sizeof(peer))
    try:
        if unpack_inet(record.peer, record.peer_size, <char *>&peer) == 0:
            (<sockaddr *>&peer).sa_family = AF_UNIX
            path = unpack_peer(record.peer[:record.peer_size])
        transport = make_transport(core, connection, schedule, protocol, <sockaddr *>&peer, 0)
    except MemoryError:
        release(core, connection)
        return NO_MEMORY
    if transport.family == AF_UNIX:
        transport.peer_path = path
    transport.high, transport.low = record.high, record.low
    transport.eof_written = record.flags & R_EOF_WRITTEN != 0
    transport.moved = moved
    return FINE


cdef list adopt_batch(Core *core, object schedule, const char *records, size_t size, array.array descriptors,
                      object generation):
    """Takes every descriptor: those refused are closed here. Returns [[index, reason], …] of those.

    Whatever it raises, RemoteProtocolError where the records are garbled, it has taken and closed none of them.
    """
    cdef uint8_t[MOST] answers
    cdef int *fds = descriptors.data.as_ints
    cdef int count = <int>len(descriptors)
    cdef int index = 0
    cdef list refused
    try:
        check(records, size, count)
        adopt_all(core, schedule, records, size, fds, count, generation, answers, &index)
        refused = [[each, WORDS[answers[each]]] for each in range(count) if answers[each]]
    except BaseException:
        while index:
            index -= 1
            if answers[index] == FINE:
                forget_connection(core, place(core, fds[index]))
        raise
    for index in range(count):
        if answers[index]:
            close(fds[index])
    return refused


cdef int check(const char *records, size_t size, int count) except -1:
    """Raises RemoteProtocolError unless the bytes are so many records."""
    cdef Record record
    cdef size_t at = 0, length
    cdef int _index
    for _index in range(count):
        length = unpack(records + at, size - at, &record)
        at += length
        if length == 0:
            break
    if at != size or (count and length == 0):
        raise RemoteProtocolError(f"the records of {count} connections are garbled")
    return 0


cdef int adopt_all(Core *core, object schedule, const char *records, size_t size, const int *fds, int count,
                   object generation, uint8_t *answers, int *index) except -1:
    """Answers for each of the descriptors; `index` says for how many when it raises."""
    cdef size_t at = 0, length
    cdef Record record
    cdef int home, moves
    cdef object moved = None
    while index[0] < count:
        with nogil:
            home = -1
            while index[0] < count:
                length = unpack(records + at, size - at, &record)
                if home < 0 or core.origins[home].inode != record.listener:
                    home = home_of(core, record.listener)
                if home < 0:
                    answers[index[0]] = NO_LISTENER
                elif not is_stream(fds[index[0]]):
                    answers[index[0]] = NO_SOCKET
                elif record.unread_size:
                    answers[index[0]] = UNREAD
                elif core.origins[home].callbacks == NULL:
                    break
                else:
                    answers[index[0]] = <uint8_t>adopt_native(core, fds[index[0]], &record, home)
                at += length
                index[0] += 1
        if index[0] < count:
            moves = moves_then(&record)
            if moved is None or moved.times != moves:
                moved = Moved(generation, moves)
            answers[index[0]] = <uint8_t>adopt_protocol(core, schedule, fds[index[0]], &record, home, moved)
            at += length
            index[0] += 1
    return 0


cdef int start_protocol(Core *core, Connection *connection) except -1:
    cdef Transport transport = <Transport>connection.state
    cdef bint was_full = connection.flags & FULL != 0
    connection.flags &= <uint8_t>~FULL
    transport.resume()
    transport.begin()
    if was_full and not connection.flags & (LOST | FULL):
        connection.flags |= FULL
        try:
            transport.protocol.pause_writing()
        except BaseException as error:
            transport.failed("pause_writing", error)
    elif not connection.flags & LOST:
        transport.fill()
    return 0


cdef int start_batch(Core *core, array.array descriptors, object skip, dict tails) except -1:
    """Reads and writes from now on; what was written to a connection on its way goes out behind what it had brought.

    One whose tail there is no memory for is ended. What ends the program is raised when all the others are served.
    """
    cdef int *fds = descriptors.data.as_ints
    cdef int count = <int>len(descriptors)
    cdef int index = 0
    cdef bint all_of_them = not skip and not tails
    cdef Connection *connection
    ending = None
    while index < count:
        if all_of_them:
            with nogil:
                while index < count:
                    connection = place(core, fds[index])
                    if connection.kind != NATIVE:
                        break
                    resume_native(core, connection)
                    index += 1
                reap(core)
            if index == count:
                break
        connection = place(core, fds[index])
        if all_of_them or index not in skip:
            try:
                start(core, connection, None if all_of_them else tails.get(index))
            except BaseException as error:
                ending = ending or error
        index += 1
    reap(core)
    if ending is not None:
        raise ending
    return 0


cdef int start(Core *core, Connection *connection, bytes tail) except -1:
    if tail is not None and queue(core, connection, tail, len(tail)):
        connection.flags &= <uint8_t>~HELD
        if connection.kind == NATIVE:
            doom(core, connection, ENOMEM)
        else:
            (<Transport>connection.state).lose(MemoryError())
        log.error("no memory for %d bytes that a connection has brought; it is aborted", len(tail))
    elif connection.kind == NATIVE:
        resume_native(core, connection)
    else:
        start_protocol(core, connection)
    return 0


cdef int drop_batch(Core *core, array.array descriptors, object skip) except -1:
    """Closes our copies of what was adopted and goes back: no handler has seen its connection yet."""
    cdef int *fds = descriptors.data.as_ints
    cdef int index, fd
    cdef Connection *connection
    for index in range(<int>len(descriptors)):
        if index in skip:
            continue
        fd = fds[index]
        connection = place(core, fd)
        forget_connection(core, connection)
        close(fd)
    return 0
