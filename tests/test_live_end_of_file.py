"""A handler is told of its client's end of file once, by whichever process, however often its connection moves."""

from __future__ import annotations

import socket

import pytest

from aio_rooms import Aio, Client
from clients import Talker, eventually
from processes import FAST, Boundaries, Program, Room, stopping


def test_an_end_of_file_that_was_told_is_not_told_again_where_the_connection_has_moved_to(aio: Aio) -> None:
    first = aio.start("lines")
    with Client(aio.room) as half, Client(aio.room) as whole:
        end(half, first)
        whole.ask()
        for _ in range(3):
            last = aio.start("lines")
            assert first.wait() == 0
            for word in ("news", "more"):
                whole.say(f"tell {word}")
                assert half.read_line() == f"{last.pid} {word}"
            first = last


def test_an_end_of_file_that_was_told_is_not_told_again_where_the_connection_comes_back(aio: Aio) -> None:
    first = aio.start("lines")
    with Client(aio.room) as half, Client(aio.room) as whole:
        end(half, first)
        whole.ask()
        aio.start("lines", versions=[7])
        first.wait_for("the rest drains (2 version)")
        for word in ("news", "more"):
            whole.say(f"tell {word}")
            assert half.read_line() == f"{first.pid} {word}"


def test_an_end_of_file_that_comes_on_the_way_is_told_by_the_next_process(aio: Aio) -> None:
    clients: list[Client] = []

    def act() -> bool:
        clients[0].sock.shutdown(socket.SHUT_WR)
        return False

    boundaries = Boundaries({"giver after CONNECTIONS": act})
    try:
        first = aio.start("lines", boundaries=boundaries.name)
        with Client(aio.room) as half:
            clients.append(half)
            half.ask("half")
            second = aio.start("lines")
            assert first.wait() == 0
            assert boundaries.reached.is_set()
            assert half.read_line() == f"{second.pid} eof"
    finally:
        boundaries.close()


@pytest.mark.parametrize("begin", ["here", "native"])
def test_a_protocol_that_goes_from_loop_to_loop_is_told_once(aio: Aio, begin: str) -> None:
    here = aio.loop
    first = aio.start("lines", **({"loop": "native"} if begin == "native" else {}))
    with Client(aio.room) as half, Client(aio.room) as whole:
        end(half, first)
        whole.ask()
        for loop in (here, "native", here) if begin == "native" else ("native", here, "native", here):
            aio.loop = loop
            last = aio.start("lines")
            assert first.wait() == 0
            whole.say("tell news")
            assert half.read_line() == f"{last.pid} news"
            first = last


def end(half: Client, server: Program) -> None:
    """The client sends its end of file, and its handler keeps the connection open."""
    half.ask("half")
    half.sock.shutdown(socket.SHUT_WR)
    assert half.read_line() == f"{server.pid} eof"


def half_closed(room: Room, *orders: str) -> tuple[Program, Talker]:
    """A server that writes to all from time to time, and a connection whose end of file was told to its handler."""
    server = room.protocols({"timer": 0.02, "limits": FAST})
    server.wait_for("serving")
    talker = room.talker()
    for order in ("stay", *orders):
        talker.say(order)
    talker.sock.shutdown(socket.SHUT_WR)
    eventually(lambda: talker.hear() == {"eof": server.pid}, "the handler is told")
    return server, talker


def is_not_told_again(talker: Talker, server: Program) -> None:
    for _ in range(10):
        answer = talker.hear()
        assert answer["pid"] == server.pid
        assert "tick" in answer


def test_on_the_native_loop_too_it_is_not_told_again_where_the_connection_was_refused(room: Room) -> None:
    room.tracebacks_allowed = True
    old, talker = half_closed(room, "poison refuse")
    room.protocols()
    old.wait_for("the rest drains (1 state)")
    is_not_told_again(talker, old)


def test_on_the_native_loop_too_it_is_not_told_again_where_the_connection_was_taken_back(room: Room) -> None:
    old, talker = half_closed(room)
    programs: list[Program] = []

    boundaries = Boundaries({"taker before ADOPTED": stopping(programs, 0)})
    try:
        programs.append(room.protocols({"boundaries": boundaries.name}))
        old.wait_for("moved 0 connections")
        is_not_told_again(talker, old)
    finally:
        boundaries.close()
