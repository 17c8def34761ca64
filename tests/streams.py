"""An independent client of echo servers: many connections, each with a pseudo-random stream that it verifies.

Bare sockets and one selector in a thread; nothing here comes from the package under test.
"""

from __future__ import annotations

import math
import random
import selectors
import socket
import threading
import time
import zlib
from collections import deque
from typing import Any

from clients import LIMIT, eventually

READ = 1 << 18
LARGEST_BURST = 1 << 20
ENOUGH = 1 << 20
"""Bytes on their way at which a stream stops to send, if it reads."""


class Stream:
    """One connection; its own pseudo-random source says what it sends, what is due back is kept until it has come.

    `failure` says what went wrong first: "lost" bytes, "reordered" ones, a "reset", or an "ended" connection.
    """

    read_size = READ
    pause = 0.0

    def __init__(self, address: Any, seed: int, largest: int = LARGEST_BURST) -> None:
        self.source = random.Random(seed)
        self.sock = socket.socket(socket.AF_UNIX if isinstance(address, str) else socket.AF_INET)
        self.sock.settimeout(LIMIT)
        self.prepare()
        self.sock.connect(address)
        self.name = self.sock.getsockname()
        self.sock.setblocking(False)
        self.back = self.checksum = 0
        self.failure = ""
        self.detail = ""
        self.trailer = b""
        self.over = False
        self.finishing = False
        self.asleep_until = 0.0
        self._largest = largest
        self._due: deque[bytes] = deque()
        self._due_size = 0
        self._burst = memoryview(b"")
        self._half_closed = False

    def prepare(self) -> None:
        """What is to be set before the connection is made."""

    def next_burst(self) -> bytes:
        """From one byte to the largest, all magnitudes as often as each other; b"" if it is not time to send."""
        if self._due_size > ENOUGH:
            return b""
        return self.source.randbytes(int(math.exp(self.source.uniform(0, math.log(self._largest + 1)))))

    @property
    def wanted(self) -> int:
        """What the selector is to report."""
        if self.over:
            return 0
        sends = self._burst or not (self._half_closed or (self._due_size > ENOUGH and not self.finishing))
        reads = time.monotonic() >= self.asleep_until or self.finishing
        return (selectors.EVENT_WRITE if sends else 0) | (selectors.EVENT_READ if reads else 0)

    def serve(self, events: int) -> None:
        try:
            if events & selectors.EVENT_READ:
                self._receive()
            if events & selectors.EVENT_WRITE and not self.over:
                self._send()
        except BlockingIOError:
            pass
        except (ConnectionResetError, BrokenPipeError) as error:
            self._fail("reset", str(error))

    def _send(self) -> None:
        if not self._burst:
            if self.finishing:
                if not self._half_closed:
                    self._half_closed = True
                    self.sock.shutdown(socket.SHUT_WR)
                return
            self._burst = memoryview(self.next_burst())
            if not self._burst:
                return
        sent = self.sock.send(self._burst)
        self._due.append(bytes(self._burst[:sent]))
        self._due_size += sent
        self._burst = self._burst[sent:]

    def _receive(self) -> None:
        data = self.sock.recv(self.read_size)
        if self.pause:
            self.asleep_until = time.monotonic() + self.pause
        if not data:
            if not self._half_closed:
                self._fail("ended", f"by the peer, with {self._due_size} bytes due")
            elif self._due_size:
                self._fail("lost", f"{self._due_size} bytes at the end")
            else:
                self.over = True
            return
        self._compare(memoryview(data))

    def _compare(self, data: memoryview) -> None:
        while data:
            if not self._due:
                if not self._half_closed:
                    self._fail("reordered", f"{len(data)} bytes came that are not due")
                self.trailer += bytes(data)
                return
            expected = self._due[0]
            part = min(len(data), len(expected))
            if data[:part] != expected[:part]:
                self._explain(bytes(data))
                return
            data = data[part:]
            if part == len(expected):
                self._due.popleft()
            else:
                self._due[0] = expected[part:]
            self._due_size -= part
            self.back += part
            self.checksum = zlib.crc32(expected[:part], self.checksum)

    def _explain(self, data: bytes) -> None:
        """Whether what has come is due later, so that something was lost in between, or is just wrong."""
        found = b"".join(self._due).find(data[:64])
        if found > 0:
            self._fail("lost", f"{found} bytes after {self.back}")
        else:
            self._fail("reordered", f"after {self.back} bytes")

    def _fail(self, failure: str, detail: str) -> None:
        self.over = True
        self.failure, self.detail = failure, detail

    def __str__(self) -> str:
        return f"{type(self).__name__} {self.name}: {self.failure or 'fine'} {self.detail}"


