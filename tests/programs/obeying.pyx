# cython: language_level=3
"""Somebody else's compiled handler: does to connections what their clients say, a letter for each thing.

    s  is the subject from now on: what capital letters are done to, and what alone moves
    w  writes a letter    b  writes a lot    e  ends our half    c  closes    a  aborts
    p  pauses reading     r  resumes it   x  puts /dev/null in the place of its descriptor
"""

from libc.string cimport memset
from posix.fcntl cimport O_RDONLY, open
from posix.unistd cimport close, dup2

from takeover._loop cimport (
    Connection, Core, Handler, connection_abort, connection_close, connection_pause_reading, connection_resume_reading,
    connection_write, connection_write_eof,
)

cdef enum:
    BULK = 8 << 20

cdef enum Call:
    OBEYED, ENDED, FILLED, DRAINED, CLOSED, IMPORTED, MOVED, CALLS

cdef char[BULK] bulk
cdef size_t[CALLS] counts
cdef int last_error = 0
cdef Connection *subject = NULL
cdef bint keeps_open = False
cdef bint reads_state = True
cdef ssize_t state_size = 0


def prepare(size=0, keep_open=False, reads=True):
    """What is answered from now on: the size of each state, or why there is none; all counts begin anew."""
    global state_size, keeps_open, reads_state, subject
    state_size, keeps_open, reads_state, subject = size, keep_open, reads, NULL
    memset(counts, 0, sizeof(counts))


def calls():
    names = ("obeyed", "ended", "filled", "drained", "closed", "imported", "moved")
    return {name: counts[index] for index, name in enumerate(names) if counts[index]}


def error():
    """With which the last connection was closed."""
    return last_error


cdef void received(Core *core, Connection *connection, const char *data, size_t size) noexcept nogil:
    global subject
    cdef Connection *whom
    cdef size_t index
    cdef char letter
    cdef int null
    for index in range(size):
        counts[<int>OBEYED] += 1
        whom = connection if data[index] & 32 else subject
        letter = data[index] | 32
        if letter == b's':
            subject = connection
        elif letter == b'w':
            connection_write(core, whom, b"w", 1)
        elif letter == b'b':
            connection_write(core, whom, bulk, BULK)
        elif letter == b'e':
            connection_write_eof(core, whom)
        elif letter == b'c':
            connection_close(core, whom)
        elif letter == b'a':
            connection_abort(core, whom)
        elif letter == b'p':
            connection_pause_reading(core, whom)
        elif letter == b'r':
            connection_resume_reading(core, whom)
        elif letter == b'x':
            null = open("/dev/null", O_RDONLY)
            dup2(null, whom.fd)
            close(null)


cdef bint ended(Core *core, Connection *connection) noexcept nogil:
    counts[<int>ENDED] += 1
    return keeps_open


cdef void filled(Core *core, Connection *connection) noexcept nogil:
    counts[<int>FILLED] += 1


cdef void drained(Core *core, Connection *connection) noexcept nogil:
    counts[<int>DRAINED] += 1


cdef void closed(Core *core, Connection *connection, int error) noexcept nogil:
    global last_error
    counts[<int>CLOSED] += 1
    last_error = error


cdef ssize_t exported(Core *core, Connection *connection, char *room, size_t size) noexcept nogil:
    cdef ssize_t index
    if connection != subject:
        return -1
    if state_size <= <ssize_t>size:
        for index in range(state_size):
            room[index] = <char>(index % 251)
    return state_size


cdef bint imported(Core *core, Connection *connection, const char *state, size_t size) noexcept nogil:
    global subject
    cdef size_t index
    for index in range(size):
        if state[index] != <char>(index % 251):
            return False
    if reads_state and <ssize_t>size == state_size:
        counts[<int>IMPORTED] += 1
        subject = connection
        return True
    return False


cdef void moved(Core *core, Connection *connection) noexcept nogil:
    counts[<int>MOVED] += 1


cdef Handler make():
    cdef Handler handler = Handler()
    handler.callbacks.received = received
    handler.callbacks.ended = ended
    handler.callbacks.filled = filled
    handler.callbacks.drained = drained
    handler.callbacks.closed = closed
    handler.callbacks.exported = exported
    handler.callbacks.imported = imported
    handler.callbacks.moved = moved
    return handler


OBEYING = make()
