"""What may lie at the control path, where it may be, and who may have been there before (S1, S2)."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

import takeover
from clients import LIMIT
from kernel import failing, opened
from processes import Room
from takeover.control import ControlPath
from takeover.errors import ControlPathError

ROOT_ONLY = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")


def leave_stale_socket(room: Room) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(room.control)


def leave_killed_server(room: Room) -> None:
    server = room.echo()
    room.wait_for_owner(server)
    server.signal(signal.SIGKILL)
    server.wait()
    assert room.left_behind() == ["takeover.sock", "takeover.sock.lock"]


def leave_lock_of_a_living_pid(room: Room) -> None:
    with open(room.control + ".lock", "w") as file:
        file.write(f"{os.getpid()}\n")


@pytest.mark.parametrize("leave", [leave_stale_socket, leave_killed_server, leave_lock_of_a_living_pid])
def test_what_a_dead_process_left_hinders_nobody(room: Room, leave: Callable[[Room], None]) -> None:
    leave(room)
    server = room.echo()
    server.wait_for("generation 1")
    room.wait_for_owner(server)
    room.round_trip()


def refused(room: Room, *arguments: str, status: int = 1, **options: object) -> str:
    """The last line of a start that must fail."""
    program = room.cli("echo", "--listen", room.url, *arguments, **options)
    assert program.wait() == status, program.text
    assert program.lines[-1].startswith("takeover: "), program.text
    return program.lines[-1]


def test_a_regular_file_at_the_path_is_in_the_way_and_stays(room: Room) -> None:
    with open(room.control, "w") as file:
        file.write("precious")
    assert "not a socket in the way" in refused(room)
    with open(room.control) as file:
        assert file.read() == "precious"


def test_a_symbolic_link_at_the_path_is_not_followed(room: Room) -> None:
    target = os.path.join(room.folder, "elsewhere")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(target)
        os.symlink(target, room.control)
        assert "a symbolic link in the way" in refused(room)
    assert os.path.islink(room.control)
    assert os.path.exists(target)


def test_a_symbolic_link_as_lock_file_is_not_followed(room: Room) -> None:
    os.symlink(os.path.join(room.folder, "elsewhere"), room.control + ".lock")
    assert "symbolic link" in refused(room)
    assert room.left_behind() == ["takeover.sock.lock"]


def test_the_socket_of_another_program_is_left_alone(room: Room) -> None:
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(room.control)
        other.listen()
        before = os.stat(room.control).st_ino
        starting = room.cli("echo", "--listen", room.url)
        with other.accept()[0] as sock:
            sock.send(b"220 mail.example.org ESMTP\r\n")
            assert starting.wait() == 1
        assert "does not speak takeover" in starting.lines[-1]
        assert os.stat(room.control).st_ino == before


def test_a_successor_that_gives_up_leaves_the_path_also_where_somebody_had_removed_the_lock(room: Room) -> None:
    with takeover.join(room.control) as old:
        old.ready()
        before = os.stat(room.control).st_ino
        os.unlink(f"{room.control}.lock")
        with takeover.join(room.control) as new:
            assert new.state == "joining" and room.left_behind() == ["takeover.sock", "takeover.sock.lock"]
        assert os.stat(room.control).st_ino == before and room.left_behind() == ["takeover.sock"]
        with takeover.join(room.control) as new:
            assert new.ready().generation == 2


@pytest.mark.parametrize("replacement", ["socket", "file", "link"])
def test_a_path_that_was_replaced_is_never_unlinked(room: Room, replacement: str) -> None:
    server = room.echo()
    room.wait_for_owner(server)
    os.unlink(room.control)
    with socket.socket(socket.AF_UNIX) as other:
        if replacement == "socket":
            other.bind(room.control)
        elif replacement == "file":
            open(room.control, "w").close()
        else:
            os.symlink("/nowhere", room.control)
        before = os.lstat(room.control).st_ino
        server.signal(signal.SIGTERM)
        assert server.wait() == 0
        assert os.lstat(room.control).st_ino == before


def test_an_incumbent_that_ends_leaves_the_path_and_unix_listeners_to_its_successor(room: Room) -> None:
    path = os.path.join(room.folder, "echo.sock")
    old = room.echo(listen=[f"unix:{path}"])
    room.wait_for_owner(old)
    new = room.echo(listen=[f"unix:{path}"])
    new.wait_for("took over")
    inodes = {os.stat(each).st_ino for each in (path, room.control)}
    assert old.wait() == 0
    assert {os.stat(each).st_ino for each in (path, room.control)} == inodes
    room.wait_for_owner(new)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(LIMIT)
        sock.connect(path)
        sock.send(b"x")
        assert sock.recv(1) == b"x"
    new.signal(signal.SIGTERM)
    assert new.wait() == 0
    assert room.left_behind() == []


def test_a_path_of_107_bytes_works_and_one_of_108_is_refused(room: Room) -> None:
    folder = os.path.join(room.folder, "d" * (106 - len(room.folder) - 1 - len("/s")))
    os.mkdir(folder)
    longest = os.path.join(folder, "s" * 2)
    assert len(longest) == 107
    room.control = longest
    server = room.echo()
    room.wait_for_owner(server)
    new = room.echo()
    new.wait_for("took over")
    assert "at most 107" in refused(room, "--control", longest + "x", status=2)


def test_a_short_relative_path_works_in_a_folder_whose_name_is_too_long(room: Room) -> None:
    folder = os.path.join(room.folder, "d" * 120)
    os.mkdir(folder)
    server = room.cli("echo", "--listen", room.url, cwd=folder)
    server.wait_for("serving")
    new = room.cli("echo", "--listen", room.url, "--probation", "0", cwd=folder)
    new.wait_for("took over")
    room.round_trip()


def test_a_missing_folder_is_named(room: Room) -> None:
    missing = os.path.join(room.folder, "missing", "takeover.sock")
    assert "make the folder first" in refused(room, "--control", missing)


def test_a_folder_that_everybody_may_write_to_is_refused(room: Room) -> None:
    os.chmod(room.folder, 0o777)
    assert "everybody may write" in refused(room)


@ROOT_ONLY
def test_a_folder_of_another_user_is_refused(room: Room) -> None:
    os.chown(room.folder, 65533, 65533)
    os.chmod(room.folder, 0o755)
    # root may use it no less dangerously than anybody
    assert "belongs to uid 65533" in refused(room, "--control", room.control)


@ROOT_ONLY
def test_a_folder_that_may_not_be_written_to_is_named(room: Room) -> None:
    os.chmod(room.folder, 0o755)
    program = room.echo({"uid": 65534})
    assert program.wait() == 1
    assert "Permission denied" in program.lines[-1] and room.control in program.lines[-1]


@ROOT_ONLY
def test_another_users_incumbent_is_refused_and_serves_on(room: Room) -> None:
    server = room.echo()
    room.wait_for_owner(server)
    os.chmod(room.folder, 0o755)
    program = room.echo({"uid": 65534})
    assert program.wait() == 1
    assert len(program.lines) == 1, program.text
    assert room.owner() == server.pid


# In one process: what the kernel says, and what is said of it.


@pytest.fixture
def control(tmp_path: pathlib.Path) -> ControlPath:
    (tmp_path / "control").mkdir()
    return ControlPath(str(tmp_path / "control" / "takeover.sock"))


def test_a_relative_path_where_the_working_folder_is_gone_is_refused(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(ControlPathError, match=r"takeover.sock: the working folder is gone"):
        ControlPath("takeover.sock")


def test_a_file_in_the_place_of_the_folder_is_named(control: ControlPath) -> None:
    folder = pathlib.Path(control.path).parent
    folder.rmdir()
    folder.touch()
    with pytest.raises(ControlPathError, match="control is not a folder"):
        control.lock()
    with pytest.raises(ControlPathError, match=r"lstat .*takeover.sock: Not a directory"):
        control.connect()


def test_a_lock_file_that_is_a_pipe_is_refused_and_stays(control: ControlPath) -> None:
    os.mkfifo(control.lock_path)
    before = opened()
    with pytest.raises(ControlPathError, match="is not a regular file; remove it"):
        control.lock()
    assert os.path.exists(control.lock_path) and opened() == before


def test_who_locks_a_file_that_its_holder_has_just_removed_locks_the_one_that_is_there_now(
    control: ControlPath, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the opening and the locking of the file its holder may have ended."""
    flock, before = fcntl.flock, opened()

    def remove_and_lock(descriptor: int, operation: int) -> None:
        monkeypatch.setattr(fcntl, "flock", flock)
        os.unlink(control.lock_path)
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", remove_and_lock)
    descriptor = control.lock()
    assert descriptor is not None and os.path.samestat(os.fstat(descriptor), os.stat(control.lock_path))
    assert opened() == before + 1
    control.unlock(descriptor)


