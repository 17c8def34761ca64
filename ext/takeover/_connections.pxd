# cython: language_level=3
"""The table of descriptors of one loop: connections, their unsent bytes and the epoll set. Plain C, no Python object.

A connection is everything that the loop knows of a descriptor, in one record of 64 bytes at a fixed place: what moves
to another loop or process is the descriptor, `flags` and the chunks from `head` on.
"""

from libc.errno cimport EAGAIN, EINTR, ENOMEM, errno
from libc.stdint cimport int32_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc, realloc
from libc.string cimport memcpy, memset
from posix.unistd cimport close

from takeover._messages cimport MSG_DONTWAIT, MSG_NOSIGNAL, iovec, msghdr, sendmsg

cdef extern from "<sys/socket.h>" nogil:
    enum: SHUT_WR
    ctypedef uint32_t socklen_t
    ctypedef uint16_t sa_family_t
    struct sockaddr:
        sa_family_t sa_family
    struct sockaddr_storage:
        sa_family_t ss_family
    ssize_t send(int fd, const void *data, size_t size, int flags)
    ssize_t recv(int fd, void *data, size_t size, int flags)
    int shutdown(int fd, int how)


cdef extern from "<sys/epoll.h>" nogil:
    enum: EPOLLIN, EPOLLOUT, EPOLLERR, EPOLLHUP, EPOLL_CTL_ADD, EPOLL_CTL_MOD, EPOLL_CTL_DEL, EPOLL_CLOEXEC
    ctypedef union epoll_data_t:
        uint64_t u64
    struct epoll_event:
        uint32_t events
        epoll_data_t data
    int epoll_create1(int flags)
    int epoll_ctl(int epoll, int operation, int fd, epoll_event *event)
    int epoll_wait(int epoll, epoll_event *events, int size, int timeout)

cdef enum:
    SLAB = 256              # connections that are allocated together; they never change their place
    EVENTS = 512            # events of one epoll_wait
    RECEIVE = 256 << 10     # bytes of the one buffer that every connection receives into
    CHUNK = (16 << 10) - 16  # bytes of one chunk of backlog; with its header 16 KiB
    CHUNKS_KEPT = 256       # spare chunks that a loop keeps: 4 MiB
    VECTOR = 64             # chunks that one sendmsg takes: 1 MiB

cdef enum Kind:
    FREE, NATIVE, PROTOCOL, NATIVE_LISTENER, PROTOCOL_LISTENER
    WATCH  # a descriptor that is not the loop's, with callbacks for when it can be read or written

cdef enum Flag:
    PAUSED = 1        # the handler does not want to read
    FULL = 2          # the backlog rose above the high-water mark and has not fallen to the low one
    EOF_RECEIVED = 4  # the peer has sent its FIN
    EOF_QUEUED = 8    # our FIN goes out, or went out, behind the backlog
    CLOSING = 16      # no reading any more; closed as soon as the backlog is sent
    LOST = 32         # over; its backlog is dropped, and only the last callback and close() are left
    HELD = 64         # on its way between two processes: neither read nor written, what a handler writes is queued
    STAYS = 128       # it cannot move, or nobody wants it

cdef struct Chunk:
    Chunk *next
    uint32_t start
    uint32_t end      # the bytes from start to end, which lie behind this header, are unsent

cdef struct Connection:
    int32_t fd
    uint32_t generation   # of this place in the table; an event that carries another one is stale
    const Callbacks *handler
    void *state           # the handler's own
    Chunk *head           # the backlog
    Chunk *tail
    size_t unsent
    Connection *doomed    # the next one to be closed at the end of this batch
    uint16_t error        # errno that ended it, 0 for an orderly end
    uint8_t kind
    uint8_t flags
    uint8_t events        # what epoll watches; with 0 the descriptor is not in the set (EPOLLHUP cannot be masked)
    uint8_t moves         # how often it has moved, 255 for more
    uint16_t origin       # which of Core.origins it came from

cdef struct Callbacks:
    size_t high           # water marks of the backlog, in bytes
    size_t low
    int32_t version       # of the state that `exported` writes
    int32_t oldest        # and the oldest one that `imported` reads
    void *context         # the handler's own, for all its connections
    void (*opened)(Core *core, Connection *connection) noexcept nogil
    void (*received)(Core *core, Connection *connection, const char *data, size_t size) noexcept nogil
    bint (*ended)(Core *core, Connection *connection) noexcept nogil
    void (*filled)(Core *core, Connection *connection) noexcept nogil
    void (*drained)(Core *core, Connection *connection) noexcept nogil
    void (*closed)(Core *core, Connection *connection, int error) noexcept nogil
    ssize_t (*exported)(Core *core, Connection *connection, char *room, size_t size) noexcept nogil
    bint (*imported)(Core *core, Connection *connection, const char *state, size_t size) noexcept nogil
    void (*moved)(Core *core, Connection *connection) noexcept nogil

