"""The examples do what they say: each takes over from itself, and who was connected is served to the end."""

from __future__ import annotations

import pathlib
import socket
import sys

import pytest

from clients import receive_exactly
from processes import Program, Room

EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"


def say(sock: socket.socket, line: bytes, answer: bytes) -> None:
    sock.sendall(line)
    assert receive_exactly(sock, len(answer)) == answer


@pytest.mark.parametrize("example", sorted(path.name for path in EXAMPLES.glob("*.py")))
def test_an_example_takes_over_from_itself_and_serves_its_clients_to_the_end(room: Room, example: str) -> None:
    def start() -> int:
        program = room.run(sys.executable, str(EXAMPLES / example), room.url, room.control)
        room.wait_for_owner(program)
        return program.pid

    def answer(pid: int) -> bytes:
        return b"%d: hello\n" % pid if example == "blocking.py" else b"hello\n"

    first = start()
    with room.connect() as early:
        say(early, b"hello\n", answer(first))
        second = start()
        with room.connect() as late:
            say(late, b"hello\n", answer(second))
        say(early, b"hello\n", answer(first))
    assert room.programs[0].wait() == 0


def test_who_is_in_the_chat_room_goes_along_with_the_line_that_is_being_typed(room: Room) -> None:
    def start() -> Program:
        program = room.run(sys.executable, str(EXAMPLES / "chat.py"), room.url, room.control)
        room.wait_for_owner(program)
        return program

    first = start()
    with room.connect() as one, room.connect() as other:
        say(one, b"hello\nhow are", b"hello\n")
        assert receive_exactly(other, 6) == b"hello\n"
        start()
        assert first.wait() == 0
        say(one, b" you?\n", b"how are you?\n")
        assert receive_exactly(other, 13) == b"how are you?\n"


def test_who_is_in_the_chat_room_of_coroutines_keeps_name_and_line_and_is_not_said_to_have_left(room: Room) -> None:
    def start() -> Program:
        program = room.run(sys.executable, str(EXAMPLES / "aio_chat.py"), room.url, room.control)
        room.wait_for_owner(program)
        return program

    first = start()
    with room.connect() as other:
        say(other, b"hello\n", b"hello\n")
        with room.connect() as ada:
            say(ada, b"/name Ada\nhello\nhow are", b"Ada: hello\n")
            assert receive_exactly(other, 11) == b"Ada: hello\n"
            start()
            assert first.wait() == 0
            say(ada, b" you?\n", b"Ada: how are you?\n")
            assert receive_exactly(other, 18) == b"Ada: how are you?\n"
        assert receive_exactly(other, 13) == b"Ada has left\n"
