"""A connection as asyncio knows it: the plain twin of the compiled transport."""

from __future__ import annotations

import contextlib
import logging
import os
import selectors
import socket
from typing import TYPE_CHECKING, Any

from ._sockets import TransportSocket
from ._traveller_py import Traveller
from .borrowed import let_go
from .ledger import note

if TYPE_CHECKING:
    import asyncio

    from ._loop_py import Loop
    from .records import Moved

log = logging.getLogger("takeover")

RECEIVE = 256 << 10
VECTOR = 64


class Transport(Traveller):
    """asyncio.Transport over one accepted socket, which it owns and closes after connection_lost.

    Made by the loop only. Everything in here is called on the loop's thread.
    """

    __slots__ = (
        "_eof_received",
        "_high",
        "_local",
        "_low",
        "_paused",
        "_peer",
        "_watched",
        "moved",
        "origin",
    )

    def __init__(self, loop: Loop, sock: socket.socket, peer: Any, protocol: asyncio.Protocol, origin: int) -> None:
        self.origin = origin  # the inode of the listener that it came from
        self.moved: Moved | None = None
        self.exported = 0  # bytes of the backlog that are in the record of a connection on its way
        self.stays = False
        self._held = False
        self._loop = loop
        self._sock = sock
        self._peer = peer
        self._local: Any = None
        self._protocol: asyncio.Protocol | None = protocol
        self._backlog: list[memoryview] = []
        self._unsent = 0
        self._high, self._low = 65536, 16384
        self._watched = 0
        self._paused = self._full = self._eof_received = self._eof_written = self._closing = self._lost = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Send bytes, bytearray or memoryview; what the kernel does not take at once is copied and sent later."""
        if not isinstance(data, (bytes, bytearray, memoryview)):
            raise TypeError(f"data argument must be a bytes-like object, not {type(data).__name__!r}")
        if self._eof_written:
            raise RuntimeError("Cannot call write() after write_eof()")
        if isinstance(data, memoryview):
            data = data.cast("B") if data.c_contiguous else data.tobytes()
        if not data or self._closing or self._lost:
            return
        sent = 0
        if not self._unsent and not self._held:
            try:
                sent = self._sock.send(data, socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT)
            except BlockingIOError:
                pass
            except OSError as error:
                self._lose(error)
                return
            if sent == len(data):
                return
        if self._held and self._loop.ledger >= 0 and not note(self._loop.ledger, self.fileno(), bytes(data)):
            self._loop.ledger, self.stays = -1, True
        self._backlog.append(memoryview(bytes(memoryview(data)[sent:])))
        self._unsent += len(data) - sent
        self._arm()
        self._fill()

    def writelines(self, list_of_data: Any) -> None:
        """Send the items as if they were one."""
        self.write(b"".join(list_of_data))

    def write_eof(self) -> None:
        """Send FIN behind what is still to be sent; the peer can go on sending."""
        if self.is_closing() or self._eof_written:
            return
        self._eof_written = True
        if self._held:
            self.stays = True
        elif not self._unsent:
            self._shut_down()

    def can_write_eof(self) -> bool:
        """True."""
        return True

    def close(self) -> None:
        """Read no more, send what is still to be sent, then close."""
        if self.is_closing():
            return
        self._closing = True
        if self._held:
            self.stays = True
        elif self._unsent:
            self._arm()
        else:
            self._lose(None)

    def abort(self) -> None:
        """Close without sending what is still to be sent."""
        self._lose(None)

    def is_closing(self) -> bool:
        """Whether close() or abort() was called or the connection is over."""
        return self._closing or self._lost

    def pause_reading(self) -> None:
        """No data_received until resume_reading()."""
        if not self.is_closing():
            self._paused = True
            self._arm()

    def resume_reading(self) -> None:
        """Undo pause_reading()."""
        if not self.is_closing():
            self._paused = False
            self._arm()

    def is_reading(self) -> bool:
        """Whether neither paused nor closing."""
        return not self.is_closing() and not self._paused

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """The "peername" and "sockname" (also after the connection is lost), "socket" (a TransportSocket).

        And "takeover" for a connection that has moved: a Moved, with the generation it came from, and how often.
        """
        if name == "peername":
            return self._peer
        if name == "sockname":
            self._learn_local_name()
            return default if self._local is None else self._local
        if name == "socket":
            return TransportSocket(self._sock.fileno, self._sock.family)
        if name == "takeover" and self.moved is not None:
            return self.moved
        return default

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """Water marks in bytes for pause_writing and resume_writing; 64 KiB and a quarter of `high` by default."""
        if high is None:
            high = 65536 if low is None else 4 * low
        if low is None:
            low = high // 4
        if not high >= low >= 0:
            raise ValueError(f"high ({high!r}) must be >= low ({low!r}) must be >= 0")
        self._high, self._low = high, low
        if not self.is_closing():
            self._fill()

    def get_write_buffer_limits(self) -> tuple[int, int]:
        """(low, high) in bytes."""
        return self._low, self._high

    def get_write_buffer_size(self) -> int:
        """Bytes that are yet to be sent."""
        return self._unsent

    def set_protocol(self, protocol: Any) -> None:
        """Make another protocol the one whose methods are called."""
        self._protocol = protocol

    def get_protocol(self) -> Any:
        """The protocol; None after connection_lost."""
        return self._protocol

    def __repr__(self) -> str:
        fd = self._sock.fileno()
        state = "closed" if fd < 0 else "closing" if self.is_closing() else "open"
        return f"<Transport fd={fd} {state}>"

    def fileno(self) -> int:
        return self._sock.fileno()

    def begin(self) -> None:
        self._arm()
        self._tell("connection_made", self)

    @property
    def at_rest(self) -> bool:
        """Whether it is neither over nor on its way."""
        return not (self._held or self._lost)

    def ready(self, events: int) -> None:
        """Serve what the selector reports."""
        if self._held:
            return
        if self._unsent and events & selectors.EVENT_WRITE:
            self._send_backlog()
        if events & selectors.EVENT_READ and not (self._paused or self._eof_received or self._closing or self._lost):
            self._receive()

    def lose(self, error: BaseException | None = None) -> bool:
        """Abort; False if it was over already."""
        if self._lost:
            return False
        self._lose(error)
        return True

    def _receive(self) -> None:
        try:
            data = self._sock.recv(RECEIVE, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        except OSError as error:
            self._lose(error)
            return
        if data:
            self._tell("data_received", data)
            return
        keep_open = self._tell("eof_received")
        self._eof_received = True
        if keep_open:
            self._arm()
        else:
            self.close()

    def _send_backlog(self) -> None:
        try:
            while self._unsent:
                sent = self._sock.sendmsg(self._backlog[:VECTOR], [], socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT)
                self._unsent -= sent
                done = 0
                while sent and sent >= len(self._backlog[done]):
                    sent -= len(self._backlog[done])
                    done += 1
                del self._backlog[:done]
                if sent:
                    self._backlog[0] = self._backlog[0][sent:]
        except BlockingIOError:
            pass
        except OSError as error:
            self._lose(error)
            return
        if not self._unsent:
            self._arm()
        if self._full and self._unsent <= self._low:
            self._full = False
            self._tell("resume_writing")
        if not self._unsent and not self._lost:
            if self._closing:
                self._lose(None)
            elif self._eof_written:
                self._shut_down()

    def _fill(self) -> None:
        if self._unsent > self._high and not self._full:
            self._full = True
            self._tell("pause_writing")

    def _arm(self) -> None:
        wanted = 0
        if not (self._paused or self._eof_received or self._closing or self._lost or self._held):
            wanted |= selectors.EVENT_READ
        if self._unsent and not self._held:
            wanted |= selectors.EVENT_WRITE
        try:
            self._loop.watch(self._sock, self._watched, wanted, self)
            self._watched = wanted
        except OSError as error:
            self._lose(error)

    def _shut_down(self) -> None:
        with contextlib.suppress(OSError):  # the peer has reset the connection, which the next read tells
            self._sock.shutdown(socket.SHUT_WR)

    def _lose(self, error: BaseException | None) -> None:
        """The connection is over: nothing is read or sent any more, and connection_lost(error) is on its way.

        One that is on its way between two processes stays here instead, and is over as soon as it is here again.
        """
        if self._held:
            self._closing = self.stays = True
            self._backlog.clear()
            self._unsent = 0
        elif not self._lost:
            self._lost = True
            self._backlog.clear()
            self._unsent = 0
            self._arm()
            self._loop.call_soon(self._connection_lost, error)

    def _tell(self, callback: str, *args: Any) -> Any:
        """Call the protocol. If it raises, say so and give the connection up; what is to end the program goes on."""
        try:
            return getattr(self._protocol, callback)(*args)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:
            log.exception("%s of %r raised; its connection is aborted", callback, self._protocol)
            self._lose(error)
            return None

    def _learn_local_name(self) -> None:
        if self._local is None and self._sock.fileno() >= 0:
            with contextlib.suppress(OSError):
                self._local = self._sock.getsockname()

    def _connection_lost(self, error: Exception | None) -> None:
        protocol, self._protocol = self._protocol, None
        try:
            protocol.connection_lost(error)  # type: ignore[union-attr]
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException:
            log.exception("connection_lost of %r raised", protocol)
        finally:
            self._learn_local_name()
            self._loop.forget(self._sock.fileno())
            os.close(let_go(self._sock))
