"""Commands under `takeover run`: starts supervisors in a room, and asks who serves."""

from __future__ import annotations

import json
import os
import pathlib
import socket
import sys
from collections.abc import Sequence
from typing import Any

import takeover.run
from clients import LIMIT, eventually
from processes import PROGRAMS, Program, Room
from takeover.run.options import Options, parse_listen

MAIN = str(pathlib.Path(takeover.run.__file__).parent / "__main__.py")
SERVED = str(PROGRAMS / "served.py")


def served(wishes: dict[str, Any] | None = None, *words: str) -> tuple[str, ...]:
    """The command that runs programs/served.py."""
    return (sys.executable, SERVED, json.dumps(wishes or {}), *words)


def supervise(
    room: Room,
    wishes: dict[str, Any] | None = None,
    *words: str,
    command: Sequence[str] = (),
    listen: Sequence[str] = (),
    started: Sequence[str] = (),
    process: dict[str, Any] | None = None,
    **options: Any,
) -> Program:
    """Starts a supervisor with programs/served.py or another command under it; the options are those of Options.

    started: words before the supervisor's own, to start it with. process: settings of the Popen.
    """
    settings: dict[str, Any] = {"control": room.control, "probation": 0.0, **options}
    wanted = Options(parse_listen(listen or [room.url]), tuple(command) or served(wishes, *words), **settings)
    return room.run(*started, sys.executable, MAIN, wanted.to_json(), **(process or {}))


def deploy(room: Room, wishes: dict[str, Any] | None = None, *words: str, **options: Any) -> Program:
    """The same, and returns when it serves and is settled."""
    supervisor = supervise(room, wishes, *words, **options)
    room.wait_for_owner(supervisor)
    return supervisor


def say_to(address: Any, line: str) -> str:
    """One line, and the line that comes back, on a connection of its own."""
    family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
    with socket.socket(family) as sock:
        sock.settimeout(LIMIT)
        sock.connect(address)
        sock.sendall(f"{line}\n".encode())
        return sock.makefile().readline()


def who(room: Room) -> dict[str, Any]:
    """Who has answered, and what it was given."""
    return dict(json.loads(say_to(room.address, "who")))


def wait_for_version(room: Room, version: int) -> None:
    """Until this version answers; the older one may accept until it is stopped."""
    eventually(lambda: who(room)["version"] == version, f"version {version} answers")


def do(room: Room, what: str) -> None:
    """Has whoever answers do something; whether it lives on is another matter."""
    assert say_to(room.address, f"do {what}") == "ok\n"


def is_gone(pid: int) -> bool:
    return not os.path.exists(f"/proc/{pid}")


def wait_until_gone(pid: int) -> None:
    eventually(lambda: is_gone(pid), f"pid {pid} has ended and was waited for")


def processes_of(room: Room) -> list[dict[str, Any]]:
    """What status tells of the command's processes."""
    return list(room.status(LIMIT)["command"]["processes"])
