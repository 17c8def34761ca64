"""Clients of an echo server that count what they lose, and a wait for what is to happen."""

from __future__ import annotations

import json
import os
import random
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

LIMIT = 30.0
"""Seconds after which a test gives up waiting for an event; nothing depends on how long it took."""


def eventually(question: Callable[[], Any], what: str, limit: float = LIMIT, pause: float = 0.005) -> Any:
    """Asks until the answer is true, and returns it."""
    deadline = time.monotonic() + limit
    while True:
        answer = question()
        if answer:
            return answer
        assert time.monotonic() < deadline, f"not within {limit:g} s: {what}"
        time.sleep(pause)


def receive_exactly(sock: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        part = sock.recv(size - len(data))
        if not part:
            raise ConnectionResetError(f"end of file after {len(data)} of {size} bytes")
        data += part
    return bytes(data)


def echo_once(sock: socket.socket, data: bytes) -> None:
    """Sends, and receives the same."""
    sock.sendall(data)
    assert receive_exactly(sock, len(data)) == data


class Talker:
    """A connection to programs/protocol_server.py in its lines mode: each line gets an answer, in order."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.sock.settimeout(LIMIT)
        self._file = sock.makefile("rb")

    def send(self, text: str) -> None:
        self.sock.sendall(text.encode())

    def say(self, line: str = "hello") -> dict[str, Any]:
        self.send(f"{line}\n")
        return self.hear()

    def hear(self) -> dict[str, Any]:
        """The next answer."""
        line = self._file.readline()
        if not line.endswith(b"\n"):
            raise ConnectionResetError(f"the answer ends after {line!r}")
        return dict(json.loads(line))

    def rest(self) -> bytes:
        """Everything up to the end of the connection."""
        return self._file.read()

    def read(self, size: int) -> bytes:
        data = self._file.read(size)
        assert data is not None
        return data

    def pid(self) -> int:
        """Who serves it."""
        return int(self.say()["pid"])

    def close(self) -> None:
        self._file.close()
        self.sock.close()


class Pounder:
    """A client that connects anew all the time, each connection with one echo round trip; it counts every loss."""

    def __init__(self, address: Any, pause: float = 0.002, timeout: float = LIMIT) -> None:
        self.address = address
        self.good = 0
        self.slowest = 0.0
        self.lost: list[OSError | AssertionError] = []
        self._pause, self._timeout = pause, timeout
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @property
    def refused(self) -> int:
        return sum(isinstance(error, ConnectionRefusedError) for error in self.lost)

    def _run(self) -> None:
        while not self._stopping.is_set():
            began = time.monotonic()
            try:
                with socket.socket(socket.AF_UNIX if isinstance(self.address, str) else socket.AF_INET) as sock:
                    sock.settimeout(self._timeout)
                    sock.connect(self.address)
                    echo_once(sock, os.urandom(32))
                self.good += 1
            except (OSError, AssertionError) as error:
                self.lost.append(error)
            self.slowest = max(self.slowest, time.monotonic() - began)
            self._stopping.wait(self._pause)

    def goes_on(self, limit: float = LIMIT) -> None:
        """Returns when some connections more have been served."""
        before = self.good
        eventually(lambda: self.good > before + 2, f"new connections are served; lost: {self.lost[-3:]}", limit)

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join(LIMIT)


class Steady:
    """Clients that stay connected and talk in turn; every byte that comes back is compared."""

    def __init__(self, address: Any, count: int) -> None:
        self.rounds = 0
        self.lost: list[BaseException] = []
        self._socks = [socket.create_connection(address, LIMIT) for _ in range(count)]
        for sock in self._socks:
            echo_once(sock, b"hello")
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        source = random.Random(7)
        while not self._stopping.is_set() and not self.lost:
            for sock in self._socks:
                try:
                    echo_once(sock, source.randbytes(source.choice((1, 100, 5000, 70_000))))
                except (OSError, AssertionError) as error:
                    self.lost.append(error)
            self.rounds += 1
            self._stopping.wait(0.002)

    def goes_on(self, limit: float = LIMIT) -> None:
        before = self.rounds
        eventually(lambda: self.rounds > before + 1 or self.lost, "steady clients are served", limit)
        assert not self.lost, self.lost

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join(LIMIT)
        for sock in self._socks:
            sock.close()
