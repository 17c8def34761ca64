"""A taker, and a stranger who gives and says whatever it is told to: nothing is lost."""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Callable
from typing import Any

import pytest

from channel_cases import QUICK, Scene, Stranger, a_record, heard, offer, some_connections
from takeover import giver as giver_module
from takeover import records
from takeover import taker as taker_module
from takeover.protocol import State
from takeover.records import BATCH
from takeover.taker import Taker
from takeover.wire import Type


def test_a_taker_reads_nothing_before_it_was_released(scene: Scene) -> None:
    stranger, taker = scene.take()
    (client,) = offer(scene, stranger, 0, state=b"before, ")
    client.send(b"after")
    heard(scene, stranger, Type.ADOPTED)
    scene.turn(20)
    (protocol,) = scene.protocols[1]
    assert (protocol.made, protocol.received) == (0, b"before, ")
    stranger.say(Type.RELEASED, records.pack_release(0, [], {0: b"tail "}))
    assert scene.read(client, 10) == b"tail AFTER"
    assert protocol.received == b"before, after" and taker.moved == 1


def test_a_taker_claims_what_a_silent_giver_does_not_release(scene: Scene) -> None:
    stranger, taker = scene.take(QUICK)
    first = offer(scene, stranger, 0, 2)
    heard(scene, stranger, Type.ADOPTED)
    scene.until(lambda: taker.state is State.CLAIMED)
    assert not stranger.claims()
    scene.answers(first)
    second = offer(scene, stranger, 1)
    offer(scene, stranger, 2, listener=1)
    frames = heard(scene, stranger, Type.ADOPTED, Type.ADOPTED)
    assert [frame.body["refused"] for frame in frames] == [[], [[0, "listener"]]]
    scene.answers(second)
    stranger.say(Type.RELEASED, records.pack_release(0, [1], {0: b"too late"}))
    scene.answers([*first, *second])
    stranger.say(Type.FINISHED, {"left": {}})
    scene.until(lambda: taker.finished)
    assert scene.loops[1].connections == 3


@pytest.mark.parametrize("released", [0, 1, 2])
def test_a_taker_claims_what_a_giver_that_hangs_up_has_not_released(scene: Scene, released: int) -> None:
    stranger, taker = scene.take()
    clients = [client for number in range(3) for client in offer(scene, stranger, number)]
    for number in range(released):
        stranger.say(Type.RELEASED, records.pack_release(number, [], {}))
    stranger.hang_up()
    scene.until(lambda: taker.finished)
    assert scene.loops[1].connections == 3
    scene.answers(clients)


@pytest.mark.parametrize("released", [0, 1, 2])
def test_a_taker_drops_what_a_giver_has_taken_back(scene: Scene, released: int) -> None:
    stranger, taker = scene.take()
    clients = [client for number in range(3) for client in offer(scene, stranger, number)]
    for number in range(released):
        stranger.say(Type.RELEASED, records.pack_release(number, [], {}))
    assert stranger.claims()
    stranger.hang_up()
    scene.until(lambda: taker.finished)
    assert scene.loops[1].connections == released
    scene.answers(clients[:released])
    assert [client.recv(1) for client in clients[released:]] == [b""] * (3 - released), "all copies are closed"


def test_what_is_to_stay_is_dropped_and_said_so(scene: Scene) -> None:
    stranger, taker = scene.take()
    clients = offer(scene, stranger, 0, 3)
    stranger.say(Type.RELEASED, records.pack_release(0, [1], {}))
    *_, frame = heard(scene, stranger, Type.ADOPTED, Type.DROPPED)
    assert frame.body == {"batch": 0} and scene.loops[1].connections == 2
    scene.answers([clients[0], clients[2]])
    taker.leave()


def a_file(data: bytes, seal: bool) -> int:
    if seal:
        return records.seal("test", data)
    file = os.memfd_create("test", os.MFD_ALLOW_SEALING)
    os.write(file, data)
    return file


def send_batch(
    scene: Scene,
    stranger: Stranger,
    *,
    number: int = 1,
    count: int = 1,
    descriptors: int = 1,
    body: bytes | None = None,
    size: int | None = None,
    file: int = -1,
) -> None:
    """One CONNECTIONS, as honest as the arguments are."""
    _, accepted = some_connections(scene, descriptors)
    sent = [sock.fileno() for sock in accepted]
    if body is None:
        body = a_record(scene).pack() * count if file < 0 else b""
    if file >= 0:
        sent.append(file)
    prefix = BATCH.pack(number, 0, count, len(body) if size is None else size)
    stranger.say(Type.CONNECTIONS, prefix + body, sent)
    if file >= 0:
        os.close(file)


