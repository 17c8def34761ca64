# cython: language_level=3, boundscheck=False, wraparound=False, binding=False
"""A connection as asyncio knows it: the transport that serves an asyncio.Protocol on the native loop."""

cimport cython
from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.object cimport PyObject
from cpython.ref cimport Py_DECREF, Py_INCREF
from libc.errno cimport EAGAIN, EINTR, errno
from libc.stdint cimport uint8_t, uint32_t
from libc.string cimport memcpy
from posix.unistd cimport close

from takeover._addresses cimport ADDRESS, inet_address, unix_address
from takeover._connections cimport (
    CLOSING, EOF_QUEUED, EOF_RECEIVED, EPOLLERR, EPOLLHUP, EPOLLOUT, FULL, HELD, LOST, NATIVE,
    PAUSED, RECEIVE, SHUT_WR, STAYS, arm, drop_backlog, flush, recv, release, shutdown,
    sockaddr_storage, write,
)
from takeover._ledger cimport note
from takeover._messages cimport MSG_DONTWAIT
from takeover._native cimport forget_native, resume_native

import os

from takeover._schedule import log
from takeover._sockets import TransportSocket

cdef extern from "<sys/socket.h>" nogil:
    enum: AF_UNIX
    int getsockname(int fd, sockaddr *name, socklen_t *size)

cdef extern from "Python.h":
    PyObject *new_bytes "PyBytes_FromStringAndSize"(const char *data, Py_ssize_t size) except NULL
    int resize_bytes "_PyBytes_Resize"(PyObject **data, Py_ssize_t size) except -1
    char *bytes_start "PyBytes_AS_STRING"(PyObject *data)

cdef enum:
    COPIED = 2048  # up to this many bytes, receiving into the loop's buffer and copying is the cheaper way


cdef Transport make_transport(Core *core, Connection *connection, object schedule, object protocol,
                              const sockaddr *peer, socklen_t size):
    """Connect a protocol to a connection, which from here on owns the transport, which owns the descriptor."""
    cdef Transport transport = Transport.__new__(Transport)
    transport.core = core
    transport.connection = connection
    transport.schedule = schedule
    transport.protocol = protocol
    transport.high = 65536
    transport.low = 16384
    transport.family = peer.sa_family
    if transport.family == AF_UNIX:
        transport.peer_path = unix_address(<const char *>peer, size)
    else:
        memcpy(transport.peer, peer, ADDRESS)
    connection.state = <void *>transport
    Py_INCREF(transport)
    return transport


