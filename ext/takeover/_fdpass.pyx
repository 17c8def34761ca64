# cython: language_level=3
"""Send and receive descriptors over an AF_UNIX stream socket, one system call a batch, without the GIL."""

from cpython cimport array
from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from cpython.exc cimport PyErr_CheckSignals
from cpython.number cimport PyNumber_Index
from libc.errno cimport EINTR, EMSGSIZE, errno
from libc.stdint cimport uint64_t
from libc.string cimport memcpy, memset
from posix.unistd cimport close

from takeover._messages cimport (
    CMSG_DATA,
    CMSG_FIRSTHDR,
    CMSG_LEN,
    CMSG_NXTHDR,
    MSG_CMSG_CLOEXEC,
    MSG_CTRUNC,
    MSG_NOSIGNAL,
    SCM_RIGHTS,
    SOL_SOCKET,
    cmsghdr,
    iovec,
    msghdr,
    recvmsg,
    sendmsg,
)

from array import array as new_array
from os import strerror

from takeover.errors import DescriptorsLost


MAX_DESCRIPTORS = <int>MOST
cdef array.array TEMPLATE = new_array("i")


cdef ssize_t send_batch(int sock, const void *data, size_t size, const int *descriptors, int count) noexcept nogil:
    cdef uint64_t[CONTROL_WORDS] control
    cdef iovec part = iovec(<void *>data, size)
    cdef msghdr message
    cdef cmsghdr *block
    cdef ssize_t sent
    memset(&message, 0, sizeof(message))
    message.msg_iov = &part
    message.msg_iovlen = 1
    if count:
        message.msg_control = control
        message.msg_controllen = CMSG_LEN(count * sizeof(int))
        block = CMSG_FIRSTHDR(&message)
        block.cmsg_level = SOL_SOCKET
        block.cmsg_type = SCM_RIGHTS
        block.cmsg_len = message.msg_controllen
        memcpy(CMSG_DATA(block), descriptors, count * sizeof(int))
    sent = sendmsg(sock, &message, MSG_NOSIGNAL)
    return sent if sent >= 0 else -errno