def release(number: int, kept: tuple[int, ...], tails: dict[int, bytes]) -> Callable[[Scene, Stranger], None]:
    return lambda scene, stranger: stranger.say(Type.RELEASED, records.pack_release(number, kept, tails))


NONSENSE_FOR_A_TAKER: dict[str, Callable[[Scene, Stranger], object]] = {
    "no descriptor": lambda scene, stranger: send_batch(scene, stranger, descriptors=0),
    "too few descriptors": lambda scene, stranger: send_batch(scene, stranger, count=3, descriptors=2),
    "too many descriptors": lambda scene, stranger: send_batch(scene, stranger, descriptors=3),
    "one descriptor too many": lambda scene, stranger: send_batch(scene, stranger, descriptors=2),
    "a header cut off": lambda scene, stranger: stranger.say(Type.CONNECTIONS, b"\0" * (BATCH.size - 1)),
    "no body": lambda scene, stranger: stranger.say(Type.CONNECTIONS, b""),
    "another size": lambda scene, stranger: send_batch(scene, stranger, size=1),
    "a huge size": lambda scene, stranger: send_batch(scene, stranger, size=(1 << 64) - 1),
    "a record cut off": lambda scene, stranger: send_batch(scene, stranger, body=a_record(scene).pack()[:-1]),
    "a byte too many": lambda scene, stranger: send_batch(scene, stranger, body=a_record(scene).pack() + b"\0"),
    "garbage": lambda scene, stranger: send_batch(scene, stranger, body=b"\xff" * 100),
    "a huge part": lambda scene, stranger: send_batch(
        scene, stranger, body=struct.pack("!I", 40) + b"\0" * 24 + b"\xff" * 12
    ),
    "no file": lambda scene, stranger: send_batch(scene, stranger, file=os.dup(0), size=47),
    "a file that is not sealed": lambda scene, stranger: send_batch(
        scene, stranger, file=a_file(a_record(scene).pack(), False), size=len(a_record(scene).pack())
    ),
    "a file too short": lambda scene, stranger: send_batch(
        scene, stranger, file=a_file(a_record(scene).pack()[:-1], True), size=len(a_record(scene).pack())
    ),
    "a file too long": lambda scene, stranger: send_batch(
        scene, stranger, file=a_file(a_record(scene).pack() + b"\0", True), size=len(a_record(scene).pack())
    ),
    "an empty file": lambda scene, stranger: send_batch(scene, stranger, file=a_file(b"", True), size=47),
    "a file of garbage": lambda scene, stranger: send_batch(scene, stranger, file=a_file(b"\1" * 47, True), size=47),
    "another batch released": release(1, (), {}),
    "one kept that is out of range": release(0, (2,), {}),
    "one kept twice": release(0, (0, 0), {}),
    "a tail that is out of range": release(0, (), {2: b"x"}),
    "half a release": lambda scene, stranger: stranger.say(Type.RELEASED, b"\0\0"),
    "a release with a tail cut off": lambda scene, stranger: stranger.say(
        Type.RELEASED, records.pack_release(0, [], {0: b"tail"})[:-1]
    ),
    "the end before the release": lambda scene, stranger: stranger.say(Type.FINISHED, {"left": {}}),
    "what a taker says": lambda scene, stranger: stranger.adopted(0),
    "no frame": lambda scene, stranger: stranger.link.sock.send(b"GET / HTTP/1.1\r\n\r\n"),
}


@pytest.mark.parametrize("nonsense", NONSENSE_FOR_A_TAKER)
def test_a_taker_keeps_what_it_had_adopted_from_somebody_who_speaks_nonsense(scene: Scene, nonsense: str) -> None:
    stranger, taker = scene.take()
    clients = offer(scene, stranger, 0, 2)
    heard(scene, stranger, Type.ADOPTED)
    NONSENSE_FOR_A_TAKER[nonsense](scene, stranger)
    scene.until(lambda: taker.finished)
    assert taker.error is not None and not stranger.claims()
    assert scene.loops[1].connections == 2
    scene.answers(clients)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another listener": ({"listener": 1}, "listener"),
    "a native one": ({"flags": 0}, "handler"),
    "another version": ({"version": 7}, "version"),
    "unread bytes": ({"unread": b"x"}, "unread"),
}


