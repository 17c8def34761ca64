"""A keeper outlives kill -9 of everything else: nobody is refused, and the next start serves the queue."""

import os
import pathlib
import signal
import socket
import sys
from collections.abc import Callable

import pytest

import takeover
from clients import LIMIT, echo_once, eventually
from processes import Program, Room, descriptors, state_of
from takeover import _keeper_py, keeper, query
from takeover.control import ControlPath
from takeover.errors import LocalError, NotRunning, TimedOut

MIB = 1024


def keeper_of(room: Room) -> int:
    """The pid of the keeper that the owner shows, when it shows one."""

    def known() -> int:
        report = room.status(LIMIT).get("keeper") or {}
        return int(report["pid"]) if report.get("listeners") else 0

    return int(eventually(known, "status shows the keeper"))


def is_gone(pid: int) -> bool:
    try:
        return state_of(pid) == "Z"
    except FileNotFoundError:
        return True


def kill(program: Program) -> None:
    program.signal(signal.SIGKILL)
    program.wait()


def kept(room: Room) -> keeper.Keeper:
    """A connection of the test's own to the keeper of the room."""
    found = keeper.find(keeper.path_of_keeper(ControlPath(room.control)))
    assert found is not None
    return found


@pytest.fixture
def owner(room: Room) -> Callable[..., Program]:
    """Starts an owner with a keeper, and waits until it serves."""

    def start(**options: object) -> Program:
        program = room.echo(keeper=True, **options)
        room.wait_for_owner(program)
        return program

    return start


@pytest.fixture(autouse=True)
def no_keeper_is_left(room: Room) -> object:
    """Whatever a test leaves alive is ended by its pid."""
    yield
    for program in room.programs:
        program.end()
    if keeper_lives(room):
        query.stop(room.control)


def keeper_lives(room: Room) -> bool:
    found = keeper.find(keeper.path_of_keeper(ControlPath(room.control)))
    if found is not None:
        found.close()
    return found is not None


def test_twenty_times_everything_else_is_killed_and_nobody_is_refused(
    room: Room, owner: Callable[..., Program]
) -> None:
    program = owner()
    pid = keeper_of(room)
    pounder = room.pound(pause=0.001)
    pounder.goes_on()
    held = descriptors(pid)
    for _ in range(20):
        kill(program)
        waiting = [room.connect() for _ in range(5)]
        for sock in waiting:
            sock.sendall(b"while nobody is there")
        program = owner()
        for sock in waiting:
            assert sock.recv(100) == b"while nobody is there"
            sock.close()
        assert keeper_of(room) == pid
        pounder.goes_on()
    eventually(lambda: descriptors(pid) == held, "the keeper holds what it held")
    pounder.stop()
    # Who was being served when the owner was killed is cut off; nobody who came to the queue is.
    assert pounder.refused == 0
    assert len(pounder.lost) <= 20
    assert all(isinstance(error, ConnectionResetError) for error in pounder.lost), pounder.lost


def test_the_keeper_costs_little_while_its_owner_lives_and_when_it_is_dead(
    room: Room, owner: Callable[..., Program]
) -> None:
    program = owner()
    pid = keeper_of(room)
    limit = MIB if room.backend == "cython" else 6 * MIB
    alive = keeper.private_memory(pid)
    assert alive is not None and alive < limit
    kill(program)
    dead = keeper.private_memory(pid)
    assert dead is not None and dead < limit
    print(f"{room.backend}: {alive} KiB while the owner lives, {dead} KiB when it is dead")


def test_status_shows_the_keeper_and_stop_ends_it(room: Room, owner: Callable[..., Program]) -> None:
    program = owner()
    pid = keeper_of(room)
    shown = room.status(LIMIT)["keeper"]
    assert shown["listeners"] == 1 and shown["private_kib"] > 0 and shown["failure"] is None
    assert f"pid {pid} holds 1 listeners" in " ".join(room.cli("status").wait_for("keeper").split())
    query.stop(room.control)
    assert program.wait() == 0
    assert is_gone(pid)
    assert room.left_behind() == []


