"""Bad input and bad luck: one clear line on standard error, the right exit status, no traceback, nothing lost."""

from __future__ import annotations

import contextlib
import os
import pathlib
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence

import pytest

from clients import LIMIT, eventually
from processes import FAST, Program, Room, free_address, stopped
from takeover.wire import LEGACY_BYTE


def failing(room: Room, *arguments: str, starter: Sequence[str] = (), **options: object) -> tuple[int, str]:
    """Exit status and standard error's one line of a start that must fail."""
    done = subprocess.run(
        [*starter, sys.executable, "-m", "takeover", *arguments],
        cwd=room.folder,
        env=room.environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
        **options,  # type: ignore[call-overload]
    )
    lines = [line for line in done.stderr.splitlines() if line.startswith(("takeover: ", "Error: "))]
    assert len(lines) == 1, done.stderr
    assert "Traceback" not in done.stderr
    return done.returncode, lines[0]


def test_a_port_that_a_stranger_uses(room: Room) -> None:
    with socket.create_server(room.address):
        status, line = failing(room, "echo", "--listen", room.url)
    assert (status, "somebody else is listening there" in line) == (1, True)
    assert room.left_behind() == []


@pytest.mark.parametrize(
    ("url", "status", "hint"),
    [
        ("tcp://192.0.2.1:9999", 1, "no such address"),
        ("tcp://127.0.0.1", 2, "tcp://HOST:PORT"),
        ("tcp://127.0.0.1:port", 2, "tcp://HOST:PORT"),
        ("tcp://127.0.0.1:70000", 2, "65535"),
        ("http://127.0.0.1:80", 2, "tcp://HOST:PORT"),
        ("tcp://no-such-host.invalid:80", 2, "getaddrinfo"),
        ("tcp://127.0.0.1:0?colour=red", 2, "colour"),
        ("unix:" + "x" * 200, 2, "107"),
        ("unix:/nowhere/at/all.sock", 1, "no such folder"),
        ("", 2, "tcp://HOST:PORT"),
    ],
)
def test_an_address_that_cannot_be_used(room: Room, url: str, status: int, hint: str) -> None:
    found, line = failing(room, "echo", "--listen", url)
    assert (found, hint in line) == (status, True), line
    assert room.left_behind() == []


def test_an_address_that_is_given_twice(room: Room) -> None:
    status, line = failing(room, "echo", "--listen", room.url, "--listen", room.url)
    assert (status, "asked for already" in line) == (2, True)
    assert room.left_behind() == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_a_privileged_port(room: Room) -> None:
    lowest = int(pathlib.Path("/proc/sys/net/ipv4/ip_unprivileged_port_start").read_text())
    if lowest < 2:
        pytest.skip("every port is free to all here")
    os.chown(room.folder, 65534, 65534)
    program = room.echo({"uid": 65534}, listen=[f"tcp://{room.address[0]}:{lowest - 1}"])
    assert program.wait() == 1
    assert "CAP_NET_BIND_SERVICE" in program.lines[-1]
    assert room.left_behind() == []


@pytest.mark.parametrize(("listen", "status"), [("tcp://192.0.2.1:9999", 1), ("tcp://127.0.0.1:0?x", 2)])
def test_a_successor_with_a_bad_address_leaves_the_incumbent_serving(room: Room, listen: str, status: int) -> None:
    server = room.echo()
    room.wait_for_owner(server)
    assert failing(room, "echo", "--listen", room.url, "--listen", listen)[0] == status
    room.wait_for_owner(server)
    server.wait_for("is off")
    room.round_trip()


def test_status_and_stop_where_nothing_runs(room: Room) -> None:
    for command in ("status", "stop"):
        status, line = failing(room, command)
        assert (status, "nothing is running" in line) == (3, True)
    assert room.left_behind() == []


def test_an_incumbent_that_is_stopped_is_named_and_the_wait_is_bounded(room: Room) -> None:
    server = room.echo()
    room.wait_for_owner(server)
    with stopped(server):
        asking = room.cli("status")
        successor = room.echo({"limits": FAST})
        assert (asking.wait(), successor.wait()) == (4, 4)
        for line in (asking.lines[-1], successor.lines[-1]):
            assert f"pid {server.pid}" in line and "is it stopped?" in line
    room.wait_for_owner(server)
    room.round_trip()


@contextlib.contextmanager
def impostor(room: Room, says: bytes) -> Iterator[Program]:
    """Somebody who listens at the control path, says something to the first who comes, and then nothing."""
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(room.control)
        listening.listen()
        program = room.echo({"limits": FAST})
        with listening.accept()[0] as sock:
            sock.send(says)
            yield program


@pytest.mark.parametrize(
    ("says", "status"),
    [(b"\x54\xff garbage and more of it", 1), (b"\x54", 4), (LEGACY_BYTE, 1), (b"hello", 1)],
    ids=["garbage", "half a greeting", "the original script's byte without a descriptor", "another protocol"],
)
def test_an_incumbent_that_speaks_nonsense(room: Room, says: bytes, status: int) -> None:
    with impostor(room, says) as program:
        assert program.wait() == status, program.text
        assert program.lines[-1].startswith("takeover: ")
    assert os.path.exists(room.control)


FEW_DESCRIPTORS = ("sh", "-c", 'ulimit -n 24; exec "$@"', "sh")
"""What starts a command that may have no more than 24 of them."""


