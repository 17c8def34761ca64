"""Giver and taker on real loops and a real socket pair in one process: whatever the other end does, nothing is lost."""

from __future__ import annotations

import errno
import importlib
import os
import queue
import socket
from array import array
from types import ModuleType
from typing import Any

import pytest

import takeover
from channel_cases import PATIENT, QUICK, MakeScene, Scene, Tally, heard
from clients import LIMIT, eventually
from conftest import CYTHON_IS_BUILT
from kernel import opened
from processes import Room
from takeover import channel as channel_module
from takeover import records
from takeover.channel import open_channel
from takeover.protocol import Limits
from takeover.records import BATCH
from takeover.successor import CHANNELS
from takeover.taker import Taker
from takeover.wire import Type

# Everything moves.

MODULES = ("takeover._loop", "takeover._loop_py")


@pytest.mark.parametrize("handler", [Tally, "echo"], ids=["protocol", "native"])
@pytest.mark.parametrize("taking", MODULES)
def test_everything_moves_between_any_two_loops(make_scene: MakeScene, taking: str, handler: Any) -> None:
    if taking == "takeover._loop" and not CYTHON_IS_BUILT:
        pytest.skip("the compiled modules are not built")
    scene = make_scene(handler, importlib.import_module(taking))
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
def test_every_loop_reads_what_every_loop_writes(loop_module: ModuleType, make_scene: MakeScene, taking: str) -> None:
    if taking == "takeover._loop" and not CYTHON_IS_BUILT:
        pytest.skip("the compiled modules are not built")
    scene = make_scene(Tally, importlib.import_module(taking))
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
def test_a_deadline_waits_for_what_is_on_its_way(make_scene: MakeScene, handler: Any, then: str) -> None:
    scene = make_scene(handler)
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
def test_a_loop_that_is_closed_lets_go_of_what_is_on_its_way(make_scene: MakeScene, handler: Any) -> None:
    scene = make_scene(handler)
    scene.connect(3)
    _, descriptors, _ = scene.loops[0].export_connections(0, 251, 1 << 20, {})
    assert len(descriptors) == 3
    for loop in scene.loops:
        loop.close()
        assert loop.connections == 0
    assert [client.recv(1) for client in scene.clients] == [b""] * 3


def test_a_deadline_in_the_middle_of_a_move_ends_on_both_sides(make_scene: MakeScene) -> None:
    scene = make_scene("echo")
    scene.connect(3)
    giver, stranger = scene.give()
    heard(scene, stranger, Type.CONNECTIONS)
    scene.loops[0].abort_connections()
    giver.leave()
    scene.until(lambda: not scene.loops[0].connections)
    assert not stranger.claims()
