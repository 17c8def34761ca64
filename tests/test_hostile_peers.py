"""Broken and hostile peers on the control socket: bounded, closed, and nobody else is kept waiting (F12, D10, S4)."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import socket
import struct
import subprocess
import sys
from collections.abc import Callable

import pytest

from clients import LIMIT, eventually
from processes import FAST, Program, Room, descriptors_at_rest, stopped
from takeover.link import FRAMES_AT_ONCE
from takeover.service import ATTEMPTS
from takeover.wire import HEADER, MAGIC, Decoder, Frame, Type, encode

JOIN = {
    "version": 1,
    "capabilities": [],
    "room": 1000,
    "dry_run": False,
    "build": "0",
    "pid": 1,
    "service": "echo",
}


def hangs_up(sock: socket.socket) -> bool:
    """Reads to the end, which comes before the socket's time limit."""
    with contextlib.suppress(ConnectionResetError):
        while sock.recv(65536):
            pass
    return True


def with_descriptors(sock: socket.socket, data: bytes, count: int) -> None:
    with open(os.devnull) as file:
        socket.send_fds(sock, [data], [file.fileno()] * count)


def descriptors_in_the_middle(sock: socket.socket) -> None:
    whole = encode(Type.JOIN, JOIN)
    sock.send(whole[:20])
    with_descriptors(sock, whole[20:], 3)


def go_away(sock: socket.socket) -> None:
    sock.send(encode(Type.JOIN, JOIN))
    sock.shutdown(socket.SHUT_WR)


def descriptors_of_other_kinds(sock: socket.socket) -> None:
    """A folder, an epoll set, a memfd, a pidfd, and the connection itself: it would hold itself open for ever."""
    kinds = [os.open("/", os.O_RDONLY), os.memfd_create("any"), os.pidfd_open(os.getpid())]
    try:
        with select.epoll() as epoll:
            socket.send_fds(sock, [encode(Type.JOIN, JOIN)], [*kinds, epoll.fileno(), *[sock.fileno()] * 100])
    finally:
        for number in kinds:
            os.close(number)


Attack = Callable[[socket.socket], object]
ATTACKS: dict[str, Attack] = {
    "says nothing": lambda sock: None,
    "half a header": lambda sock: sock.send(encode(Type.STATUS)[:5]),
    "half a body": lambda sock: sock.send(encode(Type.JOIN, JOIN)[:-1]),
    "a huge length": lambda sock: sock.send(HEADER.pack(MAGIC, Type.JOIN, 0, 0xFFFFFFFF)),
    "junk": lambda sock: sock.send(b"GET / HTTP/1.1\r\n\r\n"),
    "zeros": lambda sock: sock.send(bytes(64)),
    "a body that is not JSON": lambda sock: sock.send(HEADER.pack(MAGIC, Type.JOIN, 0, 4) + b"{[[["),
    "deep JSON": lambda sock: sock.send(HEADER.pack(MAGIC, Type.JOIN, 0, 4000) + b"[" * 4000),
    "an unknown type": lambda sock: sock.send(HEADER.pack(MAGIC, 200, 0, 2) + b"{}"),
    "a field of the wrong type": lambda sock: sock.send(encode(Type.JOIN, JOIN).replace(b"1000", b'"10"')),
    "a message out of turn": lambda sock: sock.send(encode(Type.READY, {"adopted": [], "bound": [], "unused": []})),
    "an unknown version": lambda sock: sock.send(encode(Type.JOIN, {**JOIN, "version": 99})),
    "another service": lambda sock: sock.send(encode(Type.JOIN, {**JOIN, "service": "chat"})),
    "too little room": lambda sock: sock.send(encode(Type.JOIN, {**JOIN, "room": 0})),
    "descriptors nobody asked for": lambda sock: with_descriptors(sock, encode(Type.JOIN, JOIN), 200),
    "descriptors of other kinds, and itself": descriptors_of_other_kinds,
    "one announced descriptor and a stream": lambda sock: with_descriptors(
        sock, HEADER.pack(MAGIC, Type.JOIN, 1, 100) + b" " * 10_000, 1
    ),
    "descriptors in the middle of a frame": descriptors_in_the_middle,
    "a successor that goes away": go_away,
    "a successor that says nothing more": lambda sock: sock.send(encode(Type.JOIN, JOIN)),
    "ready before it was offered anything": lambda sock: sock.send(
        encode(Type.JOIN, JOIN) + encode(Type.READY, {"adopted": [], "bound": [], "unused": []})
    ),
}


