"""Sockets that a service manager gives to a process are adopted by whichever way it serves, or closed and named."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from clients import echo_once
from processes import PROGRAMS, Program, Room
from takeover import activation

ACTIVATE = shutil.which("systemd-socket-activate")
needs_systemd = pytest.mark.skipif(ACTIVATE is None, reason="systemd-socket-activate is not installed")

Arguments = Callable[[Room, str], list[str]]


def echo(room: Room, url: str) -> list[str]:
    return ["-m", "takeover", "echo", "--listen", url, "--control", room.control]


def native(room: Room, url: str) -> list[str]:
    options = {"listen": [url], "control": room.control, "probation": 0.0}
    return [str(PROGRAMS / "echo.py"), json.dumps({"options": options})]


def asyncio_(room: Room, url: str) -> list[str]:
    options = {"listen": [url], "control": room.control, "probation": 0.0}
    return [str(PROGRAMS / "aio_server.py"), json.dumps({"loop": "asyncio", "kind": "echo", "options": options})]


def join(room: Room, url: str) -> list[str]:
    return [str(PROGRAMS / "member.py"), json.dumps({"listen": [url], "join": {"control": room.control}})]


WAYS = pytest.mark.parametrize("way", [echo, native, asyncio_, join])


def activate(room: Room, sockets: Sequence[socket.socket], *command: str, **plan: Any) -> Program:
    """Starts a program of Python with the sockets from descriptor 3 on."""
    descriptors = [sock.fileno() for sock in sockets]
    wishes = {"descriptors": descriptors, "names": [f"s{index}.socket" for index in range(len(sockets))], **plan}
    shim = (sys.executable, "-S", str(PROGRAMS / "activated.py"), json.dumps(wishes))
    return room.run(*shim, sys.executable, *command, pass_fds=descriptors)


def holds(program: Program, sock: socket.socket) -> bool:
    """Whether one of its descriptors is the socket; it may open and close others meanwhile."""
    for entry in os.listdir(f"/proc/{program.pid}/fd"):
        with contextlib.suppress(FileNotFoundError):
            if os.readlink(f"/proc/{program.pid}/fd/{entry}") == f"socket:[{os.fstat(sock.fileno()).st_ino}]":
                return True
    return False


@pytest.fixture
def listening(room: Room) -> Iterator[socket.socket]:
    with socket.create_server(room.address) as sock:
        yield sock


@WAYS
def test_a_given_socket_is_adopted_and_who_waits_in_its_queue_is_served(
    room: Room, listening: socket.socket, way: Arguments
) -> None:
    with room.connect() as early:
        program = activate(room, [listening], *way(room, room.url))
        echo_once(early, b"early")
        room.wait_for_owner(program)
        program.wait_for(f"adopted {room.url}, which the service manager has given (s0.socket)")


@needs_systemd
@pytest.mark.parametrize("kind", ["tcp", "unix"])
@WAYS
def test_the_real_systemd_socket_activate_starts_a_server_with_its_first_client(
    room: Room, way: Arguments, kind: str
) -> None:
    path = os.path.join(room.folder, "s")
    where, url = ("{}:{}".format(*room.address), room.url) if kind == "tcp" else (path, f"unix:{path}")
    assert ACTIVATE is not None
    variables = [f"-E{name}" for name in ("PYTHONPATH", "TAKEOVER_BACKEND", "HOME")]
    program = room.run(ACTIVATE, "-l", where, *variables, sys.executable, *way(room, url))
    program.wait_for("Listening on")
    with socket.socket(socket.AF_UNIX if kind == "unix" else socket.AF_INET) as client:
        client.settimeout(30)
        client.connect(path if kind == "unix" else room.address)
        echo_once(client, b"first")
    room.wait_for_owner(program)
    program.wait_for(f"adopted {url}, which the service manager has given")


def test_the_environment_is_cleared_and_the_descriptors_are_close_on_exec(room: Room, listening: socket.socket) -> None:
    source = (
        "import os, takeover\n"
        f"with takeover.join({room.control!r}) as service:\n"
        f"    sock = service.listen({room.url!r})\n"
        "    print(sorted(name for name in os.environ if name.startswith('LISTEN_')), sock.fileno(), "
        "os.get_inheritable(3), os.get_blocking(3))\n"
    )
    program = activate(room, [listening], "-c", source)
    assert program.wait_for("]") == "[] 3 False False"
    assert program.wait() == 0


def test_what_nobody_asks_for_is_closed_and_named(room: Room, listening: socket.socket) -> None:
    with socket.create_server((room.address[0], 0)) as other:
        program = activate(room, [listening, other], *native(room, room.url))
        room.wait_for_owner(program)
        line = program.wait_for("nobody has asked for")
        assert f"tcp://{room.address[0]}:{other.getsockname()[1]} (s1.socket)" in line and "s0.socket" not in line
        assert holds(program, listening) and not holds(program, other)
    room.round_trip()


def test_strict_refuses_to_start_while_something_given_is_not_asked_for(room: Room, listening: socket.socket) -> None:
    with socket.create_server((room.address[0], 0)) as other:
        program = activate(room, [listening, other], *echo(room, room.url), "--strict")
        assert program.wait() == 1
        assert "strict: the service manager has given" in program.text


def test_an_address_in_other_words_is_not_bound_and_the_message_says_what_is_there(room: Room) -> None:
    if not socket.has_dualstack_ipv6():
        pytest.skip("no sockets here that take IPv4 and IPv6")
    with socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True) as sock:
        port = sock.getsockname()[1]
        program = activate(room, [sock], *echo(room, f"tcp://0.0.0.0:{port}"))
        assert program.wait() == 1
        assert (
            f"the service manager has given tcp://[::]:{port}?v6only=0 (s0.socket): ask for what it has" in program.text
        )
        again = activate(room, [sock], *echo(room, f"tcp://[::]:{port}?v6only=0"))
        room.wait_for_owner(again)


def test_sockets_of_another_process_are_left_alone(room: Room, listening: socket.socket) -> None:
    program = activate(room, [listening], *native(room, f"tcp://{room.address[0]}:0"), pid=1)
    program.wait_for("LISTEN_FDS is for pid 1, this is pid")
    room.wait_for_owner(program)
    assert "has given" not in program.text


def test_what_is_no_listener_stays_open_and_is_nobodys_business(room: Room, listening: socket.socket) -> None:
    here, there = socket.socketpair()
    with here, there:
        program = activate(room, [there, listening], *native(room, room.url))
        room.wait_for_owner(program)
        program.wait_for("descriptor 3 (s0.socket) of LISTEN_FDS is not a socket to listen on: left alone")
        assert os.readlink(f"/proc/{program.pid}/fd/3").startswith("socket:")
    room.round_trip()


def test_a_unix_socket_whose_file_is_gone_is_closed_and_bound_anew(room: Room) -> None:
    path = os.path.join(room.folder, "s")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(path)
        sock.listen()
        os.unlink(path)
        program = activate(room, [sock], *native(room, f"unix:{path}"))
        room.wait_for_owner(program)
        program.wait_for("nobody can reach")
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(path)
        echo_once(client, b"hello")


def test_the_file_of_a_given_unix_socket_stays_when_the_service_ends(room: Room) -> None:
    path = os.path.join(room.folder, "s")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(path)
        sock.listen()
        program = activate(room, [sock], *native(room, f"unix:{path}"))
        room.wait_for_owner(program)
        program.process.terminate()
        assert program.wait() == 0
        assert os.path.exists(path)


def test_a_given_socket_goes_on_to_the_next_process(room: Room, listening: socket.socket) -> None:
    first = activate(room, [listening], *native(room, room.url))
    room.wait_for_owner(first)
    second = room.echo()
    room.wait_for_owner(second)
    assert first.wait() == 0
    listening.close()
    room.round_trip()


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Iterator[Callable[..., list[str]]]:
    """Gives these descriptors to this process, None for a number that is closed; the URLs that are taken."""
    caplog.set_level(logging.WARNING, "takeover")
    with contextlib.ExitStack() as closing:

        def give(*descriptors: int | None, count: str = "") -> list[str]:
            monkeypatch.setattr(activation, "FIRST", 900)
            monkeypatch.setenv("LISTEN_PID", str(os.getpid()))
            monkeypatch.setenv("LISTEN_FDS", count or str(len(descriptors)))
            monkeypatch.setenv("LISTEN_FDNAMES", ":".join(f"s{index}" for index in range(len(descriptors))))
            for number, descriptor in enumerate(descriptors, 900):
                if descriptor is not None:
                    closing.callback(os.close, os.dup2(descriptor, number))
            return [each.url for each in activation.take()]

        yield give


def test_a_number_of_sockets_that_is_none_is_named_and_none_is_taken(
    given: Callable[..., list[str]], caplog: pytest.LogCaptureFixture
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        assert given(sock.fileno(), count="\u0661") == []
    assert caplog.messages == ["LISTEN_FDS=\u0661 is not a number: ignored"]
    assert "LISTEN_FDS" not in os.environ


def test_what_was_promised_and_is_closed_is_named_and_the_rest_is_taken(
    given: Callable[..., list[str]], caplog: pytest.LogCaptureFixture
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        assert given(None, sock.fileno()) == ["tcp://{}:{}".format(*sock.getsockname())]
    assert caplog.messages == ["descriptor 900 (s0) of LISTEN_FDS: Bad file descriptor"]


def test_a_socket_of_the_kernels_messages_is_left_alone(
    given: Callable[..., list[str]], caplog: pytest.LogCaptureFixture
) -> None:
    """ListenNetlink= of a .socket unit: datagrams too, and bound, but to nothing that a URL could name."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM) as sock:
        sock.bind((0, 1))
        assert given(sock.fileno()) == []
    assert caplog.messages == ["descriptor 900 (s0) of LISTEN_FDS is not a socket to listen on: left alone"]
    os.fstat(900)
