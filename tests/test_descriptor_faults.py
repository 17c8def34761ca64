"""What shared descriptors can do to a process at the other end: block it, haunt it, reset its clients, stay behind."""

from __future__ import annotations

import os
import pathlib
import re
import shutil
import signal
import socket
import sys

import pytest

from clients import echo_once, eventually, receive_exactly
from processes import Program, Room

CHILD_HOLDS = {"0", "1", "2"}


def child_of(program: Program) -> int:
    return int(program.wait_for("child is ").rpartition(" ")[2])


@pytest.fixture
def children() -> object:
    """Pids of processes that outlive their parent in a test; killed at its end."""
    pids: list[int] = []
    yield pids
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


def flags_of_listener(program: Program, address: tuple[str, int]) -> int:
    """The open file's flags (proc_pid_fdinfo(5)) of the descriptor that listens at the address."""
    hexadecimal = socket.inet_aton(address[0])[::-1].hex().upper() + f":{address[1]:04X}"
    for line in pathlib.Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if fields[1] == hexadecimal and fields[3] == "0A":
            inode = fields[9]
    for entry in os.listdir(f"/proc/{program.pid}/fd"):
        if os.readlink(f"/proc/{program.pid}/fd/{entry}") == f"socket:[{inode}]":
            info = pathlib.Path(f"/proc/{program.pid}/fdinfo/{entry}").read_text()
            return int(info.split("flags:")[1].split()[0], 8)
    raise AssertionError("nobody listens")


@pytest.mark.parametrize("step", ["spawn", "fork"])
def test_a_child_started_in_the_middle_of_a_takeover_holds_nothing_of_it(
    room: Room, step: str, children: list[int]
) -> None:
    """F4, F13."""
    old = room.member()
    old.wait_for("ready")
    new = room.member(plan=[step, "wait"])
    new.wait_for("waiting")
    children.append(child_of(new))
    eventually(lambda: set(os.listdir(f"/proc/{children[0]}/fd")) == CHILD_HOLDS, "the child holds only what it is to")
    new.tell()
    new.wait_for("ready")
    assert old.wait() == 0
    room.wait_for_owner(new)


def test_after_the_parent_alone_is_killed_a_forked_child_does_not_hinder_a_new_start(
    room: Room, children: list[int]
) -> None:
    """F13."""
    old = room.member(after=["fork"])
    children.append(child_of(old))
    old.signal(signal.SIGKILL)
    old.wait()
    new = room.member()
    assert '"generation": 1' in new.wait_for("ready")
    room.round_trip()


def test_nothing_is_shut_down_that_was_handed_over(room: Room) -> None:
    """F6: strace sees every shutdown(2) of both processes, from the start to the end of the older one.

    What is not TCP is the link between the two, which was nobody else's.
    """
    if not shutil.which("strace"):
        pytest.skip("strace is not installed")
    traced = ["strace", "-f", "-qq", "-yy", "-e", "trace=shutdown", "-e", "signal=none"]
    server = [sys.executable, "-m", "takeover", "echo", "--listen", room.url, "--probation", "0"]
    probe = room.run(
        *traced, "-o", "probe", sys.executable, "-c", "import socket; a = socket.create_server(('', 0)); a.shutdown(1)"
    )
    shut_down = re.compile(r"shutdown\(\d+<TCP")
    if probe.wait() != 0 or not shut_down.search(pathlib.Path(room.folder, "probe").read_text()):
        pytest.skip("strace may not trace here")
    old = room.run(*traced, "-o", "old", *server)
    old.wait_for("serving")
    new = room.run(*traced, "-o", "new", *server)
    new.wait_for("took over")
    assert old.wait() == 0
    room.round_trip()
    for record in ("old", "new"):
        assert not shut_down.search(pathlib.Path(room.folder, record).read_text())
    new.signal(signal.SIGKILL)
    room.cli("stop").wait()


