"""Stream handlers whose connections move: a reader that tells what it holds, and the protocol around a handler."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from .records import NOT_NOW, Moved, NotNow

if TYPE_CHECKING:
    from typing_extensions import Buffer

log = logging.getLogger("takeover")


class Connection:
    """What a stream handler knows of its connection besides the bytes.

    `state` travels as JSON: the handler of the new process finds in it what this one has put there. `moved` tells where
    the connection came from, None for one that was accepted here. `gone` is true when it has moved to the successor,
    which is why the handler is cancelled.
    """

    def __init__(self) -> None:
        self.state: Any = {}
        self.moved: Moved | None = None
        self.gone = False
        self.busy = 0

    @contextmanager
    def not_now(self) -> Iterator[None]:
        """Inside of this block the connection does not move."""
        self.busy += 1
        try:
            yield
        finally:
            self.busy -= 1


StreamHandler = Callable[[asyncio.StreamReader, asyncio.StreamWriter, Connection], Awaitable[Any]]


class Reader(asyncio.StreamReader):
    """A StreamReader with a buffer of its own, which may be looked at and held.

    `waits` says whether somebody waits in it and has consumed nothing; `turns` counts how often such a wait has ended.
    """

    def __init__(self, limit: int, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(limit, loop)
        self.buffer = bytearray()
        self.ended = False
        self.waits = False
        self.turns = 0
        self._own_limit = limit
        self._own_loop = loop
        self._feeder: Any = None  # a ReadTransport, which uvloop's do not say that they are
        self._arrival: asyncio.Future[None] | None = None
        self._release: asyncio.Future[None] | None = None
        self._full = False

    def hold(self) -> None:
        """Nothing is consumed any more until free()."""
        self._release = self._own_loop.create_future()

    def free(self) -> None:
        """Whoever waits goes on."""
        _wake(self._release)
        self._release = None

    def give_away(self) -> None:
        """What it holds is another's now; whoever still waits here finds the end of file."""
        self.buffer.clear()
        self.feed_eof()
        self.free()

    def set_transport(self, transport: asyncio.BaseTransport) -> None:
        super().set_transport(transport)
        self._feeder = transport
        self._own_loop.call_soon(self._pause_if_full)  # loops begin to read after this, whoever has paused them

    def set_exception(self, exc: Exception) -> None:
        super().set_exception(exc)
        _wake(self._arrival)

    def feed_eof(self) -> None:
        self.ended = True
        _wake(self._arrival)

    def feed_data(self, data: Buffer) -> None:  # type: ignore[override]
        self.buffer += data
        _wake(self._arrival)
        self._pause_if_full()

    def at_eof(self) -> bool:
        return self.ended and not self.buffer

    async def read(self, n: int = -1) -> bytes:
        if n >= 0:
            return await self._read_some(n, quiet=True)
        blocks = []
        while block := await self._read_some(self._own_limit, quiet=False):
            blocks.append(block)
        return b"".join(blocks)

    async def readline(self) -> bytes:
        try:
            return await self.readuntil(b"\n")
        except asyncio.IncompleteReadError as error:
            return error.partial
        except asyncio.LimitOverrunError as error:
            found = self.buffer.startswith(b"\n", error.consumed)
            self._take(error.consumed + 1 if found else len(self.buffer))
            raise ValueError(error.args[0]) from None

    async def readuntil(self, separator: Any = b"\n") -> bytes:
        separators = separator if isinstance(separator, tuple) else (separator,)
        if not separators or not all(separators):
            raise ValueError("Separator should be at least one-byte string")
        longest = max(map(len, separators))
        await self._check()
        start = 0
        while True:
            ends = [(at + len(each), at) for each in separators if (at := self.buffer.find(each, start)) >= 0]
            if ends:
                break
            start = max(start, len(self.buffer) + 1 - longest)
            if start > self._own_limit:
                raise asyncio.LimitOverrunError("Separator is not found, and chunk exceed the limit", start)
            if self.ended:
                raise asyncio.IncompleteReadError(self._take(len(self.buffer)), None)
            await self._wait(quiet=True)
        end, at = min(ends)
        if at > self._own_limit:
            raise asyncio.LimitOverrunError("Separator is found, but chunk is longer than limit", at)
        return self._take(end)

    async def readexactly(self, n: int) -> bytes:
        if n < 0:
            raise ValueError("readexactly size can not be less than zero")
        await self._check()
        while len(self.buffer) < n:
            if self.ended:
                raise asyncio.IncompleteReadError(self._take(len(self.buffer)), n)
            await self._wait(quiet=True)
        return self._take(n)

    async def _read_some(self, most: int, *, quiet: bool) -> bytes:
        await self._check()
        if most and not self.buffer and not self.ended:
            await self._wait(quiet=quiet)
        return self._take(most)

    async def _check(self) -> None:
        while self._release is not None:
            await asyncio.shield(self._release)
        error = self.exception()
        if error is not None:
            raise error

    async def _wait(self, *, quiet: bool) -> None:
        if self._arrival is not None:
            raise RuntimeError("another coroutine is already waiting for incoming data")
        if self._full and self._feeder is not None:
            self._full = False
            self._feeder.resume_reading()
        self._arrival = self._own_loop.create_future()
        self.waits = quiet
        try:
            await self._arrival
            await self._check()
        finally:
            self._arrival = None
            self.waits = False
            self.turns += 1

    def _take(self, most: int) -> bytes:
        data = bytes(memoryview(self.buffer)[:most])
        del self.buffer[:most]
        if self._full and self._feeder is not None and len(self.buffer) <= self._own_limit:
            self._full = False
            self._feeder.resume_reading()
        return data

    def _pause_if_full(self) -> None:
        full = len(self.buffer) > 2 * self._own_limit
        if full and self._feeder is not None and not self._feeder.is_closing():
            self._feeder.pause_reading()
            self._full = True


