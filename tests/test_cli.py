"""The command as a person or a unit file uses it: what it prints, where, and with which exit status."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import pytest
from click.testing import CliRunner

from clients import LIMIT, eventually
from processes import Room
from takeover import cli, cli_screens, demo, query
from takeover.errors import NotRunning, TakeoverError


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


@pytest.mark.parametrize("form", [["--json"], []], ids=["json", "table"])
def test_a_watched_status_is_written_again_and_again_until_it_is_interrupted(room: Room, form: list[str]) -> None:
    start(room)
    watching = room.cli("status", "--control", room.control, "--watch", *form)
    pid = room.programs[0].pid

    def shown() -> list[str]:
        return [line for line in watching.lines if f"{pid}" in line and "pid" in line]

    eventually(lambda: len(shown()) >= 3, "it is shown three times")
    watching.signal(signal.SIGINT)
    assert watching.wait() == 130
    assert watching.lines[-1] == "takeover: interrupted"
    if form:
        assert {json.loads(line)["pid"] for line in shown()} == {pid}


def test_a_watch_ends_when_nothing_runs_there_any_more(room: Room) -> None:
    start(room)
    watching = room.cli("status", "--control", room.control, "--watch")
    watching.wait_for("serving")
    assert run(room, "stop", "--control", room.control).returncode == 0
    assert watching.wait() == 3
    assert watching.lines[-1] == f"takeover: nothing is running at {room.control}"


class Terminal:
    """What a terminal shows; `theirs` is the end for a process."""

    def __init__(self) -> None:
        self._ours, self.theirs = os.openpty()
        os.set_blocking(self._ours, False)
        self._shown = bytearray()

    def shows(self, text: bytes, times: int = 1) -> bool:
        with contextlib.suppress(BlockingIOError):
            self._shown.extend(os.read(self._ours, 65536))
        return self._shown.count(text) >= times

    def close(self) -> None:
        os.close(self._ours)
        os.close(self.theirs)


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    with contextlib.closing(Terminal()) as opened:
        yield opened


def test_on_a_terminal_a_watched_status_takes_the_place_of_the_one_before(room: Room, terminal: Terminal) -> None:
    start(room)
    environment = {**room.environment, "TERM": "xterm", "COLUMNS": "120"}
    watching = room.cli(
        "status", "--control", room.control, "--watch", stdout=terminal.theirs, stderr=terminal.theirs, env=environment
    )
    eventually(lambda: terminal.shows(b"generation", times=3), "it is shown three times")
    cursor_up = b"\x1b[1A"
    assert terminal.shows(cursor_up)
    watching.signal(signal.SIGINT)
    assert watching.wait() == 130
    eventually(lambda: terminal.shows(b"takeover: interrupted"), "the last word")


@pytest.mark.parametrize("options", [[], ["--json"], ["--watch"], ["--json", "--watch"]])
def test_whoever_reads_a_status_may_stop_reading(room: Room, options: list[str]) -> None:
    start(room)
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "wb") as output:
        asked = subprocess.run(
            [sys.executable, "-m", "takeover", "status", "--control", room.control, *options],
            stdout=output,
            stderr=subprocess.PIPE,
            timeout=60,
            env=room.environment,
            check=False,
        )
    assert (asked.returncode, asked.stderr) == (0, b"")


def test_status_for_a_person_tells_what_was_refused_and_what_did_not_move() -> None:
    nothing = {"in": 0, "out": 0, "refused": {}, "drained": {}}
    assert cli_screens.moves_in_words(nothing) == []
    told = cli_screens.moves_in_words({**nothing, "refused": {"version": 2, "room": 1024}, "drained": {"busy": 1}})
    assert told == [("refused", "1,024 room, 2 version"), ("not moved", "1 busy")]


@pytest.mark.parametrize(
    ("keeper", "line"),
    [
        ({"pid": 0, "listeners": 0}, "none yet: it is being started"),
        ({"pid": 0, "listeners": 0, "failure": "no memory"}, "none yet: no memory"),
        ({"pid": 7, "listeners": 2, "failure": "it does not answer"}, "none yet: it does not answer"),
        ({"pid": 7, "listeners": 2}, "pid 7 holds 2 listeners"),
        ({"pid": 7, "listeners": 2, "private_kib": 4096}, "pid 7 holds 2 listeners, 4,096 KiB of its own"),
    ],
)
def test_status_for_a_person_tells_of_the_keeper(keeper: dict[str, object], line: str) -> None:
    assert cli_screens.keeper_in_words(keeper) == line


def test_on_a_terminal_a_bar_shows_the_connections_that_move(room: Room, terminal: Terminal) -> None:
    start(room, "--probation", "0")
    with contextlib.ExitStack() as opened:
        for _ in range(100):
            sock = opened.enter_context(room.connect())
            sock.sendall(b"x")
            assert sock.recv(1) == b"x"
        environment = {**room.environment, "TERM": "xterm", "COLUMNS": "120"}
        options = ("--listen", room.url, "--control", room.control, "--probation", "0")
        new = room.cli("echo", *options, stdout=subprocess.DEVNULL, stderr=terminal.theirs, env=environment)
        room.wait_for_owner(new)
        eventually(lambda: room.status()["moved"]["in"] == 100, "all have moved")
        for text in (b"moving connections", b"of 100 moved", b"still drain"):
            eventually(lambda: terminal.shows(text), f"the terminal shows {text!r}")  # noqa: B023 - called before the next


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


@pytest.mark.once
@pytest.mark.parametrize("what", ["talks", "comes anew"])
@pytest.mark.parametrize("answer", [b"?" * 64, b"short", b""], ids=["another", "short", "none"])
def test_the_demo_counts_what_its_clients_lose_and_tells_of_the_first(what: str, answer: bytes) -> None:
    async def play() -> demo.Tally:
        async def misbehave(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readline()
            writer.write(answer)
            writer.close()
            played.leaving.set()

        server = await asyncio.start_server(misbehave, "127.0.0.1", 0)
        played = demo.Demo(1, print)
        played.address = server.sockets[0].getsockname()[:2]
        async with server:
            await asyncio.wait_for(played.talk() if what == "talks" else played.knock(), LIMIT)
        return played.tally

    tally = asyncio.run(play())
    assert (tally.lost, tally.failed) == ((1, 0) if what == "talks" else (0, 1))
    assert not tally.clean
    who = "a client that talks" if what == "talks" else "a new client"
    how = "another message came back" if answer.startswith(b"?") else "IncompleteReadError"
    assert tally.first_failure.startswith(f"{who}: ") and how in tally.first_failure


@pytest.mark.once
def test_a_demo_in_which_something_was_lost_ends_with_exit_status_1(monkeypatch: pytest.MonkeyPatch) -> None:
    async def lose(played: demo.Demo) -> None:
        for reason in ("the first", "the second"):
            played.tally.lost += 1
            played.tally.failure("a client that talks", ValueError(reason))

    monkeypatch.setattr(demo.Demo, "run", lose)
    shown = CliRunner().invoke(cli.main, ["demo"])
    assert shown.exit_code == 1
    assert "clients that stayed and lost a message" in shown.output
    last = "takeover: something was lost; the first of it: a client that talks: ValueError('the first')"
    assert shown.output.splitlines()[-1] == last


@pytest.mark.once
def test_a_demo_whose_server_does_not_come_up_says_so_and_leaves_nothing_behind(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a server that does not end when it is told to is killed."""
    started: list[subprocess.Popen[bytes]] = []
    popen = subprocess.Popen

    def start_another(_command: list[str], **options: Any) -> subprocess.Popen[bytes]:
        handler = signal.signal(signal.SIGTERM, signal.SIG_IGN)
        try:
            started.append(popen(["sleep", "600"], **options))
        finally:
            signal.signal(signal.SIGTERM, handler)
        return started[-1]

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(demo, "PATIENCE", 0.1)
    monkeypatch.setattr(subprocess, "Popen", start_another)
    with pytest.raises(TakeoverError, match="generation 1 does not come up"):
        asyncio.run(demo.Demo(1, print).run())
    assert [process.returncode for process in started] == [-signal.SIGKILL]
    assert not list(tmp_path.iterdir())


def test_a_command_that_shows_nothing_does_not_wait_for_what_shows_things() -> None:
    text = "import sys, takeover.cli; print([name for name in ('asyncio', 'rich') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True).stdout == "[]\n"
