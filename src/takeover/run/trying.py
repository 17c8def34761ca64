"""A command of the user's that tells by its exit status whether the server is ready, run without blocking the loop."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Mapping

from .events import Events, Timer

PATIENCE = 10.0
"""Seconds until a command that has not ended is killed, and counts as failed."""

_KEPT = 4096


class Trying:
    """Runs `sh -c COMMAND` once, in a process group of its own, and calls back with its exit status and last line.

    The status is negative for a signal, as in os.waitstatus_to_exitcode(). What it writes is not shown.
    """

    def __init__(
        self,
        events: Events,
        command: str,
        environment: Mapping[str, str],
        on_end: Callable[[int, str], object],
    ) -> None:
        """Raises OSError if it cannot be started."""
        self._events = events
        self._on_end = on_end
        self._written = b""
        self._over = False
        self._reading, writing = os.pipe()
        try:
            os.set_blocking(self._reading, False)
            self._pid = os.posix_spawn(
                "/bin/sh",
                ["sh", "-c", command],
                {**os.environ, **environment},
                file_actions=[
                    (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                    (os.POSIX_SPAWN_DUP2, writing, 1),
                    (os.POSIX_SPAWN_DUP2, writing, 2),
                ],
                setpgroup=0,
                setsigmask=[],
                setsigdef=[each for each in signal.Signals if each not in (signal.SIGKILL, signal.SIGSTOP)],
            )
        except BaseException:
            os.close(self._reading)
            raise
        finally:
            os.close(writing)
        events.watch(self._reading, self._read)
        events.watch_child(self._pid, self._ended)
        self._timer: Timer = events.call_later(PATIENCE, self._kill)

    def _read(self) -> None:
        with contextlib.suppress(BlockingIOError):
            data = os.read(self._reading, 65536)
            self._written = (self._written + data)[-_KEPT:]
            if not data:
                self._events.unwatch(self._reading)

    def _ended(self, status: int) -> None:
        if not self._over:
            self._read()
            self._close()
            lines = self._written.decode(errors="replace").split("\n")
            self._on_end(status, next((line.strip() for line in reversed(lines) if line.strip()), ""))

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._pid, signal.SIGKILL)

    def _close(self) -> None:
        self._over = True
        self._timer.cancel()
        self._events.unwatch(self._reading)
        os.close(self._reading)

    def close(self) -> None:
        """Ends it if it still runs, and calls nobody; harmless a second time."""
        if not self._over:
            self._kill()
            self._close()