def test_a_successor_without_room_for_the_descriptors_is_refused(room: Room) -> None:
    addresses = [room.url, *("tcp://{}:{}".format(*free_address()) for _ in range(20))]
    server = room.echo(listen=addresses)
    room.wait_for_owner(server)
    arguments = [word for address in addresses for word in ("--listen", address)]
    status, line = failing(room, "echo", *arguments, starter=FEW_DESCRIPTORS)
    assert (status, "ulimit -n" in line) == (1, True), line
    room.wait_for_owner(server)
    room.round_trip()


def test_a_server_that_runs_out_of_descriptors_serves_on_and_is_taken_over(room: Room) -> None:
    server = room.run(*FEW_DESCRIPTORS, sys.executable, "-m", "takeover", "echo", "--listen", room.url)
    room.wait_for_owner(server)
    crowd = [room.connect() for _ in range(40)]
    eventually(lambda: "Too many open files" in server.text or len(os.listdir(f"/proc/{server.pid}/fd")) >= 24, "full")
    for sock in crowd:
        sock.close()
    room.round_trip()
    new = room.echo()
    new.wait_for("took over")
    room.round_trip()
    assert server.text.count("Too many open files") <= 4, server.text


@pytest.mark.parametrize("full", [True, False], ids=["full disk", "closed"])
def test_a_standard_error_that_cannot_be_written_to_costs_only_the_lines(room: Room, full: bool) -> None:
    command = [sys.executable, "-m", "takeover", "echo", "--listen", room.url, "--probation", "0"]
    redirect = ">/dev/full 2>/dev/full" if full else ">&- 2>&- <&-"
    start = ["sh", "-c", f'exec "$@" {redirect}', "sh", *command]
    old = room.run(*start)
    room.wait_for_owner(old)
    load = room.pound()
    new = room.run(*start)
    room.wait_for_owner(new)
    assert old.wait() == 0
    load.goes_on()
    load.stop()
    assert not load.lost, load.lost
    new.signal(signal.SIGTERM)
    assert new.wait() == 0
    assert room.left_behind() == []


def test_a_working_folder_that_is_gone(room: Room) -> None:
    folder = os.path.join(room.folder, "gone")
    os.mkdir(folder)
    start = ["sh", "-c", f'rmdir "{folder}"; exec "$@"', "sh", sys.executable, "-m", "takeover", "echo"]
    program = room.run(*start, "--listen", room.url, cwd=folder)
    assert program.wait() == 1, program.text
    assert "working folder is gone" in program.lines[-1]
    room.run(*start, "--listen", room.url, "--control", room.control, cwd=room.folder).wait_for("serving")


def test_a_folder_that_is_removed_under_a_running_server_keeps_nobody_from_being_served(room: Room) -> None:
    folder = os.path.join(room.folder, "gone")
    os.mkdir(folder)
    server = room.cli("echo", "--listen", room.url, cwd=folder)
    server.wait_for("serving")
    for entry in os.listdir(folder):
        os.unlink(os.path.join(folder, entry))
    os.rmdir(folder)
    room.round_trip()
    server.signal(signal.SIGTERM)
    assert server.wait() == 0


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("phase", ["joining", "warming", "probation"])
def test_an_interrupted_successor_leaves_the_service_in_order(room: Room, signum: int, phase: str) -> None:
    """Before the commit the incumbent serves on, after it the successor ends the service as it was told to."""
    old = room.echo({"limits": FAST}, probation=600)
    room.wait_for_owner(old)
    load = room.pound()
    if phase == "joining":
        with stopped(old):
            new = room.cli("echo", "--listen", room.url)
            eventually(lambda: "socket:[" in holds(new), "it has connected")
            new.signal(signum)
            assert new.wait() == 1, new.text
    elif phase == "warming":
        new = room.program("slow.py", {"listen": [room.url], "control": room.control})
        new.wait_for("warming")
        new.signal(signum)
        assert new.wait() == 1, new.text
    else:
        new = room.cli("echo", "--listen", room.url)
        new.wait_for("took over")
        new.signal(signum)
        assert new.wait() == 0, new.text
        assert old.wait() == 0
        assert room.left_behind() == []
        return
    assert new.lines[-1].startswith("takeover: ") and "before the service was ready" in new.lines[-1]
    room.wait_for_owner(old)
    load.goes_on()
    load.stop()
    assert not load.lost, load.lost


def holds(program: Program) -> str:
    with contextlib.suppress(OSError):
        return " ".join(
            os.readlink(f"/proc/{program.pid}/fd/{entry}") for entry in os.listdir(f"/proc/{program.pid}/fd")
        )
    return ""


@pytest.mark.parametrize("phase", ["warming", "probation", "draining"])
def test_an_interrupted_incumbent_leaves_the_service_to_the_successor(room: Room, phase: str) -> None:
    old = room.echo(probation=600 if phase == "probation" else 0)
    room.wait_for_owner(old)
    steady, load = room.steady(1), room.pound()
    new = room.member(join={"service": "echo"}, plan=["wait"])
    new.wait_for("waiting")
    if phase == "warming":
        old.signal(signal.SIGTERM)
        old.wait_for("SIGTERM")
    new.tell()
    new.wait_for("ready")
    if phase == "probation":
        old.signal(signal.SIGTERM)
    room.wait_for_owner(new)
    steady.goes_on()
    steady.stop()
    if phase == "draining":
        old.signal(signal.SIGTERM)
    assert old.wait() == 0
    load.goes_on()
    load.stop()
    assert not load.lost, load.lost


def test_a_signal_that_comes_when_all_is_over_changes_nothing(room: Room) -> None:
    old = room.echo({"late": True})
    room.wait_for_owner(old)
    new = room.echo()
    room.wait_for_owner(new)
    assert old.wait() == 0, old.text
