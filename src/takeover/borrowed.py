"""Socket objects for descriptors that stay somebody else's, or change hands, also where memory runs out."""

from __future__ import annotations

import errno
import os
import socket


class BorrowedSocket(socket.socket):
    """Used in a with statement, at whose end the descriptor is as it was: open, its flags unchanged.

    Without family, type and protocol they are read from the kernel. socket.setdefaulttimeout() makes every new socket
    object non-blocking, its descriptor included; that is undone here. Raises OSError where it is not a socket.
    """

    __slots__ = ()

    def __init__(self, descriptor: int, family: int = -1, type: int = -1, protocol: int = -1) -> None:
        if descriptor < 0:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        blocking = None if socket.getdefaulttimeout() is None else os.get_blocking(descriptor)
        try:
            super().__init__(family, type, protocol, fileno=descriptor)
            if blocking is not None:
                self.setblocking(blocking)
        except BaseException:
            let_go(self)
            raise

    def __exit__(self, *exc_info: object) -> None:
        let_go(self)


def let_go(sock: socket.socket) -> int:
    """The descriptor of a socket object, which is the caller's from now on.

    What socket.detach() does too, but that needs memory, and where there is none the descriptor ends with the object.
    """
    return socket.SocketType.detach(sock)


def own(descriptor: int, family: int = -1, kind: int = -1) -> socket.socket:
    """A socket object that owns the descriptor now. Whatever it raises, the descriptor is the caller's still."""
    sock = socket.socket.__new__(socket.socket)
    try:
        socket.socket.__init__(sock, family, kind, fileno=descriptor)
    except BaseException:
        let_go(sock)
        raise
    return sock
