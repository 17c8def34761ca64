"""`takeover run` as a unit of a service manager: started, reloaded, crashed, stopped, with any command under it."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from clients import LIMIT, eventually
from processes import Room
from service_manager import ServiceManager, parent_of
from supervised import do, is_gone, processes_of, say_to, served, wait_for_version, wait_until_gone, who

ACTIVATE = shutil.which("systemd-socket-activate")


@pytest.fixture
def room() -> Iterator[Room]:
    with Room("auto") as room:
        yield room


@pytest.fixture
def manager(room: Room) -> Iterator[ServiceManager]:
    with ServiceManager(room) as manager:
        yield manager
        if manager.main_pid:
            os.kill(manager.main_pid, signal.SIGKILL)  # one in the background is no program of the room


def words(room: Room, wishes: dict[str, Any] | None = None, *options: str) -> list[str]:
    """The command line of a unit."""
    where = ("--listen", room.url, "--control", room.control, "--probation", "0.2")
    return [sys.executable, "-m", "takeover", "run", *where, *options, "--", *served(wishes)]


def test_the_first_start_says_ready_when_the_command_is_and_its_listener_is_kept(
    room: Room, manager: ServiceManager
) -> None:
    supervisor = manager.start(*words(room, {"version": 1}))
    manager.wait_for_main(supervisor)
    manager.wait_until(lambda: manager.store, "the listener is kept")
    (ready,) = manager.heard("READY")
    assert ready.pid == supervisor.pid and manager.status == f"serving {room.url} (generation 1)"
    told = who(room)["environment"]
    assert told.get("NOTIFY_SOCKET") != manager.address
    assert not any(message.pid != supervisor.pid for message in manager.said)


def test_a_detached_reload_is_the_deploy(room: Room, manager: ServiceManager) -> None:
    first = manager.start(*words(room, {"version": 1}))
    manager.wait_for_main(first)
    for version in (2, 3):
        old = manager.main_pid
        reload = manager.reload(*words(room, {"version": version}, "--detach"))
        assert reload.wait() == 0, reload.text
        manager.wait_until(lambda: manager.main_pid not in (0, old), "there is a new main process")  # noqa: B023
        manager.wait_until(lambda: manager.state == "active", "the reload is over")
        wait_for_version(room, version)
        wait_until_gone(old) if old != first.pid else first.wait()
        assert manager.main_pid != reload.pid
        assert parent_of(manager.main_pid) != reload.pid
    manager.wait_until(lambda: manager.status == f"serving {room.url} (generation 3)", "the last says what it does")
    assert first.process.returncode == 0
    assert manager.deaths == 0 and not manager.unbelieved and len(manager.store) == 1
    os.kill(manager.main_pid, signal.SIGTERM)
    manager.wait_until(lambda: manager.deaths == 1, "it stops")
    assert manager.said[-1]["STOPPING"] == "1"


def test_a_deploy_that_fails_is_a_reload_that_fails_and_the_unit_stays_active(
    room: Room, manager: ServiceManager
) -> None:
    first = manager.start(*words(room, {"version": 1}))
    manager.wait_for_main(first)
    reload = manager.reload(*words(room, {"exit": 3}, "--detach"))
    assert reload.wait() == 1
    manager.wait_until(lambda: "the last takeover is off" in manager.status, "the status says so")
    assert (manager.state, manager.main_pid, who(room)["version"]) == ("active", first.pid, 1)
    assert not manager.unbelieved


@pytest.mark.parametrize("broken", [False, True], ids=["good", "broken"])
def test_a_hangup_is_a_reload_from_its_signal_to_its_end(room: Room, manager: ServiceManager, broken: bool) -> None:
    file = os.path.join(room.folder, "wishes")
    supervisor = manager.start(*words(room, {"version": 1, "file": file}))
    manager.wait_for_main(supervisor)
    before = who(room)["pid"]
    with open(file, "w") as wishes:
        wishes.write('{"exit": 3}' if broken else '{"version": 2}')
    supervisor.signal(signal.SIGHUP)
    manager.wait_until(lambda: manager.heard("RELOADING"), "the reload has begun")
    manager.wait_until(lambda: manager.state == "active", "the reload is over")
    (begun,) = manager.heard("RELOADING")
    assert 0 < int(begun["MONOTONIC_USEC"]) <= begun.at
    if broken:
        assert manager.status == "the command was not replaced; the old one serves on"
        assert who(room)["pid"] == before
    else:
        assert manager.status == "serving with a new command"
        wait_for_version(room, 2)
    assert manager.main_pid == supervisor.pid and not manager.unbelieved


def test_after_a_crash_of_every_process_the_next_start_serves_who_has_been_waiting(
    room: Room, manager: ServiceManager
) -> None:
    first = manager.start(*words(room, {"version": 1}))
    manager.wait_until(lambda: manager.store, "the listener is kept")
    (process,) = processes_of(room)
    first.process.kill()
    manager.wait_until(lambda: manager.deaths == 1, "the main process is dead")
    eventually(lambda: is_gone(process["pid"]), "the command is dead too")
    with socket.create_connection(room.address, LIMIT) as client:
        client.sendall(b"who\n")
        second = manager.start(*words(room, {"version": 2}))
        assert '"version": 2' in client.makefile().readline()
    manager.wait_for_main(second)
    second.wait_for("which the service manager has given")


def test_a_command_that_dies_is_no_death_of_the_unit(room: Room, manager: ServiceManager) -> None:
    supervisor = manager.start(*words(room))
    manager.wait_for_main(supervisor)
    before = who(room)["pid"]
    do(room, "kill 9")
    eventually(lambda: who(room)["pid"] != before, "another one serves")
    assert manager.state == "active" and manager.deaths == 0 and manager.main_pid == supervisor.pid


def test_the_supervisor_feeds_the_watchdog_and_goes_on_after_a_deploy(room: Room) -> None:
    with ServiceManager(room, watchdog=0.2) as manager:
        supervisor = manager.start(*words(room))
        manager.wait_for_main(supervisor)
        manager.wait_until(lambda: len(manager.heard("WATCHDOG")) >= 2, "it is fed")
        second = manager.reload(*words(room))
        manager.wait_for_main(second)
        manager.wait_until(
            lambda: sum(message.pid == second.pid for message in manager.heard("WATCHDOG")) >= 2, "by the next one too"
        )


@pytest.mark.skipif(ACTIVATE is None, reason="systemd-socket-activate is not installed")
def test_the_real_systemd_socket_activate_starts_it_with_its_first_client(room: Room) -> None:
    assert ACTIVATE is not None
    variables = [f"-E{name}" for name in ("PYTHONPATH", "HOME")]
    program = room.run(ACTIVATE, "-l", "{}:{}".format(*room.address), *variables, *words(room, {"version": 1}))
    program.wait_for("Listening on")
    assert '"version": 1' in say_to(room.address, "who")
    program.wait_for(f"adopted {room.url}, which the service manager has given")
    room.wait_for_owner(program)
