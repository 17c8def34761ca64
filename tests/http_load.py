"""Clients of benchmarks/http_load.py for as long as a test deploys."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys
from typing import Any

from clients import LIMIT

PROGRAM = pathlib.Path(__file__).parent.parent / "benchmarks" / "http_load.py"


class HttpLoad:
    """In a process of its own, from its making to finish()."""

    def __init__(self, address: tuple[str, int], *options: str) -> None:
        command = [sys.executable, str(PROGRAM), address[0], str(address[1]), *options]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == b"started\n"

    def finish(self) -> dict[str, Any]:
        """What the clients saw; the keys are told at the head of the program."""
        out, _ = self.process.communicate(timeout=2 * LIMIT)
        seen: dict[str, Any] = json.loads(out)
        return seen

    def close(self) -> None:
        """Kills it, if it runs."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.communicate()
