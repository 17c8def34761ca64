"""A successor that turns out not to work gives the service back, as long as the probation lasts."""

from __future__ import annotations

import errno
import select
import socket
import threading
from typing import Any

import pytest

import takeover
from clients import eventually
from processes import Room
from takeover.errors import TakeoverError
from takeover.link import Link
from takeover.wire import Type


class Watcher(takeover.Server):
    def __init__(self) -> None:
        self.calls: list[str] = []

    def start_accepting(self) -> None:
        self.calls.append("start")

    def stop_accepting(self, kept: frozenset[str]) -> None:
        self.calls.append("stop")

    def drain(self) -> None:
        self.calls.append("drain")

    def undone(self, reason: str) -> None:
        self.calls.append(f"undone: {reason}")


def take_over(room: Room) -> int:
    """Returns the generation of who has done it."""
    with takeover.join(room.control) as new:
        new.listen(room.url)
        return new.ready().generation


def test_in_the_probation_the_incumbent_accepts_again_and_learns_why(room: Room) -> None:
    old_server, new_server = Watcher(), Watcher()
    with takeover.join(room.control, server=old_server, probation=60) as old:
        sock = old.listen(room.url)
        old.ready()
        with takeover.join(room.control, server=new_server) as new:
            new.listen(room.url)
            new.ready()
            assert new.accepts and not old.accepts
            assert new.give_back("the command died")
            assert new.state == "undone" and not new.accepts
        last = old.status()["last_takeover"]
        assert old.accepts and old.state == "serving"
        assert old_server.calls == ["stop", "start"]
        assert new_server.calls[-1].startswith("undone: ")
        assert last["outcome"] == "undone" and last["reason"] == "the command died"
        with socket.create_connection(sock.getsockname()):
            select.select([sock], [], [], 30)
            sock.accept()[0].close()
        assert take_over(room) == 2
    assert room.left_behind() == []


def test_before_the_commit_the_incumbent_goes_on_and_learns_why(room: Room) -> None:
    with takeover.join(room.control) as old:
        old.listen(room.url)
        old.ready()
        with takeover.join(room.control) as new:
            new.listen(room.url)
            assert new.give_back("its tables are older than the database")
        eventually(lambda: old.status()["last_takeover"], "the takeover is over")
        assert old.accepts and old.status()["last_takeover"]["reason"] == "its tables are older than the database"
    assert room.left_behind() == []


def fail_to_warm_up(room: Room) -> None:
    with takeover.join(room.control) as new:
        new.listen(room.url)
        raise ZeroDivisionError("no workers to share the load")


def test_what_a_successor_fails_with_is_what_the_incumbent_is_told(room: Room) -> None:
    with takeover.join(room.control) as old:
        old.listen(room.url)
        old.ready()
        with pytest.raises(ZeroDivisionError):
            fail_to_warm_up(room)
        eventually(lambda: old.status()["last_takeover"], "the takeover is over")
        assert old.status()["last_takeover"]["reason"] == "no workers to share the load"


def test_after_the_probation_the_service_stays_where_it_is(room: Room) -> None:
    with takeover.join(room.control, probation=0) as old:
        old.listen(room.url)
        old.ready()
        with takeover.join(room.control) as new:
            new.listen(room.url)
            new.ready()
            assert old.wait(30)
            assert not new.give_back("too late")
            assert new.accepts
    assert room.left_behind() == []


def test_a_cold_start_has_nobody_to_give_the_service_back_to(room: Room) -> None:
    with takeover.join(room.control) as service:
        service.listen(room.url)
        assert not service.give_back("too early")
        service.ready()
        assert not service.give_back("nobody is there")
        assert service.accepts
    assert room.left_behind() == []


def start_in_vain(room: Room) -> None:
    def fail() -> None:
        raise OSError("no room to serve in")

    with takeover.join(room.control) as service:
        service.listen(room.url)
        service.ready(fail)


def test_what_cannot_start_to_serve_gives_the_service_back_even_without_a_probation(room: Room) -> None:
    old_server = Watcher()
    with takeover.join(room.control, server=old_server, probation=0) as old:
        old.listen(room.url)
        old.ready()
        with pytest.raises(OSError, match="no room"):
            start_in_vain(room)
        eventually(lambda: old.state == "serving" and old.accepts, "the incumbent accepts again")
        assert old.status()["last_takeover"]["reason"] == "no room to serve in"
        assert old_server.calls == ["stop", "start"]


def test_a_cold_start_that_cannot_start_to_serve_leaves_nothing_behind(room: Room) -> None:
    with pytest.raises(OSError, match="no room"):
        start_in_vain(room)
    assert room.left_behind() == []


@pytest.mark.parametrize("message", ["LISTENERS", "COMMIT"])
def test_whichever_message_the_incumbent_cannot_send_it_serves_on(
    room: Room, monkeypatch: pytest.MonkeyPatch, message: str
) -> None:
    send = Link.send

    def fail_once(link: Link, kind: Type, *args: Any, **options: Any) -> None:
        if kind is Type[message] and not failed.is_set():
            failed.set()
            raise OSError(errno.EMFILE, "Too many open files")
        send(link, kind, *args, **options)

    failed = threading.Event()
    with takeover.join(room.control) as old:
        old.listen(room.url)
        old.ready()
        monkeypatch.setattr(Link, "send", fail_once)
        with pytest.raises(TakeoverError):
            take_over(room)
        eventually(lambda: old.status()["last_takeover"], "the takeover is over")
        assert failed.is_set() and old.accepts and old.state == "serving"
        assert take_over(room) == 2
    assert room.left_behind() == []
