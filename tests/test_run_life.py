"""The life of a command under `takeover run`: it dies, is signalled, leaves orphans, and costs nothing at rest."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pathlib
import pty
import re
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from typing import Any

import pytest

from clients import LIMIT, eventually
from newcomers import NEWCOMER
from processes import Program, Room, private_memory, state_of
from supervised import SERVED, deploy, do, is_gone, processes_of, supervise, wait_until_gone, who

MOST_MEMORY = 15 * 1024
"""kB of private memory that a supervisor may have."""


@pytest.fixture
def room() -> Iterator[Room]:
    """No descriptor goes from one process to another in most of these tests, so one backend will do."""
    with Room("auto") as room:
        yield room


def children_of(pid: int) -> list[int]:
    found = []
    for entry in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError, ProcessLookupError):
            if int(pathlib.Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(entry))
    return found


def test_a_command_that_dies_is_started_again_and_who_connects_meanwhile_waits(room: Room) -> None:
    supervisor = deploy(room)
    first = who(room)["pid"]
    do(room, "exit 3")
    second = who(room)["pid"]
    assert second != first
    supervisor.wait_for(f"pid {first} ended with exit status 3")
    supervisor.wait_for("starting it again in 0.1 s")
    eventually(lambda: processes_of(room)[0]["ready_since"], "it is ready")
    (process,) = processes_of(room)
    assert (process["pid"], process["restarts"], process["last_exit"]) == (second, 1, "exit status 3")
    do(room, "kill 9")
    assert who(room)["pid"] not in (first, second)
    supervisor.wait_for("ended with SIGKILL")
    supervisor.wait_for("starting it again in 0.2 s")
    shown = room.cli("status", "--control", room.control)
    assert shown.wait() == 0
    assert "served.py" in shown.text
    assert "started again 2 times, the last one ended with SIGKILL" in " ".join(shown.text.split())


def test_a_restart_that_does_not_get_ready_is_tried_again(room: Room) -> None:
    wishes = os.path.join(room.folder, "wishes")
    supervisor = deploy(room, {"file": wishes})
    with open(wishes, "w") as file:
        json.dump({"exit": 4}, file)
    do(room, "exit 3")
    supervisor.wait_for("ended with exit status 4 before it was ready")
    supervisor.wait_for("starting it again in 0.2 s")
    os.unlink(wishes)
    assert who(room)["pid"] not in (None, supervisor.pid)
    assert supervisor.running


def test_one_of_several_workers_that_dies_is_replaced_while_the_others_serve(room: Room) -> None:
    deploy(room, workers=3)
    before = {process["pid"] for process in processes_of(room)}
    assert len(before) == 3
    client = room.pound()
    victim = min(before)
    os.kill(victim, signal.SIGUSR1)
    os.kill(victim, signal.SIGKILL)
    eventually(
        lambda: len({each["pid"] for each in processes_of(room) if each["ready_since"]} - {victim}) == 3, "3 are ready"
    )
    client.goes_on()
    client.stop()
    assert client.refused == 0
    assert len(before & {process["pid"] for process in processes_of(room)}) == 2


ONE_AFTER_THE_OTHER = """
if mkdir first 2>/dev/null; then
    echo ready; while ! test -e die; do sleep 0.02; done; exit 3