@cython.final
cdef class Transport:
    """asyncio.Transport over one accepted socket, which it owns and closes after connection_lost.

    Made by the loop only. Everything in here is called on the loop's thread.
    """

    def __init__(self):
        raise TypeError("transports are made by the loop")

    def write(self, data):
        """Send bytes, bytearray or memoryview; what the kernel does not take at once is copied and sent later."""
        cdef Py_buffer view
        if type(data) is bytes:
            self.send(PyBytes_AS_STRING(data), <size_t>PyBytes_GET_SIZE(data))
            return
        if not isinstance(data, (bytes, bytearray, memoryview)):
            raise TypeError(f"data argument must be a bytes-like object, not {type(data).__name__!r}")
        if isinstance(data, memoryview) and not data.c_contiguous:
            data = data.tobytes()
        PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
        try:
            self.send(<const char *>view.buf, <size_t>view.len)
        finally:
            PyBuffer_Release(&view)

    def writelines(self, list_of_data):
        """Send the items as if they were one."""
        self.write(b"".join(list_of_data))

    def write_eof(self):
        """Send FIN behind what is still to be sent; the peer can go on sending."""
        if self.closing() or self.eof_written:
            return
        self.eof_written = True
        self.connection.flags |= EOF_QUEUED
        if self.connection.flags & HELD:
            self.connection.flags |= STAYS
        elif self.connection.unsent == 0:
            shutdown(self.connection.fd, SHUT_WR)

    def can_write_eof(self):
        """True."""
        return True

    def close(self):
        """Read no more, send what is still to be sent, then close."""
        if self.closing():
            return
        self.connection.flags |= CLOSING
        if self.connection.flags & HELD:
            self.connection.flags |= STAYS
        elif self.connection.unsent:
            arm(self.core, self.connection)
        else:
            self.lose(None)

    def abort(self):
        """Close without sending what is still to be sent."""
        if self.connection != NULL:
            self.lose(None)

    def is_closing(self):
        """Whether close() or abort() was called or the connection is over."""
        return self.closing()

    def pause_reading(self):
        """No data_received until resume_reading()."""
        if not self.closing():
            self.connection.flags |= PAUSED
            arm(self.core, self.connection)

    def resume_reading(self):
        """Undo pause_reading()."""
        cdef int error
        if not self.closing():
            self.connection.flags &= <uint8_t>~PAUSED
            error = arm(self.core, self.connection)
            if error:
                self.lose(OSError(error, os.strerror(error)))

    def is_reading(self):
        """Whether neither paused nor closing."""
        return not self.closing() and not self.connection.flags & PAUSED

    def get_extra_info(self, name, default=None):
        """The "peername" and "sockname" (also after the connection is lost), "socket" (a TransportSocket).

        And "takeover" for a connection that has moved: a Moved, with the generation it came from, and how often.
        """
        if name == "peername":
            return self.peer_path if self.family == AF_UNIX else inet_address(self.peer, self.family)
        if name == "sockname":
            self.learn_local_name()
            if not self.local_known:
                return default
            return self.local_path if self.family == AF_UNIX else inet_address(self.local, self.family)
        if name == "socket":
            return TransportSocket(self._fileno, self.family)
        if name == "takeover" and self.moved is not None:
            return self.moved
        return default

    def set_write_buffer_limits(self, high=None, low=None):
        """Water marks in bytes for pause_writing and resume_writing; 64 KiB and a quarter of `high` by default."""
        if high is None:
            high = 65536 if low is None else 4 * low
        if low is None:
            low = high // 4
        if not high >= low >= 0:
            raise ValueError(f"high ({high!r}) must be >= low ({low!r}) must be >= 0")
        self.high, self.low = high, low
        if not self.closing():
            self.fill()

    def get_write_buffer_limits(self):
        """(low, high) in bytes."""
        return self.low, self.high

    def get_write_buffer_size(self):
        """Bytes that are yet to be sent."""
        return self.connection.unsent if self.connection != NULL else 0

    def set_protocol(self, protocol):
        """Make another protocol the one whose methods are called."""
        self.protocol = protocol

    def get_protocol(self):
        """The protocol; None after connection_lost."""
        return self.protocol

    def __repr__(self):
        state = "closed" if self.connection == NULL else "closing" if self.closing() else "open"
        return f"<Transport fd={self._fileno()} {state}>"

    def _fileno(self):
        return self.connection.fd if self.connection != NULL else -1

    def _connection_lost(self, error):
        protocol, self.protocol = self.protocol, None
        try:
            protocol.connection_lost(error)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException:
            log.exception("connection_lost of %r raised", protocol)
        finally:
            self.let_go()

    cdef bint closing(self) noexcept:
        return self.connection == NULL or self.connection.flags & (CLOSING | LOST) != 0

    cdef int ready(self, uint32_t events) except -1:
        """Serve what epoll reports. The connection outlives this: it goes when connection_lost was called."""
        cdef Connection *connection = self.connection
        if connection.unsent and events & <uint32_t>(EPOLLOUT | EPOLLERR | EPOLLHUP):
            self.send_backlog()
        if events != EPOLLOUT and not connection.flags & (PAUSED | EOF_RECEIVED | CLOSING | LOST):
            self.receive()
        return 0

    cdef int receive(self) except -1:
        """One read. Large ones go straight into a bytes object, of a size that follows what the last ones brought."""
        cdef PyObject *room
        cdef object data = None
        cdef Py_ssize_t size
        cdef int error
        if self.expected <= COPIED:
            size = recv(self.connection.fd, self.core.buffer, RECEIVE, MSG_DONTWAIT)
            error = errno
            if size > 0:
                data = PyBytes_FromStringAndSize(self.core.buffer, size)
                if size > COPIED:
                    self.expected = <uint32_t>size
        else:
            room = new_bytes(NULL, self.expected)
            size = recv(self.connection.fd, bytes_start(room), self.expected, MSG_DONTWAIT)
            error = errno
            if size < <Py_ssize_t>self.expected:
                resize_bytes(&room, max(size, 0))
                if 4 * size < <Py_ssize_t>self.expected:
                    self.expected //= 2
            elif self.expected < RECEIVE:
                self.expected = min(2 * self.expected, <uint32_t>RECEIVE)
            data = <object>room
            Py_DECREF(data)
        if size == 0:
            return self.end_of_file()
        if size < 0:
            return 0 if error == EAGAIN or error == EINTR else self.lose(OSError(error, os.strerror(error)))
        try:
            self.protocol.data_received(data)
        except BaseException as error_raised:
            self.failed("data_received", error_raised)
        return 0

    cdef int end_of_file(self) except -1:
        cdef bint keep_open = False
        try:
            keep_open = bool(self.protocol.eof_received())
        except BaseException as error:
            self.failed("eof_received", error)
        self.connection.flags |= EOF_RECEIVED
        if keep_open:
            arm(self.core, self.connection)
        else:
            self.close()
        return 0

    cdef int send(self, const char *data, size_t size) except -1:
        cdef int error
        if self.eof_written:
            raise RuntimeError("Cannot call write() after write_eof()")
        if size == 0 or self.closing():
            return 0
        if self.connection.flags & HELD and not note(self.core, self.connection, data, size):
            self.connection.flags |= STAYS
        error = write(self.core, self.connection, data, size)
        if error:
            return self.lose(OSError(error, os.strerror(error)))
        return self.fill() if self.connection.unsent > self.high else 0

    cdef int send_backlog(self) except -1:
        cdef Connection *connection = self.connection
        cdef int error = flush(self.core, connection)
        if error:
            return self.lose(OSError(error, os.strerror(error)))
        if connection.unsent == 0:
            arm(self.core, connection)
        if connection.flags & FULL and connection.unsent <= self.low:
            connection.flags &= <uint8_t>~FULL
            try:
                self.protocol.resume_writing()
            except BaseException as error_raised:
                self.failed("resume_writing", error_raised)
        if connection.unsent == 0 and not connection.flags & LOST:
            if connection.flags & CLOSING:
                return self.lose(None)
            if connection.flags & EOF_QUEUED:
                shutdown(connection.fd, SHUT_WR)
        return 0

    cdef int fill(self) except -1:
        if self.connection.unsent > self.high and not self.connection.flags & FULL:
            self.connection.flags |= FULL
            try:
                self.protocol.pause_writing()
            except BaseException as error:
                self.failed("pause_writing", error)
        return 0

    cdef int lose(self, object error) except -1:
        """The connection is over: nothing is read or sent any more, and connection_lost(error) is on its way.

        One that is on its way between two processes stays here instead, and is over as soon as it is here again.
        """
        if self.connection.flags & HELD:
            self.connection.flags |= CLOSING | STAYS
            drop_backlog(self.core, self.connection)
        elif not self.connection.flags & LOST:
            self.connection.flags |= LOST
            drop_backlog(self.core, self.connection)
            arm(self.core, self.connection)
            self.schedule.call_soon(self._connection_lost, error)
        return 0

    cdef int begin(self) except -1:
        """The protocol's first callback."""
        try:
            self.protocol.connection_made(self)
        except BaseException as error:
            self.failed("connection_made", error)
        return 0

    cdef int resume(self) except -1:
        """Read and write again, after the connection was held."""
        cdef Connection *connection = self.connection
        cdef int error
        connection.flags &= <uint8_t>~HELD
        if connection.unsent == 0:
            if connection.flags & CLOSING:
                return self.lose(None)
            if connection.flags & EOF_QUEUED:
                shutdown(connection.fd, SHUT_WR)
        error = arm(self.core, connection)
        return self.lose(OSError(error, os.strerror(error))) if error else 0

    cdef int failed(self, str callback, object error) except -1:
        """A callback raised: say so and give the connection up; but what is to end the program goes on its way."""
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise error
        self.lose(error)
        log.error("%s of %r raised; its connection is aborted", callback, self.protocol, exc_info=error)
        return 0

    cdef int learn_local_name(self) except -1:
        cdef sockaddr_storage name
        cdef socklen_t size = sizeof(name)
        if self.local_known or self.connection == NULL:
            return 0
        if getsockname(self.connection.fd, <sockaddr *>&name, &size) == 0:
            self.local_known = True
            if self.family == AF_UNIX:
                self.local_path = unix_address(<const char *>&name, size)
            else:
                memcpy(self.local, &name, ADDRESS)
        return 0

    cdef int let_go(self) except -1:
        cdef int fd = self.connection.fd
        self.learn_local_name()
        release(self.core, self.connection)
        self.connection = NULL
        close(fd)
        Py_DECREF(self)
        return 0


cdef int forget_connection(Core *core, Connection *connection) except -1:
    """Out of the table, without a word to the handler; the descriptor is the caller's to close."""
    cdef Transport transport
    if connection.kind == NATIVE:
        forget_native(core, connection)
        return 0
    transport = <Transport>connection.state
    transport.connection = NULL
    transport.protocol = None
    release(core, connection)
    Py_DECREF(transport)
    return 0


cdef int resume_connection(Core *core, Connection *connection) except -1:
    """Read and write again, after the connection was held."""
    if connection.kind == NATIVE:
        resume_native(core, connection)
    else:
        (<Transport>connection.state).resume()
    return 0
