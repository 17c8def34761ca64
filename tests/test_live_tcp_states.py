"""Connections move in every state that TCP has for them (CRIU's matrix), and end as they would have without a move."""

from __future__ import annotations

import socket
from collections.abc import Callable

import pytest

from clients import LIMIT, Talker, eventually, receive_exactly
from processes import Boundaries, Program, Room

MIB = 1 << 20
LINGER_NOT = b"\1\0\0\0\0\0\0\0"
"""A struct linger: close() resets."""


def serving(room: Room) -> Program:
    program = room.protocols({"losses": True})
    program.wait_for("serving")
    return program


def take_over(room: Room, old: Program, timer: float = 0) -> Program:
    """A new process owns the service, and the old one has ended well: nothing has stayed there."""
    new = room.protocols({"losses": True, **({"timer": timer} if timer else {})})
    room.wait_for_owner(new)
    assert old.wait() == 0, old.text
    assert "rest drains" not in old.text
    return new


def reset(sock: socket.socket) -> None:
    """Ends the connection with a RST."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_NOT)
    sock.close()


def paused(room: Room) -> Talker:
    """A connection that its handler does not read: what its peer does now is for the next process to find."""
    talker = room.talker()
    talker.say("pause")
    return talker


def test_an_end_of_file_that_nobody_has_seen_yet_is_seen_by_the_next_process(room: Room) -> None:
    old = serving(room)
    talker = paused(room)
    talker.sock.shutdown(socket.SHUT_WR)
    new = take_over(room, old)
    assert talker.hear() == {"eof": new.pid}
    assert talker.rest() == b""


def test_an_end_of_file_behind_unread_data_stays_behind_it(room: Room) -> None:
    old = serving(room)
    talker = paused(room)
    data = "x" * 200_000
    talker.send(f"{data}\nlast\n")
    talker.sock.shutdown(socket.SHUT_WR)
    new = take_over(room, old)
    assert [talker.hear()["line"], talker.hear()["line"]] == [data, "last"]
    assert talker.hear() == {"eof": new.pid}
    assert talker.rest() == b""


def test_a_connection_half_closed_by_its_peer_is_still_written_to(room: Room) -> None:
    """eof_received() has returned True in the old process; it is not called again."""
    old = serving(room)
    talker = room.talker()
    talker.say("stay")
    talker.sock.shutdown(socket.SHUT_WR)
    assert talker.hear() == {"eof": old.pid}
    new = take_over(room, old, timer=0.02)
    assert [talker.hear()["pid"], talker.hear()["pid"]] == [new.pid] * 2


def test_a_connection_half_closed_by_its_peer_brings_what_is_unsent_along(room: Room) -> None:
    old = serving(room)
    talker = room.talker()
    size = 9 * MIB
    talker.send(f"stay\nbig {size}\n")
    assert talker.hear()["line"] == "stay"
    talker.sock.shutdown(socket.SHUT_WR)
    room.talker().say()
    new = take_over(room, old, timer=0.02)
    assert talker.read(size) == b"x" * size
    assert talker.hear()["line"] == f"big {size}"
    assert talker.hear() == {"eof": old.pid}
    assert talker.hear()["pid"] == new.pid


def test_a_connection_half_closed_by_its_handler_is_still_read(room: Room) -> None:
    old = serving(room)
    talker = room.talker()
    talker.say("write_eof")
    assert talker.rest() == b""
    new = take_over(room, old, timer=0.02)
    talker.send("after the end\n")
    new.wait_for("line after the end")
    talker.sock.shutdown(socket.SHUT_WR)
    new.wait_for("end of file")
    new.wait_for("lost NoneType 2")


def test_an_end_of_file_of_the_handler_goes_out_behind_what_is_unsent(room: Room) -> None:
    """Half-closed by the handler with pending data in both directions."""
    old = serving(room)
    talker = room.talker()
    size = 9 * MIB
    talker.send(f"big {size}\nwrite_eof\n")
    assert talker.read(1) == b"x"
    talker.send("half ")
    room.talker().say()
    new = take_over(room, old)
    talker.send("a line\n")
    new.wait_for("line half a line")
    assert talker.read(size - 1) == b"x" * (size - 1)
    assert [talker.hear()["line"], talker.hear()["line"]] == [f"big {size}", "write_eof"]
    assert talker.rest() == b""
    talker.close()
    new.wait_for("lost NoneType")


def test_a_connection_half_closed_both_ways_with_data_unsent_is_ended_when_that_has_gone_out(room: Room) -> None:
    """The old process cannot have seen the end of file: it reads no more of this one."""
    old = serving(room)
    talker = room.talker()
    size = 9 * MIB
    talker.send(f"big {size}\npause\nwrite_eof\n")
    talker.sock.shutdown(socket.SHUT_WR)
    room.talker().say()
    new = take_over(room, old)
    assert talker.read(size) == b"x" * size
    assert [talker.hear()["line"] for _ in range(3)] == [f"big {size}", "pause", "write_eof"]
    assert talker.rest() == b""
    new.wait_for("lost NoneType")


@pytest.mark.parametrize(
    ("prepare", "error"),
    [
        (lambda _: None, "ConnectionResetError"),
        (lambda talker: talker.send("unread"), "ConnectionResetError"),
        (lambda talker: talker.sock.shutdown(socket.SHUT_WR), "BrokenPipeError"),
    ],
    ids=["established", "with data", "half-closed"],
)
def test_a_reset_that_is_pending_as_the_sockets_error_reaches_the_next_process(
    room: Room, prepare: Callable[[Talker], None], error: str
) -> None:
    """SO_ERROR is ECONNRESET, or EPIPE where the end of file came before."""
    old = serving(room)
    talker = paused(room)
    prepare(talker)
    talker._file.close()
    reset(talker.sock)
    new = take_over(room, old)
    new.wait_for(f"lost {error} 1")


def test_a_closed_window_opens_for_the_next_process(room: Room) -> None:
    """Without a byte in the old process's own backlog at first, then with some."""
    old = serving(room)
    talker = room.talker()
    talker.say()
    size = 9 * MIB
    talker.send(f"big {size}\n")
    room.talker().say()
    for _ in range(2):
        old = take_over(room, old)
    assert talker.read(size) == b"x" * size
    assert talker.hear()["line"] == f"big {size}"
    assert talker.say()["pid"] == old.pid


