"""Giver and taker on real loops and a real socket pair in one process: whatever the other end does, nothing is lost."""

from __future__ import annotations

import errno
import importlib
import math
import os
import queue
import socket
import struct
from array import array
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest

import takeover
from channel_cases import PATIENT, QUICK, Scene, Stranger, Tally
from clients import LIMIT, eventually
from conftest import CYTHON_IS_BUILT
from kernel import opened
from processes import Room
from takeover import channel as channel_module
from takeover import giver as giver_module
from takeover import records
from takeover import taker as taker_module
from takeover.channel import open_channel
from takeover.protocol import Limits, Local, State
from takeover.records import BATCH, Record
from takeover.successor import CHANNELS
from takeover.taker import Taker
from takeover.wire import HEADER, MAGIC, Frame, Type

MakeScene = Callable[..., Scene]


@pytest.fixture
def make(loop_module: ModuleType) -> Iterator[MakeScene]:
    """Makes a scene on loops of the backend; what is open at the end is what was open before it."""
    scenes: list[Scene] = []
    before = opened()

    def make(handler: Any = Tally, taking: ModuleType = loop_module) -> Scene:
        scenes.append(Scene(loop_module, taking, handler))
        return scenes[-1]

    yield make
    for scene in scenes:
        scene.close()
    assert opened() == before


@pytest.fixture
def scene(make: MakeScene) -> Scene:
    return make()


def a_record(scene: Scene, state: bytes = b"", **more: Any) -> Record:
    name = records.pack_peer(socket.AF_INET, ("127.0.0.1", 1))
    fixed = Record(scene.inode, records.HAS_STATE, 0, name, 0, 65536, 16384, b"", b"", state)
    return fixed._replace(**more)


def some_connections(scene: Scene, count: int) -> tuple[list[socket.socket], list[socket.socket]]:
    """Clients, and the accepted sockets of a process that is not one of the scene's loops."""
    clients, accepted = [], []
    for _ in range(count):
        client, server = socket.socketpair()
        clients.append(client)
        accepted.append(server)
    scene.clients += [*clients, *accepted]
    return clients, accepted


def offer(scene: Scene, stranger: Stranger, number: int, count: int = 1, **more: Any) -> list[socket.socket]:
    """The stranger sends a batch, and keeps no copies; its clients."""
    clients, accepted = some_connections(scene, count)
    stranger.connections(number, [sock.fileno() for sock in accepted], [a_record(scene, **more)] * count)
    for sock in accepted:
        sock.close()
    return clients


def heard(scene: Scene, stranger: Stranger, *kinds: Type, keep: bool = False) -> list[Frame]:
    """Waits for these messages, and no others; the descriptors that came are closed, unless they are to `keep`."""
    frames: list[Frame] = []

    def come() -> bool:
        frames.extend(stranger.hears())
        return len(frames) >= len(kinds)

    scene.until(come)
    assert tuple(frame.type for frame in frames) == kinds
    for frame in frames:
        for descriptor in () if keep else frame.descriptors:
            os.close(descriptor)
    return frames


# Everything moves.

MODULES = ("takeover._loop", "takeover._loop_py")


@pytest.mark.parametrize("handler", [Tally, "echo"], ids=["protocol", "native"])
@pytest.mark.parametrize("taking", MODULES)
def test_everything_moves_between_any_two_loops(make: MakeScene, taking: str, handler: Any) -> None:
    if taking == "takeover._loop" and not CYTHON_IS_BUILT:
        pytest.skip("the compiled modules are not built")
    scene = make(handler, importlib.import_module(taking))
    scene.connect(150)
    scene.answers()
    giver, taker = scene.move()
    scene.until(lambda: giver.finished and taker.finished)
    assert scene.counts() == (0, 150)
    scene.answers()
    assert (scene.account[0].moved_out, scene.account[1].moved_in) == (150, 150)
    assert not giver.left and not taker.left
    scene.until(lambda: len(scene.ended) == 2)
    for protocol in scene.protocols[1]:
        assert protocol.received.count(b"ask") == 2 and protocol.made == 1
        assert protocol.transport.get_extra_info("takeover") == (1, 1)


