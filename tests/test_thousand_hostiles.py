"""A thousand hostile connections on the control socket: clients, status and the next takeover do not suffer."""

from __future__ import annotations

import contextlib
import os
import pathlib
import re
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from clients import LIMIT, eventually
from processes import STEP, Room, descriptors_at_rest
from takeover.controller import MOST_CONNECTIONS

ROOT = pathlib.Path(__file__).parent.parent
ROUNDS = 1 if STEP > 1 else 3


@contextlib.contextmanager
def hostiles(control: str) -> Iterator[Any]:
    """Those of benchmarks/hostile.py, in a thread; `made` grows with each that comes back."""
    from benchmarks.hostile import Hostiles

    enemies, over = Hostiles(control), threading.Event()

    def run() -> None:
        while not over.is_set():
            enemies.go_on(0.1)

    with contextlib.closing(enemies):
        enemies.connect()
        thread = threading.Thread(target=run)
        thread.start()
        try:
            yield enemies
        finally:
            over.set()
            thread.join()


def memory(pid: int) -> int:
    """KiB that the process has of its own."""
    found = re.search(r"RssAnon:\s+(\d+)", pathlib.Path(f"/proc/{pid}/status").read_text())
    assert found
    return int(found[1])


def test_a_thousand_hostile_connections_harm_nobody_and_leave_nothing_behind(
    room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two descriptors for each, what the clients have, what a message brings, what a takeover under way holds."""
    monkeypatch.syspath_prepend(str(ROOT))
    server = room.echo()
    room.wait_for_owner(server)
    held = eventually(lambda: descriptors_at_rest(server.pid), "the server is at rest")
    before = memory(server.pid)
    steady = room.steady(8)
    with hostiles(room.control) as enemies:
        for _ in range(ROUNDS):
            made = enemies.made
            steady.goes_on()
            assert room.status(LIMIT)["pid"] == server.pid
            room.round_trip()
            eventually(lambda made=made: enemies.made > made, "they come again")  # type: ignore[misc]
            assert len(os.listdir(f"/proc/{server.pid}/fd")) < 2 * MOST_CONNECTIONS + 300
            assert memory(server.pid) - before < 64 << 10
    steady.stop()
    eventually(lambda: descriptors_at_rest(server.pid) == held, "nothing is left of them")
    assert len(server.lines) < 1000
    new = room.echo()
    new.wait_for("took over")
    assert server.wait() == 0
    room.wait_for_owner(new)
