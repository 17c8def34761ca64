"""All that is takeover's own: how its echo server is started, who owns the service, and what its lines say."""

from __future__ import annotations

import functools
import re
import subprocess
from typing import Any

from processes import FAST, Program, Room, environment

from .nursery import Nursery, Nursling

PROBATION = 0.1
DRAIN_TIMEOUT = 5.0
"""Seconds that a process has whose successor was killed before it could take the connections over."""


@functools.cache
def nursery(backend: str) -> Nursery:
    """The one for a backend, which is chosen when takeover is imported."""
    return Nursery(environment(backend))


class Stage(Room):
    """A room in which echo servers take over from each other. kind: "listeners", or "live" where connections move."""

    def __init__(self, backend: str, kind: str) -> None:
        super().__init__(backend)
        self.kind = kind
        self.tells = False

    def run(self, *command: str, **options: Any) -> Program:
        """Starts a program of Python in this room."""
        start = functools.partial(Nursling, nursery(self.backend))
        return super().run(*command, start=start, **options)

    @property
    def mark(self) -> str:
        """What the successor's first call of its own names."""
        return self.folder

    def start(self, gated: bool = False) -> Program:
        """gated: it waits for a line on its standard input, and can be traced meanwhile."""
        options: dict[str, Any] = {
            "listen": [self.url],
            "control": self.control,
            "live": self.kind == "live",
            "probation": PROBATION,
            "drain_timeout": DRAIN_TIMEOUT,
        }
        wishes = {"options": options, "limits": FAST}
        if gated:
            return self.program("echo.py", {**wishes, "gated": True}, stdin=subprocess.PIPE)
        return self.program("echo.py", wishes)

    @staticmethod
    def knows_the_end_of(survivor: Program, is_successor: bool, owner: int | None) -> bool:
        """Whether a process has found out that the other one is stopped, and has done what it can do alone."""
        if not survivor.running:
            return True
        if is_successor or owner != survivor.pid:
            return owner == survivor.pid
        asked = "asks for the service" in survivor.text
        return "is off" in survivor.text or not asked

    @staticmethod
    def started_cold(successor: Program) -> bool:
        """Whether it has taken nothing over, since nothing was left."""
        return "(generation 1," in successor.text

    @staticmethod
    def moved(program: Program) -> int | None:
        """How many connections the process says that it has moved, to or from the other one; None if it is silent."""
        found = re.search(r"moved ([\d,]+) connections (?:to|from) pid", program.text)
        return int(found[1].replace(",", "")) if found else None

    @staticmethod
    def closed(program: Program) -> int:
        """How many connections it says that it has closed at the drain deadline."""
        return sum(int(count.replace(",", "")) for count in re.findall(r"closed ([\d,]+) connections", program.text))
