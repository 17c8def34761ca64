"""The command as a person or a unit file uses it: what it prints, where, and with which exit status."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys

import pytest

from clients import eventually
from processes import Room
from takeover import query
from takeover.errors import NotRunning


def run(room: Room, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "takeover", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=room.folder,
        env={**room.environment, **environment},
        check=False,
    )


def start(room: Room, *options: str, **environment: str) -> None:
    server = room.cli(
        "echo", "--listen", room.url, "--control", room.control, *options, env={**room.environment, **environment}
    )
    room.wait_for_owner(server)


@pytest.mark.parametrize("command", [[], ["echo"], ["status"], ["stop"], ["demo"]])
def test_every_command_explains_itself(room: Room, command: list[str]) -> None:
    shown = run(room, *command, "--help")
    assert shown.returncode == 0
    assert "Usage: " in shown.stdout and shown.stderr == ""


def test_version_names_the_backend(room: Room) -> None:
    assert room.backend in run(room, "--version").stdout


def test_status_as_json_has_what_programs_need(room: Room) -> None:
    start(room)
    with room.connect():
        report = json.loads(run(room, "status", "--control", room.control, "--json").stdout)
    assert report["pid"] == room.programs[0].pid
    assert (report["generation"], report["state"], report["backend"]) == (1, "serving", room.backend)
    assert [listener["url"] for listener in report["listeners"]] == [room.url]
    assert report["connections"] == {"open": 1, "draining": []}
    assert report["last_takeover"] is None
    assert report["role"] == "incumbent"
    assert {"version", "uptime"} <= report.keys()


def test_status_for_a_person_tells_of_the_takeover_and_of_who_still_drains(room: Room) -> None:
    start(room, "--probation", "0", "--no-live")
    with room.connect() as sock:
        sock.sendall(b"x")
        assert sock.recv(1) == b"x"
        start(room, "--probation", "0")
        shown = run(room, "status", "--control", room.control).stdout
        old, new = (program.pid for program in room.programs)
        assert shown.startswith("pid") and str(new) in shown
        assert f"1 drain in pid {old} (generation 1)" in shown
        assert f"committed, as successor, with pid {old}" in shown
        assert "ready" in shown and " ms" in shown


def test_status_for_a_person_tells_what_has_moved(room: Room) -> None:
    start(room, "--probation", "0")
    with room.connect() as sock:
        sock.sendall(b"x")
        assert sock.recv(1) == b"x"
        start(room, "--probation", "0")
        eventually(lambda: room.status()["moved"]["in"] == 1, "it has moved")
        shown = run(room, "status", "--control", room.control).stdout
    assert "1 in, 0 out" in shown and "longest standstill" in shown


def test_on_a_terminal_a_bar_shows_the_connections_that_move(room: Room) -> None:
    start(room, "--probation", "0")
    ours, theirs = os.openpty()
    socks = [room.connect() for _ in range(100)]
    try:
        for sock in socks:
            sock.sendall(b"x")
            assert sock.recv(1) == b"x"
        environment = {**room.environment, "TERM": "xterm", "COLUMNS": "120"}
        options = ("--listen", room.url, "--control", room.control, "--probation", "0")
        new = room.cli("echo", *options, stdout=subprocess.DEVNULL, stderr=theirs, env=environment)
        room.wait_for_owner(new)
        eventually(lambda: room.status()["moved"]["in"] == 100, "all have moved")
        os.set_blocking(ours, False)
        shown = bytearray()

        def shows(text: bytes) -> bool:
            with contextlib.suppress(BlockingIOError):
                shown.extend(os.read(ours, 65536))
            return text in shown

        for text in (b"moving connections", b"of 100 moved", b"still drain"):
            eventually(lambda: shows(text), f"the terminal shows {text!r}")  # noqa: B023 - called before the next one
    finally:
        for sock in socks:
            sock.close()
        os.close(ours)
        os.close(theirs)


def test_options_have_environment_twins(room: Room) -> None:
    start(room, TAKEOVER_PROBATION="0", TAKEOVER_DRAIN_TIMEOUT="5", TAKEOVER_MAX_GENERATIONS="3")
    shown = run(room, "status", "--json", TAKEOVER_CONTROL=room.control)
    assert json.loads(shown.stdout)["pid"] == room.programs[0].pid


def test_stop_returns_when_the_process_has_ended_and_leaves_nothing_behind(room: Room) -> None:
    start(room)
    stopped = run(room, "stop", "--control", room.control)
    assert (stopped.returncode, stopped.stdout) == (0, f"pid {room.programs[0].pid} has ended\n")
    assert room.programs[0].wait() == 0
    assert room.left_behind() == []


@pytest.mark.parametrize("command", [["status"], ["status", "--json"], ["stop"]])
def test_where_nothing_runs_the_exit_status_is_3(room: Room, command: list[str]) -> None:
    shown = run(room, *command, "--control", room.control)
    assert (shown.returncode, shown.stdout) == (3, "")
    assert shown.stderr == f"takeover: nothing is running at {room.control}\n"


def test_status_does_not_disturb_a_foreign_socket_at_the_path(room: Room) -> None:
    with pytest.raises(NotRunning):
        query.status(room.control)
    assert room.left_behind() == []


def test_the_takeover_line_has_the_counts_and_the_milliseconds(room: Room) -> None:
    start(room)
    start(room)
    line = room.programs[1].wait_for("took over")
    assert f"took over 1 listener from pid {room.programs[0].pid} (generation 2, {room.backend}) in " in line
    assert line.endswith(" ms")


@pytest.mark.once
def test_the_demo_loses_nothing_and_accounts_for_it(room: Room) -> None:
    shown = run(room, "demo", "--clients", "10")
    assert shown.returncode == 0, shown.stdout + shown.stderr
    assert "was killed in the middle of its takeover" in shown.stdout
    account = [line for line in shown.stdout.splitlines() if "new connects failed" in line]
    assert len(account) == 1 and " 0 " in account[0]


def test_a_command_that_shows_nothing_does_not_wait_for_what_shows_things() -> None:
    text = "import sys, takeover.cli; print([name for name in ('asyncio', 'rich') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True).stdout == "[]\n"
