"""The examples do what they say: each takes over from itself, and who was connected is served to the end."""

from __future__ import annotations

import pathlib
import socket
import sys

import pytest

from clients import eventually, receive_exactly
from processes import Room

EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"


def says(sock: socket.socket, answer: bytes) -> bool:
    sock.sendall(b"hello\n")
    return receive_exactly(sock, len(answer)) == answer


@pytest.mark.parametrize("example", sorted(path.name for path in EXAMPLES.glob("*.py")))
def test_an_example_takes_over_from_itself_and_serves_its_clients_to_the_end(room: Room, example: str) -> None:
    def start() -> int:
        program = room.run(sys.executable, str(EXAMPLES / example), room.url, room.control)
        room.wait_for_owner(program)
        return program.pid

    def answer(pid: int) -> bytes:
        return b"%d: hello\n" % pid if example == "blocking.py" else b"hello\n"

    def is_served_by(pid: int) -> bool:
        with room.connect() as late:
            return says(late, answer(pid))

    first = start()
    with room.connect() as early:
        assert says(early, answer(first))
        second = start()
        # The blocking server's other thread may have accepted in the very moment of the commit.
        eventually(lambda: is_served_by(second), "new clients are the second's")
        assert says(early, answer(first))
    assert room.programs[0].wait() == 0
