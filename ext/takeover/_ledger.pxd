# cython: language_level=3
"""Notes what is written to connections on their way; what ledger.py does in plain Python, and explains."""

from libc.errno cimport EPERM, errno
from libc.stdint cimport uint64_t

from takeover._connections cimport Connection, Core
from takeover._messages cimport iovec
from takeover._records cimport put_32, put_64

cdef extern from "<sys/stat.h>" nogil:
    struct status "stat":
        uint64_t st_ino
    int fstat(int fd, status *found)

cdef extern from "<sys/uio.h>" nogil:
    ssize_t writev(int fd, const iovec *vector, int count)


cdef inline bint note(Core *core, Connection *connection, const char *data, size_t size) noexcept nogil:
    """Appends an entry, without bytes one that takes the others back. False where that fails; then there is no more."""
    cdef status found
    cdef char head[12]
    cdef iovec vector[2]
    cdef ssize_t done
    if core.ledger < 0:
        return True
    if size > <size_t>0xffffffff or fstat(connection.fd, &found) < 0:
        return False
    put_32(put_64(head, found.st_ino), <unsigned int>size)
    vector[0].iov_base = head
    vector[0].iov_len = sizeof(head)
    vector[1].iov_base = <void *>data
    vector[1].iov_len = size
    done = writev(core.ledger, vector, 2)
    if done == <ssize_t>(sizeof(head) + size) or (done < 0 and errno == EPERM):
        return True
    core.ledger = -1
    return False
