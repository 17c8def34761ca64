"""Where any server takes over from itself, known only by what can be seen from outside."""

from __future__ import annotations

import contextlib
import pathlib
import shlex
import socket
import subprocess
import sys
import time

from processes import PROGRAMS, Program, Room
from takeover.run.probes import Endpoint, Probe

PATIENCE = 0.5
"""Seconds in which a server that lives accepts."""


class Stage(Room):
    """One server, and a room in which it is started again and again. Another one needs but its command.

    command: an echo server on {host} and {port} whose processes meet in {folder}, at a path that is named in full.
    Started again, it takes over, and the one before ends with exit status 0 when its clients have gone; so it does at
    SIGTERM. One that has failed to take over ends with another status.
    """

    kind = "listeners"

    def __init__(self, command: str = "", backend: str = "auto") -> None:
        super().__init__(backend)
        self.tells = False
        self.tracebacks_allowed = True
        self._command = command
        self._before: set[str] = set()

    @property
    def mark(self) -> str:
        """What the successor's first call of its own names."""
        return self.folder

    def start(self, gated: bool = False) -> Program:
        """gated: it waits for a line on its standard input, and can be traced meanwhile."""
        host, port = self.address
        words = [word.format(host=host, port=port, folder=self.folder) for word in shlex.split(self._command)]
        if not gated:
            return self.run(*words)
        self._before = self._listening()
        return self.run(sys.executable, "-S", str(PROGRAMS / "gated.py"), *words, stdin=subprocess.PIPE)

    def accepting(self) -> int | None:
        """The pid of the process that accepts; None while there is none."""
        pids = [program.pid for program in self.programs if program.running]
        where = Endpoint(self.url, socket.AF_INET, socket.SOCK_STREAM, self.address, 0)
        deadline = time.monotonic() + PATIENCE
        with contextlib.closing(Probe(where)) as probe:
            while not probe.lost and time.monotonic() < deadline:
                taken = probe.taken(pids)
                if taken is not None:
                    return taken.pid
                time.sleep(0.002)
        return None

    def owner(self) -> int | None:
        """The pid of the process that owns the service, if that is settled; None while there is none."""
        return self.accepting()

    def knows_the_end_of(self, survivor: Program, is_successor: bool, owner: int | None) -> bool:
        """Whether a process has found out that the other one is stopped, and has done what it can do alone."""
        return not survivor.running or owner == survivor.pid

    def started_cold(self, successor: Program) -> bool:
        """Whether it has taken nothing over, since nothing was left: the listener is another one."""
        return not self._before & self._listening()

    def _listening(self) -> set[str]:
        """The inodes of the listeners at the address, by proc_net_tcp(5)."""
        host, port = self.address
        address = f"{socket.inet_aton(host)[::-1].hex().upper()}:{port:04X}"
        rows = [line.split() for line in pathlib.Path("/proc/net/tcp").read_text().splitlines()[1:]]
        return {row[9] for row in rows if row[1] == address and row[3] == "0A"}

    def moved(self, program: Program) -> int | None:
        """How many connections the process says that it has moved, to or from the other one; None if it is silent."""
        return None

    def closed(self, program: Program) -> int:
        """How many connections it says that it has closed at the drain deadline."""
        return 0

    def left_behind(self) -> list[str]:
        """What must not be there when all processes have ended; what hinders the next start is found by that."""
        return []
