"""One started process of the command and all that descends from it, up to the end of the last of them.

The stop signal goes to the process that was started, as it is its business to stop its workers. What is left when it
has ended gets the signal too; and SIGKILL goes to everything that is left at the deadline.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable

from takeover.exchange import logger

from . import orphans
from .events import Events, Timer


def in_words(status: int) -> str:
    """An exit status, negative for a signal, for a log line."""
    if status >= 0:
        return f"exit status {status}"
    try:
        return signal.Signals(-status).name
    except ValueError:
        return f"signal {-status}"


class Running:
    """Calls on_end with the exit status when the process has ended, and on_gone when nothing is left of its tree."""

    def __init__(
        self,
        events: Events,
        pid: int,
        on_end: Callable[[int], object],
        on_gone: Callable[[], object],
        *,
        stop_signal: int,
        stop_timeout: float,
    ) -> None:
        self.pid = pid
        self.began = time.monotonic()
        self.ended = self.gone = False
        self._events, self._on_end, self._on_gone = events, on_end, on_gone
        self._stop_signal, self._stop_timeout = stop_signal, stop_timeout
        self._deadline: Timer | None = None
        self._killing = False
        self._asked: set[int] = set()
        events.watch_child(pid, self._process_ended)

    def signal(self, signum: int) -> None:
        """Passes a signal on to the process itself, which has not ended yet."""
        orphans.kill([self.pid], signum)

    def stop(self, timeout: float | None = None) -> None:
        """Asks it to end, and kills what has not ended after the stop timeout, or so many seconds."""
        if self._deadline is None:
            self._deadline = self._events.call_later(self._stop_timeout if timeout is None else timeout, self._overtime)
            self._ask_to_stop([] if self.ended else [self.pid])

    def kill(self) -> None:
        """Ends everything at once."""
        self._killing = True
        orphans.kill(self._tree())

    def _tree(self) -> list[int]:
        return orphans.tree(self.pid, ended=self.ended)

    def _ask_to_stop(self, pids: list[int]) -> None:
        orphans.kill(pids, self._stop_signal)
        orphans.kill(pids, signal.SIGCONT)
        self._asked.update(pids)

    def _overtime(self) -> None:
        left = self._tree()
        if left:
            logger.warning(
                "pid %d has not ended within the stop timeout: killing %d process%s",
                self.pid,
                len(left),
                "" if len(left) == 1 else "es",
            )
        self.kill()

    def _process_ended(self, status: int) -> None:
        self.ended = True
        self._on_end(status)
        self._look_for_rest()

    def _look_for_rest(self) -> None:
        """What has lost its parent is our child now: each that ends may leave others behind."""
        if self.gone:
            return
        left = self._tree()
        if not left:
            self.gone = True
            if self._deadline is not None:
                self._deadline.cancel()
            self._on_gone()
            return
        for pid in left:
            self._events.watch_child(pid, lambda _: self._look_for_rest())
        if self._killing:
            orphans.kill(left)
            return
        new = [pid for pid in left if pid not in self._asked]
        if new:
            logger.info("pid %d has left %d processes behind: stopping them", self.pid, len(new))
        self.stop()
        self._ask_to_stop(new)
