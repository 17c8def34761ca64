"""One HTTP request on a connection of which is known who has accepted it (RFC 9112), without blocking the loop."""

from __future__ import annotations

import contextlib
import re
import socket
from collections.abc import Callable

from takeover._version import VERSION

from .events import Events, Timer
from .probes import Endpoint

PATIENCE = 5.0
"""Seconds for an answer, until the connection is given up and another one tried."""

LINGER = 0.5
"""Seconds for the rest of an answer whose status is known: closing earlier would be an error in the server's log."""

_LONGEST = 262144
_STATUS = re.compile(rb"HTTP/1\.[01] (\d{3})[ \r]")
_TLS_RECORD = re.compile(rb"[\x14-\x17]\x03[\x00-\x04]")


class Asking:
    """Sends GET, and calls back once with the status and an empty text, or with 0 and what was wrong."""

    def __init__(
        self,
        events: Events,
        sock: socket.socket,
        where: Endpoint,
        path: str,
        on_answer: Callable[[int, str], object],
    ) -> None:
        """sock: connected and non-blocking; it is the object's from now on, which closes it."""
        self._events = events
        self._sock = sock
        self._on_answer = on_answer
        self._answer = b""
        self._timer: Timer = events.call_later(PATIENCE, self._too_late)
        host = "localhost"
        if where.family != socket.AF_UNIX:
            host = f"[{where.address[0]}]" if where.family == socket.AF_INET6 else where.address[0]
            host += f":{where.address[1]}"
        request = (
            f"GET {path} HTTP/1.1\r\nHost: {host}\r\nUser-Agent: takeover/{VERSION}\r\nAccept: */*\r\n"
            "Connection: close\r\n\r\n"
        )
        events.watch(sock.fileno(), self._read)
        with contextlib.suppress(OSError):  # a connection that has been closed already is readable, and tells so
            sock.send(request.encode())  # far smaller than an empty send buffer

    def _read(self) -> None:
        try:
            data = self._sock.recv(65536)
        except OSError as error:
            self._finish(f"no answer: {error.strerror}")
            return
        known = self._status()
        self._answer = (self._answer + data)[:_LONGEST]
        if not data or len(self._answer) == _LONGEST:
            self._finish("it closed the connection without an answer" if not self._answer else "")
        elif not known and self._status():
            self._timer.cancel()
            self._timer = self._events.call_later(LINGER, self._finish)

    def _status(self) -> int:
        """Of the final answer: those from 100 to 199 only announce it."""
        rest = self._answer
        while (found := _STATUS.match(rest)) and found[1].startswith(b"1"):
            rest = rest.partition(b"\r\n\r\n")[2]
        return int(found[1]) if found else 0

    def _finish(self, problem: str = "") -> None:
        status = self._status()
        if status:
            self._done(status, "")
        elif _TLS_RECORD.match(self._answer):
            self._done(0, "it answered with TLS, not with HTTP; --ready 'exec:curl -kf …' can ask it")
        else:
            self._done(0, problem or f"it answered with {self._answer[:40]!r}, which is not HTTP")

    def _too_late(self) -> None:
        self._finish(f"no answer within {PATIENCE:g} s")

    def _done(self, status: int, problem: str) -> None:
        self.close()
        self._on_answer(status, problem)

    def close(self) -> None:
        """Gives it up; harmless a second time."""
        self._timer.cancel()
        self._events.unwatch(self._sock.fileno())
        self._sock.close()
