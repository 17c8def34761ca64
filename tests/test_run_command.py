"""What a command under `takeover run` is given: descriptors, words, environment; and what is said where it is not."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pathlib
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from clients import eventually
from processes import Room
from supervised import MAIN, deploy, served, supervise, who
from takeover.errors import CommandError, UsageError
from takeover.run import process
from takeover.run.command import Listening, check_words, environment_of, executable_of, fill_in
from takeover.run.options import Options, Wish, parse_listen, parse_signal


@pytest.fixture
def room() -> Iterator[Room]:
    """No descriptor goes from one process to another in these tests, so one backend will do."""
    with Room("auto") as room:
        yield room


def test_options_survive_their_way_through_json() -> None:
    options = Options(parse_listen(["web=tcp://127.0.0.1:80", "unix:/x"]), ("a", "b"), workers=3, restart=False)
    assert Options.from_json(options.to_json()) == options
    assert options.listen == (Wish("web", "tcp://127.0.0.1:80"), Wish("", "unix:/x"))


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"listen": 3, "command": []}', '{"listen": [], "command": [], "x": 1}']
)
def test_options_that_the_command_line_did_not_write_are_a_usage_error(text: str) -> None:
    with pytest.raises(UsageError, match="takeover run"):
        Options.from_json(text)


def test_a_name_is_what_comes_before_the_url_and_is_given_once() -> None:
    assert parse_listen(["unix:/tmp/a=b"]) == (Wish("", "unix:/tmp/a=b"),)
    with pytest.raises(UsageError, match="two listeners are called 'web'"):
        parse_listen(["web=tcp://127.0.0.1:1", "web=tcp://127.0.0.1:2"])


def test_a_stop_signal_is_written_as_kill_takes_it() -> None:
    assert [parse_signal(text) for text in ("TERM", "SIGINT", "quit", "10")] == [15, 2, 3, 10]
    with pytest.raises(UsageError, match="no such signal"):
        parse_signal("STOPPED")


def listeners() -> list[Listening]:
    first, second, third = (socket.socket() for _ in range(3))
    first.bind(("127.0.0.1", 0))
    third.close()
    third = socket.socket(socket.AF_UNIX)
    return [
        Listening("", "tcp://127.0.0.1:0", first),
        Listening("web", "tcp://x", second),
        Listening("u", "unix:/u", third),
    ]


def test_words_get_the_descriptors_and_where_they_are_bound() -> None:
    found = listeners()
    try:
        port = found[0].sock.getsockname()[1]
        words = ["s", "--fd", "{fd}", "{fd:web}{fd:u}", "{host}:{port}", "{json}", '{"fd": 1}', "{fd:probe}", "{}"]
        filled = ["s", "--fd", "3", "45", f"127.0.0.1:{port}", "{json}", '{"fd": 1}', "{fd:probe}", "{}"]
        assert fill_in(words, found) == filled
        assert fill_in(["{fd:probe}:{port:probe}"], [*found, Listening("probe", "tcp://p", found[0].sock)]) == [
            f"6:{port}"
        ]
        with pytest.raises(UsageError, match="has no port"):
            fill_in(["{port:u}"], found)
        with pytest.raises(UsageError, match="stands for 2 sockets"):
            fill_in(["{fd:web}"], [*found, found[1]])
    finally:
        for each in found:
            each.sock.close()


def test_a_name_that_no_listener_has_is_a_usage_error_before_anything_is_done() -> None:
    check_words(["{fd:web}", "{port:web}", "{fd:probe}", "{fd}"], ["web"])
    for word in ("{fd:api}", "x{host:api}y"):
        with pytest.raises(UsageError, match="no listener is called"):
            check_words([word], ["web"])


def test_the_environment_has_the_names_and_nothing_that_was_meant_for_the_supervisor(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("LISTEN_PID", "LISTEN_FDS", "NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"):
        monkeypatch.setenv(name, "7")
    monkeypatch.setenv("KEPT", "yes")
    found = environment_of(["web", ""], {"MORE": "1"})
    assert found["LISTEN_FDS"] == "2" and found["LISTEN_FDNAMES"] == "web:unknown"
    assert found["KEPT"] == "yes" and found["MORE"] == "1"
    assert not {"LISTEN_PID", "NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"} & set(found)


def test_an_executable_is_searched_on_path_and_what_is_wrong_is_said(
    tmp_path: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = str(tmp_path)
    plain = os.path.join(folder, "plain")
    with open(plain, "w") as file:
        file.write("x")
    os.chmod(plain, 0o644)
    monkeypatch.setenv("PATH", f"{folder}:/bin:/usr/bin")
    assert executable_of("sh") in ("/bin/sh", "/usr/bin/sh")
    assert executable_of(sys.executable) == sys.executable
    for word, said in (
        ("no-such-command", "is in no folder of PATH"),
        ("plain", "is not executable"),
        (plain, "chmod"),
        (folder, "not a file"),
        (f"{folder}/gone", "not there"),
        ("", "empty"),
    ):
        with pytest.raises(CommandError, match=said):
            executable_of(word)


def run_child(words: list[str], environment: dict[str, str], descriptors: list[int], ignored: frozenset[int]) -> int:
    """Starts a process, and returns its exit status."""
    pid = process.start(words[0], words, environment, descriptors, ignored)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


LOOK = """
import json, os, signal, sys
out = open(sys.argv[1], "w")
held = {n: os.fstat(n).st_ino for n in map(int, os.listdir("/proc/self/fd")) if n > 2 and n != out.fileno() and
        os.path.exists(f"/proc/self/fd/{n}")}
