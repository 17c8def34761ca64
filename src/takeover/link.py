"""One control connection: whole frames in and out, the descriptors that ride on them, and who is at the other end."""

from __future__ import annotations

import contextlib
import errno
import select
import socket
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence

from ._backend import fdpass
from .control import Peer, peer_of
from .errors import LocalError, RemoteProtocolError
from .namespaces import in_words
from .wire import Body, Decoder, Frame, Type, encode

FRAMES_AT_ONCE = 32
"""How many frames one link may have processed before it is another link's turn."""
SHORT_OF_MEMORY = (errno.ENOMEM, errno.ENOBUFS)
"""What the kernel answers while it has no memory for a message, which passes."""


def close_all(descriptors: Sequence[int]) -> None:
    """Closes descriptors that nobody is going to use; negative ones stand for none."""
    fdpass.close_descriptors(descriptors)


def link_at(path: str, sock: socket.socket) -> Link:
    """The link on a connection to a control path; closes the socket and raises LocalError if the peer is unknown."""
    try:
        return Link(sock)
    except OSError as error:
        sock.close()
        raise LocalError(
            f"getsockopt of the connection to {path}: {error.strerror}; nobody knows who is there"
        ) from None


class Link:
    """Owns the socket, the pidfd of the peer and whatever descriptors a frame that never became whole had brought.

    `lost` turns true at end-of-file, at a reset, and when the peer's process is found dead with nothing left to read.
    Descriptors that are sent stay the caller's, who keeps them open until the frame was answered; those that are
    `given` with it are the link's, and closed as soon as they have gone. `peer`: where the kernel is not to be asked.
    `told` is the pid that the peer says it has, which is another one in another pid namespace.
    """

    def __init__(self, sock: socket.socket, peer: Peer | None = None) -> None:
        sock.setblocking(False)
        self.sock = sock
        self.peer = peer or peer_of(sock)
        self.told = 0
        self.lost = False
        self.before_close: Callable[[], None] | None = None
        self._decoder = Decoder()
        self._queue: deque[tuple[bytes, Sequence[int]]] = deque()
        self._given: list[int] = []

    def expect(self, kinds: Collection[Type]) -> None:
        """Takes no other messages than these from now on."""
        self._decoder.expected = kinds

    @property
    def name(self) -> str:
        """The process at the other end, for people."""
        return in_words(self.peer.pid, self.told)

    def fileno(self) -> int:
        return self.sock.fileno()

    @property
    def unsent(self) -> bool:
        """Whether something is queued that the socket had no room for."""
        return bool(self._queue)

    @property
    def between_frames(self) -> bool:
        """Whether no part of a frame has been read without the rest, or queued for sending."""
        return not self._queue and self._decoder.wants() == Decoder().wants()

    def send(
        self,
        kind: Type,
        body: Body | bytes | None = None,
        descriptors: Sequence[int] = (),
        *,
        given: Sequence[int] = (),
    ) -> None:
        """Queues a frame and sends what the socket takes. Raises OSError where the kernel refuses the descriptors.

        On a link that is lost it only closes what was given: that the peer is gone is told by reading, once.
        """
        if self.lost:
            close_all(given)
            return
        self._given += given
        self._queue.append((encode(kind, body, len(descriptors)), descriptors))
        self.flush()

    def flush(self) -> None:
        """Sends what the socket takes of what is queued.

        A peer that is gone is no error here: what it sent before may still be read, and the end of that tells. Nor is a
        kernel that is short of memory for plain bytes: they wait, as where the socket has no room. With descriptors it
        is, since fewer may do.
        """
        try:
            while self._queue:
                data, descriptors = self._queue[0]
                if descriptors:
                    sent = fdpass.send_descriptors(self.sock.fileno(), data, descriptors)
                else:
                    sent = self.sock.send(data, socket.MSG_NOSIGNAL)
                if sent == len(data):
                    self._queue.popleft()
                else:
                    self._queue[0] = (data[sent:], ())
        except (BrokenPipeError, ConnectionResetError):
            self._queue.clear()
            with contextlib.suppress(OSError):
                self.sock.shutdown(socket.SHUT_RDWR)
        except OSError as error:
            if error.errno == errno.EAGAIN or (error.errno in SHORT_OF_MEMORY and not self._queue[0][1]):
                return
            self._queue.clear()
            raise
        finally:
            if not self._queue:
                close_all(self._given)
                self._given.clear()

    def finish(self, seconds: float) -> None:
        """Sends the rest of what is queued, and waits for room for up to so many seconds in all."""
        deadline = time.monotonic() + seconds
        poll = select.poll()
        with contextlib.suppress(OSError):
            while self._queue:
                poll.register(self.sock, select.POLLOUT)
                if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
                    break
                self.flush()

    def withdraw(self) -> None:
        """Forgets the queued frames of which nothing has gone yet, descriptors included: those may be closed now."""
        self._queue = deque((data, descriptors) for data, descriptors in self._queue if not descriptors)

    def first_byte(self) -> bytes | None:
        """The next byte without taking it; b"" at the end, None where nothing has come yet."""
        try:
            return self.sock.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return None
        except OSError:
            return b""

    def receive(self) -> list[Frame]:
        """The frames that are complete; their descriptors are the caller's. Raises RemoteProtocolError."""
        frames: list[Frame] = []
        try:
            while len(frames) < FRAMES_AT_ONCE:
                size, room = self._decoder.wants()
                data, descriptors = fdpass.receive_descriptors(self.sock.fileno(), size, room)
                if not data:
                    self.lost = True
                    break
                frame = self._decoder.feed(data, descriptors)
                if frame is not None:
                    frames.append(frame)
        except ConnectionResetError:
            self.lost = True
        except OSError as error:
            # Where the kernel is short of memory, what has come stays in the queue until it is not.
            if error.errno not in (errno.EAGAIN, *SHORT_OF_MEMORY):
                raise
        except RemoteProtocolError:
            for frame in frames:
                close_all(frame.descriptors)
            raise
        return frames

    def close(self) -> None:
        """Closes everything that the link owns."""
        self.lost = True
        if self.before_close is not None:
            self.before_close()
            self.before_close = None
        self._queue.clear()
        close_all([*self._decoder.descriptors, *self._given])
        self._given.clear()
        self._decoder = Decoder()
        self.sock.close()
        if self.peer.pidfd is not None:
            close_all([self.peer.pidfd])
            self.peer = self.peer._replace(pidfd=None)
