"""Servers on asyncio or uvloop in a room (programs/aio_server.py), and clients that talk to them in lines."""

from __future__ import annotations

import json
import signal
from collections.abc import Awaitable, Callable
from typing import Any

from clients import eventually
from processes import FAST, Program, Room, catches

Run = Callable[[Awaitable[Any]], Any]
"""Runs a coroutine on a loop of some kind, for so long and no longer."""


class Aio:
    """A room with servers on one kind of loop."""

    def __init__(self, room: Room, loop: str) -> None:
        self.room = room
        self.loop = loop

    def start(self, kind: str, *, settled: bool = True, **wishes: Any) -> Program:
        """Starts a server, and returns when it owns the service and handles the signals, which comes after that."""
        defaults = {"listen": [self.room.url], "control": self.room.control, "probation": 0.0}
        options = {**defaults, **wishes.pop("options", {})}
        argument = {"loop": self.loop, "kind": kind, "options": options, "limits": FAST, **wishes}
        program = self.room.program("aio_server.py", argument)
        if settled:
            self.room.wait_for_owner(program)
            eventually(lambda: catches(program.pid, signal.SIGTERM), f"pid {program.pid} handles SIGTERM")
        return program

    def moved(self) -> dict[str, Any]:
        """What status tells of moves."""
        moved = self.room.status()["moved"]
        assert isinstance(moved, dict)
        return moved


class Client:
    """Sends lines, and reads the answers."""

    def __init__(self, room: Room) -> None:
        self.sock = room.connect()
        self._buffer = b""

    def read_line(self) -> str:
        while b"\n" not in self._buffer:
            data = self.sock.recv(65536)
            if not data:
                raise ConnectionResetError(f"end of file after {self._buffer!r}")
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line.decode()

    def say(self, text: str) -> None:
        self.sock.sendall(text.encode() + b"\n")

    def ask(self, text: str = "hello") -> dict[str, Any]:
        self.say(text)
        answer = json.loads(self.read_line())
        assert answer["text"] == text
        return dict(answer)

    def served_by(self) -> int:
        return int(self.ask()["pid"])

    def __enter__(self) -> Client:  # noqa: PYI034 - typing.Self needs Python 3.11
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()
