"""A socket object for a descriptor that stays somebody else's."""

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
        super().__init__(family, type, protocol, fileno=descriptor)
        if blocking is not None:
            self.setblocking(blocking)

    def __exit__(self, *exc_info: object) -> None:
        self.detach()
