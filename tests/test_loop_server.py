"""A server around a loop of each kind, as a takeover uses it, turned by hand."""

from __future__ import annotations

import asyncio
import errno
import importlib
import os
import socket
import struct
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest

import takeover
from channel_cases import LIMIT
from clients import eventually
from conftest import CYTHON_IS_BUILT
from kernel import opened
from processes import Room
from takeover import Limits, loop_server
from takeover.aio import AioServer, Listener
from takeover.channel import Channel, open_channel
from takeover.errors import ListenError
from takeover.loop_server import LoopServer
from takeover.server import NativeServer

Channels = Callable[..., Channel]


@pytest.fixture(params=["cython", "python", "asyncio"])
def server(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopServer]:
    """Its loop is closed in the end, and what is open then is what was open before."""
    before = opened()
    if request.param == "asyncio":
        made: LoopServer = AioServer(asyncio.SelectorEventLoop(), 60.0, live=True, observer=None)
    else:
        if request.param == "cython" and not CYTHON_IS_BUILT:
            pytest.skip("the compiled modules are not built")
        name = "takeover._loop" if request.param == "cython" else "takeover._loop_py"
        monkeypatch.setattr("takeover.server.native", importlib.import_module(name))
        made = NativeServer(60.0, live=True, observer=None)
    yield made
    made.loop.close()
    assert opened() == before


@pytest.fixture
def channel() -> Iterator[Channels]:
    """Makes one end of a channel; the other one stays open until the test has ended."""
    theirs: list[int] = []

    def make(**more: Any) -> Channel:
        ours, other = open_channel()
        theirs.extend(other)
        return Channel(*ours, pid=4211, generation=1, **more)

    yield make
    for descriptor in theirs:
        os.close(descriptor)


def turn(server: LoopServer) -> bool:
    """The loop does what there is to do now."""
    server.loop.call_soon(server.loop.stop)
    if isinstance(server, NativeServer):
        server.loop.run()
    else:
        server.loop.run_forever()
    return True


def add(server: LoopServer, sock: socket.socket, *, accepting: bool) -> None:
    if isinstance(server, NativeServer):
        server.listeners["web"] = server.native.listen(sock, asyncio.Protocol, accepting=accepting)
        return
    assert isinstance(server, AioServer)
    server.add("web", Listener(server.aio, sock, asyncio.Protocol, None))
    if accepting:
        server.start_accepting()


def test_a_server_that_ends_accepts_no_more_although_the_takeover_is_undone(
    server: LoopServer, caplog: pytest.LogCaptureFixture
) -> None:
    sock = socket.create_server(("127.0.0.1", 0))
    address = sock.getsockname()
    add(server, sock, accepting=True)
    with socket.create_connection(address, LIMIT):
        eventually(lambda: turn(server) and server.connections() == 1, "it accepts")
        server.drain()
        server.start_accepting()
        eventually(lambda: turn(server) and sock.fileno() < 0, "it has closed the listener")
        for _ in range(5):
            turn(server)
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(address, LIMIT)
        assert server.abort_connections() == 1
    eventually(lambda: turn(server) and not server.connections(), "the connection is gone")
    assert not caplog.records


@pytest.mark.parametrize("way", ["take_connections", "give_connections"])
def test_a_channel_that_comes_when_the_loop_is_closed_is_closed(
    server: LoopServer, channel: Channels, way: str
) -> None:
    server.loop.close()
    ours = channel()
    before = opened()
    getattr(server, way)(ours, Limits())
    assert opened() == before - 3
    for name in ("start_accepting", "drain", "stop"):
        getattr(server, name)()


@pytest.mark.parametrize("way", ["take_connections", "give_connections"])
def test_a_server_that_moves_nothing_closes_its_end_of_a_channel(channel: Channels, way: str) -> None:
    ours = channel()
    before = opened()
    getattr(takeover.Server(), way)(ours, Limits())
    assert opened() == before - 3


@pytest.mark.parametrize("way", ["take_connections", "give_connections"])
def test_a_channel_that_cannot_be_used_is_closed_and_who_opened_it_is_asked_for_another_one(
    server: LoopServer, channel: Channels, way: str, caplog: pytest.LogCaptureFixture
) -> None:
    asked: list[str] = []
    good = channel(again=partial(asked.append, "again") if way == "take_connections" else None)
    os.close(good.sock)
    ours = good._replace(sock=os.memfd_create("no socket"))
    before = opened()
    getattr(server, way)(ours, Limits())
    turn(server)
    assert opened() == before - 3
    assert asked == (["again"] if way == "take_connections" else [])
    assert caplog.messages == [f"no channel to pid 4211: {os.strerror(errno.ENOTSOCK)}"]
    assert not server.ends


def test_a_forked_child_holds_neither_listeners_nor_channels(server: LoopServer, channel: Channels) -> None:
    """What happens in the child is done here in a process that has not forked: a fork among threads is a warning."""
    before = opened()
    sock = socket.create_server(("127.0.0.1", 0))
    add(server, sock, accepting=False)
    for way in ("take_connections", "give_connections"):
        getattr(server, way)(channel(), Limits())
        turn(server)
    assert len(server.ends) == 2
    held = opened()
    server.after_fork()
    assert sock.fileno() < 0
    assert held - opened() == 7
    assert opened() == before + 6  # the other ends
    server.ends.clear()


def test_a_listener_that_could_block_the_loop_is_refused(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop_server, "GUARD", struct.pack("@ll", 0, 2_000_000))
    with takeover.join(room.control) as service, pytest.raises(ListenError, match=f"SO_RCVTIMEO of {room.url}: "):
        loop_server.listen_for_streams(service, room.url)
