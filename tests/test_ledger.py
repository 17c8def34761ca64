"""The ledger of a channel: what was noted is read once the taker has it, and nothing can be noted after that."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import pytest

from takeover import ledger
from takeover.ledger import ENTRY, note


@pytest.fixture
def file() -> Iterator[int]:
    file = ledger.open_ledger()
    yield file
    os.close(file)


@pytest.fixture
def sock() -> Iterator[socket.socket]:
    with socket.socket() as sock:
        yield sock


def inode(sock: socket.socket) -> int:
    return os.fstat(sock.fileno()).st_ino


def test_what_was_noted_is_read_in_its_order_and_by_connection(file: int, sock: socket.socket) -> None:
    with socket.socket() as other:
        for data in (b"one", b"two" * 1_000_000, b"three"):
            assert note(file, sock.fileno(), data)
            assert note(file, other.fileno(), data[::-1])
        expected = b"one" + b"two" * 1_000_000 + b"three"
        backwards = b"eno" + b"owt" * 1_000_000 + b"eerht"
        assert ledger.close_and_read(file) == {inode(sock): expected, inode(other): backwards}


def test_what_was_taken_back_is_not_read(file: int, sock: socket.socket) -> None:
    for data in (b"sent from here", b"", b"later"):
        assert note(file, sock.fileno(), data)
    assert ledger.close_and_read(file) == {inode(sock): b"later"}


@pytest.mark.parametrize("left", [1, ENTRY.size - 1, ENTRY.size, ENTRY.size + 3])
def test_an_entry_that_is_not_whole_was_never_written(file: int, sock: socket.socket, left: int) -> None:
    assert note(file, sock.fileno(), b"whole")
    os.write(file, (ENTRY.pack(inode(sock), 10) + b"not whole?")[:left])
    assert ledger.close_and_read(file) == {inode(sock): b"whole"}


def test_what_is_noted_too_late_goes_nowhere_and_is_no_failure(file: int, sock: socket.socket) -> None:
    assert ledger.close_and_read(file) == {}
    assert note(file, sock.fileno(), b"late")
    assert os.fstat(file).st_size == 0


def test_a_file_that_takes_nothing_is_a_failure(sock: socket.socket) -> None:
    with open("/dev/full", "wb") as full:
        assert not note(full.fileno(), sock.fileno(), b"lost")
