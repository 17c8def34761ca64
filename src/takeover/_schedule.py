"""What both loops run besides connections: callbacks, timers, signals, and the pipe that wakes a sleeping loop."""

from __future__ import annotations

import contextlib
import heapq
import logging
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable
from types import FrameType
from typing import Any

log = logging.getLogger("takeover")


class Timer:
    """A callback that is yet to run; cancel() lets go of it and of its arguments at once."""

    __slots__ = ("_args", "_callback", "_when", "schedule")

    def __init__(self, when: float, callback: Callable[..., object], args: tuple[Any, ...]) -> None:
        if not callable(callback):
            raise TypeError(f"a callable is required, not {callback!r}")
        self._when = when
        self._callback: Callable[..., object] | None = callback
        self._args = args
        self.schedule: Schedule | None = None

    def cancel(self) -> None:
        if self._callback is not None:
            self._callback, self._args = None, ()
            if self.schedule is not None:
                self.schedule.forget_cancelled()

    def cancelled(self) -> bool:
        return self._callback is None

    def when(self) -> float:
        """CLOCK_MONOTONIC seconds at which it is due; 0.0 from call_soon."""
        return self._when

    def run(self) -> None:
        callback, args = self._callback, self._args
        if callback is None:
            return
        try:
            callback(*args)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException:
            log.exception("callback %r raised", callback)


class Schedule:
    """The callbacks and timers of one loop. `wakeup` is a descriptor that turns readable when `woken` is to be called.

    Only call_soon_threadsafe may be called from other threads. A byte in the pipe only wakes the loop: the interpreter
    writes one for a signal before its Python-level handler runs, which makes the callback ready. So a signal that comes
    while its handler is being set is neither lost nor counted twice.
    """

    def __init__(self) -> None:
        self.closed = True
        self.wakeup, self._write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self.ready: deque[Timer] = deque()
        self.timers: list[tuple[float, int, Timer]] = []
        self.closed = False
        self._farewells: deque[Timer] = deque()
        self._sequence = 0
        self._cancelled = 0
        self._awake = False
        self._lock = threading.RLock()  # a signal handler may call in while its thread holds it
        self._signals: dict[int, tuple[Any, Callable[..., object], tuple[Any, ...]]] = {}
        self._former_wakeup: int | None = None

    def call_soon(self, callback: Callable[..., object], *args: Any) -> Timer:
        self._check()
        timer = Timer(0.0, callback, args)
        self.ready.append(timer)
        return timer

    def call_soon_threadsafe(self, callback: Callable[..., object], *args: Any) -> Timer:
        with self._lock:
            timer = self.call_soon(callback, *args)
            if not self._awake:
                self._awake = True
                os.write(self._write, b"\0")
        return timer

    def call_at(self, when: float, callback: Callable[..., object], *args: Any) -> Timer:
        self._check()
        timer = Timer(when, callback, args)
        timer.schedule = self
        self._sequence += 1
        heapq.heappush(self.timers, (when, self._sequence, timer))
        return timer

    def bid_farewell(self, callback: Callable[..., object]) -> None:
        """Call back in the next turn, or before the loop closes at the latest."""
        if not self._farewells:
            self.call_soon(self.say_farewell)
        self._farewells.append(Timer(0.0, callback, ()))

    def say_farewell(self) -> None:
        """Call back now where that was bidden."""
        while self._farewells:
            self._farewells.popleft().run()

    def forget_cancelled(self) -> None:
        """Called for each timer that is cancelled; once most of a long heap is cancelled, it is built anew."""
        self._cancelled += 1
        if self._cancelled > 64 and 2 * self._cancelled > len(self.timers):
            self.timers[:] = [entry for entry in self.timers if not entry[2].cancelled()]
            heapq.heapify(self.timers)
            self._cancelled = 0

    def run_due(self) -> None:
        """Run what was ready or due when this was called; what that adds runs next time."""
        if self.timers:
            now = time.monotonic()
            while self.timers and (self.timers[0][0] <= now or self.timers[0][2].cancelled()):
                timer = heapq.heappop(self.timers)[2]
                timer.schedule = None
                if timer.cancelled():
                    self._cancelled -= 1
                else:
                    self.ready.append(timer)
        for _ in range(len(self.ready)):
            self.ready.popleft().run()

    def woken(self) -> None:
        """Empty the pipe."""
        with self._lock:
            self._awake = False
            with contextlib.suppress(BlockingIOError):
                os.read(self.wakeup, 4096)

    def _handle(self, signum: int, _frame: FrameType | None) -> None:
        if signum in self._signals and not self.closed:
            _, callback, args = self._signals[signum]
            self.call_soon(callback, *args)

    def catch_signals(self) -> bool:
        """Have signals wake the loop through the pipe; True if that is new, False on another than the main thread."""
        if self._former_wakeup is not None or threading.current_thread() is not threading.main_thread():
            return False
        self._former_wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        return True

    def release_signals(self) -> None:
        if self._former_wakeup is not None and not self._signals:
            signal.set_wakeup_fd(self._former_wakeup)
            self._former_wakeup = None

    def add_signal_handler(self, signum: int, callback: Callable[..., object], args: tuple[Any, ...]) -> None:
        self._check()
        if not callable(callback):
            raise TypeError(f"a callable is required, not {callback!r}")
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError("signals can only be handled on the main thread: add the handler there")
        self.catch_signals()
        former = self._signals[signum][0] if signum in self._signals else signal.getsignal(signum)
        self._signals[signum] = (former, callback, args)
        try:
            signal.signal(signum, self._handle)
        except OSError:
            del self._signals[signum]
            raise
        signal.siginterrupt(signum, False)

    def remove_signal_handler(self, signum: int) -> bool:
        if signum not in self._signals:
            return False
        former = self._signals.pop(signum)[0]
        signal.signal(signum, signal.SIG_DFL if former is None else former)
        return True

    def close(self) -> None:
        """Put the signals back as they were, forget every callback, close both ends of the pipe."""
        for signum in list(self._signals):
            self.remove_signal_handler(signum)
        self.release_signals()
        with self._lock:
            self.closed = True
            self.ready.clear()
            self.timers.clear()
            os.close(self.wakeup)
            os.close(self._write)

    def __del__(self) -> None:
        if not self.closed:
            self.close()

    def _check(self) -> None:
        if self.closed:
            raise RuntimeError("the loop is closed")
