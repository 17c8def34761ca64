"""A successor in a container: in other mount, pid and user namespaces, with the control socket in a shared folder."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable

import pytest

from clients import LIMIT, eventually
from processes import PROGRAMS, Program, Room, descriptors_at_rest
from takeover import namespaces, query
from takeover.control import ControlPath, peer_of


def may(*flags: str) -> str:
    """Why these namespaces cannot be made here; "" where they can."""
    tool = shutil.which("unshare")
    if tool is None:
        return "there is no unshare (util-linux)"
    tried = subprocess.run([tool, *flags, "true"], capture_output=True, text=True, check=False)
    return "" if tried.returncode == 0 else f"not allowed here: {tried.stderr.strip()}"


PID = ("--pid", "--mount-proc", "--fork", "--kill-child")
USER = ("--user", "--map-root-user")
in_pid_namespaces = pytest.mark.skipif(bool(may(*PID)), reason=may(*PID))
in_user_namespaces = pytest.mark.skipif(bool(may(*USER)), reason=may(*USER))

Contained = Callable[..., Program]


@pytest.fixture
def contained(room: Room) -> Contained:
    """Starts programs/echo.py under unshare; what the Program is, is unshare, which passes its exit status on."""

    def start(*flags: str, **options: object) -> Program:
        before = room.echo

        def run(*command: str, start: object = None, **settings: object) -> Program:
            program = Program(
                ("unshare", *flags, *command), **{"env": room.environment, "cwd": room.folder, **settings}
            )
            room.programs.append(program)
            return program

        room.run, original = run, room.run  # type: ignore[method-assign]
        try:
            return before(**options)
        finally:
            room.run = original  # type: ignore[method-assign]

    return start


def generation(room: Room) -> int:
    with contextlib.suppress(Exception):
        report = room.status(0.5)
        return int(report["generation"]) if report["state"] == "serving" else 0
    return 0


def wait_for_generation(room: Room, number: int, program: Program) -> None:
    eventually(lambda: generation(room) == number or not program.running, f"generation {number} serves")
    assert program.running, program.text


@in_pid_namespaces
def test_a_successor_that_cannot_see_the_incumbent_takes_over_from_it(room: Room, contained: Contained) -> None:
    first = room.echo()
    room.wait_for_owner(first)
    pounder = room.pound()
    pounder.goes_on()
    second = contained(*PID)
    wait_for_generation(room, 2, second)
    assert first.wait() == 0
    pounder.goes_on()
    pounder.stop()
    assert pounder.lost == []
    # The incumbent sees the container's process, the container does not see the incumbent.
    assert f"pid {first.pid} of another pid namespace" in second.wait_for("took over 1 listener")
    seen = room.status(LIMIT)
    assert seen["pid_there"] == 1 and seen["pid"] > 1
    assert f"pid {seen['pid']} asks for the service" in first.text
    assert seen["last_takeover"]["peer"] == first.pid and seen["last_takeover"]["elsewhere"] is True
    shown = room.cli("status")
    assert shown.wait() == 0
    assert f"pid {seen['pid']} (it calls itself 1)" in " ".join(shown.text.split())
    assert f"with pid {first.pid} of another pid namespace" in " ".join(shown.text.split())


@in_pid_namespaces
def test_takeovers_between_two_containers_and_back_leave_no_descriptor(room: Room, contained: Contained) -> None:
    generations = [contained(*PID)]
    wait_for_generation(room, 1, generations[0])
    held = []
    for number in range(2, 6):
        pounder = room.pound()
        pounder.goes_on()
        generations.append(contained(*PID))
        wait_for_generation(room, number, generations[-1])
        assert generations[-2].wait() == 0
        pounder.goes_on()
        pounder.stop()
        assert pounder.lost == []
        eventually(lambda: room.status(LIMIT)["connections"]["open"] == 0, "the clients are gone")
        owner = room.status(LIMIT)["pid"]
        held.append(eventually(lambda owner=owner: descriptors_at_rest(owner), "the owner is at rest"))
    assert held[0] == held[-1]
    assert "pid 1 of another pid namespace asks for the service" in generations[1].text
    last = room.echo()
    wait_for_generation(room, 6, last)
    assert generations[-1].wait() == 0
    room.round_trip()


@in_pid_namespaces
@pytest.mark.parametrize("killed", ["the successor", "the incumbent"])
def test_a_death_in_another_pid_namespace_is_seen_at_once(room: Room, contained: Contained, killed: str) -> None:
    first = contained(*PID, probation=60.0)
    wait_for_generation(room, 1, first)
    second = contained(*PID, probation=60.0)
    second.wait_for("took over")
    victim, heir = (second, first) if killed == "the successor" else (first, second)
    # unshare --kill-child takes its container along
    victim.signal(signal.SIGKILL)
    victim.wait()
    expected = 1 if heir is first else 2
    eventually(lambda: generation(room) == expected, "who lives owns the service")
    room.round_trip()
    contained(*PID).wait_for(f"(generation {expected + 1}")


@in_pid_namespaces
def test_a_keeper_in_a_container_that_is_gone_is_replaced_by_the_next(room: Room, contained: Contained) -> None:
    first = contained(*PID, keeper=True)
    wait_for_generation(room, 1, first)
    second = contained(*PID, keeper=True)
    wait_for_generation(room, 2, second)
    # With PID 1 of its pid namespace goes the keeper, and one of the second container takes its place.
    assert first.wait() == 0
    second.wait_for("holds 1 listeners")
    eventually(lambda: (room.status(LIMIT)["keeper"] or {}).get("pid"), "there is a keeper that can be seen")
    room.round_trip()
    query.stop(room.control)
    assert second.wait() == 0


@in_pid_namespaces
def test_stop_and_status_work_from_inside_and_say_where_the_owner_is(room: Room) -> None:
    first = room.echo()
    room.wait_for_owner(first)
    shown = room.run("unshare", *PID, sys.executable, "-m", "takeover", "status")
    assert shown.wait() == 0
    assert f"{first.pid} of another pid namespace" in " ".join(shown.text.split())
    stopped = room.run("unshare", *PID, sys.executable, "-m", "takeover", "stop")
    assert stopped.wait() == 0
    assert "a process in another pid namespace has ended" in stopped.text
    assert first.wait() == 0


@in_user_namespaces
def test_a_successor_in_a_user_namespace_takes_over_where_its_uid_is_mapped(room: Room, contained: Contained) -> None:
    first = room.echo()
    room.wait_for_owner(first)
    second = contained(*USER, *PID)
    wait_for_generation(room, 2, second)
    third = contained("--user", "--map-user=1000", "--map-group=1000")
    wait_for_generation(room, 3, third)
    assert first.wait() == 0 and second.wait() == 0
    room.round_trip()


@in_user_namespaces
def test_a_uid_without_a_mapping_is_nobody_that_may_take_over(room: Room, contained: Contained) -> None:
    first = room.echo()
    room.wait_for_owner(first)
    refused = contained("--user")
    assert refused.wait() == 1
    assert "as which this user namespace shows every uid without a mapping" in refused.text
    assert room.owner() == first.pid
    room.round_trip()


@in_user_namespaces
@pytest.mark.skipif(os.geteuid() != 0, reason="only root may map a user that is not its own")
def test_an_incumbent_in_a_user_namespace_does_not_take_the_overflow_uid_for_a_user_that_it_allows(
    room: Room, contained: Contained
) -> None:
    overflow = 65534
    first = contained("--user", "--map-root-user", allow_uids=[overflow])
    wait_for_generation(room, 1, first)
    os.chmod(room.folder, 0o711)
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            os.setgid(12345)
            os.setuid(12345)
            sock = socket.socket(socket.AF_UNIX)
            sock.settimeout(LIMIT)
            sock.connect(room.control)
            os._exit(3 if sock.recv(1) else 0)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert "without a mapping" in first.wait_for(f"refused uid {overflow}")
    room.round_trip()


@pytest.mark.skipif(bool(may("--mount")), reason=may("--mount"))
def test_only_the_control_folder_need_be_shared(room: Room) -> None:
    first = room.echo()
    room.wait_for_owner(first)
    shared = os.path.join(room.folder, "elsewhere")
    os.mkdir(shared)
    second = room.run(
        "unshare",
        "--mount",
        "sh",
        "-c",
        'mount --bind "$1" "$2" && mount -t tmpfs none "$2/elsewhere" && shift 2 && exec "$@"',
        "sh",
        room.folder,
        room.folder,
        sys.executable,
        str(PROGRAMS / "echo.py"),
        json.dumps({"options": {"listen": [room.url], "control": room.control, "probation": 0.0}}),
    )
    room.wait_for_owner(second)
    assert first.wait() == 0


def test_a_process_is_known_by_what_it_says_of_itself() -> None:
    one, other = socket.socketpair()
    with one, other:
        peer = peer_of(one)
        assert namespaces.is_process(peer.pid, peer.pidfd, os.getpid())
        assert not namespaces.is_process(peer.pid, peer.pidfd, os.getpid() + 1)
        assert namespaces.own_pid(None) is None
        assert namespaces.is_process(5, None, 5) and not namespaces.is_process(5, None, 6)
        if peer.pidfd is not None:
            os.close(peer.pidfd)
    assert [namespaces.in_words(*pids) for pids in ((3, 4), (0, 4), (0,))] == [
        "pid 3",
        "pid 4 of another pid namespace",
        "a process in another pid namespace",
    ]


def test_where_every_uid_is_mapped_the_overflow_uid_is_a_user_like_any_other(
    tmp_path: os.PathLike[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = os.path.join(tmp_path, "takeover.sock")
    monkeypatch.setattr("takeover.control.unmapped_uid", lambda: None)
    assert 65534 in ControlPath(path, [65534]).allowed
    monkeypatch.setattr("takeover.control.unmapped_uid", lambda: 65534)
    assert 65534 not in ControlPath(path, [65534]).allowed


def test_where_nothing_tells_of_mappings_every_uid_is_a_user(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> object:
        raise FileNotFoundError

    monkeypatch.setattr(namespaces, "open", fail, raising=False)
    assert namespaces.unmapped_uid() is None
    assert namespaces.mapping_hint(65534) == ""
