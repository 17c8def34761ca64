"""Whether processes that may not be looked into wait on a listener: they wake up when somebody connects.

Where /proc/PID/fd of another user is closed to us, /proc/PID/task/TID/status still tells how often a thread has gone to
sleep. A window in which a probe is open is followed by one in which it has been closed, and by one in which nothing is
done: a process that sleeps through the last and wakes up in the first waits on the listener, whether it or another one
accepts in the end. One that hangs, or waits for something else, does not. That is evidence and no proof, and a busy
process that wakes up all the time gives none.
"""

from __future__ import annotations

import enum
from collections import Counter, defaultdict
from collections.abc import Sequence

from . import proc

WINDOW = 0.05
"""Seconds, in which a process that waits has woken up and gone to sleep again."""

ROUNDS = 8
"""Windows of each kind until it is judged; then it begins anew."""


class Window(enum.Enum):
    """What happens in it."""

    PROBED = "a probe is open"
    CLOSED = "it has been closed, which wakes up who had accepted it"
    QUIET = "nothing"


class Waking:
    """Counts for one listener of one command. `busy` is a process that woke up in the windows of both kinds."""

    def __init__(self) -> None:
        self.busy: int | None = None
        self._window = Window.QUIET
        self._before: dict[int, int] = {}
        self._until = 0.0
        self._begin()

    def _begin(self) -> None:
        self._rounds = 0
        self._hits: dict[int, Counter[Window]] = defaultdict(Counter)

    def look(self, pids: Sequence[int], now: float) -> Window | None:
        """The window that begins right now, if one does. pids: the command's. now: seconds of the monotonic clock."""
        if now < self._until:
            return None
        sleeps = {pid: count for pid in pids if (count := proc.sleeps(pid)) is not None}
        for pid, count in sleeps.items():
            self._hits[pid][self._window] += count > self._before.get(pid, count)
        self._rounds += self._window is Window.PROBED
        order = list(Window)
        self._window = order[(order.index(self._window) + 1) % len(order)]
        self._before, self._until = sleeps, now + WINDOW
        return self._window

    def judge(self) -> str:
        """What has been found, in words; empty while that is not enough."""
        if self._rounds < ROUNDS or self._window is not Window.PROBED:
            return ""
        found = ""
        self.busy = None
        for pid, hits in self._hits.items():
            probed, quiet = hits[Window.PROBED], hits[Window.QUIET]
            if (probed >= 3 and not quiet) or (probed >= ROUNDS - 1 and quiet <= 2):
                found = found or f"pid {pid} woke up for {probed} of {ROUNDS} probes, and {quiet} times without"
            elif probed >= ROUNDS - 1:
                self.busy = pid
        self._begin()
        return found
