"""The giving end of a channel: an incumbent that drains moves what its loop holds to the successor.

Some batches are on their way at a time, so that both processes work at once, and each is so small that it stands still
for some milliseconds only: the next one is larger if the last one was quick, smaller if it was not. Between two batches
the loop serves what it holds. A handler that says "not now" is asked again until the drain deadline.
"""

from __future__ import annotations

import select
import time
from array import array
from collections import Counter, deque
from collections.abc import Callable
from typing import Any

from . import records
from .channel import Batch, End, check_indices, in_words
from .errors import RemoteProtocolError
from .exchange import logger
from .protocol import GIVER, Do, Event, Local, State
from .wire import Frame, Type

WINDOW = 3
"""Batches on their way at a time: one that is being adopted, one in the socket, one that is being packed."""

FIRST_BATCH = 64
SMALL_BATCH = 32
QUICK, SLOW = 0.003, 0.008
"""Seconds from the export of a batch to its release: below the one the next is twice as large, above the other half."""

TOO_SLOW = 0.1
"""Seconds above which even a small batch is halved: only handlers take so long, all else is a machine that is busy."""

SHARE = 8
"""How many times longer than it is worked on here a batch must stand still for its size not to matter: it waits while
loops that are busy serve others then, and with small batches that goes on for longer."""

BATCH_SIZE = 256 << 10
"""Bytes of records at which a batch is full, whatever the number of its connections."""

SOONEST, LATEST = 0.005, 0.1
"""Seconds until who had said "not now" is asked again, the first time and after some times."""

FAILURES = 10
"""How often a batch may be refused by the kernel (ETOOMANYREFS, no memory for a file), or find no memory here, before
the rest stays here."""


