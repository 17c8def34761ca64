"""A channel, along which connections move from the loop of one process to that of another: what its ends share.

Each end is a table of protocol.py, driven on the thread of the loop whose connections it moves: between two callbacks
of a loop every connection is at rest, and nobody has to wait for anybody.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from array import array
from collections import Counter, deque
from collections.abc import Callable, Collection, Mapping
from typing import Any, ClassVar, NamedTuple

from .connections import Connections
from .control import Peer
from .descriptors import limit_and_held
from .errors import LocalError
from .exchange import Exchange, read_token, say_failed
from .ledger import open_ledger
from .link import Link, close_all
from .protocol import CHANNEL_BYTE, Event, Limits, Local, State


class Channel(NamedTuple):
    """One end: the socket, the token and the ledger are descriptors, owned by whoever holds this; who is at the other.

    `room` is how many descriptors the taker can hold, `expected` how many connections the giver has. `again`, which any
    thread may call, asks for another one where this one has ended although both ends live.
    """

    sock: int
    token: int
    ledger: int
    pid: int
    generation: int
    room: int = 0
    expected: int = 0
    again: Callable[[], object] | None = None

    def close(self) -> None:
        close_all([self.sock, self.token, self.ledger])


def open_channel() -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Socket, token and ledger of each of the two ends of a new channel; all are the caller's. Raises OSError."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    opened: list[int] = []
    with ours, theirs:
        try:
            opened += os.pipe()
            token, writing = opened
            os.write(writing, CHANNEL_BYTE)
            for make in (open_ledger, lambda: os.dup(token), lambda: os.dup(opened[2])):
                opened.append(make())
        except BaseException:
            close_all(opened)
            raise
        os.close(writing)
        _, _, ledger, their_token, their_ledger = opened
        return (ours.detach(), token, ledger), (theirs.detach(), their_token, their_ledger)


def room_for_connections() -> int:
    """How many connections this process may take in: a sixteenth of its RLIMIT_NOFILE stays free for new ones."""
    limit, held = limit_and_held()
    return max(0, limit - held - max(32, limit // 16))


class Account:
    """What has moved, and why the rest has not: a part of what `takeover status` shows. Bytes, milliseconds.

    `observer`, if any, is called when it has changed; `expected` is how many connections are to come; `last_move` is
    what the last channel took in this process, from its opening to its end.
    """

    def __init__(self) -> None:
        self.moved_in = 0
        self.moved_out = 0
        self.state_bytes = 0
        self.longest_standstill = 0.0
        self.last_move = 0.0
        self.expected = 0
        self.refused: Counter[str] = Counter()
        self.drained: Counter[str] = Counter()
        self.observer: Callable[[Account], object] | None = None

    def changed(self) -> None:
        if self.observer is not None:
            self.observer(self)

    def report(self) -> dict[str, Any]:
        return {
            "in": self.moved_in,
            "out": self.moved_out,
            "refused": dict(self.refused),
            "drained": dict(self.drained),
            "state_bytes": self.state_bytes,
            "longest_standstill_ms": round(self.longest_standstill, 3),
            "last_move_ms": round(self.last_move, 3),
        }


class Batch(NamedTuple):
    """Connections on their way since `began` (CLOCK_MONOTONIC), but for those with the indices in `skip`.

    `work` is how many seconds it took to take them out of the loop.
    """

    number: int
    descriptors: array[int]
    began: float
    skip: frozenset[int] = frozenset()
    work: float = 0.0


class End(Exchange):
    """What both ends share: the loop's watch on the socket, the clock, the token. Owns the descriptors of the channel.

    Whatever is raised while it is made, they are the caller's. `loop` has add_reader(), add_writer(), call_soon() and
    call_later(), as asyncio's loops have. `ended` is called when it has finished, and again where it is over only
    later.
    """

    begins: ClassVar[State]

    def __init__(
        self,
        loop: Any,
        connections: Connections,
        channel: Channel,
        limits: Limits,
        account: Account,
        ended: Callable[[], object],
    ) -> None:
        # With all of these the object asks the kernel nothing, which could fail.
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, 0, channel.sock)
        try:
            super().__init__(Link(sock, Peer(channel.pid, os.geteuid(), None)), limits)
            os.set_blocking(channel.token, False)
            loop.add_reader(channel.sock, self.guard, self.readable)
        except BaseException:
            sock.detach()
            raise
        self.link.before_close = self._unwatch
        self.machine.state = self.begins
        self.loop = loop
        self.connections = connections
        self.channel = channel
        self.account = account
        self.batches: deque[Batch] = deque()
        self.started = time.monotonic()
        self._ended = ended
        self._token = channel.token
        self._ledger = channel.ledger
        self._timer: Any = None
        self._writing = False

    @property
    def waits(self) -> bool:
        """Whether something is on its way, so that the other end must not be silent."""
        return bool(self.batches)

    def owned(self) -> list[int]:
        return [self._token, self._ledger]

    @property
    def over(self) -> bool:
        """Whether nothing will happen any more: it is finished, and what was to be said has gone out."""
        return self.finished and self.link.fileno() < 0

    def leave(self) -> None:
        """The loop ends: what is on its way is the other end's, who finds that nobody has claimed it."""
        self.link.close()
        if self.finished:
            return
        self._close_owned()
        for batch in self.batches:
            self.connections.drop_connections(batch.descriptors, batch.skip)
        self.batches.clear()

    def hang_up(self) -> None:
        """Closes the socket once what is queued has gone: only a release tells the other end what it owns."""
        self.link.withdraw()
        if self.link.unsent and not self.link.lost:
            self.loop.remove_reader(self.link.fileno())
            self.loop.add_writer(self.link.fileno(), self._linger)
        else:
            self.link.close()

    def _linger(self) -> None:
        with contextlib.suppress(OSError):
            self.link.flush()
        if not self.link.unsent:
            self.link.close()
            self.loop.call_soon(self._ended)

    def close_after_fork(self) -> None:
        """In a forked child: closes the descriptors, and does not touch the loop, whose epoll set is the parent's."""
        self.link.before_close = None
        self.link.close()
        self._close_owned()

    def _close_owned(self) -> None:
        close_all(self.owned())
        self._token = self._ledger = -1

    def changed(self, before: State) -> None:
        if self.finished:
            self._close_owned()
            if self._timer is not None:
                self._timer.cancel()
            if self.error is not None:
                self.error.__traceback__ = None  # which knows the records of a batch, and with them a descriptor
            self.loop.call_soon(self._ended)

    def take_token(self) -> Event:
        """Reads the channel's token: who gets the byte owns every batch that was not released."""
        return Local.GOT_CHANNEL if read_token(self._token) == CHANNEL_BYTE else Local.GOT_NOTHING

    def flushed(self) -> None:
        """The socket has room again."""
        self.link.flush()

    def guard(self, work: Callable[[], object]) -> None:
        """Lets this end work; a mistake in it costs the channel, not the service its loop."""
        if self.finished:
            return
        try:
            work()
        except Exception as error:  # noqa: BLE001 - logged, with its traceback if it is a mistake, and contained
            say_failed(f"the channel to pid {self.channel.pid}", error)
            self.error = LocalError(f"the channel to pid {self.channel.pid} failed: {error}")
            self.link.lost = True
            self.lose()
        if not self.finished:
            self._look_after()

    def _look_after(self) -> None:
        """Watches for room in the socket while something is unsent, and the clock while something is on its way."""
        if self.link.unsent and not self._writing:
            self.loop.add_writer(self.link.fileno(), self.guard, self.flushed)
        elif self._writing and not self.link.unsent:
            self.loop.remove_writer(self.link.fileno())
        self._writing = self.link.unsent
        if self.waits and self._timer is None:
            self._timer = self.loop.call_later(self.limits.heartbeat, self._ticked)

    def _ticked(self) -> None:
        self._timer = None
        if self.waits:
            self.guard(self.tick)
        else:
            self._silent = 0
            self.idle()

    def idle(self) -> None:
        """Nothing has been on its way for a moment."""

    def _unwatch(self) -> None:
        self.loop.remove_reader(self.link.fileno())
        self.loop.remove_writer(self.link.fileno())


def in_words(counts: Mapping[str, int]) -> str:
    """`3 busy, 1 version`"""
    return ", ".join(f"{count:,} {word}" for word, count in sorted(counts.items()))


def check_indices(indices: Collection[int], batch: Batch) -> bool:
    """Whether they name different connections of a batch."""
    return len(set(indices)) == len(indices) and all(index < len(batch.descriptors) for index in indices)