class Stream(asyncio.StreamReaderProtocol):
    """The protocol of one connection with a stream handler, which runs in a task of its own.

    To those who move it it is a protocol class with a state, and besides it has bytes that nobody has consumed.
    """

    def __init__(self, handler: StreamHandler, limit: int, loop: asyncio.AbstractEventLoop) -> None:
        self.reader = Reader(limit, loop)
        super().__init__(self.reader, self._begin, loop)
        self.connection = Connection()
        self.task: asyncio.Task[None] | None = None
        self._handler = handler
        self._own_loop = loop

    @property
    def state_version(self) -> int:
        return int(getattr(self._handler, "state_version", 0))

    @property
    def readable_state_versions(self) -> Any:
        return getattr(self._handler, "readable_state_versions", (self.state_version,))

    @property
    def over(self) -> bool:
        """Whether the handler has ended."""
        return self.task is None or self.task.done()

    def export_state(self) -> bytes | NotNow:
        """Raises where the state is not what JSON can tell."""
        if self.connection.busy or not self.reader.waits:
            return NOT_NOW
        return json.dumps(self.connection.state).encode()

    def import_state(self, state: bytes) -> None:
        self.connection.state = json.loads(state)

    def connection_moved(self) -> None:
        """The handler ends; what it still writes goes nowhere."""
        assert self.task is not None
        self.connection.gone = True
        self.task.cancel()

    def _begin(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.task = self._own_loop.create_task(self._run(reader, writer))

    async def _run(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await self._handler(reader, writer, self.connection)
        except ConnectionError:
            log.debug("handler %r: the connection is lost", self._handler, exc_info=True)
        except Exception:
            if not self.connection.gone:
                log.exception("handler %r raised; its connection is closed", self._handler)
        finally:
            writer.close()


def _wake(future: asyncio.Future[None] | None) -> None:
    if future is not None and not future.done():
        future.set_result(None)