@pytest.mark.parametrize("taking", MODULES)
def test_every_loop_reads_what_every_loop_writes(loop_module: ModuleType, make: MakeScene, taking: str) -> None:
    if taking == "takeover._loop" and not CYTHON_IS_BUILT:
        pytest.skip("the compiled modules are not built")
    scene = make(Tally, importlib.import_module(taking))
    scene.connect(3)
    first, second, third = scene.protocols[0]
    first.received = b"\0state\xff"
    first.transport.set_write_buffer_limits(high=1000, low=10)
    first.transport.pause_reading()
    second.transport.write_eof()
    third.received = bytes(range(256)) * 300
    reasons: dict[str, int] = {}
    packed, descriptors, end = scene.loops[0].export_connections(0, 251, 1 << 20, reasons)
    assert (len(descriptors), end, reasons) == (3, -1, {})
    copies = [os.dup(descriptor) for descriptor in descriptors]
    found = records.unpack(packed, 3)
    names = {sock.getsockname() for sock in scene.clients}
    assert {records.unpack_peer(record.peer) for record in found} == names
    assert b"".join(record.pack() for record in found) == packed
    assert scene.loops[1].adopt_connections(packed, array("i", copies), 7) == []
    scene.loops[0].drop_connections(descriptors, ())
    again, _, _ = scene.loops[1].export_connections(0, 251, 1 << 20, reasons)
    assert again == b"", "what was adopted and not started is not exported"
    scene.loops[1].start_connections(array("i", copies), (), {1: b""})
    again, descriptors, _ = scene.loops[1].export_connections(0, 251, 1 << 20, reasons)
    assert records.unpack(again, 3) == [record._replace(times=1) for record in found]
    scene.loops[1].put_back_connections(descriptors, False)


def test_handlers_that_write_meanwhile_are_heard_behind_all_else(scene: Scene) -> None:
    (client,) = scene.connect(1)
    (before,) = scene.protocols[0]
    giver, taker = scene.move()
    scene.until(lambda: taker.batches)
    before.transport.write(b"one, ")
    before.transport.writelines([b"two, ", b"three, "])
    scene.until(lambda: giver.finished and taker.finished)
    (after,) = scene.protocols[1]
    after.transport.write(b"four")
    assert scene.read(client, 21) == b"one, two, three, four"
    assert scene.counts() == (0, 1)


@pytest.mark.parametrize("how", ["close", "abort", "write_eof"])
def test_what_a_handler_ends_meanwhile_ends_here_once(scene: Scene, how: str) -> None:
    clients = scene.connect(3)
    giver, taker = scene.move()
    scene.until(lambda: taker.batches)
    scene.protocols[0][1].transport.write(b"bye")
    getattr(scene.protocols[0][1].transport, how)()
    scene.until(lambda: giver.finished and taker.finished)
    assert scene.read(clients[1], 10) == (b"" if how == "abort" else b"bye")
    assert giver.left == taker.left == {"closing": 1}
    if how == "write_eof":
        clients[1].sendall(b"still here")
        scene.until(lambda: scene.protocols[0][1].received == b"still here")
    else:
        scene.until(lambda: scene.protocols[0][1].lost)
    assert scene.loops[1].connections == 2 and not scene.protocols[1][1].made
    scene.answers([clients[0], clients[2]])


def test_what_a_handler_has_ended_is_left_to_a_taker_that_has_claimed_it(scene: Scene) -> None:
    (client,) = scene.connect(1)
    giver, stranger = scene.give(QUICK)
    (frame,) = heard(scene, stranger, Type.CONNECTIONS, keep=True)
    assert stranger.claims()
    scene.protocols[0][0].transport.write_eof()
    stranger.adopted(0)
    heard(scene, stranger, Type.RELEASED, Type.FINISHED)
    with socket.socket(fileno=frame.descriptors[0]) as claimed:
        claimed.send(b"served elsewhere")
        assert client.recv(100) == b"served elsewhere", "the giver's write_eof() has not ended it"
        assert giver.finished and scene.loops[0].connections == 0 and not scene.protocols[0][0].lost


