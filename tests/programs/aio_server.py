"""A server on any loop that echoes, or that obeys the lines its clients send and keeps count of them."""

import asyncio
import contextlib
import functools
import gc
import json
import logging
import os
import signal
import ssl
import sys
import threading
from collections.abc import Callable
from typing import Any

from wishes import report_boundaries

import takeover
from takeover import aio, service
from takeover.exchange import Exchange

WRITERS: set[Any] = set()
"""Whom `tell` tells: what has write(), write_eof() and close()."""

COUNTS: dict[Any, int] = {}

NOTES: set[str] = set()
"""What the test wishes of all connections: "no memory" for any state."""


class Echo(asyncio.Protocol):
    """Sends back what comes, and pauses whom its own client is too slow for."""

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.transport.write(data)

    def pause_writing(self) -> None:
        self.transport.pause_reading()

    def resume_writing(self) -> None:
        self.transport.resume_reading()

    def export_state(self) -> bytes:
        return b""

    def import_state(self, state: bytes) -> None:
        assert state == b""


class Unmovable(asyncio.Protocol):
    """Echoes, and knows nothing of moves."""

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.transport.write(data)


def say_farewell(count: int, how: str) -> None:
    """Who is told that a connection is over, named by the lines it has had, and how it was told."""
    print(f"farewell {count} {how}", flush=True)


def obey(writer: Any, words: list[str]) -> None:
    """What a line asks for besides an answer."""
    if words[0] == "fill":
        writer.write(b"x" * int(words[1]))
    elif words[0] == "end":
        writer.write_eof()
    elif words[0] == "pause":
        writer.pause_reading()
    elif words[0] == "wake":
        for each in WRITERS:
            each.resume_reading()
    elif words[0] == "tell":
        for each in WRITERS:
            with contextlib.suppress(RuntimeError):  # it has sent its end of file
                each.write(f"{os.getpid()} {words[1]}\n".encode())


def answer(count: int, moved: Any, text: str) -> bytes:
    fields = {"pid": os.getpid(), "count": count, "times": moved.times if moved else 0, "text": text}
    return json.dumps({**fields, "counts": sum(COUNTS.values())}).encode() + b"\n"


class Lines(asyncio.Protocol):
    """Answers each line; its state is how many there were, and the line that has begun."""

    busy = broken = half = False
    count = 0
    begun = b""

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        WRITERS.add(transport)

    def connection_lost(self, error: Exception | None) -> None:
        WRITERS.discard(self.transport)
        say_farewell(self.count, "lost")

    def connection_moved(self) -> None:
        WRITERS.discard(self.transport)
        say_farewell(self.count, "moved")

    def eof_received(self) -> bool:
        if self.half:
            self.transport.write(f"{os.getpid()} eof\n".encode())
        return self.half

    def data_received(self, data: bytes) -> None:
        *lines, self.begun = (self.begun + data).split(b"\n")
        for line in lines:
            self.count += 1
            COUNTS[self] = self.count
            words = line.decode().split()
            self.busy = words[0] == "busy" or (self.busy and words[0] != "free")
            self.broken = self.broken or (words[0] == "break" and words[-1])
            self.half = self.half or words[0] == "half"
            obey(self.transport, words)
            if words[0] == "bye":
                self.transport.close()
            elif words[0] not in ("fill", "end", "mute"):
                self.transport.write(answer(self.count, aio.moved(self.transport), line.decode()))

    def export_state(self) -> Any:
        if self.broken == "memory":
            raise MemoryError
        if self.broken:
            raise RuntimeError("this state cannot be told")
        return takeover.NOT_NOW if self.busy else b"%d %d %s" % (self.count, self.half, self.begun)

    def import_state(self, state: bytes) -> None:
        if "no memory" in NOTES:
            raise MemoryError
        count, half, self.begun = state.split(b" ", 2)
        self.count = COUNTS[self] = int(count)
        self.half = half == b"1"


async def echo_stream(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, connection: aio.Connection) -> None:
    while data := await reader.read(50_000):
        writer.write(data)
        await writer.drain()


async def lines_stream(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, connection: aio.Connection) -> None:
    """Answers each line, as Lines does."""
    WRITERS.add(writer)
    try:
        while line := await reader.readline():
            await obey_stream(line, writer, connection)
            while line.startswith(b"busy"):
                with connection.not_now():
                    if (await reader.readline()).startswith(b"free"):
                        break
    finally:
        WRITERS.discard(writer)
        say_farewell(connection.state.get("count", 0), "moved" if connection.gone else "lost")
        writer.close()
        await writer.wait_closed()


async def obey_stream(line: bytes, writer: asyncio.StreamWriter, connection: aio.Connection) -> None:
    state = connection.state
    state["count"] = COUNTS[connection] = state.get("count", 0) + 1
    words = line.decode().split()
    if words[0] == "break":
        state["broken"] = object()
    obey(writer, words)
    if words[0] == "bye":
        writer.close()
    elif words[0] not in ("fill", "end", "mute"):
        writer.write(answer(state["count"], connection.moved, line.decode().strip()))
        await writer.drain()


KINDS: dict[str, Any] = {
    "echo": Echo,
    "echo-stream": echo_stream,
    "lines": Lines,
    "lines-stream": lines_stream,
    "unmovable": Unmovable,
}


def signal_at(step: str, signum: int) -> Callable[[str], None]:
    """A boundary that signals this process where it comes to the step."""

    def boundary(name: str) -> None:
        if name == step:
            signal.pthread_kill(threading.get_ident(), signum)  # this thread does not go one step further

    return boundary


async def serve(wishes: dict[str, Any]) -> None:
    handler = KINDS[wishes["kind"]]
    options = wishes["options"]
    NOTES.update(wishes.get("notes", ()))
    if "versions" in wishes:
        handler.state_version, *handler.readable_state_versions = wishes["versions"]
    if "certificate" in wishes:
        gc.disable()  # what is over is to be forgotten without its help
        options["ssl"] = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        options["ssl"].load_cert_chain(*wishes["certificate"])
    begin = aio.start_server if wishes["kind"].endswith("stream") else aio.create_server
    server = await begin(handler, **options)
    print("accepting", flush=True)
    await server.serve_forever()


def main() -> None:
    """Its argument: {"loop", "kind", "options", "limits", "versions", "certificate", and where to wait or fail}."""
    wishes: dict[str, Any] = json.loads(sys.argv[1])
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(process)d %(levelname)s %(message)s")
    if "limits" in wishes:
        service.Limits = functools.partial(takeover.Limits, **wishes["limits"])  # type: ignore[assignment,attr-defined]
    if "die_at" in wishes:
        Exchange.boundary = signal_at(wishes["die_at"], signal.SIGKILL)
    if "stop_at" in wishes:
        Exchange.boundary = signal_at(wishes["stop_at"], signal.SIGSTOP)
    if "boundaries" in wishes:
        report_boundaries(wishes["boundaries"])
    try:
        if wishes["loop"] == "native":
            takeover.serve(KINDS[wishes["kind"]], **wishes["options"])
            return
        if wishes["loop"] == "uvloop":
            import uvloop

            uvloop.install()
        asyncio.run(serve(wishes))
    except takeover.errors.TakeoverError as error:
        print(f"takeover: {type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(error.exit_status)
    except KeyboardInterrupt:
        sys.exit(130)


main()
