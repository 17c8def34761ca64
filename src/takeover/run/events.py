"""A small selector loop for one thread: descriptors that become readable, timers, and calls from other threads."""

from __future__ import annotations

import contextlib
import heapq
import itertools
import os
import selectors
import time
from collections import deque
from collections.abc import Callable

Callback = Callable[[], object]


class Timer:
    """A call at a moment to come, unless it is cancelled before."""

    __slots__ = ("_callback", "when")

    def __init__(self, when: float, callback: Callback) -> None:
        self.when = when
        self._callback: Callback | None = callback

    def cancel(self) -> None:
        """Nothing happens any more; harmless when it has happened already."""
        self._callback = None

    @property
    def pending(self) -> bool:
        return self._callback is not None

    def fire(self) -> None:
        callback, self._callback = self._callback, None
        if callback is not None:
            callback()


class Events:
    """Runs in one thread; only post() and stop() may be called from others, and from signal handlers.

    While nothing is due it sleeps in the selector without a time limit, so that a supervisor costs nothing.
    """

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._timers: list[tuple[float, int, Timer]] = []
        self._order = itertools.count()
        self._posted: deque[Callback] = deque()
        self._children: dict[int, Callable[[int], object]] = {}
        self._stopped = False
        self._woken, self._waker = os.pipe()
        os.set_blocking(self._woken, False)
        os.set_blocking(self._waker, False)
        self._selector.register(self._woken, selectors.EVENT_READ, self._drain)

    def watch(self, descriptor: int, callback: Callback) -> None:
        """Calls back as long as the descriptor is readable; it is the caller's, who unwatches it before closing it."""
        self._selector.register(descriptor, selectors.EVENT_READ, callback)

    def unwatch(self, descriptor: int) -> None:
        """Harmless for one that is not watched."""
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(descriptor)

    def call_later(self, seconds: float, callback: Callback) -> Timer:
        """Calls back once, in so many seconds of the monotonic clock."""
        timer = Timer(time.monotonic() + seconds, callback)
        heapq.heappush(self._timers, (timer.when, next(self._order), timer))
        return timer

    def watch_child(self, pid: int, callback: Callable[[int], object]) -> None:
        """Calls back once with the exit status of a child, as os.waitstatus_to_exitcode() gives it: negative for a
        signal. Whoever starts a child registers it here, and leaves the waiting for it to reap().
        """
        self._children[pid] = callback

    def reap(self) -> None:
        """Takes in every child that has ended, also those that were left behind by others; call it upon SIGCHLD."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if not pid:
                return
            callback = self._children.pop(pid, None)
            if callback is not None:
                callback(os.waitstatus_to_exitcode(status))

    def post(self, callback: Callback) -> None:
        """Calls back in the loop's thread, soon."""
        self._posted.append(callback)
        self._wake()

    @property
    def waker(self) -> int:
        """A descriptor that wakes the loop when it is written to: signal.set_wakeup_fd() wants one."""
        return self._waker

    def stop(self) -> None:
        """run() returns when what is going on has returned."""
        self._stopped = True
        self._wake()

    def run(self) -> None:
        """Until stop() is called; may be called again afterwards."""
        while not self._stopped:
            self.run_once()
        self._stopped = False

    def run_once(self, patience: float | None = None) -> None:
        """One turn, which waits for at most `patience` seconds, or until something happens."""
        for key, _ in self._selector.select(self._timeout(patience)):
            if self._selector.get_map().get(key.fd) == key:
                key.data()
        while self._posted:
            self._posted.popleft()()
        now = time.monotonic()
        while self._timers and (self._timers[0][0] <= now or not self._timers[0][2].pending):
            heapq.heappop(self._timers)[2].fire()

    def close(self) -> None:
        """Frees the loop's own descriptors."""
        self._selector.close()
        os.close(self._woken)
        os.close(self._waker)

    def _timeout(self, patience: float | None) -> float | None:
        while self._timers and not self._timers[0][2].pending:
            heapq.heappop(self._timers)
        if self._posted or self._stopped:
            return 0
        if not self._timers:
            return patience
        due = max(0.0, self._timers[0][0] - time.monotonic())
        return due if patience is None else min(due, patience)

    def _wake(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.write(self._waker, b"\0")

    def _drain(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while len(os.read(self._woken, 4096)) == 4096:
                pass