SLOW = ("says nothing", "half a header", "half a body", "a successor that says nothing more")
PATIENT = {**FAST, "greeting": 600.0, "offering": 600.0, "warming_silence": 600.0}


@pytest.fixture
def server(room: Room) -> Program:
    program = room.echo({"limits": FAST})
    room.wait_for_owner(program)
    return program


@pytest.mark.parametrize("slow", [False, True], ids=["at once", "at the time limit"])
def test_every_attack_is_answered_with_a_hang_up_and_leaves_nothing_behind(room: Room, slow: bool) -> None:
    """A server with endless patience hangs up on what is wrong; on what is only slow one that has time limits."""
    server = room.echo({"limits": FAST if slow else PATIENT})
    room.wait_for_owner(server)
    held = eventually(lambda: descriptors_at_rest(server.pid), "the server is at rest")
    for name, attack in ATTACKS.items():
        if (name in SLOW) is not slow:
            continue
        with room.connect_control() as sock:
            attack(sock)
            assert hangs_up(sock), name
        eventually(lambda: room.owner() == server.pid, f"status works after {name}")
    eventually(lambda: descriptors_at_rest(server.pid) == held, "nothing is left of the attacks")
    room.round_trip()


LENDS_ITS_LINK = """
import socket, sys
with socket.socket(socket.AF_UNIX) as link, socket.socket(fileno=int(sys.argv[2])) as borrower:
    link.connect(sys.argv[1])
    link.sendall(bytes.fromhex(sys.argv[3]))
    socket.send_fds(borrower, [b"x"], [link.fileno()])
"""


def test_a_successor_that_is_dead_is_hung_up_on_though_another_process_holds_its_link(room: Room) -> None:
    """A child of its own, for instance; what it had said before it died is read first."""
    server = room.echo({"limits": PATIENT})
    room.wait_for_owner(server)
    said = encode(Type.JOIN, JOIN) + encode(Type.HEARTBEAT) * 3 * FRAMES_AT_ONCE
    ours, theirs = socket.socketpair()
    with ours, theirs:
        with stopped(server):
            words = (LENDS_ITS_LINK, room.control, str(theirs.fileno()), said.hex())
            subprocess.run([sys.executable, "-c", *words], pass_fds=[theirs.fileno()], timeout=LIMIT, check=True)
        _, (number,), _, _ = socket.recv_fds(ours, 1, 1)
        with socket.socket(fileno=number) as sock:
            sock.settimeout(LIMIT)
            assert hangs_up(sock)
    server.wait_for("is off: the successor died or hung up; serving on")
    room.wait_for_owner(server)
    room.round_trip()


def test_status_and_a_takeover_work_while_hostile_connections_are_open(room: Room, server: Program) -> None:
    quiet = [name for name in ATTACKS if not name.startswith(("a successor", "ready"))]
    with contextlib.ExitStack() as open_ones:
        for name in quiet:
            ATTACKS[name](open_ones.enter_context(room.connect_control()))
        assert room.status()["pid"] == server.pid
        new = room.echo()
        new.wait_for("took over")
        assert server.wait() == 0
        room.wait_for_owner(new)


def test_a_flood_of_connections_leaves_room_for_status_and_a_takeover(room: Room) -> None:
    """Each takes two descriptors; the oldest that has said nothing makes room, long before its time limit."""
    server = room.echo({"limits": PATIENT, "nofile": 550})
    room.wait_for_owner(server)
    with contextlib.ExitStack() as flood:
        for _ in range(600):
            flood.enter_context(room.connect_control())
        assert room.status(LIMIT)["pid"] == server.pid
        new = room.echo()
        new.wait_for("took over")
        assert server.wait() == 0


def test_a_flood_of_frames_on_one_connection_does_not_keep_others_waiting(room: Room, server: Program) -> None:
    with room.connect_control() as sock:
        sock.send(encode(Type.JOIN, JOIN))
        sock.setblocking(False)
        for _ in range(20):
            with contextlib.suppress(BlockingIOError):
                while True:
                    sock.send(encode(Type.HEARTBEAT) * 1000)
            assert room.status()["pid"] == server.pid
    new = eventually(lambda: attempt(room), "the next takeover works")
    assert room.status()["pid"] == new.pid


