"""Clients of an HTTP server while it is deployed: kept-alive ones, new connections all the while, and websockets.

    python http_load.py HOST PORT [--keep-alive N] [--new N] [--websockets N] [--pause MS] [--lines]

Runs until its standard input ends, and then prints one line of JSON with what the clients saw:

requests            requests that were answered in full, with status 200
connects            connections that were made
connects_failed     those that were not, by reason
requests_failed     requests that were sent and not answered in full with status 200, by reason
keep_alives_lost    connections closed without notice under a request after their first, which nobody had read
keep_alives_noticed connections closed with notice: `Connection: close`, or an end before a request was sent
websockets_closed   websockets that the server ended, by code (1006: without a close frame)
messages            websocket messages that came back
processes           how many processes answered, by the pid in the body
seconds, slowest_ms of the whole run; of the slowest request, with its connect

A server may close an idle connection at any moment, also while the next request is on its way to it (RFC 9112, section
9.5). Then it has not read that request, and a reset tells the client so, who may send it again: this is a column of its
own. A request that is the first of its connection, that was read and not answered (the connection ends without a
reset), or whose answer is cut, is a failed one.

With --lines a request is a line, which a server of lines gives back.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import json
import os
import random
import select
import socket
import sys
import time
from collections import Counter

LIMIT = 20.0
"""Seconds after which a request counts as failed."""

CLOSED = "closed"


class Cut(Exception):
    """The connection ended before the answer did; `received` is how much of the answer had come."""

    def __init__(self, why: str, received: int) -> None:
        super().__init__(why)
        self.received = received


class Seen:
    """What the clients have seen so far."""

    def __init__(self) -> None:
        self.began = time.monotonic()
        self.requests = self.connects = self.keep_alives_lost = self.keep_alives_noticed = self.messages = 0
        self.connects_failed: Counter[str] = Counter()
        self.requests_failed: Counter[str] = Counter()
        self.websockets_closed: Counter[str] = Counter()
        self.processes: set[bytes] = set()
        self.slowest = 0.0

    def answered(self, began: float, body: bytes) -> None:
        self.requests += 1
        self.slowest = max(self.slowest, time.monotonic() - began)
        if body.strip().isdigit():
            self.processes.add(body)

    def report(self) -> dict[str, object]:
        return {
            **{key: value for key, value in vars(self).items() if isinstance(value, (int, Counter))},
            "processes": len(self.processes),
            "seconds": round(time.monotonic() - self.began, 3),
            "slowest_ms": round(self.slowest * 1000, 2),
        }


class Connection:
    """One connection, whose bytes this program reads when it chooses to, so that it knows what came before what."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.buffer = b""

    def ended(self) -> bool:
        """Whether the server's end of file, or its reset, has come."""
        poll = select.poll()
        poll.register(self.sock, select.POLLIN | select.POLLRDHUP)
        return bool(poll.poll(0))

    async def is_reset(self) -> bool:
        """Whether a reset follows on an end of file, as it does when the server has closed before it read all.

        A request that was lost on the way is sent again by the kernel after 200 ms at the earliest, and reset then.
        """
        poll = select.poll()
        poll.register(self.sock, 0)
        for _ in range(100):
            if any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0)):
                return True
            await asyncio.sleep(0.01)
        return False

    async def send(self, data: bytes) -> None:
        await asyncio.get_running_loop().sock_sendall(self.sock, data)

    async def more(self) -> None:
        data = await asyncio.get_running_loop().sock_recv(self.sock, 65536)
        if not data:
            raise Cut(CLOSED, len(self.buffer))
        self.buffer += data

    async def take(self, size: int) -> bytes:
        while len(self.buffer) < size:
            await self.more()
        data, self.buffer = self.buffer[:size], self.buffer[size:]
        return data

    async def take_to(self, end: bytes) -> bytes:
        while end not in self.buffer:
            await self.more()
        return await self.take(self.buffer.index(end) + len(end))

    async def head(self) -> tuple[int, dict[bytes, bytes]]:
        """The status and the fields of an answer."""
        lines = (await self.take_to(b"\r\n\r\n")).split(b"\r\n")
        fields = {}
        for line in lines[1:-2]:
            name, _, value = line.partition(b":")
            fields[name.lower()] = value.strip()
        return int(lines[0].split()[1]), fields

    async def rest(self, fields: dict[bytes, bytes]) -> bytes:
        """The body of an answer."""
        if fields.get(b"transfer-encoding") != b"chunked":
            return await self.take(int(fields[b"content-length"]))
        body = b""
        while size := int((await self.take_to(b"\r\n")).split(b";")[0], 16):
            body += (await self.take(size + 2))[:-2]
        await self.take(2)
        return body

    async def ask(self, request: bytes) -> tuple[int, bytes, bool]:
        """Sends a request: the status and the body of its answer, and whether the connection is to be kept."""
        received = 0
        try:
            await self.send(request)
            if not request.startswith(b"GET "):
                line = await self.take_to(b"\n")
                return 200 if line == request else 0, line, True
            status, fields = await self.head()
            received = 1
            body = await self.rest(fields)
            return status, body, fields.get(b"connection", b"").lower() != b"close"
        except OSError as error:
            raise Cut(error.strerror or type(error).__name__, received or len(self.buffer)) from None
        except Cut as cut:
            raise Cut(str(cut), received or cut.received) from None


