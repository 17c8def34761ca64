"""The control thread: one small selector loop in which every exchange has a machine and time limits of its own.

The owner's side and the successor's side both live here, so a successor becomes the owner without a change of threads,
and one implementation serves the native loop, asyncio and servers that block. A silent or hostile connection delays
neither status nor the next successor. While nothing is under way the thread sleeps in the kernel without a time limit.

Ticks are counted, not clocked: a tick that comes late counts once. So a process that was stopped and goes on finds what
its peer sent in the meantime before it judges anybody's silence.

However many peers there are and whatever they send, the thread leaves the server its CPU time (allowance.py): in debt
it looks at nothing but what this process itself asks for and at the ticks.

What one event closes may have others pending in the same round, and its number may be another's by then: they are
dropped.
"""

from __future__ import annotations

import contextlib
import os
import select
import selectors
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import TypeVar

from .allowance import CpuAllowance
from .errors import LocalError
from .exchange import Exchange, say_failed
from .link import close_all
from .protocol import Limits

Result = TypeVar("Result")


class ControlThread:
    """Owns the thread, its selector and the links of its exchanges; `ended` is set when the thread has ended.

    Other threads come in through `post` and `ask` only.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.exchanges: dict[Exchange, tuple[int, int]] = {}
        self.ended = threading.Event()
        self._posted: deque[Callable[[], object]] = deque()
        # Whoever wakes the thread must not do so through a descriptor that is closed, and perhaps another file by now.
        # Reentrant, since the handler of a signal may post as well.
        self._waking = threading.RLock()
        with contextlib.ExitStack() as opened:
            try:
                self.selector = selectors.DefaultSelector()
                opened.callback(self.selector.close)
                self._wake_reading, self._wake_writing = os.pipe()
                opened.callback(close_all, [self._wake_reading, self._wake_writing])
                os.set_blocking(self._wake_reading, False)
                os.set_blocking(self._wake_writing, False)
                self.selector.register(self._wake_reading, selectors.EVENT_READ, self._woken)
            except OSError as error:
                raise LocalError(f"no selector and pipe for the control thread: {error.strerror}") from None
            opened.pop_all()
        self._next_tick = 0.0
        self._at_next_tick: list[Callable[[], object]] = []
        self._alarm: tuple[float, Callable[[], object]] | None = None
        self._thread = threading.Thread(target=self._run, name="takeover-control", daemon=True)

    def start(self) -> None:
        """Starts the thread. Raises LocalError where the system allows no more, and has closed its descriptors then."""
        try:
            self._thread.start()
        except RuntimeError as error:
            self.close_after_fork()
            raise LocalError(f"the control thread: {error}; see RLIMIT_NPROC and pids.max of the cgroup") from None

    def post(self, callback: Callable[[], object]) -> None:
        """Runs the callback in the control thread, soon; dropped if the thread has ended."""
        self._posted.append(callback)
        with self._waking, contextlib.suppress(BlockingIOError):
            if self._wake_writing >= 0:
                os.write(self._wake_writing, b"\0")

    def ask(self, question: Callable[[], Result]) -> Result:
        """Runs the question in the control thread and returns its answer, or raises what it raised.

        Raises LocalError where the thread has ended, and the question was not asked.
        """
        answer: Future[Result] = Future()

        def run() -> None:
            try:
                answer.set_result(question())
            except BaseException as error:  # noqa: BLE001 - raised again in the thread that asked
                answer.set_exception(error)

        if threading.current_thread() is self._thread:
            run()
            return answer.result()
        if not self.ended.is_set():
            self.post(run)
        if self.ended.is_set():
            self._thread.join()
            if not answer.done():
                raise LocalError("the service has been closed")
        return answer.result()

    def close(self) -> None:
        """Ends the thread and closes what it owns; what is under way ends as it would by a death."""
        if self.ended.is_set():
            return
        self.post(self.ended.set)
        self._thread.join()
        for exchange in list(self.exchanges):
            exchange.link.close()
        with self._waking:
            self.close_after_fork()

    def close_after_fork(self) -> None:
        """In a forked child, where the thread does not run: closes its descriptors, touches no shared epoll set."""
        self.ended.set()
        for exchange in self.exchanges:
            exchange.link.before_close = None
            exchange.link.close()
            close_all(exchange.owned())
        self.exchanges.clear()
        self.selector.close()
        close_all([self._wake_reading, self._wake_writing])
        self._wake_reading = self._wake_writing = -1

    def add(self, exchange: Exchange, first: Callable[[], object] = bool) -> None:
        """Takes an exchange in, and has it do the first thing; it leaves by itself when it is over for good."""
        if not self._needs_ticks():
            self._next_tick = time.monotonic() + self.limits.heartbeat
        self.exchanges[exchange] = (-1, -1)
        exchange.link.before_close = lambda: self._unregister(exchange)
        self.run_step(exchange, first)

    def at_next_tick(self, callback: Callable[[], object]) -> None:
        """Runs the callback in the control thread after a heartbeat's time; only for the control thread."""
        if not self._needs_ticks():
            self._next_tick = time.monotonic() + self.limits.heartbeat
        self._at_next_tick.append(callback)

    def call_in(self, seconds: float, callback: Callable[[], object]) -> None:
        """Runs the callback in the control thread when so many seconds have passed, in place of the last such wish."""
        self.post(lambda: setattr(self, "_alarm", (time.monotonic() + seconds, callback)))

    def run_step(self, exchange: Exchange, work: Callable[[], object]) -> None:
        """Lets one exchange work; a mistake in it costs that exchange its link, not the service its control thread."""
        if exchange not in self.exchanges or exchange.finished:
            return
        try:
            work()
            self._watch(exchange)
        except Exception as error:  # noqa: BLE001 - logged, with its traceback if it is a mistake, and contained
            what = f"the exchange with {exchange.link.name}"
            say_failed(what, error)
            exchange.error = exchange.error or LocalError(f"{what} failed: {error}")
            exchange.link.close()
            exchange.lose()
            self._watch(exchange)

    def _run(self) -> None:
        allowance = CpuAllowance()
        while not self.ended.is_set():
            ticking = self._needs_ticks()
            patience = self._patience(ticking=ticking)
            debt = allowance.debt()
            if debt:
                self._rest(debt if patience is None else min(debt, patience))
            else:
                self._run_ready(patience)
            while self._posted and not self.ended.is_set():
                self._run_posted(self._posted.popleft())
            if ticking and time.monotonic() >= self._next_tick:
                self._next_tick = time.monotonic() + self.limits.heartbeat
                due, self._at_next_tick = self._at_next_tick, []
                for callback in due:
                    self._run_posted(callback)
                for exchange in list(self.exchanges):
                    self.run_step(exchange, exchange.tick)
            if self._alarm is not None and time.monotonic() >= self._alarm[0]:
                (_, callback), self._alarm = self._alarm, None
                self._run_posted(callback)
        while self._posted:
            # Whoever asks looks at `ended` after posting: it was not set yet, so there must be an answer.
            self._run_posted(self._posted.popleft())

    def _run_ready(self, patience: float | None) -> None:
        """What is ready; an earlier event of the same batch may have closed the link of a later one."""
        for key, mask in self.selector.select(patience):
            still = self.selector.get_map().get(key.fd)
            if still is not None and still.data is key.data:
                self._run_posted(partial(key.data, mask))

    def _rest(self, seconds: float) -> None:
        """Waits for no peer, but for a wish of this process."""
        poll = select.poll()
        poll.register(self._wake_reading, select.POLLIN)
        if poll.poll(seconds * 1000):
            self._woken(0)

    def _patience(self, *, ticking: bool) -> float | None:
        """Seconds until there is something to do, should nothing come."""
        moments = [self._next_tick] if ticking else []
        if self._alarm is not None:
            moments.append(self._alarm[0])
        return max(0.0, min(moments) - time.monotonic()) if moments else None

    def _run_posted(self, callback: Callable[[], object]) -> None:
        try:
            callback()
        except Exception as error:  # noqa: BLE001 - logged, with its traceback if it is a mistake, and contained
            say_failed("what the control thread was asked for", error)

    def _needs_ticks(self) -> bool:
        return bool(self._at_next_tick) or any(exchange.needs_ticks for exchange in self.exchanges)

    def _woken(self, _mask: int) -> None:
        os.read(self._wake_reading, 4096)

    def _ready(self, exchange: Exchange, mask: int) -> None:
        def work() -> None:
            if mask & selectors.EVENT_WRITE:
                exchange.link.flush()
            if mask & selectors.EVENT_READ:
                exchange.readable()

        self.run_step(exchange, work)

    def _watch(self, exchange: Exchange) -> None:
        """Brings the selector up to date with what the exchange waits for."""
        if exchange.link.lost:
            exchange.link.close()
            if exchange.finished or not exchange.needs_ticks:
                self.exchanges.pop(exchange, None)
            return
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if exchange.link.unsent else 0)
        sock, pidfd = self.exchanges[exchange]
        if sock < 0:
            sock = exchange.link.fileno()
            self.selector.register(sock, events, lambda mask: self._ready(exchange, mask))
            self.exchanges[exchange] = (sock, pidfd)
        elif self.selector.get_key(sock).events != events:
            self.selector.modify(sock, events, self.selector.get_key(sock).data)
        if not exchange.knows_peer and pidfd >= 0:
            self.selector.unregister(pidfd)
            self.exchanges[exchange] = (sock, -1)
        elif exchange.knows_peer and pidfd < 0 and exchange.link.peer.pidfd is not None:
            pidfd = exchange.link.peer.pidfd
            self.selector.register(pidfd, selectors.EVENT_READ, lambda _: self.run_step(exchange, exchange.died))
            self.exchanges[exchange] = (sock, pidfd)

    def _unregister(self, exchange: Exchange) -> None:
        for descriptor in self.exchanges[exchange]:
            if descriptor >= 0:
                self.selector.unregister(descriptor)
        self.exchanges[exchange] = (-1, -1)