def test_sigterm_of_the_last_owner_ends_the_keeper(room: Room, owner: Callable[..., Program]) -> None:
    program = owner()
    pid = keeper_of(room)
    program.signal(signal.SIGTERM)
    assert program.wait() == 0
    assert is_gone(pid)
    assert room.left_behind() == []
    with pytest.raises(ConnectionRefusedError):
        room.connect()


def test_a_successor_goes_on_with_the_keeper_that_is_there(room: Room, owner: Callable[..., Program]) -> None:
    first = owner()
    pid = keeper_of(room)
    second = owner()
    assert first.wait() == 0
    assert keeper_of(room) == pid
    kill(second)
    with room.connect() as waiting:
        owner()
        echo_once(waiting, b"hello")
    assert keeper_of(room) == pid


def test_a_successor_that_wants_no_keeper_ends_it(room: Room, owner: Callable[..., Program]) -> None:
    owner()
    pid = keeper_of(room)
    second = room.echo()
    room.wait_for_owner(second)
    eventually(lambda: is_gone(pid) and not os.path.exists(f"{room.control}.keeper"), "the keeper is gone")
    assert room.status(LIMIT)["keeper"] is None
    room.round_trip()


def test_the_keeper_is_told_of_listeners_that_go(room: Room) -> None:
    with takeover.join(room.control, keeper=True) as service:
        one, other = service.listen("tcp://127.0.0.1:0?v6only=1"), service.listen("tcp://127.0.0.1:0")
        address = other.getsockname()
        service.ready()
        eventually(lambda: (service.status()["keeper"] or {})["listeners"] == 2, "the keeper holds both")
        with socket.create_connection(address, LIMIT):
            other.close()
        eventually(lambda: service.status()["keeper"]["listeners"] == 1, "the keeper holds one")
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(address, LIMIT)
        socket.create_connection(one.getsockname(), LIMIT).close()
    assert not keeper_lives(room)


def test_a_keeper_that_was_killed_is_started_again(room: Room, owner: Callable[..., Program]) -> None:
    program = owner()
    first = keeper_of(room)
    os.kill(first, signal.SIGKILL)
    program.wait_for("has died")
    second = eventually(lambda: keeper_of(room) != first and keeper_of(room), "another keeper")
    kill(program)
    with room.connect() as waiting:
        owner()
        echo_once(waiting, b"hello")
    assert keeper_of(room) == second


def test_a_keeper_that_is_stopped_is_replaced_by_a_successor(room: Room, owner: Callable[..., Program]) -> None:
    owner()
    first = keeper_of(room)
    os.kill(first, signal.SIGSTOP)
    second = owner()
    second.wait_for("the keeper is replaced")
    eventually(lambda: keeper_of(room) != first, "another keeper")
    assert is_gone(first)


def test_a_cold_start_says_of_a_stopped_keeper_that_it_has_the_listeners(
    room: Room, owner: Callable[..., Program]
) -> None:
    program = owner()
    pid = keeper_of(room)
    kill(program)
    os.kill(pid, signal.SIGSTOP)
    late = room.echo(keeper=True)
    assert late.wait() == TimedOut.exit_status
    assert "It holds the listeners" in late.text
    os.kill(pid, signal.SIGCONT)
    owner()


def test_ctrl_c_and_a_terminal_that_goes_do_not_reach_the_keeper_but_sigterm_does(
    room: Room, owner: Callable[..., Program]
) -> None:
    program = owner()
    pid = keeper_of(room)
    assert os.getsid(pid) != os.getsid(program.pid) and os.getpgid(pid) != os.getpgid(program.pid)
    for signum in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGUSR1, signal.SIGPIPE):
        os.kill(pid, signum)
    connection = kept(room)
    assert connection.greet() == 1
    connection.close()
    kill(program)
    os.kill(pid, signal.SIGTERM)
    eventually(lambda: is_gone(pid), "SIGTERM ends the keeper")