def test_what_a_handler_has_ended_is_taken_back_with_the_rest(scene: Scene) -> None:
    """The taker has been told what stays, and dies before it has said that it does not serve that."""
    clients = scene.connect(2)
    giver, stranger = scene.give()
    heard(scene, stranger, Type.CONNECTIONS)
    scene.protocols[0][0].transport.write(b"bye")
    scene.protocols[0][0].transport.write_eof()
    stranger.adopted(0)
    heard(scene, stranger, Type.RELEASED)
    stranger.hang_up()
    scene.until(lambda: giver.finished)
    assert giver.left == {"closing": 1} and scene.loops[0].connections == 1
    assert scene.read(clients[0], 10) == b"bye"
    clients[0].sendall(b"still here")
    scene.until(lambda: scene.protocols[0][0].received == b"still here")


class Busy(Tally):
    refusals = 3

    def export_state(self) -> Any:
        self.refusals -= 1
        return records.NOT_NOW if self.refusals >= 0 else super().export_state()


def test_who_says_not_now_is_asked_again_also_when_answers_come_together(
    make: MakeScene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(giver_module, "FIRST_BATCH", 1)
    scene = make(Busy)
    scene.connect(4)
    for protocol in scene.protocols[0][1:]:
        protocol.refusals = 0
    giver, stranger = scene.give()
    heard(scene, stranger, *[Type.CONNECTIONS] * 3)
    for number in range(3):
        stranger.adopted(number)
    heard(scene, stranger, *[Type.RELEASED] * 3, Type.CONNECTIONS)
    stranger.adopted(3)
    *_, frame = heard(scene, stranger, Type.RELEASED, Type.FINISHED)
    assert giver.finished and frame.body["left"] == {} and scene.loops[0].connections == 0


# A giver, and a stranger who takes.


def test_no_more_batches_are_on_their_way_than_the_window_has(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(giver_module, "FIRST_BATCH", 1)
    monkeypatch.setattr(giver_module, "QUICK", -1.0)
    scene.connect(6)
    giver, stranger = scene.give()
    heard(scene, stranger, *[Type.CONNECTIONS] * giver_module.WINDOW)
    scene.turn(20)
    assert stranger.hears() == []
    stranger.adopted(0)
    heard(scene, stranger, Type.RELEASED, Type.CONNECTIONS)
    scene.turn(20)
    assert stranger.hears() == [] and scene.loops[0].connections == 5
    giver.leave()
    scene.answers(scene.clients[1:])


def test_no_more_connections_are_sent_than_the_taker_has_room_for(scene: Scene) -> None:
    scene.connect(5)
    giver, stranger = scene.give(room=2)
    (frame,) = heard(scene, stranger, Type.CONNECTIONS)
    assert len(frame.descriptors) == 2
    stranger.adopted(0, room=1, refused=[[1, "memory"]])
    _, frame = heard(scene, stranger, Type.RELEASED, Type.CONNECTIONS)
    assert len(frame.descriptors) == 1
    stranger.adopted(1, room=0)
    *_, frame = heard(scene, stranger, Type.RELEASED, Type.FINISHED)
    assert frame.body["left"] == {"memory": 1, "room": 2}
    scene.until(lambda: giver.finished)
    assert scene.loops[0].connections == 3
    scene.answers([scene.clients[number] for number in (1, 3, 4)])


@pytest.mark.parametrize(
    ("quick", "slow", "share", "then"),
    [
        (math.inf, math.inf, math.inf, 8),
        (-1.0, -1.0, math.inf, 2),
        (-1.0, math.inf, math.inf, 4),
        (-1.0, -1.0, 0.0, 8),
    ],
    ids=["quick", "slow", "neither", "slow, but not for its size"],
)
def test_a_batch_is_larger_after_a_quick_one_and_smaller_after_a_slow_one(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, quick: float, slow: float, share: float, then: int
) -> None:
    sizes = {"FIRST_BATCH": 4, "SMALL_BATCH": 0, "WINDOW": 1, "QUICK": quick, "SLOW": slow, "SHARE": share}
    for name, value in {**sizes, "TOO_SLOW": math.inf}.items():
        monkeypatch.setattr(giver_module, name, value)
    scene.connect(13)
    giver, stranger = scene.give()
    (frame,) = heard(scene, stranger, Type.CONNECTIONS)
    assert len(frame.descriptors) == 4
    stranger.adopted(0)
    _, frame = heard(scene, stranger, Type.RELEASED, Type.CONNECTIONS)
    assert len(frame.descriptors) == then
    giver.leave()


def test_what_is_refused_is_served_on_and_counted_and_not_offered_again(scene: Scene) -> None:
    scene.connect(3)
    giver, stranger = scene.give()
    heard(scene, stranger, Type.CONNECTIONS)
    stranger.adopted(0, refused=[[0, "version"], [2, "handler"]])
    *_, frame = heard(scene, stranger, Type.RELEASED, Type.FINISHED)
    assert frame.body["left"] == {"version": 1, "handler": 1} == scene.account[0].refused
    assert (scene.account[0].moved_out, giver.finished) == (1, True)
    scene.answers([scene.clients[0], scene.clients[2]])
    assert scene.clients[1].recv(1) == b"", "nobody has a copy any more"


def raw(kind: int, data: bytes) -> bytes:
    return HEADER.pack(MAGIC, kind, 0, len(data)) + data


NONSENSE_FOR_A_GIVER: dict[str, Callable[[Stranger], object]] = {
    "another batch": lambda stranger: stranger.adopted(1),
    "a batch that was not sent": lambda stranger: stranger.adopted(1 << 40),
    "a refusal that is out of range": lambda stranger: stranger.adopted(0, refused=[[3, "version"]]),
    "a refusal that is far out of range": lambda stranger: stranger.adopted(0, refused=[[1 << 62, "version"]]),
    "two refusals of one": lambda stranger: stranger.adopted(0, refused=[[1, "version"], [1, "state"]]),
    "DROPPED for nothing": lambda stranger: stranger.say(Type.DROPPED, {"batch": 0}),
    "what a giver says": lambda stranger: stranger.say(Type.FINISHED, {"left": {}}),
    "a message of the control link": lambda stranger: stranger.say(Type.HEARTBEAT),
    "no frame": lambda stranger: stranger.link.sock.send(b"GET / HTTP/1.1\r\n\r\n"),
    "no JSON": lambda stranger: stranger.link.sock.send(raw(Type.ADOPTED, b"{")),
    "no fields": lambda stranger: stranger.link.sock.send(raw(Type.ADOPTED, b"{}")),
    "descriptors": lambda stranger: socket.send_fds(
        stranger.link.sock, [HEADER.pack(MAGIC, Type.ADOPTED, 1, 2) + b"{}"], [0]
    ),
}


@pytest.mark.parametrize("nonsense", NONSENSE_FOR_A_GIVER)
def test_a_giver_serves_on_what_it_had_sent_to_somebody_who_speaks_nonsense(scene: Scene, nonsense: str) -> None:
    scene.connect(3)
    giver, stranger = scene.give()
    heard(scene, stranger, Type.CONNECTIONS)
    NONSENSE_FOR_A_GIVER[nonsense](stranger)
    scene.until(lambda: giver.finished)
    assert not stranger.claims()
    assert scene.loops[0].connections == 3
    scene.answers()


def test_a_giver_does_not_serve_what_somebody_who_has_the_token_speaks_nonsense_of(scene: Scene) -> None:
    scene.connect(3)
    giver, stranger = scene.give()
    heard(scene, stranger, Type.CONNECTIONS)
    assert stranger.claims()
    stranger.link.sock.send(b"nonsense")
    scene.until(lambda: giver.finished)
    assert scene.loops[0].connections == 0


@pytest.mark.parametrize("answers", [0, 1, 2])
def test_a_taker_that_hangs_up_leaves_to_the_giver_what_was_not_released(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, answers: int
) -> None:
    monkeypatch.setattr(giver_module, "FIRST_BATCH", 1)
    scene.connect(3)
    giver, stranger = scene.give()
    heard(scene, stranger, *[Type.CONNECTIONS] * 3)
    for number in range(answers):
        stranger.adopted(number)
        heard(scene, stranger, Type.RELEASED)
    stranger.adopted(answers)  # and nobody hears of it
    stranger.hang_up()
    scene.until(lambda: giver.finished)
    assert scene.loops[0].connections == 3 - answers
    scene.answers(scene.clients[answers:])


def test_an_answer_that_is_read_together_with_the_loss_of_the_link_counts_for_nothing(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It could not be told any more that it owns what it has adopted."""
    scene.connect(3)
    giver, stranger = scene.give()
    heard(scene, stranger, Type.CONNECTIONS)
    receive = giver.link.receive

    def receive_and_lose() -> list[Frame]:
        frames = receive()
        giver.link.lost = True
        return frames

    monkeypatch.setattr(giver.link, "receive", receive_and_lose)
    stranger.adopted(0)
    scene.until(lambda: giver.finished)
    assert not stranger.claims()
    assert scene.loops[0].connections == 3
    scene.answers()


@pytest.mark.parametrize("adopted", [0, 1, 2, 3])
def test_a_taker_that_claims_and_dies_takes_only_what_it_has_adopted_along(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, adopted: int
) -> None:
    monkeypatch.setattr(giver_module, "FIRST_BATCH", 2)
    scene.connect(6)
    giver, stranger = scene.give()
    heard(scene, stranger, *[Type.CONNECTIONS] * 3)
    assert stranger.claims()
    for number in range(adopted):
        stranger.adopted(number, refused=[[0, "version"]])
    stranger.hang_up()
    scene.until(lambda: giver.finished)
    assert scene.loops[0].connections == 6 - adopted
    scene.answers([c for number, c in enumerate(scene.clients) if number % 2 == 0 or number >= 2 * adopted])


def test_a_giver_takes_back_from_a_silent_taker(scene: Scene) -> None:
    scene.connect(3)
    giver, stranger = scene.give(QUICK)
    scene.until(lambda: giver.finished)
    assert giver.reason == "the taker said nothing for 0.04 s" and not stranger.claims()
    scene.answers()


def test_a_giver_that_is_outrun_waits_for_what_is_refused(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(giver_module, "FIRST_BATCH", 2)
    scene.connect(8)
    giver, stranger = scene.give(QUICK)
    heard(scene, stranger, *[Type.CONNECTIONS] * 3)
    assert stranger.claims()
    scene.until(lambda: giver.state is State.OUTRUN)
    scene.turn(20)
    assert giver.state is State.OUTRUN and scene.loops[0].connections == 8
    for number in range(3):
        stranger.adopted(number, refused=[[1, "state"]])
    (frame,) = heard(scene, stranger, Type.FINISHED)
    assert frame.body["left"] == {"state": 3} and scene.loops[0].connections == 5
    scene.answers([scene.clients[number] for number in (1, 3, 5, 6, 7)])


class Posting:
    """A loop that runs what was posted when the test says so, before it looks at its sockets as asyncio's may."""

    def __init__(self, loop: Any) -> None:
        self._loop = loop
        self._posted: list[Callable[[], object]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loop, name)

    def call_soon(self, callback: Callable[..., object], *arguments: Any) -> None:
        self._posted.append(lambda: callback(*arguments))

    def run_posted(self) -> None:
        while self._posted:
            self._posted.pop(0)()


def test_an_answer_that_waits_when_a_giver_finds_itself_outrun_counts(scene: Scene) -> None:
    scene.connect(3)
    giver, stranger = scene.give()
    heard(scene, stranger, Type.CONNECTIONS)
    assert stranger.claims()
    stranger.adopted(0, refused=[[1, "state"]])
    giver.loop = Posting(giver.loop)
    giver.guard(lambda: giver.step(Local.SILENT))
    assert giver.state is State.OUTRUN
    giver.loop.run_posted()
    assert giver.finished
    (frame,) = heard(scene, stranger, Type.FINISHED)
    assert frame.body["left"] == {"state": 1} and scene.loops[0].connections == 1
    scene.answers(scene.clients[1:2])


def test_what_was_half_sent_at_the_end_is_sent_to_its_end(scene: Scene) -> None:
    """Else the other end could not tell a batch that it may not keep from a giver that is dead."""
    scene.connect(1)
    scene.protocols[0][0].received = b"x" * (records.LARGEST_INLINE - 1000)
    giver, stranger = scene.give(QUICK)
    scene.until(lambda: giver.finished)
    assert giver.link.unsent and not giver.over
    (frame,) = heard(scene, stranger, Type.CONNECTIONS)
    assert len(frame.data) > records.LARGEST_INLINE - 1000
    scene.until(lambda: giver.over)
    assert not stranger.claims()
    scene.answers()


def test_a_giver_whose_token_is_gone_sends_nothing_more(scene: Scene) -> None:
    scene.connect(3)
    giver, stranger = scene.give()
    assert stranger.claims()
    heard(scene, stranger, Type.FINISHED)
    assert giver.finished
    scene.answers()


def test_a_giver_that_leaves_takes_back_or_lets_go(scene: Scene) -> None:
    scene.connect(2)
    for claimed in (False, True):
        giver, stranger = scene.give()
        heard(scene, stranger, Type.CONNECTIONS)
        assert claimed is False or stranger.claims()
        giver.leave()
        assert giver.finished and scene.loops[0].connections == (0 if claimed else 2)


def test_too_many_references_make_batches_smaller_and_later(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    scene.connect(40)
    giver, taker = scene.move()
    send, sizes = giver.link.send, []

    def refuse(kind: Type, body: Any = None, descriptors: Any = (), **more: Any) -> None:
        if kind is Type.CONNECTIONS:
            sizes.append(len(descriptors))
            if len(sizes) <= 2:
                raise OSError(errno.ETOOMANYREFS, os.strerror(errno.ETOOMANYREFS))
        send(kind, body, descriptors, **more)

    monkeypatch.setattr(giver.link, "send", refuse)
    scene.until(lambda: giver.finished and taker.finished)
    assert sizes[:3] == [40, 10, 2] and scene.counts() == (0, 40)
    scene.answers()


class Short:
    """A loop's connections, and no memory for so many exports of them."""

    def __init__(self, connections: Any, failures: int) -> None:
        self._connections = connections
        self._failures = failures

    def __getattr__(self, name: str) -> Any:
        return getattr(self._connections, name)

    def export_connections(self, *arguments: Any) -> Any:
        self._failures -= 1
        if self._failures >= 0:
            raise MemoryError
        return self._connections.export_connections(*arguments)


@pytest.mark.parametrize("failures", [2, 1000])
def test_what_there_is_no_memory_to_export_moves_later_or_stays(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, failures: int
) -> None:
    monkeypatch.setattr(giver_module, "LATEST", 0.005)
    scene.connect(5)
    giver, taker = scene.move()
    giver.connections = Short(giver.connections, failures)  # type: ignore[assignment]
    scene.until(lambda: giver.finished and taker.finished)
    if failures == 2:
        assert not giver.left and scene.counts() == (0, 5)
    else:
        assert giver.left == taker.left == {"memory": 5} and scene.counts() == (5, 0)
    scene.answers()


def test_what_there_is_no_file_for_is_sent_again(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    seal, failures = records.seal, iter([OSError(errno.EMFILE, os.strerror(errno.EMFILE)), MemoryError()])

    def fail_twice(name: str, data: bytes) -> int:
        for error in failures:
            raise error
        return seal(name, data)

    monkeypatch.setattr(records, "seal", fail_twice)
    scene.connect(2)
    scene.protocols[0][0].received = b"x" * (records.LARGEST_INLINE + 1)
    giver, taker = scene.move()
    scene.until(lambda: giver.finished and taker.finished)
    assert next(failures, None) is None, "both have been raised"
    assert not giver.left and scene.counts() == (0, 2)
    scene.answers()


def test_what_the_kernel_refuses_again_and_again_stays(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(giver_module, "LATEST", 0.005)
    scene.connect(5)
    giver, taker = scene.move()
    send = giver.link.send

    def refuse(kind: Type, body: Any = None, descriptors: Any = (), **more: Any) -> None:
        if kind is Type.CONNECTIONS:
            raise OSError(errno.ETOOMANYREFS, os.strerror(errno.ETOOMANYREFS))
        send(kind, body, descriptors, **more)

    monkeypatch.setattr(giver.link, "send", refuse)
    scene.until(lambda: giver.finished and taker.finished)
    assert giver.left == taker.left == {"kernel": 5} and scene.counts() == (5, 0)
    scene.answers()


# Large records.


def test_records_above_what_a_message_carries_travel_in_a_file(scene: Scene) -> None:
    scene.connect(1)
    scene.protocols[0][0].received = b"x" * (records.LARGEST_INLINE + 1)
    giver, stranger = scene.give()
    (frame,) = heard(scene, stranger, Type.CONNECTIONS, keep=True)
    connection, file = frame.descriptors
    number, _, count, size = BATCH.unpack(frame.data)
    (record,) = records.unpack(records.unseal(file), 1)
    assert (number, count) == (0, 1) and size > records.LARGEST_INLINE
    assert bytes(record.state) == scene.protocols[0][0].received
    os.close(connection)
    os.close(file)
    giver.leave()


def test_a_large_state_moves(scene: Scene) -> None:
    scene.connect(3)
    scene.protocols[0][1].received = b"x" * (3 << 20)
    giver, taker = scene.move()
    scene.until(lambda: giver.finished and taker.finished)
    assert sorted(len(each.received) for each in scene.protocols[1]) == [0, 0, 3 << 20]
    assert scene.account[1].state_bytes > 3 << 20
    scene.answers()


def test_what_there_is_no_memory_to_read_goes_back(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(_: int) -> memoryview:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    monkeypatch.setattr(records, "unseal", no_memory)
    scene.connect(2)
    scene.protocols[0][1].received = b"x" * (2 << 20)
    giver, taker = scene.move()
    scene.until(lambda: giver.finished and taker.finished)
    assert giver.left == taker.left == {"memory": 2} and scene.counts() == (2, 0)
    scene.answers()


# A taker, and a stranger who gives.


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


# The channel itself.


@pytest.mark.parametrize("which", ["the first copy", "the last copy", "the ledger", "the token"])
def test_a_channel_that_cannot_be_opened_leaves_nothing_open(monkeypatch: pytest.MonkeyPatch, which: str) -> None:
    left, dup, before = [0 if which == "the first copy" else 1], os.dup, opened()

    def fail(*_: object) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    def fail_in_the_end(descriptor: int) -> int:
        left[0] -= 1
        return dup(descriptor) if left[0] >= 0 else fail()

    with monkeypatch.context() as patched:
        if which == "the ledger":
            patched.setattr(channel_module, "open_ledger", fail)
        elif which == "the token":
            patched.setattr(os, "pipe", fail)
        else:
            patched.setattr(os, "dup", fail_in_the_end)
        with pytest.raises(OSError, match="Too many open files"):
            open_channel()
    assert opened() == before


def test_an_end_that_no_loop_can_watch_leaves_the_channel_to_its_owner(scene: Scene) -> None:
    class Full:
        def add_reader(self, *_: object) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    ours, theirs = open_channel()
    channel = channel_module.Channel(*ours, os.getpid(), 1)
    with pytest.raises(OSError, match="No space left"):
        Taker(Full(), scene.loops[1], channel, PATIENT, scene.account[1], lambda: None)
    for descriptor in (*ours, *theirs):
        os.close(descriptor)


def test_a_forked_child_lets_go_of_a_channel_and_its_parent_moves_on(scene: Scene) -> None:
    """The epoll set is the parent's too: whoever took the socket out of it would make the parent deaf."""
    scene.connect(3)
    ends = scene.move()
    child = os.fork()
    if child == 0:
        for end in ends:
            end.close_after_fork()
        left = [end for end in ends for descriptor in end.channel[:3] if os.path.exists(f"/proc/self/fd/{descriptor}")]
        os._exit(len(left))
    assert os.waitpid(child, 0)[1] == 0
    scene.until(lambda: all(end.finished for end in ends))
    assert scene.counts() == (0, 3)
    scene.answers()


class Live(takeover.Server):
    live = True

    def __init__(self) -> None:
        self.channels: queue.Queue[channel_module.Channel] = queue.Queue()

    def take_connections(self, channel: channel_module.Channel, limits: Limits) -> None:
        self.channels.put(channel)


@pytest.mark.parametrize("failures", [1, CHANNELS])
def test_a_channel_that_cannot_be_opened_is_tried_again_some_times(
    room: Room, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, failures: int
) -> None:
    left = [failures]

    def open_or_fail() -> Any:
        left[0] -= 1
        if left[0] >= 0:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return open_channel()

    monkeypatch.setattr("takeover.successor.open_channel", open_or_fail)
    server, limits = Live(), Limits(heartbeat=0.01)
    with takeover.join(room.control, probation=0) as old:
        old.ready()
        with takeover.join(room.control, server=server, limits=limits) as new:
            new.ready()
            if failures < CHANNELS:
                server.channels.get(timeout=LIMIT).close()
            else:
                eventually(lambda: "Too many open files; its connections drain there" in caplog.text, "it gives up")
            assert caplog.text.count("Too many open files; trying again") == min(failures, CHANNELS - 1)
            assert server.channels.empty() and left[0] == (-1 if failures < CHANNELS else 0)


# The end of a loop.


@pytest.mark.parametrize("handler", [Tally, "echo"], ids=["protocol", "native"])
@pytest.mark.parametrize("then", ["put_back", "drop", "relinquish"])
def test_a_deadline_waits_for_what_is_on_its_way(make: MakeScene, handler: Any, then: str) -> None:
    scene = make(handler)
    scene.connect(3)
    _, descriptors, _ = scene.loops[0].export_connections(0, 251, 1 << 20, {})
    assert scene.loops[0].abort_connections() == 3
    scene.turn(3)
    assert scene.loops[0].connections == 3, "a descriptor of a batch changes hands with the batch only"
    if then == "put_back":
        scene.loops[0].put_back_connections(descriptors, False)
    elif then == "drop":
        scene.loops[0].drop_connections(descriptors, ())
    else:
        assert scene.loops[0].relinquish_connections(descriptors, ()) == ([0, 1, 2], {})
        scene.loops[0].put_back_connections(descriptors, True)
    scene.until(lambda: not scene.loops[0].connections)
    assert [client.recv(1) for client in scene.clients] == [b""] * 3


@pytest.mark.parametrize("handler", [Tally, "echo"], ids=["protocol", "native"])
def test_a_loop_that_is_closed_lets_go_of_what_is_on_its_way(make: MakeScene, handler: Any) -> None:
    scene = make(handler)
    scene.connect(3)
    _, descriptors, _ = scene.loops[0].export_connections(0, 251, 1 << 20, {})
    assert len(descriptors) == 3
    for loop in scene.loops:
        loop.close()
        assert loop.connections == 0
    assert [client.recv(1) for client in scene.clients] == [b""] * 3


def test_a_deadline_in_the_middle_of_a_move_ends_on_both_sides(make: MakeScene) -> None:
    scene = make("echo")
    scene.connect(3)
    giver, stranger = scene.give()
    heard(scene, stranger, Type.CONNECTIONS)
    scene.loops[0].abort_connections()
    giver.leave()
    scene.until(lambda: not scene.loops[0].connections)
    assert not stranger.claims()
