"""The taking end of a channel: the successor adopts a batch without touching it, and serves it once it was released."""

from __future__ import annotations

import socket
import struct
import time
from array import array
from typing import Any

from . import records
from .channel import Batch, End, check_indices, in_words, room_for_connections
from .errors import RemoteProtocolError
from .exchange import logger
from .link import close_all
from .protocol import TAKER, Do, Event, Local, State
from .wire import Frame, Type

EXACT_BELOW = 2048
"""Descriptors; while there is more room than that it is not counted anew for each batch."""


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
        self._room = self.channel.room
        self._refused: list[list[Any]] = []
        self.account.expected += self.channel.expected

    def received(self, frame: Frame) -> Event | None:
        if frame.type is Type.FINISHED:
            self.left = frame.body["left"]
        return frame.type

    def message(self, kind: Type) -> None:
        if kind is Type.ADOPTED:
            if self._room < EXACT_BELOW:
                self._room = room_for_connections()
            self.link.send(kind, {"batch": self.batches[-1].number, "room": self._room, "refused": self._refused})

    def perform(self, action: Do) -> Event | None:
        if action is Do.ADOPT:
            self._adopt()
        elif action is Do.START:
            self._start()
        elif action is Do.CLAIM:
            return self.take_token()
        elif action is Do.START_ALL:
            while self.batches:
                self._serve(self.batches.popleft(), {})
        elif action is Do.DROP_ALL:
            while self.batches:
                batch = self.batches.popleft()
                self.connections.drop_connections(batch.descriptors, batch.skip)
        elif action is Do.HANG_UP and not self.link.lost:
            self.link.sock.shutdown(socket.SHUT_WR)
        return None

    def _lose(self) -> None:
        """Nothing is claimed by who does not understand what came, or could not take it in: it is the giver's again."""
        if (self.broken or self.error is not None) and self.machine.accepts(Local.FAIL):
            self.step(Local.FAIL)
        else:
            super()._lose()

    def _adopt(self) -> None:
        assert self.frame is not None
        number, taken, body, descriptors = self._open(self.frame)
        if not self.batches:
            self._silent = 0
        if body is None:
            close_all(descriptors)
            self._refused = [[index, "memory"] for index in range(len(descriptors))]
            body = memoryview(b"")
        else:
            self._refused = self.connections.adopt_connections(body, descriptors, self.channel.generation)
        skip = frozenset(index for index, _ in self._refused)
        self.batches.append(Batch(number, descriptors, taken, skip))
        self._room -= len(descriptors) - len(skip)
        self.account.state_bytes += len(body)
        self.account.refused.update(word for _, word in self._refused)

    def _open(self, frame: Frame) -> tuple[int, float, memoryview | None, array[int]]:
        """Number, time, records and descriptors of a batch; those are the caller's, and the frame has none any more.

        No records where there is no memory for the file that they are in.
        """
        try:
            number, taken, count, size = records.BATCH.unpack_from(frame.data)
        except struct.error:
            raise RemoteProtocolError("the body of a CONNECTIONS is garbled") from None
        inline = memoryview(frame.data)[records.BATCH.size :]
        body: memoryview | None = inline
        extra = len(frame.descriptors) - count
        if (extra, len(inline)) not in ((0, size), (1, 0)) or count > records.MOST_CONNECTIONS:
            raise RemoteProtocolError(f"{count} connections came with {len(frame.descriptors)} descriptors")
        if extra:
            body = self._unseal(frame.descriptors[-1])
            if body is not None and len(body) != size:
                raise RemoteProtocolError(f"{size} bytes of records are announced, the file has {len(body)}")
            close_all([frame.descriptors.pop()])
        descriptors = frame.descriptors[:]
        del frame.descriptors[:]
        return number, taken / 1e9, body, descriptors

    def _unseal(self, descriptor: int) -> memoryview | None:
        try:
            return records.unseal(descriptor)
        except OSError as error:
            logger.error("cannot map the records of pid %d: %s; they go back", self.channel.pid, error.strerror)
            return None

    def _start(self) -> None:
        assert self.frame is not None
        number, kept, tails = records.unpack_release(self.frame.data)
        if not self.batches or number != self.batches[0].number:
            raise RemoteProtocolError(f"batch {number} was released, which is not the next one")
        batch = self.batches[0]
        if not check_indices([*batch.skip, *kept], batch) or not check_indices(tails, batch):
            raise RemoteProtocolError("a connection was kept that is not in the batch, or twice")
        self.batches.popleft()
        if kept:
            self.connections.drop_connections(array("i", [batch.descriptors[index] for index in kept]), ())
        self._serve(batch._replace(skip=batch.skip | set(kept)), tails)

    def _serve(self, batch: Batch, tails: dict[int, bytes]) -> None:
        self.connections.start_connections(batch.descriptors, batch.skip, tails)
        count = len(batch.descriptors) - len(batch.skip)
        self.moved += count
        self.account.moved_in += count
        standstill = (time.monotonic() - batch.began) * 1000
        self.account.longest_standstill = max(self.account.longest_standstill, standstill)
        self.account.changed()

    def changed(self, before: State) -> None:
        super().changed(before)
        if self.finished:
            self.account.expected -= self.channel.expected - self.moved
            self.account.drained.update(self.left)
            self.account.changed()
            if self.moved or self.left:
                self._tell()

    def _tell(self) -> None:
        logger.info(
            "moved %s connections from pid %d (generation %d) in %.0f ms%s",
            f"{self.moved:,}",
            self.channel.pid,
            self.channel.generation,
            (time.monotonic() - self.started) * 1000,
            f"; the rest drains there ({in_words(self.left)})" if self.left else "",
        )