def test_the_keeper_holds_nothing_else_of_its_owner(room: Room, owner: Callable[..., Program]) -> None:
    program = owner()
    pid = keeper_of(room)
    assert os.readlink(f"/proc/{pid}/cwd") == "/"
    assert set(descriptors(pid)) <= {"socket", "anon_inode:[signalfd"}
    # its listening socket, the listener, the owner's connection
    assert descriptors(pid)["socket"] == 3
    assert int(pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[4]) == 0, "it has a terminal"
    kill(program)
    assert pathlib.Path(f"/proc/{pid}/comm").read_text() == "takeover-keeper\n"


def test_a_dry_run_takes_nothing_from_a_keeper(room: Room, owner: Callable[..., Program]) -> None:
    program = owner()
    pid = keeper_of(room)
    kill(program)
    dry = room.echo(dry_run=True)
    assert dry.wait() == 0
    with room.connect() as waiting:
        owner()
        echo_once(waiting, b"hello")
    assert keeper_of(room) == pid


def test_the_report_says_what_came_from_the_keeper_and_what_had_no_use(room: Room) -> None:
    other = "unix:" + os.path.join(room.folder, "listener")
    first = room.member([room.url, other], join={"keeper": True})
    first.wait_for("ready")
    keeper_of(room)
    kill(first)
    second = room.member([room.url, "tcp://127.0.0.1:0"], join={"keeper": True})
    report = second.wait_for("ready")
    assert '"from_keeper": true' in report
    assert f'"adopted": ["{room.url}"], "bound": ["tcp://127.0.0.1:0"], "unused": ["{other}"]' in report
    kill(second)
    strict = room.member([room.url], join={"keeper": True, "strict": True})
    assert strict.wait() == 1
    assert "strict" in strict.text


def test_unix_listeners_and_groups_come_back_whole(room: Room) -> None:
    path = os.path.join(room.folder, "listener")
    urls = [f"{room.url}?reuseport=3", f"unix:{path}"]
    first = room.member(urls, join={"keeper": True})
    first.wait_for("ready")
    keeper_of(room)
    kill(first)
    waiting = [room.connect() for _ in range(12)]
    with socket.socket(socket.AF_UNIX) as on_path:
        on_path.connect(path)
        second = room.member(urls, join={"keeper": True})
        second.wait_for("ready")
        for sock in (*waiting, on_path):
            sock.settimeout(LIMIT)
            echo_once(sock, b"hello")
    for sock in waiting:
        sock.close()
    query.stop(room.control)
    second.wait()
    assert room.left_behind() == []


def test_where_only_the_keeper_is_left_status_says_so_and_stop_ends_it(
    room: Room, owner: Callable[..., Program]
) -> None:
    program = owner()
    pid = keeper_of(room)
    kill(program)
    with pytest.raises(NotRunning, match=rf"its keeper \(pid {pid}\) holds 1 listeners"):
        query.status(room.control)
    assert query.stop(room.control) == pid
    assert is_gone(pid)
    with pytest.raises(ConnectionRefusedError):
        room.connect()
    assert room.left_behind() == ["takeover.sock"]
    with pytest.raises(NotRunning):
        query.stop(room.control)


def test_neither_silence_nor_nonsense_keeps_anybody_from_the_keeper(room: Room, owner: Callable[..., Program]) -> None:
    program = owner()
    pid = keeper_of(room)
    held = descriptors(pid)
    path = f"{room.control}.keeper"
    silent = []
    for message in (b"", b"X", b"K", b"C", b"G", b"G\xff\xff\xff\xff", b"H" * 40_000, b"B", *[b""] * 100):
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        sock.connect(path)
        if message:
            sock.send(message)
        silent.append(sock)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as flood:
        flood.connect(path)
        with open(os.devnull) as file:
            socket.send_fds(flood, [b"B"], [file.fileno()] * 200)
            flood.settimeout(LIMIT)
            assert flood.recv(10) == b""
    connection = kept(room)
    assert connection.greet() == 1
    connection.close()
    for sock in silent:
        sock.close()
    eventually(lambda: descriptors(pid) == held, "nothing stays of them")
    assert "has died" not in program.text
    kill(program)
    with room.connect() as waiting:
        owner()
        echo_once(waiting, b"hello")


