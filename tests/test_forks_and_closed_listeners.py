"""What a server does to itself: forks in a handler (F13), listeners that it closes, ready() called twice."""

from __future__ import annotations

import contextlib
import errno
import os
import pathlib
import signal
import sys

import pytest

import takeover
from clients import eventually
from kernel import failing
from processes import PROGRAMS, Program, Room
from takeover.errors import ListenError, LocalProtocolError


def start(room: Room) -> Program:
    program = room.run(sys.executable, str(PROGRAMS / "forking.py"), room.url, room.control)
    room.wait_for_owner(program)
    return program


def test_a_child_that_a_handler_forked_holds_nothing_that_hinders_a_new_start(room: Room) -> None:
    first = start(room)
    with room.connect() as sock:
        sock.sendall(b"fork")
        child = int(sock.makefile("rb").readline())
        try:
            first.signal(signal.SIGKILL)
            first.wait()
            second = start(room)
            assert room.status()["pid"] == second.pid
            os.kill(child, 0)
        finally:
            os.kill(child, signal.SIGKILL)


def test_children_forked_in_the_middle_of_a_move_hold_nothing_of_it(room: Room) -> None:
    """F13: of the control path, the lock, the channel and the records; connections are any child's to hold."""
    first = start(room)
    children: list[int] = []
    with contextlib.ExitStack() as opened:
        opened.callback(lambda: [os.kill(child, signal.SIGKILL) for child in children])
        clients = [opened.enter_context(room.connect()) for _ in range(5)]
        eventually(lambda: room.status()["connections"]["open"] == len(clients), "all are accepted")
        second = start(room)
        assert first.wait() == 0
        for program in (first, second):
            children += [int(line.split()[-1]) for line in program.lines if line.startswith("child is")]
        assert len(children) == 2 * len(clients)
        for child in children:
            held = {os.readlink(entry) for entry in pathlib.Path(f"/proc/{child}/fd").iterdir()}
            assert not [link for link in held if room.folder in link or "pidfd" in link or "memfd" in link], held
        for client in clients:
            client.sendall(b"fork")
            children.append(int(client.makefile("rb").readline()))
        second.signal(signal.SIGKILL)
        second.wait()
        third = start(room)
        assert room.status()["pid"] == third.pid


def test_a_listener_that_was_closed_is_neither_shown_nor_handed_over(room: Room) -> None:
    with takeover.join(room.control, probation=0) as old:
        old.listen(room.url)
        given_up = old.listen(f"unix:{room.folder}/given-up")
        old.ready()
        given_up.close()
        assert [listener["url"] for listener in old.status()["listeners"]] == [room.url]
        with takeover.join(room.control) as new:
            new.listen(room.url)
            assert new.ready().unused == ()
            assert old.wait(30)
    assert room.left_behind() == []


def test_a_takeover_that_comes_to_nothing_leaves_a_closed_listener_closed(room: Room) -> None:
    with takeover.join(room.control, probation=60) as old:
        sock = old.listen(room.url)
        given_up = old.listen(f"unix:{room.folder}/given-up")
        old.ready()
        given_up.close()
        with takeover.join(room.control) as new:
            new.listen(room.url)
            new.ready()
            assert new.give_back("it does not work")
        assert old.accepts and old.state == "serving"
        assert given_up.fileno() < 0 and not os.get_blocking(sock.fileno())
        assert [listener["url"] for listener in old.status()["listeners"]] == [room.url]


def test_listeners_are_asked_for_before_ready(room: Room) -> None:
    with takeover.join(room.control) as service:
        service.ready()
        with pytest.raises(LocalProtocolError, match="after ready"):
            service.listen(room.url)


def test_a_listener_that_there_is_no_descriptor_for_is_named(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    with takeover.join(room.control) as service, monkeypatch.context() as patched:
        patched.setattr("socket.socket", failing(errno.EMFILE))
        with pytest.raises(ListenError, match=f"listen {room.url}: Too many open files"):
            service.listen(room.url)


def test_ready_is_called_once_and_tells_when_to_accept(room: Room) -> None:
    with takeover.join(room.control, probation=0) as old:
        old.listen(room.url)
        assert not old.accepts
        old.ready()
        assert old.accepts
        with pytest.raises(LocalProtocolError, match="before"):
            old.ready()
        with takeover.join(room.control) as new:
            new.listen(room.url)
            assert old.accepts and not new.accepts
            new.ready()
            assert new.accepts and not old.accepts
        eventually(lambda: old.state == "draining", "the old process drains")
