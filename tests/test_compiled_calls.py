"""What a compiled handler may do to its connections at any time, also to one that is on its way."""

from __future__ import annotations

import errno
import importlib
import os
import socket
import struct
from array import array
from collections.abc import Iterator
from types import ModuleType

import pytest

from channel_cases import Scene
from compiled import compiled
from processes import PROGRAMS
from takeover.ledger import close_and_read, open_ledger

BULK = 8 << 20


@pytest.fixture(scope="module")
def obeying(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    source = (PROGRAMS / "obeying.pyx").read_text()
    return compiled("obeying", source, tmp_path_factory.mktemp("obeying"))


@pytest.fixture
def scene(obeying: ModuleType) -> Iterator[Scene]:
    obeying.prepare()
    loops = importlib.import_module("takeover._loop")
    scene = Scene(loops, loops, obeying.OBEYING)
    yield scene
    scene.close()


@pytest.fixture
def clients(scene: Scene) -> list[socket.socket]:
    return scene.connect(2)


def order(scene: Scene, obeying: ModuleType, client: socket.socket, letters: bytes) -> None:
    """Returns when all that has been obeyed."""
    wanted = obeying.calls().get("obeyed", 0) + len(letters)
    client.sendall(letters)
    scene.until(lambda: obeying.calls().get("obeyed") == wanted)


def export(scene: Scene, which: int = 0) -> tuple[bytes, array[int], dict[str, int]]:
    reasons: dict[str, int] = {}
    packed, descriptors, cursor = scene.loops[which].export_connections(0, 251, 1 << 20, reasons)
    assert cursor == -1
    return packed, descriptors, reasons


def hand_over(scene: Scene) -> list[list[object]]:
    """The subject goes over to the other loop; who was refused there."""
    packed, descriptors, _ = export(scene)
    theirs = array("i", map(os.dup, descriptors))
    refused = scene.loops[1].adopt_connections(packed, theirs, 1)
    skip = [index for index, _ in refused]
    assert scene.loops[0].relinquish_connections(descriptors, skip) == ([], {})
    scene.loops[1].start_connections(theirs, skip, {})
    return refused  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("letter", "heard", "connections"), [(b"W", b"w", 2), (b"E", b"", 2), (b"C", b"", 1), (b"A", b"", 1)]
)
def test_what_is_done_to_a_connection_on_its_way_keeps_it_here_and_comes_true(
    scene: Scene, obeying: ModuleType, clients: list[socket.socket], letter: bytes, heard: bytes, connections: int
) -> None:
    order(scene, obeying, clients[0], b"s")
    ledger = open_ledger()
    scene.loops[0].note_late_writes(ledger)
    inode = 0
    try:
        _, descriptors, reasons = export(scene)
        inode = os.fstat(descriptors[0]).st_ino
        assert (len(descriptors), reasons) == (1, {"busy": 1})
        order(scene, obeying, clients[1], letter)
        assert scene.loops[0].relinquish_connections(descriptors, ()) == ([0], {})
        scene.loops[0].put_back_connections(descriptors, True)
    finally:
        scene.loops[0].note_late_writes(-1)
        noted = close_and_read(ledger)
        os.close(ledger)
    assert noted == ({inode: b"w"} if letter == b"W" else {})
    assert scene.read(clients[0], 1) == heard
    scene.until(lambda: scene.loops[0].connections == connections)
    order(scene, obeying, clients[1], b"w")
    assert scene.read(clients[1], 1) == b"w"


def test_a_handler_is_told_that_its_backlog_is_large_and_that_it_is_small_again(
    scene: Scene, obeying: ModuleType, clients: list[socket.socket]
) -> None:
    order(scene, obeying, clients[0], b"b")
    assert obeying.calls() == {"obeyed": 1, "filled": 1}
    order(scene, obeying, clients[0], b"w")
    assert scene.read(clients[0], BULK + 1) == bytes(BULK) + b"w"
    scene.until(lambda: obeying.calls() == {"obeyed": 2, "filled": 1, "drained": 1})


def test_a_close_waits_for_the_backlog(scene: Scene, obeying: ModuleType, clients: list[socket.socket]) -> None:
    order(scene, obeying, clients[0], b"bcw")
    assert scene.loops[0].connections == 2
    assert scene.read(clients[0], BULK + 1) == bytes(BULK)
    scene.until(lambda: scene.loops[0].connections == 1)
    assert obeying.error() == 0


def test_the_end_of_our_half_waits_for_the_backlog_and_theirs_goes_on(
    scene: Scene, obeying: ModuleType, clients: list[socket.socket]
) -> None:
    order(scene, obeying, clients[0], b"beew")
    assert scene.read(clients[0], BULK + 1) == bytes(BULK)
    order(scene, obeying, clients[0], b"s")
    assert scene.loops[0].connections == 2


