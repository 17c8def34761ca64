"""Blobs where one side is written with bare sockets: what is not a sealed memfd is refused, and closed."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import subprocess
from array import array
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from clients import LIMIT, eventually
from heirs import MEMFD, ask, start
from processes import Program, Room, descriptors
from takeover import records
from takeover.wire import Body, Decoder, Frame, Type, encode


class Bare:
    """One end of a link, without a line of the package's own sockets."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.sock.settimeout(LIMIT)
        self._decoder = Decoder()

    def send(self, kind: Type, body: Body | None = None, numbers: list[int] | None = None) -> None:
        data = encode(kind, body, len(numbers or ()))
        if numbers:
            socket.send_fds(self.sock, [data], numbers)
        else:
            self.sock.send(data)

    def receive(self, wanted: Type) -> Frame:
        """The next message but for heartbeats, and how many connections are left."""
        while True:
            size, room = self._decoder.wants()
            data, numbers, _, _ = socket.recv_fds(self.sock, size, room)
            assert data, f"the end, instead of {wanted.name}"
            frame = self._decoder.feed(data, array("i", numbers))
            if frame is not None and frame.type not in (Type.HEARTBEAT, Type.DRAINING):
                assert frame.type is wanted
                return frame

    def hangs_up(self) -> bool:
        with contextlib.suppress(ConnectionResetError):
            while self.sock.recv(65536):
                pass
        return True


def token() -> int:
    reading, writing = os.pipe()
    os.write(writing, b"cs")
    os.close(writing)
    return reading


def memfd(*seals: int, data: bytes = b"data") -> int:
    number = os.memfd_create("bare", os.MFD_ALLOW_SEALING)
    os.write(number, data)
    for seal in seals:
        fcntl.fcntl(number, fcntl.F_ADD_SEALS, seal)
    return number


def write_only() -> int:
    number = records.seal("bare", b"data")
    again = os.open(f"/proc/self/fd/{number}", os.O_WRONLY)
    os.close(number)
    return again


BAD: dict[str, Callable[[], int]] = {
    "not sealed": memfd,
    "can shrink": lambda: memfd(fcntl.F_SEAL_GROW, fcntl.F_SEAL_WRITE, fcntl.F_SEAL_SEAL),
    "can be written": lambda: memfd(fcntl.F_SEAL_GROW, fcntl.F_SEAL_SHRINK),
    "cannot be read": write_only,
    "a file": lambda: os.open(__file__, os.O_RDONLY),
    "a folder": lambda: os.open("/", os.O_RDONLY),
    "a pipe": token,
    "a socket": lambda: socket.socket().detach(),
}


@pytest.fixture
def hostile(room: Room) -> Iterator[Callable[[list[dict[str, Any]], list[int]], tuple[Bare, Program]]]:
    """An incumbent with bare sockets, which offers what it must, and the blobs that it is told to."""
    with contextlib.ExitStack() as stack:

        def offer(items: list[dict[str, Any]], numbers: list[int]) -> tuple[Bare, Program]:
            listening = stack.enter_context(socket.socket(socket.AF_UNIX))
            listening.bind(room.control)
            listening.listen()
            listening.settimeout(LIMIT)
            settings = {"control": room.control, "listen": room.url, "probation": 0.0}
            program = room.program("heir.py", settings, stdin=subprocess.PIPE)
            bare = Bare(stack.enter_context(listening.accept()[0]))
            hello = {"versions": [1], "generation": 1, "build": "0", "pid": os.getpid(), "service": ""}
            bare.send(Type.HELLO, hello)
            bare.receive(Type.JOIN)
            lock = os.open(room.control + ".lock", os.O_RDWR)
            own = [token(), lock, listening.fileno()]
            whole = [*({**item(""), "role": role} for role in ("token", "lock", "control")), *items]
            bare.send(Type.LISTENERS, {"items": whole, "left": 0}, [*own, *numbers])
            for number in (own[0], lock, *numbers):
                os.close(number)
            return bare, program

        yield offer