class Load:
    """All clients of one run."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.seen = Seen()
        self.stopped = False

    @property
    def request(self) -> bytes:
        if self.options.lines:
            return b"hello %d\n" % random.randrange(1 << 30)
        return b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"

    async def connect(self) -> Connection | None:
        sock = socket.socket()
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            address = (self.options.host, self.options.port)
            await asyncio.wait_for(asyncio.get_running_loop().sock_connect(sock, address), LIMIT)
        except (OSError, asyncio.TimeoutError) as error:
            sock.close()
            self.seen.connects_failed[getattr(error, "strerror", None) or type(error).__name__] += 1
            await asyncio.sleep(0.05)
            return None
        self.seen.connects += 1
        return Connection(sock)

    async def exchange(self, connection: Connection, began: float, *, first: bool, only: bool = False) -> bool:
        """One request and its answer; whether the connection lives on. `only`: no other was to follow anyway."""
        try:
            status, body, kept = await asyncio.wait_for(connection.ask(self.request), LIMIT)
        except asyncio.TimeoutError:
            self.seen.requests_failed["out of time"] += 1
            return False
        except Cut as cut:
            was_read = str(cut) == CLOSED and not await connection.is_reset()
            if first or cut.received or was_read:
                kind = "answer cut" if cut.received else "first request" if first else "read, but not answered"
                self.seen.requests_failed[f"{cut}: {kind}"] += 1
            else:
                self.seen.keep_alives_lost += 1
            return False
        if status != 200:
            self.seen.requests_failed[f"status {status}"] += 1
            return False
        self.seen.answered(began, body)
        if not kept and not only:
            self.seen.keep_alives_noticed += 1
        return kept

    async def keep_alive(self) -> None:
        while not self.stopped:
            began = time.monotonic()
            connection = await self.connect()
            if connection is None:
                continue
            with connection.sock:
                first = True
                while not self.stopped:
                    if not first and connection.ended():
                        self.seen.keep_alives_noticed += 1
                        break
                    if not await self.exchange(connection, began, first=first):
                        break
                    first = False
                    await self.pause()
                    began = time.monotonic()

    async def new(self) -> None:
        while not self.stopped:
            began = time.monotonic()
            connection = await self.connect()
            if connection is not None:
                with connection.sock:
                    await self.exchange(connection, began, first=True, only=True)
            await self.pause()

    async def websocket(self) -> None:
        while not self.stopped:
            connection = await self.connect()
            if connection is not None:
                with connection.sock:
                    await self.talk(connection)

    async def talk(self, connection: Connection) -> None:
        """A handshake, and messages until the server ends it (RFC 6455)."""
        key = base64.b64encode(os.urandom(16)).decode()
        fields = f"Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13"
        try:
            await connection.send(f"GET /ws HTTP/1.1\r\nHost: localhost\r\n{fields}\r\n\r\n".encode())
            status, _ = await asyncio.wait_for(connection.head(), LIMIT)
        except (Cut, OSError, asyncio.TimeoutError) as error:
            self.seen.requests_failed[f"websocket: {getattr(error, 'strerror', None) or error!r}"] += 1
            return
        if status != 101:
            self.seen.requests_failed[f"websocket: status {status}"] += 1
            return
        code = 1006
        with contextlib.suppress(Cut, OSError):
            while not self.stopped:
                text = b"%d" % random.randrange(1 << 30)
                await connection.send(_frame(1, text))
                opcode, payload = await _read_frame(connection)
                if opcode == 8:
                    code = int.from_bytes(payload[:2], "big") if payload else 1005
                    await connection.send(_frame(8, payload))
                    break
                if payload == text:
                    self.seen.messages += 1
                await self.pause()
        if not self.stopped:
            self.seen.websockets_closed[str(code)] += 1

    async def pause(self) -> None:
        await asyncio.sleep(random.uniform(0, 2 * self.options.pause / 1000))

    async def run(self) -> None:
        options = self.options
        kinds = ((self.keep_alive, options.keep_alive), (self.new, options.new), (self.websocket, options.websockets))
        clients = [asyncio.ensure_future(kind()) for kind, count in kinds for _ in range(count)]
        print("started", flush=True)
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
        self.stopped = True
        await asyncio.wait(clients, timeout=LIMIT)
        for client in clients:
            if not client.done():
                client.cancel()
            elif client.exception() is not None:
                raise client.exception()  # type: ignore[misc]
        print(json.dumps(self.seen.report()), flush=True)


def _frame(opcode: int, payload: bytes) -> bytes:
    """A short frame from a client, whose mask is 0."""
    return bytes([0x80 | opcode, 0x80 | len(payload)]) + bytes(4) + payload


async def _read_frame(connection: Connection) -> tuple[int, bytes]:
    while True:
        first, second = await connection.take(2)
        size = second & 0x7F
        if size == 126:
            size = int.from_bytes(await connection.take(2), "big")
        payload = await connection.take(size)
        if first & 0xF == 9:
            await connection.send(_frame(10, payload))
        else:
            return first & 0xF, payload


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("host")
    parser.add_argument("port", type=int)
    parser.add_argument("--keep-alive", type=int, default=8, help="clients that keep their connections")
    parser.add_argument("--new", type=int, default=8, help="clients that connect for each request")
    parser.add_argument("--websockets", type=int, default=0, help="clients that talk over a websocket at /ws")
    parser.add_argument(
        "--pause", type=float, default=5, help="milliseconds between two requests of a client, on average"
    )
    parser.add_argument("--lines", action="store_true", help="a request is a line, which comes back")
    asyncio.run(Load(parser.parse_args()).run())


if __name__ == "__main__":
    main()
