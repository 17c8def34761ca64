"""The processes of the tests with blobs: servers that do what they are told (programs/heir.py)."""

from __future__ import annotations

import json
import subprocess
from typing import Any

from clients import eventually
from processes import Program, Room

MEMFD = "memfd:takeover-blob (deleted)"


def start(room: Room, **options: Any) -> Program:
    """A process that has joined, and is not ready yet; see programs/heir.py."""
    settings = {"control": room.control, "listen": room.url, "probation": 0.0, **options}
    program = room.program("heir.py", settings, stdin=subprocess.PIPE)
    program.wait_for("joined")
    return program


def ask(program: Program, *order: Any) -> Any:
    """Tells the program to do something, and returns what came of it."""

    def answers() -> list[str]:
        return [line for line in program.lines if line.startswith("answer: ")]

    before = len(answers())
    program.tell(json.dumps(order))
    eventually(lambda: len(answers()) > before or not program.running, f"an answer to {order}")
    assert len(answers()) > before, program.text
    return json.loads(answers()[-1].removeprefix("answer: "))


def end(program: Program) -> None:
    """The program has nothing more to do, and ends."""
    assert program.process.stdin is not None
    program.process.stdin.close()
    assert program.wait() == 0, program.text