def item(name: str) -> dict[str, Any]:
    return {"role": "blob", "name": name, "url": "", "device": 0, "inode": 0}


@pytest.mark.parametrize("name", BAD)
def test_what_is_offered_and_is_not_a_sealed_memfd_ends_the_takeover(
    room: Room, hostile: Callable[..., tuple[Bare, Program]], name: str
) -> None:
    bare, new = hostile([item("good"), item("bad")], [records.seal("bare", b"good"), BAD[name]()])
    bare.receive(Type.TAKEN)
    bare.receive(Type.ABORT)
    assert new.wait() == 1
    assert "RemoteProtocolError: descriptor" in new.text


@pytest.mark.parametrize("name", [*BAD, "none at all", "two"])
def test_a_blob_that_is_not_a_sealed_memfd_costs_its_sender_the_link(
    room: Room, hostile: Callable[..., tuple[Bare, Program]], name: str
) -> None:
    bare, new = hostile([item("good")], [records.seal("bare", b"good")])
    bare.receive(Type.TAKEN)
    new.wait_for("joined")
    new.tell('["ready"]')
    bare.receive(Type.READY)
    bare.send(Type.COMMIT)
    bare.receive(Type.ALIVE)
    bare.send(Type.DONE, {"left": 0, "elders": []})
    bare.send(Type.BLOB, {"name": "late"}, [number := records.seal("bare", b"late")])
    os.close(number)
    new.wait_for("answer: 2")
    assert ask(new, "inherited", "late", 20) == "late"
    held = eventually(lambda: descriptors(new.pid), "what it holds")
    bad = [] if name == "none at all" else [records.seal("", b""), memfd()] if name == "two" else [BAD[name]()]
    bare.send(Type.BLOB, {"name": "bad"}, bad)
    for number in bad:
        os.close(number)
    assert bare.hangs_up()
    eventually(lambda: sum(descriptors(new.pid).values()) < sum(held.values()), "the link is closed")
    assert ask(new, "inherited", "bad", 600) is None
    assert ask(new, "inherited", "good") == "good"
    assert len(ask(new, "held")) == 0
    assert room.owner() == new.pid


def test_a_blob_that_is_replaced_while_it_is_offered_comes_as_it_was_and_then_anew(room: Room) -> None:
    old = start(room)
    ask(old, "ready")
    ask(old, "hand_over_many", 300)
    with room.connect_control() as sock:
        bare = Bare(sock)
        bare.receive(Type.HELLO)
        wish = {"version": 1, "capabilities": [], "room": 10_000, "dry_run": False, "build": "", "pid": os.getpid()}
        bare.send(Type.JOIN, {**wish, "service": ""})
        frames = [bare.receive(Type.LISTENERS)]
        ask(old, "hand_over", "blob 299", "anew")
        ask(old, "hand_over", "blob 299", "anew, and again")
        while frames[-1].body["left"]:
            bare.send(Type.TAKEN)
            frames.append(bare.receive(Type.LISTENERS))
        bare.send(Type.TAKEN)
        said = [each for frame in frames for each in frame.body["items"]]
        numbers = [number for frame in frames for number in frame.descriptors]
        assert said[-1]["name"] == "blob 299"
        assert bytes(records.unseal(numbers[-1])) == b"299"
        bare.send(Type.READY, {"adopted": [], "bound": [], "unused": []})
        bare.receive(Type.COMMIT)
        assert os.read(numbers[0], 1) == b"c"
        bare.send(Type.ALIVE)
        bare.receive(Type.DONE)
        frame = bare.receive(Type.BLOB)
        assert frame.body == {"name": "blob 299"}
        assert bytes(records.unseal(frame.descriptors[0])) == b"anew, and again"
        for number in (*numbers, *frame.descriptors):
            os.close(number)
        eventually(lambda: not descriptors(old.pid)[MEMFD], "the incumbent keeps none")
