"""All that is takeover's own: how its echo server is started, who owns the service, and what its lines say."""

from __future__ import annotations

import re
import subprocess
from typing import Any

from processes import FAST, Program, Room

from .stage import Stage

PROBATION = 0.1
DRAIN_TIMEOUT = 5.0
"""Seconds that a process has whose successor was killed before it could take the connections over."""


class Takeover(Stage):
    """The package's echo server. kind: "listeners", or "live" where connections move."""

    owner, left_behind = Room.owner, Room.left_behind

    def __init__(self, backend: str, kind: str) -> None:
        super().__init__(backend=backend)
        self.kind = kind
        self.tracebacks_allowed = False

    def start(self, gated: bool = False) -> Program:
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

    def accepting(self) -> int | None:
        return self.whoever_is("serving", "probation")

    def knows_the_end_of(self, survivor: Program, is_successor: bool, owner: int | None) -> bool:
        if not survivor.running:
            return True
        if is_successor or owner != survivor.pid:
            return owner == survivor.pid
        asked = "asks for the service" in survivor.text
        return "is off" in survivor.text or not asked

    def started_cold(self, successor: Program) -> bool:
        return "(generation 1," in successor.text

    def moved(self, program: Program) -> int | None:
        found = re.search(r"moved ([\d,]+) connections (?:to|from) pid", program.text)
        return int(found[1].replace(",", "")) if found else None

    def closed(self, program: Program) -> int:
        return sum(int(count.replace(",", "")) for count in re.findall(r"closed ([\d,]+) connections", program.text))
