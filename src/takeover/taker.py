"""The taking end of a channel: the successor adopts a batch without touching it, and serves it once it was released."""

from __future__ import annotations

import os
import struct
import time
from array import array
from typing import Any

from . import records
from .channel import Batch, End, check_indices, in_words
from .collector import collector
from .errors import RemoteProtocolError
from .exchange import logger
from .ledger import close_and_read
from .link import close_all
from .protocol import TAKER, Do, Event, Local, State
from .wire import Frame, Type

RECOUNT = 0.1
"""Seconds after which clients that have come or gone since are counted anew; asyncio's servers must look at each."""


class Taker(End):
    """`left` counts by words why connections have not moved, as the giver says in the end."""

    role = "taker"
    other = "giver"
    table = TAKER
    begins = State.TAKING

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.moved = 0
        self.left: dict[str, int] = {}
        self._adopted = 0
        self._had = self.connections.connections
        self._others = 0
        self._counted = self.started
        self._refused: list[list[Any]] = []
        self._answered = -1
        self._late: dict[int, bytes] = {}
        self._release = records.Release(0, [], {})
        self.account.expected += self.channel.expected

    def received(self, frame: Frame) -> Event | None:
        if frame.type is Type.FINISHED:
            if self.batches and self.state is State.TAKING:
                raise RemoteProtocolError(f"FINISHED came before {len(self.batches)} batches were released")
            self.left = frame.body["left"]
        elif frame.type is Type.RELEASED:
            self._release = records.unpack_release(frame.data)
            if self._release.kept:
                return Local.PARTLY
        return frame.type

    def message(self, kind: Type) -> None:
        if kind is Type.ADOPTED:
            self.link.send(kind, {"batch": self.batches[-1].number, "room": self._room(), "refused": self._refused})
            self._answered = self.batches[-1].number
        else:
            self.link.send(kind, {"batch": self._release.batch})

    def _room(self) -> int:
        """How many connections more there is room for; clients that have come since then take it too."""
        now = time.monotonic()
        if now - self._counted > RECOUNT:
            self._others = self.connections.connections - self._had - self._adopted
            self._counted = now
        return max(0, self.channel.room - self._adopted - self._others)

    def perform(self, action: Do) -> Event | None:
        if action is Do.ADOPT:
            self._adopt()
        elif action is Do.START:
            self._start()
        elif action is Do.CLAIM:
            event = self.take_token()
            if event is Local.GOT_CHANNEL:
                self._read_ledger()
            return event
        elif action is Do.START_ALL:
            while self.batches:
                self._serve_or_drop(self.batches.popleft())
        else:
            while self.batches:
                self._drop(self.batches.popleft())
        return None

    def _adopt(self) -> None:
        assert self.frame is not None
        number, taken, size, descriptors = self._open(self.frame)
        if not self.batches:
            self._silent = 0
        collector.rest(self)
        taken_in = False
        try:
            body = self._body(self.frame, len(descriptors), size)
            self._refused = [[index, "memory"] for index in range(len(descriptors))]
            if body is not None:
                self._refused = self.connections.adopt_connections(body, descriptors, self.channel.generation)
                taken_in = True
                del self.frame.descriptors[: len(descriptors)]
            close_all(self.frame.descriptors)
            del self.frame.descriptors[:]
            skip = frozenset(index for index, _ in self._refused)
            self.batches.append(Batch(number, descriptors, taken, skip))
        except BaseException:
            if taken_in:
                self.connections.drop_connections(descriptors, dict(self._refused))
            raise
        self._adopted += len(descriptors) - len(skip)
        self.account.state_bytes += len(body or b"")
        self.account.refused.update(word for _, word in self._refused)

    def _body(self, frame: Frame, count: int, size: int) -> memoryview | None:
        """The records of a batch; None, said plainly, where there is no memory for them."""
        try:
            return self._records(frame, count, size)
        except (OSError, MemoryError) as error:
            why = error.strerror if isinstance(error, OSError) else "no memory"
            logger.warning("no memory for %s bytes of connections: %s; they go back", f"{size:,}", why)
            return None

    def _open(self, frame: Frame) -> tuple[int, float, int, array[int]]:
        """Number, time, size of the records and connections of a batch; the frame owns the descriptors still."""
        try:
            number, taken, count, size = records.BATCH.unpack_from(frame.data)
        except struct.error:
            raise RemoteProtocolError("the body of a CONNECTIONS is garbled") from None
        came = len(frame.data) - records.BATCH.size
        if (len(frame.descriptors) - count, came) not in ((0, size), (1, 0)) or count > records.MOST_CONNECTIONS:
            raise RemoteProtocolError(
                f"{count} connections with {size} bytes came as {len(frame.descriptors)} descriptors and {came} bytes"
            )
        return number, taken / 1e9, size, frame.descriptors[:count]

    def _records(self, frame: Frame, count: int, size: int) -> memoryview:
        """The records of a batch, in the frame or in a file beside its connections."""
        if len(frame.descriptors) == count:
            return memoryview(frame.data)[records.BATCH.size :]
        body = records.unseal(frame.descriptors[-1])
        if len(body) != size:
            raise RemoteProtocolError(f"{size} bytes of records are announced, the file has {len(body)}")
        return body

    def _start(self) -> None:
        number, kept, tails = self._release
        if not self.batches or number != self.batches[0].number:
            raise RemoteProtocolError(f"batch {number} was released, which is not the next one")
        batch = self.batches[0]
        if not check_indices([*batch.skip, *kept], batch) or not check_indices(tails, batch):
            raise RemoteProtocolError("a connection was kept that is not in the batch, or twice")
        self.batches.popleft()
        if kept:
            self.connections.drop_connections(array("i", [batch.descriptors[index] for index in kept]), ())
            self._adopted -= len(kept)
        self._serve(batch._replace(skip=batch.skip | set(kept)), tails)

    def _serve_or_drop(self, batch: Batch) -> None:
        """What was adopted and not answered, since a mistake came in between, is the giver's still."""
        if batch.number <= self._answered:
            self._serve(batch, self._late_writes(batch))
        else:
            self._drop(batch)

    def _read_ledger(self) -> None:
        """From here on no handler of the giver can add to what it has written."""
        try:
            self._late = close_and_read(self._ledger)
        except (OSError, MemoryError) as error:
            logger.error("what pid %d wrote to connections on their way cannot be read: %r", self.channel.pid, error)

    def _late_writes(self, batch: Batch) -> dict[int, bytes]:
        """By index, what the giver's handlers have written to connections of a batch that it has not released."""
        if not self._late:
            return {}
        inodes = [
            os.fstat(descriptor).st_ino if index not in batch.skip else 0
            for index, descriptor in enumerate(batch.descriptors)
        ]
        return {index: self._late[inode] for index, inode in enumerate(inodes) if inode in self._late}

    def _drop(self, batch: Batch) -> None:
        self.connections.drop_connections(batch.descriptors, batch.skip)

    def _serve(self, batch: Batch, tails: dict[int, bytes]) -> None:
        self.connections.start_connections(batch.descriptors, batch.skip, tails)
        count = len(batch.descriptors) - len(batch.skip)
        self.moved += count
        self.account.moved_in += count
        standstill = (time.monotonic() - batch.began) * 1000
        self.account.longest_standstill = max(self.account.longest_standstill, standstill)
        self.account.changed()

    def idle(self) -> None:
        collector.wake(self)

    def leave(self) -> None:
        super().leave()
        collector.wake(self)

    def changed(self, before: State) -> None:
        super().changed(before)
        if self.finished:
            collector.wake(self)
            self.account.last_move = (time.monotonic() - self.started) * 1000
            self.account.expected -= self.channel.expected - self.moved
            self.account.drained.update(self.left)
            self.account.changed()
            if self.moved or self.left:
                self._tell()
            self._ask_again(before)

    def _ask_again(self, before: State) -> None:
        """Where one end was silent for too long, and nothing else was wrong, what is left may still move."""
        complete = before is State.TAKING and self.cause is Type.FINISHED
        if not complete and self.error is None and self._answered >= 0 and self.channel.again is not None:
            self.channel.again()

    def _tell(self) -> None:
        logger.info(
            "moved %s connections from pid %d (generation %d) in %.0f ms%s",
            f"{self.moved:,}",
            self.channel.pid,
            self.channel.generation,
            self.account.last_move,
            f"; the rest drains there ({in_words(self.left)})" if self.left else "",
        )