class Idle(Stream):
    """Says nothing until the end, and a few bytes then."""

    @property
    def wanted(self) -> int:
        if self.finishing and not self._burst and not self.back and not self._due_size:
            self._burst = memoryview(self.source.randbytes(32))
        return super().wanted & (selectors.EVENT_READ | (selectors.EVENT_WRITE if self.finishing else 0))


class Slow(Stream):
    """Sends all that it can and reads little: what comes back fills its window, and the server's backlog."""

    read_size = 4096
    pause = 0.02

    def prepare(self) -> None:
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)

    @property
    def wanted(self) -> int:
        if self.finishing:
            self.pause = 0
            self.read_size = READ
        return super().wanted


class Endless(Stream):
    """Never stops sending: there is always something on its way."""


class Streams:
    """Runs the streams in a thread until stop(), which waits for everything that is due.

    `sent_on` is how many bytes have come back and were right; lost, reordered, reset and ended count connections.
    """

    def __init__(
        self,
        address: Any,
        bursty: int = 0,
        *,
        idle: int = 0,
        slow: int = 0,
        endless: int = 0,
        seed: int = 1,
        largest: int = LARGEST_BURST,
        pause: float = 0.002,
    ) -> None:
        kinds = [Stream] * bursty + [Idle] * idle + [Slow] * slow + [Endless] * endless
        self.streams = [kind(address, 1000 * seed + index, largest) for index, kind in enumerate(kinds)]
        self._turn = pause
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _count(self, failure: str) -> int:
        return sum(stream.failure == failure for stream in self.streams)

    @property
    def lost(self) -> int:
        return self._count("lost")

    @property
    def reordered(self) -> int:
        return self._count("reordered")

    @property
    def reset(self) -> int:
        return self._count("reset") + self._count("ended")

    @property
    def failures(self) -> list[str]:
        return [str(stream) for stream in self.streams if stream.failure]

    @property
    def alive(self) -> list[Stream]:
        return [stream for stream in self.streams if not stream.failure]

    def _run(self) -> None:
        with selectors.DefaultSelector() as selector:
            watched: dict[Stream, int] = {}
            while not all(stream.over for stream in self.streams):
                finishing = self._stopping.is_set()
                for stream in self.streams:
                    stream.finishing = finishing
                    self._watch(selector, watched, stream)
                for key, events in selector.select(0.01):
                    key.data.serve(events)
                if self._turn and not finishing:
                    time.sleep(self._turn)  # so that the server, and not this, is what keeps the machine busy

    @staticmethod
    def _watch(selector: selectors.BaseSelector, watched: dict[Stream, int], stream: Stream) -> None:
        before, wanted = watched.get(stream, 0), stream.wanted
        if before == wanted:
            return
        if not before:
            selector.register(stream.sock, wanted, stream)
        elif not wanted:
            selector.unregister(stream.sock)
        else:
            selector.modify(stream.sock, wanted, stream)
        watched[stream] = wanted

    def goes_on(self, limit: float = LIMIT) -> None:
        """Returns when each stream that talks and has not failed has got something more back."""
        before = {stream: stream.back for stream in self.alive if not isinstance(stream, Idle)}
        eventually(
            lambda: all(stream.back > back or stream.failure for stream, back in before.items()),
            "the streams go on",
            limit,
        )

    def stop(self) -> None:
        """Stops sending, receives what is due and the end of each connection, and closes."""
        self._stopping.set()
        self._thread.join(LIMIT)
        stuck = [str(stream) for stream in self.streams if not stream.over]
        self.close()
        assert not stuck, f"these have not come to their end: {stuck}"

    def close(self) -> None:
        for stream in self.streams:
            stream.over = True
        self._thread.join(LIMIT)
        for stream in self.streams:
            stream.sock.close()
