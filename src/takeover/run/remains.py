"""What a supervisor that was killed has left behind, found by the next one that starts in its place.

A process of the command dies with its supervisor, but the workers that it had started may live on, and hold the port.
Each has in its environment whose it is: MARK, with the supervisor's pid, the moment of its start, and its control path.
Whoever starts cold holds the lock of that path, and so knows that nobody serves there who is to be left alone.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import TypeVar

from takeover.errors import ListenError
from takeover.exchange import logger

from .orphans import kill
from .proc import all_processes, environment, look_at

MARK = "TAKEOVER_RUN"
PATIENCE = 2.0
"""Seconds that remains have to stop serving, until they are killed; and as many again to be gone then."""

Result = TypeVar("Result")


def mark(control: str) -> str:
    """The value of MARK for a command of this process."""
    this = look_at(os.getpid())
    return f"{os.getpid()} {this.started if this is not None else 0} {os.path.abspath(control)}"


def find(control: str) -> list[int]:
    """The processes of commands at this control path whose supervisor has ended."""
    found = []
    for process in all_processes():
        if process.has_ended or process.pid == os.getpid():
            continue
        pid, _, rest = environment(process.pid).get(MARK, "").partition(" ")
        started, _, path = rest.partition(" ")
        if path == os.path.abspath(control) and pid.isdigit() and started.isdigit():
            supervisor = look_at(int(pid))
            if supervisor is None or supervisor.has_ended or supervisor.started != int(started):
                found.append(process.pid)
    return found


def clear_away(control: str, bind: Callable[[], Result]) -> Result:
    """Binds. Where the address is taken, and remains are there, ends them until it is free; else raises ListenError."""
    signum, deadline = signal.SIGTERM, time.monotonic() + PATIENCE
    told: set[int] = set()
    while True:
        try:
            return bind()
        except ListenError:
            left = find(control)
            late = time.monotonic() > deadline
            if not left or (late and signum == signal.SIGKILL):
                raise
            if late:
                signum, deadline = signal.SIGKILL, time.monotonic() + PATIENCE
                told.clear()
        new = [pid for pid in left if pid not in told]
        if new:
            logger.warning(
                "%s to %s, left behind by a supervisor that was killed",
                signum.name,
                ", ".join(f"pid {pid}" for pid in new),
            )
            kill(new, signum)
            told.update(new)
        time.sleep(0.01)
