"""What a service says to its manager at each moment, heard by a manager that believes the main process only."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest

from clients import LIMIT, echo_once, eventually
from conftest import CYTHON_IS_BUILT
from processes import FAST, PROGRAMS, Room
from service_manager import ServiceManager
from takeover import systemd
from takeover.listeners import Held
from takeover.loop_server import LoopServer
from takeover.systemd import ServiceManager as Ours
from takeover.systemd import unit_of

Way = Callable[..., list[str]]


def native(room: Room, url: str = "", **options: object) -> list[str]:
    settings = {"listen": [url or room.url], "control": room.control, "probation": 0.0, **options}
    return [sys.executable, str(PROGRAMS / "echo.py"), json.dumps({"options": settings, "limits": FAST})]


def asyncio_(room: Room, url: str = "", **options: object) -> list[str]:
    settings = {"listen": [url or room.url], "control": room.control, "probation": 0.0, **options}
    wishes = {"loop": "asyncio", "kind": "echo", "options": settings, "limits": FAST}
    return [sys.executable, str(PROGRAMS / "aio_server.py"), json.dumps(wishes)]


def join(room: Room, url: str = "", **options: object) -> list[str]:
    settings = {"control": room.control, "probation": 0.0, **options}
    return [sys.executable, str(PROGRAMS / "member.py"), json.dumps({"listen": [url or room.url], "join": settings})]


WAYS = pytest.mark.parametrize("way", [native, asyncio_, join])


@pytest.fixture
def room() -> Iterator[Room]:
    with Room("cython" if CYTHON_IS_BUILT else "python") as room:
        yield room


@pytest.fixture(params=["main", "exec", "all"])
def access(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def manager(room: Room) -> Iterator[ServiceManager]:
    with ServiceManager(room) as manager:
        yield manager


def store_name(room: Room) -> str:
    return room.url.replace(":", "%3A")


@WAYS
def test_the_first_start_says_ready_and_gives_its_listener_into_safe_keeping(
    room: Room, manager: ServiceManager, way: Way
) -> None:
    program = manager.start(*way(room))
    manager.wait_for_main(program)
    manager.wait_until(lambda: manager.store, "a listener is kept")
    assert [name for name, _ in manager.store] == [store_name(room)]
    assert manager.status == f"serving {room.url} (generation 1)"
    assert room.status()["service_manager"] == {"watchdog": None, "keeps": 1}
    shown = room.cli("status", "--control", room.control)
    assert shown.wait() == 0 and "listeners kept: 1; no watchdog" in " ".join(shown.text.split())
    room.round_trip()
    program.process.terminate()
    if way is not join:  # which does nothing about a signal
        assert program.wait() == 0
        assert manager.said[-1]["STOPPING"] == "1"
    assert not manager.unbelieved


@WAYS
def test_three_reloads_leave_one_main_process_and_no_other(room: Room, access: str, way: Way) -> None:
    with ServiceManager(room, access) as manager:
        programs = [manager.start(*way(room))]
        manager.wait_for_main(programs[0])
        pounder = room.pound()
        for _ in range(3):
            programs.append(manager.reload(*way(room)))
            manager.wait_for_main(programs[-1])
            assert programs[-2].wait() == 0
            pounder.goes_on()
            if access == "exec":
                manager.control_pid = 0
        manager.wait_until(lambda: manager.status == f"serving {room.url} (generation 4)", "the last says what it does")
        assert not pounder.lost
        assert manager.deaths == 0, "the manager would have started a third instance"
        assert [int(message["MAINPID"]) for message in manager.said if message["MAINPID"]] == [
            program.pid for program in programs[1:]
        ]
        assert len(manager.store) == 1 and not manager.unbelieved


def test_a_reload_is_announced_with_the_clock_and_over_when_the_new_process_is_the_main_one(
    room: Room, manager: ServiceManager
) -> None:
    manager.wait_for_main(manager.start(*native(room)))
    before = time.monotonic_ns() // 1000
    second = manager.reload(*native(room))
    manager.wait_for_main(second)
    (announced,) = manager.heard("RELOADING")
    assert before <= int(announced["MONOTONIC_USEC"]) <= announced.at
    assert announced["STATUS"] == f"pid {second.pid} is taking over; serving {room.url} (generation 1)"
    (named,) = manager.heard("MAINPID", str(second.pid))
    assert named["READY"] == "1" and named["STATUS"] == f"pid {second.pid} has taken over and serves (generation 2)"


def test_a_reload_that_fails_leaves_the_unit_active_and_says_why(room: Room, manager: ServiceManager) -> None:
    first = manager.start(*native(room))
    manager.wait_for_main(first)
    broken = [sys.executable, str(PROGRAMS / "member.py")]
    wishes = {"listen": [room.url], "join": {"control": room.control, "service": "echo"}, "plan": ["fail"]}
    second = manager.reload(*broken, json.dumps(wishes))
    assert second.wait() != 0
    manager.wait_until(lambda: "the last takeover is off" in manager.status, "the status says so")
    room.tracebacks_allowed = True
    assert manager.state == "active" and manager.main_pid == first.pid
    assert room.owner() == first.pid and not manager.unbelieved
    manager.wait_for_main(third := manager.reload(*native(room)))
    assert third.running and first.wait() == 0


def test_a_dry_run_says_nothing(room: Room, manager: ServiceManager) -> None:
    manager.wait_for_main(manager.start(*native(room)))
    manager.wait_until(lambda: manager.store, "a listener is kept")
    heard = len(manager.said)
    dry = manager.reload(*native(room, dry_run=True), env={**room.environment, "NOTIFY_SOCKET": manager.address})
    assert dry.wait() == 0
    room.round_trip()
    assert len(manager.said) == heard


@pytest.mark.parametrize("kind", ["tcp", "unix"])
@pytest.mark.parametrize("reloads", [0, 2])
@WAYS
def test_after_a_crash_of_every_process_the_next_start_serves_who_has_been_waiting(
    room: Room, manager: ServiceManager, way: Way, kind: str, reloads: int
) -> None:
    path = os.path.join(room.folder, "s")
    url = room.url if kind == "tcp" else f"unix:{path}"
    program = manager.start(*way(room, url))
    manager.wait_for_main(program)
    for _ in range(reloads):
        program = manager.reload(*way(room, url))
        manager.wait_for_main(program)
    manager.wait_until(lambda: len(manager.store) == 1, "the listener is kept")
    program.process.kill()
    manager.wait_until(lambda: manager.deaths == 1, "the main process is dead")
    with socket.socket(socket.AF_INET if kind == "tcp" else socket.AF_UNIX) as client:
        client.settimeout(LIMIT)
        client.connect(room.address if kind == "tcp" else path)
        again = manager.start(*way(room, url))
        echo_once(client, b"I have waited")
    manager.wait_for_main(again)
    again.wait_for(f"adopted {url}, which the service manager has given ({url.replace(':', '%3A')})")
    assert len(manager.store) == 1


@pytest.mark.parametrize("kind", ["tcp", "unix"])
def test_a_stop_and_a_start_refuse_nobody_while_the_manager_keeps_the_listener(
    room: Room, manager: ServiceManager, kind: str
) -> None:
    path = os.path.join(room.folder, "s")
    url = room.url if kind == "tcp" else f"unix:{path}"
    program = manager.start(*native(room, url))
    manager.wait_until(lambda: manager.store, "the listener is kept")
    program.process.terminate()
    assert program.wait() == 0
    with socket.socket(socket.AF_INET if kind == "tcp" else socket.AF_UNIX) as client:
        client.settimeout(LIMIT)
        client.connect(room.address if kind == "tcp" else path)
        manager.start(*native(room, url))
        echo_once(client, b"in between")


def test_a_listener_that_a_new_version_has_no_use_for_leaves_the_store(room: Room, manager: ServiceManager) -> None:
    path = os.path.join(room.folder, "s")
    first = manager.start(*native(room, listen=[room.url, f"unix:{path}"]))
    manager.wait_for_main(first)
    manager.wait_until(lambda: len(manager.store) == 2, "both are kept")
    manager.wait_for_main(manager.reload(*native(room)))
    manager.wait_until(lambda: [name for name, _ in manager.store] == [store_name(room)], "one is left")


@pytest.mark.parametrize("reloads", [0, 1])
def test_a_listener_that_is_closed_leaves_the_store(room: Room, manager: ServiceManager, reloads: int) -> None:
    source = (
        "import sys, takeover\n"
        f"with takeover.join({room.control!r}, probation=0.0) as service:\n"
        f"    service.listen({room.url!r})\n"
        f"    other = service.listen('unix:other')\n"
        "    service.ready()\n"
        "    sys.stdin.readline()\n"
        "    other.close()\n"
        "    sys.stdin.readline()\n"
    )
    program = manager.start(sys.executable, "-c", source, stdin=-1)
    manager.wait_for_main(program)
    for _ in range(reloads):
        old, program = program, manager.reload(sys.executable, "-c", source, stdin=-1)
        manager.wait_for_main(program)
        manager.wait_until(lambda: manager.said[-1]["FDSTORE"], "the new one has stored all")
        old.tell()
        old.tell()
        assert old.wait() == 0
    manager.wait_until(lambda: len(manager.store) == 2, "both are kept")
    program.tell()
    manager.wait_until(lambda: [name for name, _ in manager.store] == [store_name(room)], "one is left")
    program.tell()
    assert program.wait() == 0
    assert len(manager.store) == 1, "what a service leaves behind at its end is for the next start"


def test_every_member_of_a_group_is_kept_and_adopted_again(room: Room, manager: ServiceManager) -> None:
    program = manager.start(*native(room, f"{room.url}?reuseport=3"))
    manager.wait_until(lambda: len(manager.store) == 3, "all members are kept")
    program.process.kill()
    manager.wait_until(lambda: manager.deaths == 1, "the main process is dead")
    again = manager.start(*native(room, f"{room.url}?reuseport=3"))
    manager.wait_for_main(again)
    eventually(lambda: sum("has given" in line for line in again.lines) == 3, "each is adopted")
    assert len(manager.store) == 3


def test_a_socket_that_comes_from_its_unit_and_from_the_store_is_adopted_once(
    room: Room, manager: ServiceManager
) -> None:
    manager.activated = [("web", socket.create_server(room.address))]
    first = manager.start(*native(room))
    manager.wait_until(lambda: manager.store, "it is kept too")
    first.process.kill()
    manager.wait_until(lambda: manager.deaths == 1, "the main process is dead")
    again = manager.start(*native(room))
    manager.wait_for_main(again)
    assert len(room.status()["listeners"]) == 1
    again.wait_for(f"adopted {room.url}, which the service manager has given (web)")
    assert sum("has given" in line for line in again.lines) == 1
    room.round_trip()


@pytest.mark.parametrize("limit", ["FDSTORE=0", "MEMORY_PRESSURE_WATCH=/dev/null"])
def test_nothing_is_stored_where_the_unit_says_that_it_has_no_store(
    room: Room, manager: ServiceManager, limit: str
) -> None:
    name, _, value = limit.partition("=")
    environment = {**room.environment, "NOTIFY_SOCKET": manager.address, name: value}
    program = manager.start(*native(room), env=environment)
    manager.wait_for_main(program)
    manager.wait_for_main(manager.reload(*native(room)))
    room.round_trip()
    assert not any(message["FDSTORE"] for message in manager.said)


@WAYS
def test_the_watchdog_is_fed_by_whoever_is_the_main_process(room: Room, way: Way) -> None:
    with ServiceManager(room, watchdog=0.1) as manager:
        programs = [manager.start(*way(room))]
        manager.wait_for_main(programs[0])
        programs.append(manager.reload(*way(room)))
        manager.wait_for_main(programs[1])
        for program in programs:
            manager.wait_until(
                lambda: sum(message.pid == program.pid for message in manager.heard("WATCHDOG")) >= 1,  # noqa: B023
                f"pid {program.pid} has fed it",
            )
        already = len(manager.heard("WATCHDOG"))
        manager.wait_until(lambda: len(manager.heard("WATCHDOG")) >= already + 3, "it goes on")
        assert not manager.unbelieved
        assert room.status()["service_manager"]["watchdog"] == 0.1


def test_a_watchdog_of_another_process_is_not_fed(room: Room, manager: ServiceManager) -> None:
    environment = {**room.environment, "NOTIFY_SOCKET": manager.address, "WATCHDOG_USEC": "1000", "WATCHDOG_PID": "1"}
    manager.wait_for_main(manager.start(*native(room), env=environment))
    assert room.status()["service_manager"]["watchdog"] is None


def test_the_watchdog_is_fed_in_the_loop_that_serves() -> None:
    """So a loop that hangs does not feed it: its turn, in which the answer is given, does not come."""

    class Loop:
        def call_soon_threadsafe(self, callback: Callable[..., object], *arguments: object) -> None:
            self.posted = (callback, arguments)

    class Served(LoopServer):
        def when_empty(self, callback: Callable[[], object]) -> None: ...
        def abort_connections(self) -> int:
            return 0

        def over(self) -> None: ...

    loop, answers = Loop(), []
    server = Served(loop, None, 0.0, False, None)  # type: ignore[arg-type]
    server.alive(lambda: answers.append("alive"))
    assert not answers
    callback, arguments = loop.posted
    callback(*arguments)
    assert answers == ["alive"]


def test_a_successor_of_another_unit_ends_the_service_of_this_one(
    room: Room, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(systemd, "in_our_unit", lambda pid: False)
    with ServiceManager(room) as manager, socket.create_server(room.address) as sock:
        manager.main_pid, manager.state = os.getpid(), "activating"
        monkeypatch.setenv("NOTIFY_SOCKET", manager.address)
        ours = Ours.from_environment()
        ours.ready([Held("web", room.url, sock, "", None)], "serving")
        manager.wait_until(lambda: manager.store, "the listener is kept")
        ours.superseded(4211, "pid 4211 has taken over")
        manager.wait_until(lambda: manager.state == "deactivating" and not manager.store, "it ends")
        assert not any(message["MAINPID"] for message in manager.said)
        assert ours.legacy() is None
        assert "start new versions with systemctl reload" in caplog.text
        ours.alive()
        ours.last_words()
        assert manager.said[-1]["STOPPING"] == "1", "nothing is said any more"


def test_a_listener_that_is_closed_before_the_service_is_ready_is_not_stored(
    room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ServiceManager(room) as manager:
        manager.main_pid, manager.state = os.getpid(), "activating"
        monkeypatch.setenv("NOTIFY_SOCKET", manager.address)
        ours = Ours.from_environment()
        with socket.create_server(room.address) as open_one, socket.socket() as closed:
            closed.close()
            ours.ready([Held(name, room.url, sock, "", None) for name, sock in (("a", closed), ("b", open_one))], "")
            manager.wait_until(lambda: manager.store, "the listener is kept")
            assert ours.keeps == 1


def test_a_process_that_is_gone_counts_as_one_of_our_unit() -> None:
    """Nobody can tell any more, and a service that goes on is not to end for that."""
    child = subprocess.Popen(["true"])
    child.wait()
    assert systemd.in_our_unit(child.pid)


def test_a_process_that_is_started_as_its_own_unit_says_ready_itself(room: Room) -> None:
    with ServiceManager(room) as manager:
        old = room.run(*native(room))
        room.wait_for_owner(old)
        program = manager.start(*native(room))
        manager.wait_for_main(program)
        assert old.wait() == 0
        manager.wait_until(lambda: manager.store, "the listener is kept")
        assert not manager.unbelieved


def test_an_old_process_that_is_killed_in_the_middle_leaves_a_service_that_the_next_start_takes_over(
    room: Room, manager: ServiceManager
) -> None:
    first = manager.start(*native(room, probation=60.0))
    manager.wait_for_main(first)
    second = manager.reload(*native(room))
    second.wait_for("took over")
    first.process.kill()
    manager.wait_until(lambda: manager.deaths == 1, "the main process is dead")
    room.wait_for_owner(second)
    third = manager.start(*native(room))
    manager.wait_for_main(third)
    assert second.wait() == 0
    room.round_trip()


def test_a_manager_that_is_gone_costs_a_line_in_the_log(room: Room) -> None:
    environment = {**room.environment, "NOTIFY_SOCKET": os.path.join(room.folder, "nobody")}
    first = room.run(*native(room), env=environment)
    room.wait_for_owner(first)
    second = room.run(*native(room), env=environment)
    room.wait_for_owner(second)
    assert first.wait() == 0
    assert sum("cannot tell the service manager" in line for line in first.lines) == 1
    room.round_trip()


@pytest.mark.parametrize(
    ("text", "unit"),
    [
        ("0::/system.slice/web.service\n", "/system.slice/web.service"),
        ("0::/system.slice/web.service/.control\n", "/system.slice/web.service"),
        ("0::/user.slice/user@1.service/app.slice/web.service\n", "/user.slice/user@1.service/app.slice/web.service"),
        ("0::/user.slice/user-0.slice/session-1.scope\n", "/user.slice/user-0.slice/session-1.scope"),
        ("12:cpu:/\n1:name=systemd:/system.slice/web.service\n0::/\n", "/system.slice/web.service"),
        ("0::/\n", "/"),
        ("0::/docker/8a.serviced/x\n", "/docker/8a.serviced/x"),
        ("", ""),
    ],
)
def test_the_unit_of_a_process_is_read_from_its_control_group(text: str, unit: str) -> None:
    assert unit_of(text) == unit