cdef struct Origin:
    uint64_t inode        # of a listening socket, which is the same in every process that holds it
    const Callbacks *callbacks
    void *listener        # the Listener of this loop, borrowed; NULL for one of another process

cdef struct Acceptor:
    int fd
    int error             # for which it had to leave the poll set
    bint pausing          # since then nothing was accepted
    size_t accepted
    uint16_t origin
    const Callbacks *callbacks
    Connection *place     # NULL when it does not listen
    void *listener        # the Listener, borrowed

cdef struct Core:
    int epoll
    int ledger            # where what is written to held connections is noted, -1 for nowhere; borrowed
    bint attention        # something happened that needs the GIL
    Connection **slabs
    size_t slab_count
    size_t open           # connections
    Connection *doomed
    Chunk *spare
    size_t spare_count
    char *buffer
    epoll_event *events
    Origin *origins
    size_t origin_count


cdef inline Connection *place(Core *core, int fd) noexcept nogil:
    """The record of a descriptor, NULL without memory."""
    cdef size_t index = <size_t>fd // SLAB
    cdef size_t count = core.slab_count
    cdef Connection **slabs
    if index >= count:
        count = max(2 * count, index + 1)
        slabs = <Connection **>realloc(core.slabs, count * sizeof(Connection *))
        if slabs == NULL:
            return NULL
        core.slabs = slabs
        while core.slab_count < count:
            slabs[core.slab_count] = NULL
            core.slab_count += 1
    if core.slabs[index] == NULL:
        core.slabs[index] = <Connection *>calloc(SLAB, sizeof(Connection))
        if core.slabs[index] == NULL:
            return NULL
    return &core.slabs[index][fd % SLAB]