cdef ssize_t receive_batch(int sock, void *data, size_t size, int *descriptors, int room, int *count) noexcept nogil:
    # CMSG_LEN and not CMSG_SPACE: the padding that the latter adds is room enough for one descriptor too many.
    cdef uint64_t[CONTROL_WORDS] control
    cdef iovec part = iovec(data, size)
    cdef msghdr message
    cdef cmsghdr *block
    cdef ssize_t received
    cdef int came
    count[0] = 0
    memset(&message, 0, sizeof(message))
    message.msg_iov = &part
    message.msg_iovlen = 1
    if room:
        message.msg_control = control
        message.msg_controllen = CMSG_LEN(room * sizeof(int))
    received = recvmsg(sock, &message, MSG_CMSG_CLOEXEC)
    if received < 0:
        return -errno
    block = CMSG_FIRSTHDR(&message)
    while block is not NULL:
        if block.cmsg_level == SOL_SOCKET and block.cmsg_type == SCM_RIGHTS:
            came = <int>((block.cmsg_len - CMSG_LEN(0)) // sizeof(int))
            memcpy(descriptors + count[0], CMSG_DATA(block), came * sizeof(int))
            count[0] += came
        block = CMSG_NXTHDR(&message, block)
    if message.msg_flags & MSG_CTRUNC:
        close_all(descriptors, count[0])
        count[0] = 0
        return -EMSGSIZE
    return received


cdef void close_all(const int *descriptors, int count) noexcept nogil:
    cdef int i
    for i in range(count):
        close(descriptors[i])


cdef array.array descriptor_array(const int *descriptors, int count):
    cdef array.array found = array.clone(TEMPLATE, count, False)
    if count:  # memcpy(3) takes no null pointer, not even for nothing
        memcpy(found.data.as_ints, descriptors, count * sizeof(int))
    return found


cdef int as_batch(object descriptors, int *batch) except -1:
    """Copies at most MOST descriptors; how many. Without an object for each where they come in an array."""
    cdef array.array found
    cdef int count = 0
    if not isinstance(descriptors, new_array):
        descriptors = tuple(descriptors)
    if len(descriptors) > MOST:
        raise ValueError(f"{len(descriptors)} descriptors in one sendmsg, at most {MOST}; send them in batches")
    if isinstance(descriptors, new_array) and descriptors.typecode == "i":
        found = descriptors
        count = <int>len(found)
        if count:
            memcpy(batch, found.data.as_ints, count * sizeof(int))
        return count
    for descriptor in descriptors:
        batch[count] = PyNumber_Index(descriptor)
        count += 1
    return count


def send_descriptors(int sock, data, descriptors):
    """Sends bytes with descriptors on the first of them, in one sendmsg(2); returns how many bytes went out.

    sock         an AF_UNIX stream socket
    data         at least one byte, bytes-like
    descriptors  at most MAX_DESCRIPTORS; they stay the caller's

    Any count from 1 on took all descriptors along: what is left of the data is sent without them. Raises ValueError for
    too many descriptors or no data, BlockingIOError where a non-blocking socket has no room, and other OSErrors
    (ETOOMANYREFS where this user has more descriptors in flight than its RLIMIT_NOFILE, unix(7)).
    """
    cdef int[MOST] batch
    cdef int count
    cdef Py_buffer view
    cdef ssize_t sent
    count = as_batch(descriptors, batch)
    PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
    try:
        if not view.len:
            raise ValueError("descriptors ride on the first byte of the data; send at least one byte")
        while True:
            with nogil:
                sent = send_batch(sock, view.buf, view.len, batch, count)
            if sent != -EINTR:
                break
            PyErr_CheckSignals()
    finally:
        PyBuffer_Release(&view)
    if sent < 0:
        raise OSError(-sent, strerror(-sent))
    return sent


def receive_descriptors(int sock, Py_ssize_t size, int max_descriptors):
    """Receives bytes and an array of the descriptors that ride on them, in one recvmsg(2): `(data, descriptors)`.

    sock             an AF_UNIX stream socket
    size             the most bytes to take, at least 1
    max_descriptors  how many descriptors there is room for, 0 to MAX_DESCRIPTORS

    The descriptors are the caller's, close-on-exec from the first instant. b"" is the end of file. Raises
    DescriptorsLost where more were sent than there is room for, here or under RLIMIT_NOFILE, after closing those that
    had arrived; BlockingIOError where nothing has come yet; ValueError for a size or a room out of range; and other
    OSErrors.
    """
    cdef int[MOST] batch
    cdef int count = 0
    cdef ssize_t received
    cdef bytes data
    cdef char *buffer
    if size < 1 or not 0 <= max_descriptors <= MOST:
        raise ValueError(
            f"recvmsg of {size} bytes and {max_descriptors} descriptors; from 1 byte, from 0 to {MOST} descriptors"
        )
    data = PyBytes_FromStringAndSize(NULL, size)
    buffer = PyBytes_AS_STRING(data)
    while True:
        with nogil:
            received = receive_batch(sock, buffer, size, batch, max_descriptors, &count)
        if received != -EINTR:
            break
        PyErr_CheckSignals()
    if received == -EMSGSIZE:
        raise DescriptorsLost(
            f"recvmsg: more descriptors came than the {max_descriptors} expected or than RLIMIT_NOFILE leaves room for "
            "(MSG_CTRUNC), all were closed; raise ulimit -n if the peer is to be trusted"
        )
    if received < 0:
        raise OSError(-received, strerror(-received))
    try:
        if received < size:
            data = PyBytes_FromStringAndSize(buffer, received)
        return data, descriptor_array(batch, count)
    except BaseException:
        close_all(batch, count)
        raise


def close_descriptors(descriptors):
    """Closes descriptors that nobody is going to use, without the GIL.

    Negative numbers stand for none. What close(2) says is of no interest: on Linux the number is free whatever it says.
    """
    cdef int[MOST] batch
    cdef int count
    cdef Py_ssize_t start
    if not isinstance(descriptors, new_array):
        descriptors = tuple(descriptors)
    for start in range(0, len(descriptors), MOST):
        count = as_batch(descriptors[start:start + MOST], batch)
        with nogil:
            close_all(batch, count)