def test_an_urgent_byte_stays_out_of_the_stream(room: Room) -> None:
    old = serving(room)
    talker = paused(room)
    talker.send("be")
    talker.sock.send(b"!", socket.MSG_OOB)
    talker.send("fore\n")
    new = take_over(room, old)
    answer = talker.hear()
    assert (answer["line"], answer["pid"]) == ("before", new.pid)


def test_a_connection_that_is_closing_is_drained_where_it_is_until_all_has_gone_out(room: Room) -> None:
    """D6: the old process does not end before."""
    old = serving(room)
    talker = room.talker()
    size = 9 * MIB
    talker.send(f"big {size}\nclose\n")
    room.talker().say()
    new = room.protocols()
    room.wait_for_owner(new)
    assert "the rest drains (1 closing)" in old.wait_for("moved 1 connections")
    assert talker.read(size // 2) == b"x" * (size // 2)
    assert old.running
    assert talker.read(size - size // 2) == b"x" * (size - size // 2)
    assert [talker.hear()["line"], talker.hear()["line"]] == [f"big {size}", "close"]
    assert talker.rest() == b""
    assert old.wait() == 0


def test_the_echo_of_what_came_before_an_end_of_file_arrives_whole(room: Room) -> None:
    """Native: the end of file is behind more than the old process has read, or seen with its echo unsent."""
    old = room.echo()
    old.wait_for("serving")
    socks = [room.connect() for _ in range(20)]
    sizes = [1 << number for number in range(20)]
    for sock, size in zip(socks, sizes, strict=True):
        sock.sendall(b"x" * size)
        sock.shutdown(socket.SHUT_WR)
    full = room.connect()
    filled = fill(full)
    full.settimeout(LIMIT)
    full.shutdown(socket.SHUT_WR)
    new = room.echo()
    room.wait_for_owner(new)
    for sock, size in zip(socks, sizes, strict=True):
        with sock:
            assert receive_exactly(sock, size) == b"x" * size
            assert sock.recv(1) == b""
    assert old.wait() == 0
    with full:
        assert receive_exactly(full, filled) == b"x" * filled
        assert full.recv(1) == b""
    eventually(lambda: room.status()["connections"]["open"] == 0, "the new process has closed it")


def fill(sock: socket.socket) -> int:
    """Sends, and reads nothing, until the echo is full on the way there and back."""
    sock.settimeout(0.1)
    sent = 0
    try:
        while True:
            sent += sock.send(b"x" * 65536)
    except TimeoutError:
        return sent


@pytest.mark.parametrize("kind", ["echo", "protocols"])
def test_a_peer_that_resets_while_its_connection_is_on_its_way_costs_that_connection_only(
    room: Room, kind: str
) -> None:
    socks: list[socket.socket] = []

    def act() -> bool:
        for sock in socks[1::2]:
            reset(sock)
        return False

    boundaries = Boundaries({"giver after CONNECTIONS": act})
    try:
        start = room.echo if kind == "echo" else room.protocols
        old = start({"boundaries": boundaries.name})
        old.wait_for("serving")
        for _ in range(6):
            socks.append(room.connect())
            socks[-1].sendall(b"hello\n")
            assert socks[-1].recv(6)
        new = start({"losses": True})
        room.wait_for_owner(new)
        assert old.wait() == 0
        assert boundaries.reached.is_set()
        eventually(lambda: room.status()["connections"]["open"] == 3, "those that were reset are over")
        assert kind == "echo" or new.text.count("lost ConnectionResetError") == 3
        for sock in socks[::2]:
            with sock:
                sock.sendall(b"again\n")
                assert sock.recv(6)
    finally:
        boundaries.close()