def test_a_socket_that_cannot_be_made_is_an_error_that_names_the_path(
    control: ControlPath, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket, "socket", failing(errno.EMFILE))
    with pytest.raises(ControlPathError, match=r"a socket for .*takeover.sock: Too many open files"):
        control.bind()


def test_a_full_queue_is_told_from_nobody_who_listens(control: ControlPath) -> None:
    with socket.socket(socket.AF_UNIX) as listening, contextlib.ExitStack() as waiting:
        listening.bind(control.path)
        listening.listen(0)

        def crowd() -> None:
            for _ in range(10):
                sock = control.connect()
                assert sock is not None
                waiting.enter_context(sock)

        with pytest.raises(ControlPathError, match="its queue is full; is the process behind it stopped"):
            crowd()


def test_a_socket_of_another_kind_is_named(control: ControlPath) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
        other.bind(control.path)
        before = opened()
        with pytest.raises(ControlPathError, match=r"connect .*takeover.sock: Protocol wrong type for socket"):
            control.connect()
        assert opened() == before


class Refused(socket.socket):
    """What a user without the permission finds, or one on a full disk."""

    def connect(self, address: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    def bind(self, address: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_socket_that_may_not_be_connected_to_is_told_by_its_owner(
    control: ControlPath, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(control.path)
    monkeypatch.setattr(control, "_new_socket", lambda: Refused(socket.AF_UNIX))
    before = opened()
    with pytest.raises(ControlPathError, match=f"connect .*: it belongs to uid {os.geteuid()}"):
        control.connect()
    assert opened() == before


def test_a_path_that_cannot_be_bound_says_why_and_leaves_nothing_open(
    control: ControlPath, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "_new_socket", lambda: Refused(socket.AF_UNIX))
    before = opened()
    with pytest.raises(ControlPathError, match=r"bind .*takeover.sock: No space left on device"):
        control.bind()
    assert opened() == before


def unshared(*arguments: str) -> list[str]:
    """A command line that runs in namespaces of its own; skips where that is not permitted."""
    if not shutil.which("unshare"):
        pytest.skip("unshare is not installed")
    probe = subprocess.run(["unshare", *arguments, "true"], capture_output=True, text=True, timeout=LIMIT, check=False)
    if probe.returncode != 0:
        pytest.skip(f"unshare {' '.join(arguments)} is not permitted here: {probe.stderr.strip()}")
    return ["unshare", *arguments]


@pytest.mark.parametrize(
    "namespaces",
    [["--pid", "--fork", "--kill-child", "--mount-proc"], ["--mount"], ["--net"]],
    ids=["pid", "mount", "net"],
)
def test_successor_and_incumbent_may_live_in_different_namespaces(room: Room, namespaces: list[str]) -> None:
    """S2: the peer's pid reads 0 or differs; a listener belongs to the network that it was bound in."""
    enter = unshared(*namespaces)
    serve = [sys.executable, "-m", "takeover", "echo", "--listen", room.url, "--probation", "0"]
    outside = room.run(*serve)
    outside.wait_for("serving")
    inside = room.run(*enter, *serve)
    inside.wait_for("took over")
    assert outside.wait() == 0
    room.round_trip()
    again = room.run(*serve)
    again.wait_for("took over")
    assert inside.wait() == 0
    room.round_trip()
    assert room.status()["generation"] == 3