def test_reading_pauses_until_it_is_resumed(scene: Scene, obeying: ModuleType, clients: list[socket.socket]) -> None:
    order(scene, obeying, clients[0], b"sp")
    clients[0].sendall(b"w")
    scene.turn(5)
    assert obeying.calls() == {"obeyed": 2}
    order(scene, obeying, clients[1], b"R")
    assert scene.read(clients[0], 1) == b"w"


def test_our_half_stays_open_where_the_handler_wants_it_so(
    scene: Scene, obeying: ModuleType, clients: list[socket.socket]
) -> None:
    obeying.prepare(keep_open=True)
    order(scene, obeying, clients[0], b"s")
    clients[0].shutdown(socket.SHUT_WR)
    scene.until(lambda: obeying.calls().get("ended"))
    order(scene, obeying, clients[1], b"W")
    assert scene.read(clients[0], 1) == b"w"
    order(scene, obeying, clients[1], b"C")
    assert scene.read(clients[0], 1) == b""
    assert obeying.calls() == {"obeyed": 3, "ended": 1, "closed": 1}


def test_a_reset_ends_a_connection_that_has_a_backlog_and_its_handler_learns_why(
    scene: Scene, obeying: ModuleType, clients: list[socket.socket]
) -> None:
    order(scene, obeying, clients[0], b"b")
    clients[0].setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    clients[0].close()
    scene.until(lambda: obeying.calls().get("closed"))
    assert obeying.error() in (errno.ECONNRESET, errno.EPIPE)


@pytest.mark.parametrize("letters", [b"ac", b"aa", b"ae", b"aw"])
def test_nothing_more_happens_to_a_connection_that_was_aborted(
    scene: Scene, obeying: ModuleType, clients: list[socket.socket], letters: bytes
) -> None:
    order(scene, obeying, clients[0], letters)
    assert scene.read(clients[0], 1) == b""
    assert obeying.calls() == {"obeyed": 2, "closed": 1}


def test_what_waits_to_be_read_of_a_connection_that_another_one_aborts_is_not_read(
    scene: Scene, obeying: ModuleType, clients: list[socket.socket]
) -> None:
    """Both can be read at once, and the first is asked to abort the second."""
    order(scene, obeying, clients[0], b"s")
    scene.turn()  # in which epoll finds that it has nothing more, and does not report it first again
    clients[1].sendall(b"A")
    clients[0].sendall(b"w")
    scene.until(lambda: obeying.calls().get("closed"))
    assert obeying.calls() == {"obeyed": 2, "closed": 1}


@pytest.mark.parametrize("letters", [b"xw", b"xb", b"xp"])
def test_a_descriptor_that_was_replaced_costs_its_connection_only(
    scene: Scene, obeying: ModuleType, clients: list[socket.socket], letters: bytes
) -> None:
    order(scene, obeying, clients[0], letters)
    assert scene.read(clients[0], 1) == b""
    assert obeying.calls() == {"obeyed": 2, "closed": 1}
    assert obeying.error() in (errno.ENOTSOCK, errno.EPERM, errno.ENOENT)
    order(scene, obeying, clients[1], b"w")
    assert scene.read(clients[1], 1) == b"w"


@pytest.mark.parametrize("size", [0, 256, 257, 100_000])
def test_a_state_of_any_size_moves_whole(
    scene: Scene, obeying: ModuleType, clients: list[socket.socket], size: int
) -> None:
    obeying.prepare(size)
    order(scene, obeying, clients[0], b"s")
    assert hand_over(scene) == []
    assert obeying.calls() == {"obeyed": 1, "imported": 1, "moved": 1}
    assert scene.counts() == (1, 1)
    order(scene, obeying, clients[0], b"w")
    assert scene.read(clients[0], 1) == b"w"


def test_one_that_cannot_tell_its_state_stays_and_is_not_asked_again(
    scene: Scene, obeying: ModuleType, clients: list[socket.socket]
) -> None:
    obeying.prepare(-2)
    order(scene, obeying, clients[0], b"s")
    for expected in ({"state": 1, "busy": 1}, {"busy": 1}):
        _, descriptors, reasons = export(scene)
        assert (len(descriptors), reasons) == (0, expected)
    order(scene, obeying, clients[0], b"w")
    assert scene.read(clients[0], 1) == b"w"


def test_one_whose_state_the_other_side_cannot_read_is_served_where_it_was(
    scene: Scene, obeying: ModuleType, clients: list[socket.socket]
) -> None:
    obeying.prepare(reads=False)
    order(scene, obeying, clients[0], b"s")
    assert hand_over(scene) == [[0, "state"]]
    assert scene.counts() == (2, 0)
    order(scene, obeying, clients[0], b"w")
    assert scene.read(clients[0], 1) == b"w"