def test_the_older_process_keeps_no_closed_descriptor_in_its_epoll_set(room: Room) -> None:
    """F7: a closed listener whose open file the successor holds raises events on, unless it was removed first."""
    old = room.echo(live=False)
    old.wait_for("serving")
    steady, load = room.steady(1), room.pound()
    room.echo().wait_for("took over")
    old.wait_for("has taken over")
    load.goes_on()
    steady.goes_on()
    checked = 0
    for entry in os.listdir(f"/proc/{old.pid}/fd"):
        for line in pathlib.Path(f"/proc/{old.pid}/fdinfo/{entry}").read_text().splitlines():
            if line.startswith("tfd:"):
                fields = line.replace(":", " ").split()
                watched, inode = fields[1], int(fields[fields.index("ino") + 1], 16)
                assert os.stat(f"/proc/{old.pid}/fd/{watched}").st_ino == inode
                checked += 1
    assert checked


@pytest.mark.parametrize("fails", [True, False])
def test_a_successor_that_makes_an_adopted_listener_block_freezes_nobody(room: Room, fails: bool) -> None:
    """F8: O_NONBLOCK belongs to the open file. The load ends before the steady clients are looked at: it would wake a
    server that blocks in accept(2)."""
    old = room.echo()
    old.wait_for("serving")
    steady = room.steady(2)
    end = ["block", "wait", "fail"] if fails else []
    new = room.member(join={"service": "echo"}, plan=["block", "wait", *end])
    new.wait_for("waiting")
    assert not flags_of_listener(old, room.address) & os.O_NONBLOCK
    load = room.pound()
    load.goes_on()
    load.stop()
    steady.goes_on()
    new.tell()
    if fails:
        eventually(lambda: new.text.count("waiting") == 2, "it blocks again")
        assert not flags_of_listener(old, room.address) & os.O_NONBLOCK
        new.tell()
        assert new.wait() == 1
        old.wait_for("is off")
        assert flags_of_listener(old, room.address) & os.O_NONBLOCK
    else:
        new.wait_for("ready")
    after = room.pound()
    after.goes_on()
    after.stop()
    steady.goes_on()
    assert not load.lost and not after.lost


def test_connections_that_wait_when_the_listener_is_adopted_are_served(room: Room) -> None:
    """F9."""
    old = room.member(deaf=True, join={"service": "echo"})
    old.wait_for("ready")
    waiting = [room.connect() for _ in range(20)]
    for sock in waiting:
        sock.send(b"early")
    room.echo().wait_for("took over")
    for sock in waiting:
        with sock:
            assert receive_exactly(sock, 5) == b"early"


@pytest.mark.parametrize(("before", "after"), [(4, 2), (2, 4)])
def test_no_connection_that_waits_in_a_group_of_another_size_is_reset(room: Room, before: int, after: int) -> None:
    """F10: closing one member of an SO_REUSEPORT group resets what waits in its queue."""
    old = room.member([f"{room.url}?reuseport={before}"], deaf=True, join={"service": "echo"})
    old.wait_for("ready")
    waiting = [room.connect() for _ in range(100)]
    for sock in waiting:
        sock.send(b"early")
    new = room.echo(listen=[f"{room.url}?reuseport={after}"])
    new.wait_for("took over")
    assert old.wait() == 0
    for sock in waiting:
        with sock:
            assert receive_exactly(sock, 5) == b"early"
    assert len(room.status()["listeners"]) == max(before, after)


def test_descriptor_numbers_above_1023_do_no_harm(room: Room) -> None:
    """F11."""
    old = room.echo({"above": 1100})
    old.wait_for("serving")
    new = room.echo({"above": 1100})
    new.wait_for("took over")
    assert old.wait() == 0
    with room.connect() as sock:
        echo_once(sock, b"x")
        assert max(map(int, os.listdir(f"/proc/{new.pid}/fd"))) > 1100
    assert room.status()["pid"] == new.pid
