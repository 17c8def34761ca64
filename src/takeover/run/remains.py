"""What a supervisor that was killed has left behind, found by the next one that starts in its place.

A process of the command dies with its supervisor, but the workers that it had started may live on, and hold the port.
Each has in its environment whose it is: MARK, with the supervisor's pid, the moment of its start, and its control path.
Whoever starts cold holds the lock of that path, and so knows that nobody serves there who is to be left alone.
"""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Sequence

from takeover.errors import ListenError
from takeover.exchange import logger
from takeover.listeners import bind, resolve

from .orphans import kill
from .proc import all_processes, environment, look_at

MARK = "TAKEOVER_RUN"
PATIENCE = 2.0
"""Seconds that remains have to stop serving, until they are killed; and as many again to be gone then."""


def mark(control: str) -> str:
    """The value of MARK for a command of this process."""
    this = look_at(os.getpid())
    return f"{os.getpid()} {this.started if this is not None else 0} {os.path.abspath(control)}"


def find(control: str) -> list[int]:
    """The processes of commands at this control path whose supervisor has ended."""
    found = []
    for process in all_processes():
        if process.has_ended or process.pid == os.getpid() or not _in_our_pid_namespace(process.pid):
            continue
        pid, _, rest = environment(process.pid).get(MARK, "").partition(" ")
        started, _, path = rest.partition(" ")
        if path == os.path.abspath(control) and pid.isdigit() and started.isdigit():
            supervisor = look_at(int(pid))
            if supervisor is None or supervisor.has_ended or supervisor.started != int(started):
                found.append(process.pid)
    return found


def _in_our_pid_namespace(pid: int) -> bool:
    """Elsewhere, a container's for instance, the pid of a supervisor would be that of another process here."""
    try:
        return os.stat(f"/proc/{pid}/ns/pid").st_ino == os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return False


def clear_away(control: str, urls: Sequence[str]) -> None:
    """Where an address is taken, ends what is left behind there, until all are free; nobody else."""
    signum, deadline = signal.SIGTERM, time.monotonic() + PATIENCE
    told: set[int] = set()
    while not all(map(_is_free, urls)):
        left = find(control)
        if time.monotonic() > deadline and signum == signal.SIGTERM:
            signum, deadline = signal.SIGKILL, time.monotonic() + PATIENCE
            told.clear()
        if not left or time.monotonic() > deadline:
            return
        new = [pid for pid in left if pid not in told]
        if new:
            pids = ", ".join(f"pid {pid}" for pid in new)
            logger.warning("%s to %s, left behind by a supervisor that was killed", signum.name, pids)
            kill(new, signum)
            told.update(new)
        time.sleep(0.01)


def _is_free(url: str) -> bool:
    """Whether each of the addresses could be bound now; whoever binds them in earnest gets the error in full."""
    try:
        for address in resolve(url):
            bind(address).close()
            if address.family == socket.AF_UNIX:
                os.unlink(address.address)
    except (ListenError, OSError):
        return False
    return True
