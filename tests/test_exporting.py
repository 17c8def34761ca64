"""What a loop gives away: each connection is in a record, or stays for a reason that is counted, and is served on."""

from __future__ import annotations

import functools
import os
import pathlib
import resource
import socket
from array import array
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest

from channel_cases import Scene, Tally
from takeover import _loop_py
from takeover._transport_py import Transport
from takeover.records import LARGEST_PART, NOT_NOW

COUNT = 3
SECOND = 1


@pytest.fixture
def scene(loop_module: ModuleType) -> Iterator[Scene]:
    scene = Scene(loop_module, loop_module)
    scene.connect(COUNT)
    yield scene
    scene.close()


def export(scene: Scene) -> tuple[bytes, array[int], dict[str, int]]:
    reasons: dict[str, int] = {}
    packed, descriptors, cursor = scene.loops[0].export_connections(0, 251, 1 << 20, reasons)
    assert cursor == -1
    return packed, descriptors, reasons


def raising(error: type[BaseException]) -> Callable[[Tally], object]:
    def export_state(self: Tally) -> object:
        raise error

    return export_state


def closing(self: Tally) -> bytes:
    self.transport.write(b"bye")
    self.transport.close()
    return b""


@pytest.mark.parametrize(
    ("export_state", "word"),
    [
        (raising(ValueError), "state"),
        (raising(MemoryError), "memory"),
        (lambda _: "text", "state"),
        (lambda _: bytes(LARGEST_PART + 1), "state"),
        (closing, "closing"),
        (lambda _: NOT_NOW, "busy"),
    ],
    ids=["raises", "no memory", "no bytes", "huge", "closes", "not now"],
)
def test_one_that_gives_no_state_stays_and_is_served_and_only_the_busy_are_asked_again(
    scene: Scene, export_state: Callable[[Tally], object], word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    second = scene.protocols[0][SECOND]
    monkeypatch.setattr(second, "export_state", export_state.__get__(second))
    for expected in ({word: 1}, {word: 1} if word == "busy" else {}):
        _, descriptors, reasons = export(scene)
        assert (len(descriptors), reasons) == (COUNT - 1, expected)
        scene.loops[0].put_back_connections(descriptors, False)
    if word == "closing":
        assert scene.read(scene.clients[SECOND], 4) == b"bye"
    scene.answers([client for index, client in enumerate(scene.clients) if word != "closing" or index != SECOND])


@pytest.mark.parametrize("version", ["new", 1 << 31, -(1 << 31) - 1, 1.5])
def test_one_whose_version_is_no_number_of_32_bits_stays(
    scene: Scene, version: object, caplog: pytest.LogCaptureFixture
) -> None:
    scene.protocols[0][SECOND].state_version = version
    _, descriptors, reasons = export(scene)
    assert (len(descriptors), reasons) == (COUNT - 1, {"state": 1})
    assert "state_version must be an int of 32 bits" in caplog.text
    scene.loops[0].put_back_connections(descriptors, False)
    scene.answers()


def test_one_that_is_being_closed_stays_until_its_backlog_is_sent(scene: Scene) -> None:
    transport = scene.protocols[0][SECOND].transport
    transport.write(bytes(8 << 20))
    transport.close()
    _, descriptors, reasons = export(scene)
    assert (len(descriptors), reasons) == (COUNT - 1, {"closing": 1})
    scene.loops[0].put_back_connections(descriptors, False)
    assert scene.read(scene.clients[SECOND], (8 << 20) + 1) == bytes(8 << 20)
    scene.answers([scene.clients[0], scene.clients[2]])


@pytest.mark.parametrize("which", range(COUNT))
def test_an_export_that_ends_the_program_leaves_all_of_the_batch_served(
    scene: Scene, which: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(scene.protocols[0][which], "export_state", lambda: raising(SystemExit)(Tally()))
        with pytest.raises(SystemExit):
            export(scene)
    scene.answers()
    assert len(export(scene)[1]) == COUNT


def test_one_that_there_is_no_memory_to_hold_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the plain loop, where holding takes memory."""
    scene = Scene(_loop_py, _loop_py)
    hold = Transport.hold

    def fail_once(self: Transport) -> None:
        hold(self)
        if self is scene.protocols[0][SECOND].transport:
            raise MemoryError

    scene.connect(COUNT)
    monkeypatch.setattr(Transport, "hold", fail_once)
    _, descriptors, reasons = export(scene)
    assert (len(descriptors), reasons) == (COUNT - 1, {"memory": 1})
    scene.answers([scene.clients[SECOND]])
    scene.loops[0].put_back_connections(descriptors, False)
    scene.answers()
    scene.close()


def test_what_waits_to_be_read_when_an_export_comes_in_between_is_read_when_it_is_back(scene: Scene) -> None:
    """Both can be read at once, and whoever is first exports all."""
    batches: list[array[int]] = []

    def exporting(received: Callable[[bytes], None], data: bytes) -> None:
        received(data)
        if not batches:
            batches.append(export(scene)[1])

    for protocol in scene.protocols[0]:
        protocol.data_received = functools.partial(exporting, protocol.data_received)
    scene.turn()
    for client in scene.clients:
        client.sendall(b"x")
    scene.until(lambda: batches)
    scene.turn()
    assert sorted(protocol.received for protocol in scene.protocols[0]) == [b"", b"", b"x"]
    scene.loops[0].put_back_connections(batches[0], False)
    assert [scene.read(client, 1) for client in scene.clients] == [b"X"] * COUNT


def test_what_cannot_be_noted_is_sent_from_here(scene: Scene) -> None:
    """Nobody but this process knows then what a handler has written on the way."""
    with open("/dev/full", "wb") as full:
        scene.loops[0].note_late_writes(full.fileno())
        _, descriptors, _ = export(scene)
        scene.protocols[0][SECOND].transport.write(b"late")
        kept, tails = scene.loops[0].relinquish_connections(descriptors, ())
        scene.loops[0].note_late_writes(-1)
    assert (kept, tails) == ([SECOND], {})
    scene.loops[0].put_back_connections(array("i", [descriptors[SECOND]]), True)
    assert scene.read(scene.clients[SECOND], 4) == b"late"
    assert scene.counts() == (1, 0)


@pytest.mark.parametrize("handler", [Tally, "echo"], ids=["protocol", "native"])
@pytest.mark.parametrize("stays", range(COUNT))
def test_of_a_batch_one_may_stay_and_the_others_move(loop_module: ModuleType, handler: Any, stays: int) -> None:
    scene = Scene(loop_module, loop_module, handler)
    scene.connect(COUNT)
    packed, descriptors, _ = export(scene)
    theirs = array("i", map(os.dup, descriptors))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagrams:
        os.dup2(datagrams.fileno(), theirs[stays], inheritable=False)
    assert scene.loops[1].adopt_connections(packed, theirs, 1) == [[stays, "socket"]]
    assert scene.loops[0].relinquish_connections(descriptors, [stays]) == ([], {})
    scene.loops[1].start_connections(theirs, [stays], {})
    assert scene.counts() == (1, COUNT - 1)
    scene.answers()
    scene.close()


def test_what_was_written_on_the_way_and_there_is_no_memory_to_pass_on_is_sent_from_here(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """RLIMIT_AS, which says little of what the plain loop can still allocate: there it is told so."""

    def fail(self: Transport, start: int = 0) -> bytes:
        raise MemoryError

    _, descriptors, _ = export(scene)
    scene.protocols[0][SECOND].transport.write(b"late" + bytes(256 << 20))
    monkeypatch.setattr(Transport, "backlog", fail)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    used = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (16 << 20), limits[1]))
    try:
        kept, tails = scene.loops[0].relinquish_connections(descriptors, ())
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert (kept, tails) == ([SECOND], {})
    assert scene.counts() == (1, 0)
    scene.loops[0].put_back_connections(array("i", [descriptors[SECOND]]), True)
    assert scene.read(scene.clients[SECOND], 4) == b"late"
