"""What is done to an old command before it gets the stop signal, so that the signal costs no request.

1. Its listeners are taken out of its epoll sets (hush.py): newcomers go to the new command.
2. It finishes the turn in which it may have accepted for the last time. That is over when its thread sleeps again in
   epoll_wait() on the set that the listener was in.
3. Whatever it has accepted becomes a request that it knows of: that is so when the client has got the first bytes of an
   answer and nothing it sent is unread (conversations.py). A browser connects in advance and asks later or never, so
   this ends after PATIENCE.

Then every connection is in a state in which servers stop well: in the middle of a request, which they finish, or
between two, where they may close it. A few servers finish nothing and cut off everything at the stop signal. With
`drain` one more step is done for them:

4. The signal waits until no connection is left. Those that are idle between two requests are ended from outside:
   shutdown() on a copy of the connection, so that client and server read an end of file. A request that was on its way
   is answered by the kernel with a reset, as where a server closes an idle connection (RFC 9112, section 9.5): nobody
   has read it, and the client may send it again. An answer is taken for complete when nothing more of it has come for
   a while, which gets shorter towards the end. With `spare_idle` nobody is ended: websockets and the like stay with the
   old command until they leave.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterable, Sequence

from takeover.exchange import logger

from . import conversations, hush, proc, waiting
from .events import Events, Timer

PATIENCE = 1.0
"""Seconds for what has been accepted to become a request, and for a busy server to finish its turn."""

PAUSE = 0.005
"""Seconds between two looks; more where a look takes long, so that looking takes a quarter of a CPU at most."""

LONG_PAUSE = 0.25
"""The same while nothing is done but to wait until clients leave, which may take hours."""

HUSHED_FOR = 0.1
"""Seconds after which the epoll sets are looked at again."""

REST = 0.1
"""Seconds without a byte after which an answer is taken for complete, when the drain begins.

Less and less as it goes on, and nothing at its end, where what is left is cut off anyway.
"""

LATE = 0.97
"""The part of the drain up to which a server whose event loop is at work is not taken to have answered."""

LONG_REST = 0.5
"""The same where it is not certain that the last data was an answer; in the second half of the drain only."""


class Quieting:
    """Calls on_quiet once, when the signal may be sent; at once where nothing can be done, as without epoll."""

    def __init__(
        self,
        events: Events,
        pids: Callable[[], Iterable[int]],
        listeners: Sequence[socket.socket],
        on_quiet: Callable[[], object],
        *,
        drain: float = 0.0,
        spare_idle: bool = False,
    ) -> None:
        """pids: the processes of the old command at this moment. drain: seconds for step 4; 0 leaves it out."""
        self._events, self._pids, self._listeners, self._on_quiet = events, pids, listeners, on_quiet
        self._began = time.monotonic()
        self._drain = drain
        self._spare_idle = spare_idle
        self._awake: set[tuple[int, int]] = set()
        self._epolls: set[tuple[int, int]] = set()
        self._pids_hushed: set[int] = set()
        self._timer: Timer | None = None
        self._hush_again = 0.0
        self._holders: conversations.Holders | None = None
        self._ended: set[int] = set()
        self._hush()
        if self._pids_hushed:
            self._look()
        else:
            self._timer = events.call_later(0, on_quiet)

    def cancel(self) -> None:
        """on_quiet is not called any more."""
        if self._timer is not None:
            self._timer.cancel()

    def _hush(self) -> None:
        """Again and again: a server that had enough connections for a while adds its listener anew."""
        now = time.monotonic()
        if now < self._hush_again:
            return
        self._hush_again = now + HUSHED_FOR
        for entry in hush.hush(self._pids(), self._listeners):
            self._awake.add((entry.pid, entry.epoll))
            self._epolls.add((entry.pid, entry.epoll))
            self._pids_hushed.add(entry.pid)

    def _look(self) -> None:
        began = time.monotonic()
        try:
            if self._is_quiet(began - self._began):
                took = (time.monotonic() - self._began) * 1000
                logger.debug("hushed %d processes before the stop signal in %.0f ms", len(self._pids_hushed), took)
                self._on_quiet()
                return
        except (OSError, proc.Hidden) as error:
            logger.debug("not waiting for what was accepted: %s", error)
            self._on_quiet()
            return
        waits = self._spare_idle and began - self._began > PATIENCE
        pause = max(LONG_PAUSE if waits else PAUSE, 3 * (time.monotonic() - began))
        self._timer = self._events.call_later(pause, self._look)

    def _is_quiet(self, waited: float) -> bool:
        self._hush()
        if waited < PATIENCE:
            self._awake = {each for each in self._awake if not waiting.sleeps_on(*each) and proc.is_there(each[0])}
            if self._awake:
                return False
        elif not self._drain:
            return True
        if self._holders is None or not self._drain:
            self._holders = conversations.holders(self._pids_hushed)
        left = conversations.of(self._holders, self._listeners)
        if not self._drain:
            return not any(each.awaits_its_first_answer for each in left)
        left = [each for each in left if not (each.client_is_done and each.may_be_idle)]
        if not left or waited > self._drain:
            if left:
                logger.info("%d connections are left after %.0f s: the stop signal ends them", len(left), waited)
            return True
        if not self._spare_idle:
            for each in left:
                if each.inode not in self._ended and self._is_due(each):
                    self._end(each)
        return False

    def _is_due(self, each: conversations.Conversation) -> bool:
        """Whether it has been idle for so long that it may be ended."""
        spent = (time.monotonic() - self._began) / self._drain
        if each.is_idle:
            rested = each.since_sent >= 1000 * REST * max(0.0, 1 - spent) ** 2
            return rested and (each.since_sent >= 1000 * REST or spent > LATE or self._sleeps(each.pid))
        return each.may_be_idle and spent > 0.5 and each.since_sent >= 1000 * LONG_REST

    def _sleeps(self, pid: int) -> bool:
        """Whether an event loop of the process has nothing to do, and so no more of an answer to send."""
        return any(waiting.sleeps_on(pid, epoll) for holder, epoll in self._epolls if holder == pid)

    def _end(self, idle: conversations.Conversation) -> None:
        try:
            with socket.socket(fileno=hush.fetch(idle.pid, idle.descriptor)) as sock:
                # The number may be another connection's by now.
                if os.fstat(sock.fileno()).st_ino == idle.inode and conversations.end(sock, idle, self._is_due):
                    self._ended.add(idle.inode)
        except OSError as error:
            logger.debug("an idle connection of pid %d was not ended: %s", idle.pid, error.strerror)
