"""`takeover run --keep`: whoever connects after kill -9 of the supervisor and its crew is served by the next one."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
from collections.abc import Iterator

import pytest

from clients import LIMIT, eventually
from processes import Room
from supervised import deploy, processes_of, supervise, wait_until_gone, who
from takeover import query
from takeover.errors import NotRunning


@pytest.fixture
def room() -> Iterator[Room]:
    """The keeper has tests on both backends; here one will do."""
    with Room("auto") as room:
        yield room
        for program in room.programs:
            program.end()
        with contextlib.suppress(NotRunning):
            query.stop(room.control)


def keeper_of(room: Room) -> int:
    return int(eventually(lambda: (room.status(LIMIT)["keeper"] or {}).get("pid"), "status shows the keeper"))


def ask(room: Room) -> socket.socket:
    """A client that has connected and asked who serves."""
    sock = room.connect()
    sock.settimeout(LIMIT)
    sock.sendall(b"who\n")
    return sock


def hear(sock: socket.socket) -> int:
    with sock, sock.makefile() as file:
        return int(json.loads(file.readline())["pid"])


def test_the_queue_outlives_the_supervisor_and_its_whole_crew(room: Room) -> None:
    supervisor = deploy(room, keep=True, workers=2)
    keeper = keeper_of(room)
    for _ in range(3):
        crew = [process["pid"] for process in processes_of(room)]
        for pid in (supervisor.pid, *crew):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        supervisor.wait()
        for pid in crew:
            wait_until_gone(pid)
        waiting = [ask(room) for _ in range(20)]
        supervisor = deploy(room, keep=True, workers=2)
        supervisor.wait_for("adopted from the keeper")
        now = {process["pid"] for process in processes_of(room)}
        assert {hear(sock) for sock in waiting} <= now
        assert keeper_of(room) == keeper


def test_a_deploy_goes_on_with_the_keeper_and_the_stop_ends_it(room: Room) -> None:
    first = deploy(room, keep=True)
    keeper = keeper_of(room)
    second = deploy(room, keep=True)
    assert first.wait() == 0
    assert keeper_of(room) == keeper
    assert who(room)["pid"] in [process["pid"] for process in processes_of(room)]
    second.signal(signal.SIGTERM)
    assert second.wait() == 0
    wait_until_gone(keeper)
    assert room.left_behind() == []


def test_a_keeper_that_was_killed_leaves_no_zombie_with_the_supervisor(room: Room) -> None:
    supervisor = deploy(room, keep=True)
    first = keeper_of(room)
    os.kill(first, signal.SIGKILL)
    wait_until_gone(first)
    second = eventually(lambda: keeper_of(room) != first and keeper_of(room), "another keeper")
    supervisor.signal(signal.SIGKILL)
    supervisor.wait()
    with ask(room) as waiting:
        deploy(room, keep=True)
        assert hear(waiting) == processes_of(room)[0]["pid"]
    assert keeper_of(room) == second


def test_a_deploy_that_fails_leaves_the_keeper_to_the_incumbent(room: Room) -> None:
    deploy(room, keep=True)
    keeper = keeper_of(room)
    failed = supervise(room, command=["false"], keep=True)
    assert failed.wait() == 1
    assert keeper_of(room) == keeper
    assert who(room)["pid"] == processes_of(room)[0]["pid"]