ignored = [int(s) for s in signal.valid_signals() if signal.getsignal(s) == signal.SIG_IGN]
json.dump([held, ignored, sorted(map(int, signal.pthread_sigmask(signal.SIG_BLOCK, [])))], out)
"""


def test_a_process_gets_its_descriptors_in_order_whatever_their_numbers_were(tmp_path: pathlib.Path) -> None:
    ends = [os.open(tmp_path / f"{number}", os.O_CREAT | os.O_RDWR) for number in range(4)]
    wanted = sorted(ends, reverse=True)
    try:
        before = set(os.listdir("/proc/self/fd"))
        words = [sys.executable, "-I", "-c", LOOK, str(tmp_path / "seen")]
        assert run_child(words, {}, wanted, frozenset({signal.SIGINT})) == 0
        held, ignored, blocked = json.loads((tmp_path / "seen").read_text())
        assert [held[str(3 + place)] for place in range(4)] == [os.fstat(end).st_ino for end in wanted]
        numbers = [int(number) for number in before if os.path.exists(f"/proc/self/fd/{number}")]
        inherited = [number for number in numbers if number > 6 and os.get_inheritable(number)]
        assert len(held) <= 5 + len(inherited), "and no others of ours; one is the look itself"
        assert signal.SIGINT in ignored and signal.SIGTERM not in ignored and blocked == []
        assert set(os.listdir("/proc/self/fd")) == before
    finally:
        for end in ends:
            os.close(end)


def test_a_process_that_cannot_be_executed_is_explained_and_waited_for(tmp_path: pathlib.Path) -> None:
    before = set(os.listdir("/proc/self/fd"))
    script = tmp_path / "script"
    script.write_bytes(b"\0\0 no program")
    script.chmod(0o755)
    for word, environment, said in (
        (str(script), {}, "no program that this machine can run"),
        ("/bin/sh", {"LARGE": "x" * (1 << 22)}, "too long"),
        ("/no/such", {}, "it is gone"),
    ):
        with pytest.raises(CommandError, match=said):
            process.start(word, [word], environment, [])
    assert set(os.listdir("/proc/self/fd")) == before
    with contextlib.suppress(ChildProcessError):
        assert os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None, "none is left to be waited for"


def test_a_process_whose_parent_has_died_before_it_could_hear_of_that_starts_nothing(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "getppid", lambda: 1)
    assert run_child(["/bin/touch", str(tmp_path / "touched")], {}, [], frozenset()) == 127
    assert not (tmp_path / "touched").exists()


def failing_after(count: int, call: Callable[..., Any]) -> Callable[..., Any]:
    left = [call] * count

    def fail(*arguments: Any) -> Any:
        if left:
            return left.pop()(*arguments)
        raise OSError(24, "Too many open files")

    return fail


@pytest.mark.parametrize("count", range(3))
def test_a_process_for_which_there_are_not_enough_descriptors_is_not_started_and_leaves_none(
    count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = os.listdir("/proc/self/fd")
    monkeypatch.setattr(fcntl, "fcntl", failing_after(count, fcntl.fcntl))
    monkeypatch.setattr(os, "isatty", lambda descriptor: True)
    with pytest.raises(CommandError, match="start /bin/true: Too many open files"):
        process.start("/bin/true", ["true"], {}, [0])
    assert os.listdir("/proc/self/fd") == before


def test_a_kernel_that_makes_nobody_a_subreaper_is_an_error_that_names_the_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(process, "_prctl", lambda *_: -1)
    with pytest.raises(CommandError, match="prctl PR_SET_CHILD_SUBREAPER: "):
        process.become_subreaper()


@pytest.mark.parametrize("words", [(MAIN,), ("-m", "takeover.run")])
@pytest.mark.parametrize("arguments", [(), ("{}",), ("--listen", "tcp://127.0.0.1:1")])
def test_what_the_command_becomes_is_not_to_be_started_by_hand(
    room: Room, words: tuple[str, ...], arguments: tuple[str, ...]
) -> None:
    program = room.run(sys.executable, *words, *arguments)
    assert program.wait() == 2
    assert "takeover.run is started by the command `takeover run`" in program.text


def test_the_command_gets_its_listeners_from_descriptor_3_on_and_nothing_else(room: Room) -> None:
    second = f"unix:{room.folder}/second"
    deploy(room, {}, "{fd}", "{fd:also}", "{port}", listen=[room.url, f"also={second}"])
    found = who(room)
    environment = found["environment"]
    assert environment.pop("LISTEN_PID") == str(found["pid"])
    environment.pop("NOTIFY_SOCKET")
    assert environment == {"LISTEN_FDS": "2", "LISTEN_FDNAMES": "unknown:also"}
    assert found["words"] == ["3", "4", str(room.address[1])]
    held = {link for link in map(os.readlink, (f"/proc/{found['pid']}/fd/{n}" for n in (3, 4))) if "socket" in link}
    assert len(held) == 2
    pipes_of_its_own = 2
    connection, epoll, listing = 1, 1, 1
    assert len(found["descriptors"]) == 3 + 2 + pipes_of_its_own + connection + epoll + listing


def test_the_command_is_the_leader_of_a_process_group_of_its_own(room: Room) -> None:
    deploy(room)
    found = who(room)
    assert found["group"] == found["pid"]


def test_a_udp_listener_is_handed_to_the_command_too(room: Room) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind((room.address[0], 0))
        address = sock.getsockname()
    deploy(room, {}, listen=[room.url, f"dns=udp://{address[0]}:{address[1]}"])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(30)
        sock.sendto(b"who", address)
        assert f'"pid": {who(room)["pid"]}'.encode() in sock.recv(65536)


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (("no-such-command",), "command not found: no-such-command"),
        (("/etc/passwd",), "/etc/passwd is not executable"),
        (("/no/such",), "/no/such is not there"),
        (("/no/{fd}",), "/no/3 is not there"),
    ],
)
def test_a_command_that_cannot_run_is_named_and_nothing_is_touched(room: Room, command: tuple[str], said: str) -> None:
    program = supervise(room, command=command)
    assert program.wait() == 1
    assert said in program.text
    assert room.left_behind() == []


def test_a_script_without_an_interpreter_is_explained_and_leaves_nothing(room: Room) -> None:
    script = os.path.join(room.folder, "script")
    with open(script, "w") as file:
        file.write("#!/no/such/interpreter\n")
    os.chmod(script, 0o755)
    program = supervise(room, command=[script])
    assert program.wait() == 1
    assert "its interpreter" in program.text.splitlines()[-1]
    assert room.left_behind() == ["script"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--listen", "a=tcp://127.0.0.1:1", "--listen", "a=tcp://127.0.0.1:2", "--", "x"), "two listeners are called"),
        (("--listen", "tcp://127.0.0.1:1", "--", "x", "{fd:api}"), "no listener is called 'api'"),
        (("--listen", "nonsense", "--", "x"), "is not an address"),
        (("--listen", "tcp://127.0.0.1:1", "--ready", "soon", "--", "x"), "--ready"),
        (("--listen", "tcp://127.0.0.1:1", "--stop-signal", "FOO", "--", "x"), "no such signal"),
        (("--listen", "tcp://127.0.0.1:1"), "COMMAND"),
    ],
)
def test_wrong_usage_ends_with_status_2_and_a_line_that_says_what(
    room: Room, arguments: tuple[str, ...], said: str
) -> None:
    program = room.cli("run", *arguments)
    assert program.wait() == 2
    assert said in program.text
    assert room.left_behind() == []


def test_the_command_line_becomes_the_supervisor_with_the_same_pid_and_without_click(room: Room) -> None:
    program = room.cli(
        "run", "--listen", room.url, "--control", room.control, "--ready", "delay:0.1", "--", *served({}, "{fd}")
    )
    room.wait_for_owner(program)
    with open(f"/proc/{program.pid}/maps") as file:
        assert "/click/" not in file.read()
    assert who(room)["words"] == ["3"]
    program.signal(signal.SIGTERM)
    assert program.wait() == 0
    eventually(lambda: room.left_behind() == [], "nothing is left behind")