def test_a_registration_that_breaks_off_changes_nothing(room: Room, owner: Callable[..., Program]) -> None:
    owner()
    pid = keeper_of(room)
    held = descriptors(pid)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as half, socket.create_server(("127.0.0.1", 0)) as sock:
        half.connect(f"{room.control}.keeper")
        half.settimeout(LIMIT)
        for message, sent in ((b"B", []), (b"K{}", [sock.fileno()])):
            socket.send_fds(half, [message], sent)
            assert half.recv(10) == b"O"
    eventually(lambda: descriptors(pid) == held, "what had come is closed")
    connection = kept(room)
    (listener,) = connection.listeners()
    connection.close()
    os.close(listener.descriptor)
    assert listener.url == room.url


ASK_AS_ANOTHER = """
import os, socket, sys
path, uid = sys.argv[1], int(sys.argv[2])
os.setgroups([]); os.setgid(uid); os.setuid(uid)
sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
sock.settimeout(30)
sock.connect(path)
try:
    sock.send(b"H")
    print("answer:", sock.recv(100)[:1])
except (BrokenPipeError, ConnectionResetError):
    print("answer:", b"")
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may become another user")
def test_other_users_may_not_talk_to_the_keeper(room: Room, owner: Callable[..., Program]) -> None:
    owner(allow_uids=[12345])
    pid = keeper_of(room)
    os.chmod(room.folder, 0o711)

    def asked_by(uid: int) -> str:
        """What a process of that user gets for an answer."""
        asking = room.run(sys.executable, "-c", ASK_AS_ANOTHER, f"{room.control}.keeper", str(uid))
        assert asking.wait() == 0, asking.text
        return asking.text

    assert asked_by(12345) == "answer: b'H'"
    assert asked_by(23456) == "answer: b''"
    assert not is_gone(pid)


def test_a_thousand_listeners_are_kept_and_come_back(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeper, "backend", room.backend)
    path = keeper.path_of_keeper(ControlPath(room.control))
    started = keeper.start(path)
    with socket.create_server(("127.0.0.1", 0)) as sock:
        text = {"name": "n" * 200, "url": "tcp://127.0.0.1:1", "device": 0, "inode": 0}
        for count in (1000, 10, 1000):
            started.register([({**text, "inode": index}, sock.fileno()) for index in range(count)])
            assert started.greet() == count
        found = started.listeners()
    for listener in found:
        os.close(listener.descriptor)
    assert [listener.identity[1] for listener in found] == list(range(1000))
    started.end()
    started.close()
    os.unlink(path.path)


def test_a_path_that_is_too_long_for_the_keeper_is_told_at_once(room: Room) -> None:
    long = os.path.join(room.folder, "x" * (104 - len(room.folder)))
    with pytest.raises(takeover.errors.UsageError, match="at most 107"):
        takeover.join(long, keeper=True)
    with takeover.join(long) as service:
        service.ready()


def test_what_is_not_a_keeper_is_not_taken_for_one(room: Room) -> None:
    with open(f"{room.control}.keeper", "w"), pytest.raises(LocalError, match="not a socket"):
        takeover.join(room.control, keeper=True)
    os.unlink(f"{room.control}.keeper")


@pytest.mark.parametrize("interpreter", ["", "/nonexistent/python"])
def test_where_the_interpreter_cannot_be_run_the_plain_keeper_is_refused_with_a_reason(
    interpreter: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", interpreter)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        before = descriptors(os.getpid())
        reason = f"start the keeper: {interpreter}: No such file" if interpreter else "does not say which interpreter"
        with pytest.raises(LocalError, match=reason):
            _keeper_py.start(ours.fileno(), theirs.fileno(), [os.geteuid()])
        assert descriptors(os.getpid()) == before