def attempt(room: Room) -> Program | None:
    """A takeover, unless it is refused because another one is not over yet."""
    program = room.echo()
    with contextlib.suppress(AssertionError):
        program.wait_for("took over")
        return program
    return None


def test_a_frame_that_comes_byte_by_byte_is_understood_within_the_time_limit(room: Room, server: Program) -> None:
    with room.connect_control() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
        for byte in encode(Type.STATUS):
            sock.send(bytes([byte]))
        decoder = Decoder()
        frames: list[Frame] = []
        while len(frames) < 2:
            frame = decoder.feed(sock.recv(decoder.wants()[0]), [])
            frames += [frame] if frame else []
        assert [frame.type for frame in frames] == [Type.HELLO, Type.REPORT]
        assert frames[1].body["pid"] == server.pid


@pytest.mark.parametrize("versions", [[0], [2, 3], []])
def test_a_successor_that_shares_no_version_says_so_and_changes_nothing(room: Room, versions: list[int]) -> None:
    """D10: an incumbent of another version, which gets not one byte."""
    with socket.socket(socket.AF_UNIX) as incumbent:
        incumbent.bind(room.control)
        incumbent.listen()
        new = room.echo({"limits": FAST})
        with incumbent.accept()[0] as sock:
            sock.settimeout(LIMIT)
            hello = {"versions": versions, "generation": 7, "build": "9.9", "pid": os.getpid(), "service": "echo"}
            sock.send(encode(Type.HELLO, hello))
            assert sock.recv(1) == b""
        assert new.wait() == 1
        assert f"(takeover 9.9) speaks protocol {versions}" in new.lines[-1]


def test_an_incumbent_that_hangs_up_again_and_again_is_called_that_however_long_it_took(room: Room) -> None:
    """And not somebody who holds the lock and does not listen, though all the attempts take longer than one may."""
    with open(f"{room.control}.lock", "w") as lock, socket.socket(socket.AF_UNIX) as incumbent:
        fcntl.flock(lock, fcntl.LOCK_EX)
        incumbent.bind(room.control)
        incumbent.listen()
        incumbent.settimeout(LIMIT)
        new = room.echo({"limits": FAST})
        for _ in range(ATTEMPTS):
            with incumbent.accept()[0] as sock:
                select.select([sock], [], [], FAST["greeting"] / 2)
        assert new.wait() == 1
        assert "PeerLost" in new.lines[-1] or "hung up" in new.lines[-1]


ASK_AS_NOBODY = """
import json, os, socket, sys
os.setgid(65534); os.setuid(65534)
sock = socket.socket(socket.AF_UNIX)
try:
    sock.connect(sys.argv[1])
    print(json.dumps(len(sock.recv(100))))
except PermissionError:
    print(json.dumps("denied"))
except ConnectionResetError:
    print(json.dumps(0))
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize("permissive", [False, True], ids=["mode 0600", "mode 0777"])
def test_another_user_gets_not_one_byte_and_is_logged(room: Room, permissive: bool) -> None:
    """S4; also where somebody has opened the socket's permissions by hand."""
    server = room.echo()
    room.wait_for_owner(server)
    os.chmod(room.folder, 0o755)
    assert os.stat(room.control).st_mode & 0o777 == 0o600
    if permissive:
        os.chmod(room.control, 0o777)
    asked = subprocess.run(
        [sys.executable, "-c", ASK_AS_NOBODY, room.control], capture_output=True, text=True, timeout=LIMIT, check=True
    )
    if permissive:
        assert json.loads(asked.stdout) == 0
        assert "65534" in server.wait_for("refused uid")
    else:
        assert json.loads(asked.stdout) == "denied"


def test_the_control_socket_has_mode_0600_whatever_the_umask(room: Room) -> None:
    """S4."""
    server = room.run("sh", "-c", f"umask 0; exec {sys.executable} -m takeover echo --listen {room.url}")
    server.wait_for("serving")
    assert os.stat(room.control).st_mode & 0o777 == 0o600
    assert os.stat(room.control + ".lock").st_mode & 0o777 == 0o600


def test_a_peer_that_reads_nothing_does_not_stop_the_incumbent(room: Room, server: Program) -> None:
    """Its reports pile up in no buffer of ours: each connection gets one."""
    with contextlib.ExitStack() as deaf:
        for _ in range(100):
            sock = deaf.enter_context(room.connect_control())
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            sock.send(encode(Type.STATUS))
        assert room.status()["pid"] == server.pid