@pytest.mark.parametrize("which", REFUSED)
def test_a_taker_refuses_what_it_cannot_serve_and_takes_the_rest(scene: Scene, which: str) -> None:
    more, word = REFUSED[which]
    stranger, taker = scene.take()
    clients, accepted = some_connections(scene, 2)
    several = [a_record(scene, **more), a_record(scene)]
    stranger.connections(0, [sock.fileno() for sock in accepted], several)
    for sock in accepted:
        sock.close()
    (frame,) = heard(scene, stranger, Type.ADOPTED)
    assert frame.body["refused"] == [[0, word]] and scene.account[1].refused == {word: 1}
    stranger.say(Type.RELEASED, records.pack_release(0, [], {}))
    scene.answers(clients[1:])
    assert clients[0].recv(1) == b"", "the taker has closed its copy"
    assert taker.moved == 1


def test_what_is_no_stream_socket_is_refused(scene: Scene) -> None:
    stranger, _ = scene.take()
    reading, writing = os.pipe()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagrams:
        stranger.connections(0, [reading, datagrams.fileno()], [a_record(scene)] * 2)
    os.close(reading)
    os.close(writing)
    (frame,) = heard(scene, stranger, Type.ADOPTED)
    assert frame.body["refused"] == [[0, "socket"], [1, "socket"]]


def test_a_taker_that_leaves_drops_what_was_not_released(scene: Scene) -> None:
    stranger, taker = scene.take()
    clients = offer(scene, stranger, 0, 2)
    heard(scene, stranger, Type.ADOPTED)
    taker.leave()
    assert stranger.claims(), "the giver's to take back"
    assert [client.recv(1) for client in clients] == [b"", b""] and scene.loops[1].connections == 0


def test_a_mistake_of_this_side_costs_the_channel_and_no_connection(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(giver_module, "FIRST_BATCH", 1)
    scene.connect(3)
    giver, taker = scene.move()

    def fail(self: Taker) -> None:
        if self.batches:
            raise ZeroDivisionError
        adopt(self)

    adopt = Taker._adopt
    monkeypatch.setattr(taker_module.Taker, "_adopt", fail)
    scene.until(lambda: giver.finished and taker.finished)
    assert sum(scene.counts()) == 3 and scene.counts() != (3, 0)
    scene.answers()
    assert giver.state is taker.state is State.CLOSED


@pytest.mark.parametrize("error", [ZeroDivisionError(), OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))], ids=repr)
def test_a_mistake_after_a_batch_was_taken_in_leaves_it_to_the_giver(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: object) -> None:
        raise error

    scene.connect(3)
    monkeypatch.setattr(taker_module, "Batch", fail)
    giver, taker = scene.move()
    scene.until(lambda: giver.finished and taker.finished)
    assert scene.counts() == (3, 0)
    scene.answers()


def test_a_ledger_that_cannot_be_read_costs_only_what_is_in_it(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_memory(_: int) -> dict[int, bytes]:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    monkeypatch.setattr(taker_module, "close_and_read", no_memory)
    stranger, taker = scene.take()
    clients = offer(scene, stranger, 0, 2)
    heard(scene, stranger, Type.ADOPTED)
    stranger.hang_up()
    scene.until(lambda: taker.finished)
    assert "wrote to connections on their way cannot be read: OSError(12, 'Cannot allocate memory')" in caplog.text
    assert scene.loops[1].connections == 2
    scene.answers(clients)


def test_a_taker_says_how_much_room_is_left(scene: Scene) -> None:
    stranger, taker = scene.take()
    offer(scene, stranger, 0)
    assert heard(scene, stranger, Type.ADOPTED)[0].body["room"] == 999
    offer(scene, stranger, 1, 2)
    assert heard(scene, stranger, Type.ADOPTED)[0].body["room"] == 997
    for number in range(2):
        stranger.say(Type.RELEASED, records.pack_release(number, [], {}))
    stranger.say(Type.FINISHED, {"left": {"busy": 2}})
    scene.until(lambda: taker.finished)
    assert taker.left == scene.account[1].drained == {"busy": 2}