cdef inline Connection *find(Core *core, uint64_t tag) noexcept nogil:
    """Whom an event is for; NULL if that one is gone."""
    cdef uint32_t fd = <uint32_t>tag
    cdef Connection *connection = &core.slabs[fd // SLAB][fd % SLAB]
    return connection if connection.generation == <uint32_t>(tag >> 32) else NULL


cdef inline int watch(Core *core, Connection *connection, uint8_t wanted) noexcept nogil:
    """Have epoll report exactly `wanted`. Returns errno."""
    cdef epoll_event event
    cdef int operation
    if wanted == connection.events:
        return 0
    operation = EPOLL_CTL_ADD if connection.events == 0 else EPOLL_CTL_DEL if wanted == 0 else EPOLL_CTL_MOD
    event.events = wanted
    event.data.u64 = <uint64_t>connection.generation << 32 | <uint32_t>connection.fd
    if epoll_ctl(core.epoll, operation, connection.fd, &event) < 0:
        return errno
    connection.events = wanted
    return 0


cdef inline int arm(Core *core, Connection *connection) noexcept nogil:
    """Watch what the state of the connection asks for. Returns errno."""
    cdef uint8_t wanted = 0
    if not connection.flags & (PAUSED | EOF_RECEIVED | CLOSING | LOST | HELD):
        wanted |= EPOLLIN
    if connection.unsent and not connection.flags & HELD:
        wanted |= EPOLLOUT
    return watch(core, connection, wanted)


cdef inline void drop_backlog(Core *core, Connection *connection) noexcept nogil:
    while connection.head != NULL:
        drop_chunk(core, connection)
    connection.unsent = 0


cdef inline void drop_chunk(Core *core, Connection *connection) noexcept nogil:
    cdef Chunk *chunk = connection.head
    connection.head = chunk.next
    if core.spare_count < CHUNKS_KEPT:
        chunk.next = core.spare
        core.spare = chunk
        core.spare_count += 1
    else:
        free(chunk)


cdef inline int queue(Core *core, Connection *connection, const char *data, size_t size) noexcept nogil:
    """Copy to the end of the backlog. Returns errno."""
    cdef Chunk *chunk = connection.tail if connection.head != NULL else NULL
    cdef size_t part
    while size:
        if chunk == NULL or chunk.end == CHUNK:
            if core.spare != NULL:
                chunk = core.spare
                core.spare = chunk.next
                core.spare_count -= 1
            else:
                chunk = <Chunk *>malloc(sizeof(Chunk) + CHUNK)
                if chunk == NULL:
                    return ENOMEM
            chunk.next = NULL
            chunk.start = chunk.end = 0
            if connection.head == NULL:
                connection.head = chunk
            else:
                connection.tail.next = chunk
            connection.tail = chunk
        part = min(size, <size_t>(CHUNK - chunk.end))
        memcpy(<char *>(chunk + 1) + chunk.end, data, part)
        chunk.end += <uint32_t>part
        connection.unsent += part
        data += part
        size -= part
    return 0


cdef inline int write(Core *core, Connection *connection, const char *data, size_t size) noexcept nogil:
    """Send what the kernel takes at once, queue the rest. Returns errno, after which the connection is of no more use.

    MSG_DONTWAIT, as another process that holds the same open file may have cleared O_NONBLOCK.
    """
    cdef ssize_t sent
    cdef int error
    if connection.unsent == 0 and not connection.flags & HELD:
        while True:
            sent = send(connection.fd, data, size, MSG_NOSIGNAL | MSG_DONTWAIT)
            if sent == <ssize_t>size:
                return 0
            if sent >= 0:
                data += sent
                size -= <size_t>sent
                break
            if errno == EAGAIN:
                break
            if errno != EINTR:
                return errno
    error = queue(core, connection, data, size)
    return error if error else arm(core, connection)


cdef inline int flush(Core *core, Connection *connection) noexcept nogil:
    """Send of the backlog what the kernel takes. Returns errno."""
    cdef iovec vector[VECTOR]
    cdef msghdr message
    cdef Chunk *chunk
    cdef ssize_t sent
    cdef size_t part
    cdef int count
    memset(&message, 0, sizeof(message))
    while connection.unsent:
        count = 0
        chunk = connection.head
        while chunk != NULL and count < VECTOR:
            vector[count].iov_base = <char *>(chunk + 1) + chunk.start
            vector[count].iov_len = chunk.end - chunk.start
            count += 1
            chunk = chunk.next
        message.msg_iov = vector
        message.msg_iovlen = count
        sent = sendmsg(connection.fd, &message, MSG_NOSIGNAL | MSG_DONTWAIT)
        if sent < 0:
            if errno == EINTR:
                continue
            return 0 if errno == EAGAIN else errno
        connection.unsent -= <size_t>sent
        while sent > 0:
            part = connection.head.end - connection.head.start
            if <size_t>sent < part:
                connection.head.start += <uint32_t>sent
                return 0
            sent -= <ssize_t>part
            drop_chunk(core, connection)
    return 0


cdef inline Connection *open_connection(Core *core, int fd, Kind kind) noexcept nogil:
    """Take a descriptor into the table, unwatched; NULL without memory. Nothing is closed here.

    A listener may still be in its place, if its socket was closed without stopping it: it has stopped thereby.
    """
    cdef Connection *connection = place(core, fd)
    if connection == NULL:
        return NULL
    if connection.kind == NATIVE_LISTENER or connection.kind == PROTOCOL_LISTENER:
        (<Acceptor *>connection.state).place = NULL
    connection.generation += 1
    connection.events = 0
    connection.fd = fd
    connection.kind = kind
    connection.flags = 0
    connection.error = 0
    connection.moves = 0
    connection.state = NULL
    if kind == NATIVE or kind == PROTOCOL:
        core.open += 1
    return connection


cdef inline void release(Core *core, Connection *connection) noexcept nogil:
    """Out of the epoll set and out of the table. The descriptor is the caller's to close, after this."""
    watch(core, connection, 0)
    drop_backlog(core, connection)
    if connection.kind == NATIVE or connection.kind == PROTOCOL:
        core.open -= 1
        if core.open == 0:
            core.attention = True
    connection.generation += 1
    connection.kind = FREE
    connection.events = 0


cdef inline void doom(Core *core, Connection *connection, int error) noexcept nogil:
    """A native connection is over; it is closed when no callback runs any more.

    One that is on its way between two processes stays here instead, and is over as soon as it is here again.
    """
    if connection.flags & LOST:
        return
    if connection.flags & HELD:
        connection.flags |= CLOSING | STAYS
        drop_backlog(core, connection)
        return
    connection.flags |= LOST
    connection.error = <uint16_t>error
    drop_backlog(core, connection)
    connection.doomed = core.doomed
    core.doomed = connection


cdef inline void reap(Core *core) noexcept nogil:
    """Close the doomed. A `closed` callback may doom others."""
    cdef Connection *connection
    cdef int fd
    while core.doomed != NULL:
        connection = core.doomed
        core.doomed = connection.doomed
        if connection.handler.closed != NULL:
            connection.handler.closed(core, connection, connection.error)
        fd = connection.fd
        release(core, connection)
        close(fd)