class Giver(End):
    """`left` counts by words (records.WORDS, and "room", "kernel") what has stayed here, and why.

    While `more_to_come` says so the channel stays open, for what an older process may still move here. What handlers
    have ended while it stood still is `_staying` until the other end has said that it does not serve it.
    """

    role = "giver"
    other = "taker"
    table = GIVER
    begins = State.GIVING

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.left: Counter[str] = Counter()
        self.more_to_come: Callable[[], bool] = lambda: False
        self._most = FIRST_BATCH
        self._window = WINDOW
        self._room = self.channel.room
        self._failures = 0
        self._number = 0
        self._cursor = 0
        self._reasons: dict[str, int] = {}
        self._pause = SOONEST
        self._resting = False
        self._busy = 0
        self._packed = b""
        self._refused: list[list[Any]] = []
        self._staying: deque[Batch] = deque()
        self._release = b""
        self._pump_soon()

    def leave(self) -> None:
        """The deadline: what is on its way comes back, unless the other end has it already."""
        while not self.finished:
            self.step(Local.LEAVING)
        self.link.close()

    @property
    def waits(self) -> bool:
        return bool(self.batches or self._staying)

    @property
    def loss(self) -> Event:
        """An end that is not the end of the stream does not tell what the other one has adopted."""
        return Local.FAIL if self.error is not None and self.state is State.OUTRUN else Local.LOST

    def flushed(self) -> None:
        super().flushed()
        self._pump_soon()

    def _pump_soon(self) -> None:
        self.loop.call_soon(self.guard, self._pump)

    def _pump(self) -> None:
        """Sends one batch more, if the window has room; the next one in another turn of the loop."""
        if self._resting or self.link.unsent or self.state is not State.GIVING or len(self.batches) >= self._window:
            return
        if self._cursor >= 0:
            self._export()
        elif not self.waits:
            self._come_to_an_end()

    def _export(self) -> None:
        most = min(self._most, records.MOST_CONNECTIONS, self._room - self._on_their_way())
        if most <= 0:
            if not self.batches:
                self._give_up("room")
            return
        if not self._token_is_unread():
            self.step(Local.BEATEN)
            return
        began = time.monotonic()
        self.connections.note_late_writes(self._ledger)
        descriptors = array("i")
        try:
            self._packed, descriptors, cursor = self.connections.export_connections(
                self._cursor, most, BATCH_SIZE, self._reasons
            )
            if descriptors:
                self.batches.append(Batch(self._number, descriptors, began, work=time.monotonic() - began))
        except MemoryError as error:
            self._send_less(descriptors, error)
            return
        self._cursor = cursor
        if descriptors:
            self.step(Local.BATCH)
        self._pump_soon()

    def _token_is_unread(self) -> bool:
        return _shows(self._token, select.POLLIN)

    def _give_up(self, why: str) -> None:
        """What has not moved by now, and is not on its way, stays here."""
        self._cursor = -1
        self._count_left()
        self._busy = 0
        self.left[why] += max(0, self.connections.connections - self._on_their_way() - self.left.total())
        self._pump_soon()

    def _count_left(self) -> None:
        """Who was found to stay counts once and for all; who has said "not now" in this pass may be asked again."""
        self._busy += self._reasons.pop("busy", 0)
        self.left.update(self._reasons)
        self._reasons.clear()

    def _on_their_way(self) -> int:
        return sum(len(batch.descriptors) for batch in (*self.batches, *self._staying))

    def _come_to_an_end(self) -> None:
        self._count_left()
        if self._busy or self.more_to_come():
            self._rest()
        else:
            self.step(Local.EMPTY)

    def _rest(self) -> None:
        """Sends nothing for a moment, and asks everybody anew then."""
        self._resting = True
        self.loop.call_later(self._pause, self.guard, self._begin_anew)
        self._pause = min(2 * self._pause, LATEST)

    def _begin_anew(self) -> None:
        self._resting = False
        self._cursor = self._busy = 0
        self._reasons.pop("busy", None)
        self._pump()

    def received(self, frame: Frame) -> Event | None:
        if frame.type is Type.DROPPED:
            if not self._staying or frame.body["batch"] != self._staying[0].number:
                raise RemoteProtocolError(f"a part of batch {frame.body['batch']} was dropped that was not to stay")
            return frame.type
        if (self.link.lost or _shows(self.link.fileno(), select.POLLHUP)) and self._token_is_unread():
            return None  # the other end is gone, and has neither read nor written on what it adopted
        self._check(frame)
        self._refused = frame.body["refused"]
        self._room = frame.body["room"]
        return frame.type

    def _check(self, frame: Frame) -> None:
        if not self.batches or frame.body["batch"] != self.batches[0].number:
            raise RemoteProtocolError(f"batch {frame.body['batch']} was adopted, which is not the next one")
        if not check_indices([index for index, _ in frame.body["refused"]], self.batches[0]):
            raise RemoteProtocolError("a connection was refused that is not in the batch, or twice")

    def message(self, kind: Type) -> None:
        if kind is Type.CONNECTIONS:
            self._send_batch(self.batches[-1])
        elif kind is Type.RELEASED:
            self.link.send(kind, self._release)
            self._pump_soon()
        else:
            self.link.send(kind, {"left": dict(self.left)})

    def _send_batch(self, batch: Batch) -> None:
        """It counts as on its way from its export on: whatever is raised here, nothing of it is forgotten."""
        body, self._packed = self._packed, b""
        given: list[int] = []
        try:
            data = records.BATCH.pack(batch.number, int(batch.began * 1e9), len(batch.descriptors), len(body))
            if len(body) > records.LARGEST_INLINE:
                given.append(records.seal("takeover-connections", body))
            else:
                data += body
        except (OSError, MemoryError) as error:
            self.batches.pop()
            self._send_less(batch.descriptors, error)
            return
        try:
            self.link.send(Type.CONNECTIONS, data, [*batch.descriptors, *given], given=given)
        except OSError as error:
            self.batches.pop()
            self._send_less(batch.descriptors, error)
            return
        if len(self.batches) == 1:
            self._silent = 0
        self._number += 1

    def _send_less(self, descriptors: array[int], error: OSError | MemoryError) -> None:
        """Less at a time, and later: what is in flight counts against the user's RLIMIT_NOFILE (unix(7)), or there was
        no memory."""
        self._failures += 1
        self.connections.put_back_connections(descriptors, False)
        self._most, self._window = max(1, len(descriptors) // 4), 1
        if self._failures > FAILURES:
            what = "no memory" if isinstance(error, MemoryError) else error.strerror
            logger.warning("%d connections cannot be sent: %s; the rest is drained", len(descriptors), what)
            self._give_up("memory" if isinstance(error, MemoryError) else "kernel")
        else:
            self._rest()

    def perform(self, action: Do) -> Event | None:
        if action is Do.RECLAIM:
            return self.take_token()
        if action is Do.RELINQUISH:
            self._relinquish()
        elif action is Do.SERVE_ON:
            self._serve_on(self._staying.popleft())
            self._pump_soon()
        elif action is Do.FORGO:
            self._forgo(self._staying)
        elif action is Do.RELINQUISH_ALL:
            self._forgo(self._staying)
            self._forgo(self.batches)
        else:
            while self._staying:
                self._serve_on(self._staying.popleft())
            while self.batches:
                self.connections.put_back_connections(self.batches.popleft().descriptors, False)
        return None

    def _serve_on(self, staying: Batch) -> None:
        self.connections.put_back_connections(staying.descriptors, True)
        self.left["closing"] += len(staying.descriptors)

    def _forgo(self, batches: deque[Batch]) -> None:
        while batches:
            batch = batches.popleft()
            self.connections.forgo_connections(batch.descriptors)
            self.account.moved_out += len(batch.descriptors)

    def _relinquish(self) -> None:
        batch, began = self.batches.popleft(), time.monotonic()
        skip = frozenset(index for index, _ in self._refused)
        kept, tails = self.connections.relinquish_connections(batch.descriptors, skip)
        self._release = records.pack_release(batch.number, kept, tails)
        self.account.moved_out += len(batch.descriptors) - len(skip) - len(kept)
        why = Counter(word for _, word in self._refused)
        self.left.update(why)
        self.account.refused.update(why)
        if kept:
            staying = array("i", [batch.descriptors[index] for index in kept])
            self._staying.append(batch._replace(descriptors=staying))
        now = time.monotonic()
        took, work = now - batch.began, batch.work + now - began
        if took < QUICK or (self._most >= SMALL_BATCH and SHARE * work < took < TOO_SLOW):
            self._most = min(2 * self._most, records.MOST_CONNECTIONS)
        elif took > (SLOW if self._most > SMALL_BATCH else TOO_SLOW):
            self._most = max(self._most // 2, 1)

    def _read_to_the_end(self) -> None:
        """What the other end had said before it read the token has come, and nothing is left for it to say."""
        while self.state is State.OUTRUN and not self.link.lost and self.link.first_byte():
            self.readable()
        if self.state is State.OUTRUN and not self.link.lost and not self.batches:
            self.step(Local.EMPTY)

    def readable(self) -> None:
        super().readable()
        if self.state is State.OUTRUN and not self.batches:
            self.loop.call_soon(self.guard, self._read_to_the_end)

    def changed(self, before: State) -> None:
        if self.finished:
            self.connections.note_late_writes(-1)
        super().changed(before)
        if self.state is State.OUTRUN:
            self.loop.call_soon(self.guard, self._read_to_the_end)
        if self.finished:
            self._count_left()
            if self._busy:
                self.left["busy"] += self._busy
            self.account.drained.update(self.left)
            self.account.changed()
            logger.info(
                "moved %s connections to pid %d in %.0f ms%s",
                f"{self.account.moved_out:,}",
                self.channel.pid,
                (time.monotonic() - self.started) * 1000,
                f"; the rest drains ({in_words(self.left)})" if self.left else "",
            )


def _shows(descriptor: int, event: int) -> bool:
    """Whether poll(2) reports the event now."""
    poll = select.poll()
    poll.register(descriptor, event)
    return any(events & event for _, events in poll.poll(0))
