"""What peers may cost, however many they are and whatever they do: CPU time of one thread, and lines of the log."""

from __future__ import annotations

import logging
import time

SHARE = 0.1
"""The part of a core that the control thread may use in the long run, so that the server keeps the rest."""

BURST = 0.5
"""Seconds of CPU time that it may have saved up: many times what the largest takeover needs of it."""

MOST_LINES = 10
PERIOD = 10.0
"""Seconds in which so many lines of one kind are logged."""


class CpuAllowance:
    """CPU time of the calling thread, which it earns by the clock and pays as it works; from one thread only."""

    def __init__(self, share: float = SHARE, burst: float = BURST) -> None:
        self._share = share
        self._burst = burst
        self._saved = burst
        self._at = time.monotonic()
        self._spent = time.thread_time()

    def debt(self) -> float:
        """Seconds to rest until nothing is owed; 0.0 if nothing is."""
        now, spent = time.monotonic(), time.thread_time()
        self._saved = min(self._burst, self._saved + (now - self._at) * self._share) - (spent - self._spent)
        self._at, self._spent = now, spent
        return max(0.0, -self._saved / self._share)


class SparingLogger:
    """Logs what any peer can cause as often as it likes: MOST_LINES of a kind in PERIOD, then how many were left out.

    A kind is one text before its arguments are put in.
    """

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger
        self._kinds: dict[str, tuple[float, int]] = {}

    def log(self, level: int, text: str, *arguments: object) -> None:
        """As logging.Logger.log()."""
        now = time.monotonic()
        since, lines = self._kinds.get(text, (now, 0))
        if now - since >= PERIOD:
            if lines > MOST_LINES:
                self._logger.log(level, "%d more lines like the next were left out", lines - MOST_LINES)
            since, lines = now, 0
        self._kinds[text] = since, lines + 1
        if lines < MOST_LINES:
            self._logger.log(level, text, *arguments)
