"""A giver, and a stranger who takes and says whatever it is told to: nothing is lost."""

from __future__ import annotations

import errno
import math
import os
import socket
from collections.abc import Callable
from typing import Any

import pytest

from channel_cases import QUICK, MakeScene, Scene, Stranger, Tally, heard
from takeover import giver as giver_module
from takeover import records
from takeover.protocol import Local, State
from takeover.wire import HEADER, MAGIC, Frame, Type


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


class Busy(Tally):
    refusals = 3

    def export_state(self) -> Any:
        self.refusals -= 1
        return records.NOT_NOW if self.refusals >= 0 else super().export_state()


def test_who_says_not_now_is_asked_again_also_when_answers_come_together(
    make_scene: MakeScene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(giver_module, "FIRST_BATCH", 1)
    scene = make_scene(Busy)
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