fi
while ! test -e gate; do sleep 0.02; done
echo ready; exec sleep 100
"""


def test_a_worker_that_dies_before_the_others_are_ready_is_replaced_and_the_service_starts(room: Room) -> None:
    supervisor = supervise(room, command=["sh", "-c", ONE_AFTER_THE_OTHER], ready="line:ready", workers=2)
    supervisor.wait_for("is ready after")
    pathlib.Path(room.folder, "die").touch()
    supervisor.wait_for("ended with exit status 3")
    supervisor.wait_for("starting it again")
    pathlib.Path(room.folder, "gate").touch()
    room.wait_for_owner(supervisor)
    assert sorted(process["restarts"] for process in processes_of(room)) == [0, 1]


def test_other_signals_are_passed_on(room: Room) -> None:
    supervisor = deploy(room, workers=2)
    pids = [process["pid"] for process in processes_of(room)]
    for name in ("SIGUSR1", "SIGUSR2", "SIGWINCH", "SIGTTIN", "SIGQUIT"):
        supervisor.signal(signal.Signals[name])
        for pid in pids:
            supervisor.wait_for(f"{pid} got {name}")


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_term_and_int_stop_the_command_and_end_with_0(room: Room, signum: signal.Signals) -> None:
    supervisor = deploy(room, workers=2)
    pids = [process["pid"] for process in processes_of(room)]
    with room.connect() as sock:
        sock.sendall(b"x")
        assert sock.recv(1) == b"x"
        supervisor.signal(signum)
        supervisor.wait_for(f"{signum.name}: stopping the command")
        sock.sendall(b"y")
        assert sock.recv(1) == b"y"
    assert supervisor.wait() == 0
    assert supervisor.text.count("ended ") == 2
    assert all(map(is_gone, pids))
    assert room.left_behind() == []


def test_a_second_term_kills_at_once(room: Room) -> None:
    supervisor = deploy(room, {"ignores": True, "children": 1})
    supervisor.signal(signal.SIGTERM)
    supervisor.wait_for("stopping the command")
    supervisor.signal(signal.SIGTERM)
    assert supervisor.wait() == 0
    supervisor.wait_for("once more: killing")


def test_a_command_that_ignores_the_stop_signal_is_killed_with_all_that_it_started(room: Room) -> None:
    supervisor = deploy(room, {"ignores": True, "children": 2}, stop_timeout=0.3)
    pid = who(room)["pid"]
    supervisor.signal(signal.SIGTERM)
    assert supervisor.wait() == 0
    supervisor.wait_for("has not ended within the stop timeout: killing 3 processes")
    assert is_gone(pid)


@pytest.mark.parametrize(("what", "status"), [("exit 0", 0), ("exit 7", 7), ("kill 9", 137)])
def test_without_restart_the_end_of_the_command_is_the_end_and_its_status_is_forwarded(
    room: Room, what: str, status: int
) -> None:
    supervisor = deploy(room, restart=False)
    do(room, what)
    assert supervisor.wait() == status
    assert room.left_behind() == []


@pytest.mark.parametrize("what", ["orphan", "orphan setsid"])
def test_orphans_of_the_command_end_with_it(room: Room, what: str) -> None:
    supervisor = deploy(room, stop_timeout=0.3)
    do(room, what)
    orphan = int(supervisor.wait_for("orphan is ").rpartition(" ")[2])
    eventually(lambda: orphan in children_of(supervisor.pid), "the supervisor has inherited it")
    supervisor.signal(signal.SIGTERM)
    assert supervisor.wait() == 0
    assert is_gone(orphan)


def test_orphans_that_hide_their_environment_and_their_group_end_with_the_supervisor(room: Room) -> None:
    hidden = "import os, signal; os.setsid(); os.fork() and os._exit(0); os.setpgid(0, 0); "
    hidden += "print('hidden is', os.getpid(), flush=True); signal.pause()"
    script = f'env -i {sys.executable} -c "$0" & exec {sys.executable} -c "$1" \'{{}}\''
    served_source = pathlib.Path(SERVED).read_text()
    supervisor = deploy(room, command=["sh", "-c", script, hidden, served_source])
    pid = int(supervisor.wait_for("hidden is ").split()[2])
    eventually(lambda: pid in children_of(supervisor.pid), "the supervisor has inherited it")
    supervisor.signal(signal.SIGTERM)
    assert supervisor.wait() == 0
    assert is_gone(pid)


def test_no_zombie_is_left_of_an_orphan_that_ends(room: Room) -> None:
    supervisor = deploy(room)
    do(room, "orphan")
    orphan = int(supervisor.wait_for("orphan is ").rpartition(" ")[2])
    eventually(lambda: orphan in children_of(supervisor.pid), "the supervisor has inherited it")
    os.kill(orphan, signal.SIGKILL)
    wait_until_gone(orphan)
    assert "Z" not in map(state_of, children_of(supervisor.pid))


def test_workers_that_a_dying_command_leaves_behind_are_stopped(room: Room) -> None:
    supervisor = deploy(room, {"children": 2})
    parent = processes_of(room)[0]["pid"]
    workers = eventually(lambda: children_of(parent), "it has workers")
    os.kill(parent, signal.SIGKILL)
    supervisor.wait_for(f"pid {parent} has left {len(workers)} processes behind")
    for pid in workers:
        wait_until_gone(pid)
    assert who(room)["pid"] not in workers
    supervisor.signal(signal.SIGTERM)
    assert supervisor.wait() == 0


def test_a_command_that_forks_away_is_a_failure_and_nothing_of_it_is_left(room: Room) -> None:
    supervisor = supervise(room, {"away": True}, ready="delay:30")
    assert supervisor.wait() == 1
    assert "exit status 0 before it was ready" in supervisor.text.splitlines()[-1]
    away = int(supervisor.wait_for("serving ").split()[1]) if "serving " in supervisor.text else None
    assert away is None or is_gone(away)


def test_a_command_dies_with_its_supervisor_and_the_next_start_finds_the_port_free(room: Room) -> None:
    supervisor = deploy(room, {"ignores": True})
    pid = who(room)["pid"]
    supervisor.signal(signal.SIGKILL)
    supervisor.wait()
    eventually(lambda: is_gone(pid) or state_of(pid) == "Z", "it died too")
    deploy(room)
    assert who(room)["pid"] != pid


def test_workers_that_outlive_a_killed_supervisor_make_way_for_the_next(room: Room) -> None:
    supervisor = deploy(room, {"children": 1})
    parent = processes_of(room)[0]["pid"]
    (worker,) = eventually(lambda: children_of(parent), "it has a worker")
    supervisor.signal(signal.SIGKILL)
    supervisor.wait()
    eventually(lambda: who(room)["pid"] == worker, "the worker serves on alone")
    second = deploy(room, {"version": 2})
    second.wait_for(f"SIGTERM to pid {worker}, left behind")
    assert who(room)["version"] == 2


def test_it_works_as_pid_1_and_leaves_no_zombie_there(room: Room) -> None:
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        pytest.skip("a pid namespace takes root, and unshare of util-linux")
    probe = subprocess.run(["unshare", "--pid", "--fork", "--mount-proc", "true"], capture_output=True, check=False)
    if probe.returncode:
        pytest.skip(f"no pid namespaces here: {probe.stderr.decode().strip()}")
    namespace = supervise(
        room, stop_timeout=0.3, started=["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
    )
    eventually(lambda: room.status()["state"] == "serving" if os.path.exists(room.control) else None, "it serves")
    assert room.status()["pid_there"] == 1
    first = who(room)["pid"]
    do(room, "orphan")
    inside = eventually(lambda: children_of(children_of(namespace.pid)[0]), "it has children")
    eventually(lambda: len(children_of(children_of(namespace.pid)[0])) == 2, "it has inherited the orphan")
    do(room, "exit 3")
    assert who(room)["pid"] != first
    eventually(lambda: "Z" not in map(state_of, children_of(children_of(namespace.pid)[0])), "no zombie is left")
    for pid in inside:
        eventually(lambda: state_of(pid) != "Z", "it was waited for")  # noqa: B023
    os.kill(children_of(namespace.pid)[0], signal.SIGTERM)
    assert namespace.wait() == 0


def switches(pid: int) -> int:
    """How often its threads have gone to sleep or been woken, proc_pid_status(5)."""
    texts = [path.read_text() for path in pathlib.Path(f"/proc/{pid}/task").glob("*/status")]
    return sum(int(count) for text in texts for count in re.findall(r"ctxt_switches:\s+(\d+)", text))


def test_at_rest_a_supervisor_has_little_memory_and_wakes_up_for_nothing(room: Room) -> None:
    first = deploy(room)
    second = deploy(room)
    assert first.wait() == 0
    assert private_memory(second.pid) <= MOST_MEMORY

    def at_rest() -> bool:
        before = switches(second.pid)
        time.sleep(0.5)
        return switches(second.pid) == before

    eventually(at_rest, "half a second passes in which no thread of it wakes up")


def test_a_command_that_writes_without_end_costs_the_supervisor_nothing(room: Room) -> None:
    with open(os.devnull, "wb") as nowhere:
        supervisor = deploy(room, {"writes": 2000}, process={"stdout": nowhere, "stderr": nowhere})
        assert who(room)["words"] == []
        assert private_memory(supervisor.pid) <= MOST_MEMORY


ON_A_TERMINAL = """
import fcntl, os, sys, termios
os.setsid()
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.argv[1], sys.argv[1:])
"""


@contextlib.contextmanager
def terminal(room: Room, **options: Any) -> Iterator[tuple[Program, int]]:
    """A supervisor on a terminal of its own: the program, and the terminal's other end."""
    ours, theirs = pty.openpty()
    try:
        program = supervise(
            room,
            started=[sys.executable, "-c", ON_A_TERMINAL],
            process={"stdin": theirs, "stdout": theirs, "stderr": theirs},
            **options,
        )
        os.close(theirs)
        yield program, ours
    finally:
        os.close(ours)


def read_until(descriptor: int, text: bytes, data: bytes = b"") -> bytes:
    deadline = time.monotonic() + LIMIT
    while text not in data and time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            data += os.read(descriptor, 4096)
    assert text in data, data
    return data


def test_the_command_has_the_terminal_and_ctrl_c_stops_it_once_through_the_supervisor(room: Room) -> None:
    with terminal(room) as (program, ours):
        room.wait_for_owner(program)
        assert who(room)["terminal"] == [False, True, True]
        os.write(ours, b"\x03")
        seen = read_until(ours, b"ended ")
        assert program.wait() == 0
        assert b"SIGINT: stopping the command" in seen
        assert b"got SIGINT" not in seen


def test_a_command_whose_output_is_read_learns_the_new_size_of_the_terminal(room: Room) -> None:
    command = [sys.executable, NEWCOMER, "describe_terminal"]
    with terminal(room, command=command, ready="line:terminal") as (program, ours):
        room.wait_for_owner(program)
        fcntl.ioctl(ours, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 90, 0, 0))
        read_until(ours, b"terminal True True (90, 40)")
        os.write(ours, b"\x03")
        assert program.wait() == 0
