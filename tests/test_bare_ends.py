"""One end of a control link is written with bare sockets and may say anything; the other is in this process too."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

import takeover
from clients import LIMIT, eventually
from kernel import failing, opened
from processes import Room
from takeover import errors, query, records
from takeover.control import Peer
from takeover.wire import Type
from test_blobs_and_hostile_peers import Bare, token

HELLO = {"versions": [1], "generation": 1, "build": "0", "pid": os.getpid(), "service": ""}
JOIN = {
    "version": 1,
    "capabilities": [],
    "room": 1000,
    "dry_run": False,
    "build": "",
    "pid": os.getpid(),
    "service": "",
}
REPORT = {"pid": os.getpid(), "generation": 7, "state": "serving"}

Scene = Callable[[Bare], object]


@contextlib.contextmanager
def lock(room: Room) -> Iterator[None]:
    with open(f"{room.control}.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def owner(room: Room, *scenes: Scene) -> Iterator[socket.socket]:
    """Somebody who holds the lock and listens, and plays one scene with each who comes; the listening socket."""
    with lock(room), socket.socket(socket.AF_UNIX) as listening:
        listening.bind(room.control)
        listening.listen()
        listening.settimeout(LIMIT)

        def play() -> None:
            for scene in scenes:
                bare = Bare(listening.accept()[0])
                with bare.sock:
                    scene(bare)

        player = threading.Thread(target=play)
        player.start()
        try:
            yield listening
        finally:
            player.join(LIMIT)


def answering(asked: Type, *answers: tuple[Type, dict[str, Any]]) -> Scene:
    """Greets, is asked, says all the answers, and stays until the other end hangs up."""

    def scene(bare: Bare) -> None:
        bare.send(Type.HELLO, HELLO)
        bare.receive(asked)
        for kind, body in answers:
            bare.send(kind, body)
        if answers:
            bare.hangs_up()

    return scene


def begins_with_an_answer(bare: Bare) -> None:
    bare.send(Type.STOPPING, {"deadline": 0.0})
    bare.hangs_up()


# Who asks for the status or the end, and an owner that says anything.


def test_an_owner_that_does_not_greet_first_is_not_believed(room: Room) -> None:
    with owner(room, begins_with_an_answer), pytest.raises(errors.RemoteProtocolError, match="began with STOPPING"):
        query.status(room.control)


def test_the_answer_to_another_question_is_not_believed(room: Room) -> None:
    stopping, report = (Type.STOPPING, {"deadline": 0.0}), (Type.REPORT, REPORT)
    with owner(room, answering(Type.STATUS, stopping), answering(Type.STOP, report)):
        with pytest.raises(errors.RemoteProtocolError, match="answered STATUS with STOPPING"):
            query.status(room.control)
        with pytest.raises(errors.RemoteProtocolError, match="answered STOP with REPORT"):
            query.stop(room.control)


def test_an_owner_that_hangs_up_when_it_is_asked_is_asked_again(room: Room) -> None:
    """It may just have handed over."""
    with owner(room, answering(Type.STATUS), answering(Type.STATUS, (Type.REPORT, REPORT))):
        assert query.status(room.control)["generation"] == 7


def test_an_owner_that_hangs_up_again_and_again_is_called_that(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    passed, hear = [0.0], query._next

    def hear_and_let_time_pass(*arguments: Any) -> Any:
        frame = hear(*arguments)
        passed[0] += query.TIME_LIMIT
        return frame

    monkeypatch.setattr(query, "_next", hear_and_let_time_pass)
    monkeypatch.setattr(query, "time", SimpleNamespace(monotonic=lambda: time.monotonic() + passed[0]))
    with owner(room, lambda bare: None), pytest.raises(errors.PeerLost, match="hangs up without an answer"):
        query.status(room.control)


def test_who_ends_is_waited_for_whatever_it_says_meanwhile(room: Room) -> None:
    def stop_and_end(bare: Bare) -> None:
        bare.send(Type.HELLO, HELLO)
        bare.receive(Type.STOP)
        bare.send(Type.STOPPING, {"deadline": 0.0})
        bare.send(Type.STOPPING, {"deadline": 0.0})

    with owner(room, stop_and_end):
        assert query.stop(room.control) == os.getpid()


def test_who_does_not_end_in_time_is_called_that(room: Room) -> None:
    with (
        owner(room, answering(Type.STOP, (Type.STOPPING, {"deadline": 600.0}))),
        pytest.raises(errors.TimedOut, match="has not ended within 0 s"),
    ):
        query.stop(room.control, time_limit=0.0)


def wait_for_the_end(bare: Bare) -> None:
    bare.hangs_up()


def test_an_owner_of_another_user_is_not_asked(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("takeover.link.peer_of", lambda _: Peer(os.getpid(), 12345, None))
    with owner(room, wait_for_the_end), pytest.raises(errors.LocalError, match="belongs to uid 12345; ask as that"):
        query.status(room.control)


def test_an_owner_of_whom_nobody_knows_anything_is_not_asked(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("takeover.link.peer_of", failing(errno.EMFILE))
    with owner(room, wait_for_the_end), pytest.raises(errors.LocalError, match="Too many open files; nobody knows who"):
        query.status(room.control)


def test_a_lock_without_anybody_who_listens_is_told_from_an_owner(room: Room) -> None:
    words = f"somebody holds {room.control}.lock, but nobody listens at {room.control}"
    with lock(room):
        with pytest.raises(errors.TimedOut, match=words):
            query._ask(room.control, Type.STATUS, 0.0)
        with pytest.raises(errors.TimedOut, match=words):
            takeover.join(room.control, limits=takeover.Limits(greeting=0.0))


# A successor, and an owner that says anything.


def test_a_successor_takes_nothing_from_another_user(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("takeover.link.peer_of", lambda _: Peer(os.getpid(), 12345, None))

    def greet(bare: Bare) -> None:
        bare.send(Type.HELLO, HELLO)
        assert bare.sock.recv(1) == b"", "it gets not one byte"

    with owner(room, greet), pytest.raises(errors.LocalError, match="belongs to uid 12345, not to us"):
        takeover.join(room.control)


OFFERS: dict[str, tuple[list[str], int, str]] = {
    "a descriptor too few": (["token", "lock", "control", "missing"], 0, "4 items came with 3 descriptors"),
    "no token": (["lock", "control"], 1, "the token is not among the descriptors"),
    "no lock": (["token", "control"], 0, "the control socket, the lock or the token is not among"),
    "no control socket": (["token", "lock"], 0, "the control socket, the lock or the token is not among"),
    "too many blobs": (["token", "blob", "blob", "blob"], 1, "more than 2 blobs have come"),
}


@pytest.mark.parametrize("which", OFFERS)
def test_an_offer_that_is_not_whole_is_given_up_and_nothing_of_it_stays_open(
    room: Room, monkeypatch: pytest.MonkeyPatch, which: str
) -> None:
    roles, left, words = OFFERS[which]
    monkeypatch.setattr("takeover.successor.MOST_BLOBS", 2)

    def offer(bare: Bare) -> None:
        make = {
            "token": token,
            "lock": lambda: os.open(f"{room.control}.lock", os.O_RDWR),
            "control": lambda: os.dup(listening.fileno()),
            "blob": lambda: records.seal("bare", b"data"),
        }
        numbers = [make[role]() for role in roles if role in make]
        items = [{"role": role, "name": "", "url": "", "device": 0, "inode": 0} for role in roles]
        bare.send(Type.HELLO, HELLO)
        bare.receive(Type.JOIN)
        bare.send(Type.LISTENERS, {"items": items, "left": left}, numbers)
        for number in numbers:
            os.close(number)
        bare.receive(Type.TAKEN)
        bare.receive(Type.ABORT)

    before = opened()
    with owner(room, offer) as listening, pytest.raises(errors.RemoteProtocolError, match=words):
        takeover.join(room.control)
    eventually(lambda: opened() == before, "nothing is left open")


# An incumbent, and a successor that says anything.


def tcp() -> int:
    return socket.socket().detach()


def ledger() -> int:
    return os.memfd_create("bare")


def link() -> int:
    return socket.socket(socket.AF_UNIX).detach()


NO_CHANNELS: dict[str, list[Callable[[], int]]] = {
    "nothing": [],
    "no ledger": [link, token],
    "one too many": [link, token, ledger, ledger],
    "a socket of TCP": [tcp, token, ledger],
    "a token that is a file": [link, ledger, ledger],
    "a ledger that is a pipe": [link, token, token],
}


@pytest.mark.parametrize("which", NO_CHANNELS)
def test_what_is_no_channel_is_closed_and_costs_the_link(room: Room, which: str) -> None:
    with takeover.join(room.control, probation=0) as old:
        old.ready()
        before = opened()
        bare = Bare(room.connect_control())
        with bare.sock:
            bare.receive(Type.HELLO)
            bare.send(Type.JOIN, JOIN)
            frame = bare.receive(Type.LISTENERS)
            for number in frame.descriptors:
                os.close(number)
            bare.send(Type.TAKEN)
            bare.send(Type.READY, {"adopted": [], "bound": [], "unused": []})
            bare.receive(Type.COMMIT)
            bare.send(Type.ALIVE)
            bare.receive(Type.DONE)
            numbers = [make() for make in NO_CHANNELS[which]]
            bare.send(Type.TAKE, {"room": 1, "pid": os.getpid(), "generation": 2}, numbers)
            for number in numbers:
                os.close(number)
            assert bare.hangs_up()
        assert old.state == "draining"
        eventually(lambda: opened() <= before, "nothing is left open")
