"""A listening socket in the plain loop: accepts in batches, and pauses when that fails."""

from __future__ import annotations

import errno
import logging
import os
import selectors
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING

from ._sockets import PASSING_ERRORS, UNUSABLE, Backoff, name_of
from ._transport_py import Transport

if TYPE_CHECKING:
    import asyncio

    from ._loop_py import Loop

log = logging.getLogger("takeover")

BATCH = 128  # connections that are accepted before others get their turn
EVENT_READ = selectors.EVENT_READ


class Listener:
    """A listening socket in a loop. The socket stays its caller's; the listener closes and shuts down nothing."""

    def __init__(self, loop: Loop, sock: socket.socket, factory: Callable[[], asyncio.Protocol], native: bool) -> None:
        self.socket = sock
        self.accepted = 0
        self.factory = factory
        self.native = native  # whether it is a built-in handler's
        self.inode = os.fstat(sock.fileno()).st_ino
        self._loop = loop
        self._place = -1  # the descriptor, -1 when stopped
        self._watched = 0
        self._pausing = False
        self._backoff = Backoff(loop.schedule, sock, self._resume)

    @property
    def accepting(self) -> bool:
        """Whether it is in the poll set, or will be again after a pause."""
        return self._place >= 0

    def start(self) -> None:
        """Put the listener into the poll set; what waits in its queue is accepted first."""
        if self._place >= 0:
            return
        self._loop.check_open()
        fd = self.socket.fileno()
        if fd < 0:
            raise OSError(errno.EBADF, f"cannot accept on {self.socket!r}: it was closed")
        self._loop.take_place(fd)
        self._loop.watch(fd, 0, EVENT_READ, self)
        self._place, self._watched = fd, EVENT_READ
        self._loop.listeners[fd] = self

    def stop(self) -> None:
        """Take the listener out of the poll set; new connections wait in the kernel's queue."""
        if self._place >= 0:
            self._watch(0)
            del self._loop.listeners[self._place]
            self._place = -1
        self._backoff.cancel()
        self._pausing = False

    def ready(self, _events: int) -> None:
        """Accept a batch."""
        if self._place < 0:
            return
        os.set_blocking(self._place, False)  # O_NONBLOCK belongs to the open file, which other processes may hold
        for _ in range(BATCH):
            try:
                sock, peer = self.socket.accept()
            except BlockingIOError:
                break
            except OSError as error:
                if error.errno in PASSING_ERRORS:
                    continue
                self._troubled(error)
                break
            sock.setblocking(False)
            try:
                protocol = self.factory()
            except (KeyboardInterrupt, SystemExit):
                sock.close()
                raise
            except BaseException:
                log.exception("protocol factory %r raised; the connection that it was for is closed", self.factory)
                sock.close()
                continue
            self.accepted += 1
            self._pausing = False
            transport = Transport(self._loop, sock, peer, protocol, self.inode)
            self._loop.admit(transport)
            transport.begin()
            if self._place < 0:
                break
        if self._backoff.began and not self._pausing:
            self._backoff.over()

    def _troubled(self, error: OSError) -> None:
        if error.errno in UNUSABLE:
            log.error("accept on %s: %s; nothing more is accepted there", name_of(self.socket), error.strerror)
            self.stop()
        else:
            self._pausing = True
            self._watch(0)
            self._backoff.refused(error.errno or 0)

    def _resume(self) -> None:
        try:
            self._watch(EVENT_READ)
        except OSError as error:
            self._backoff.refused(error.errno or 0)

    def _watch(self, wanted: int) -> None:
        self._loop.watch(self._place, self._watched, wanted, self)
        self._watched = wanted
