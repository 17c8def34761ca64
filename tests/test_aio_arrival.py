"""Connections that have come into an asyncio or uvloop loop, step by step: what a protocol is told, and when."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from array import array
from typing import Any

import pytest

from aio_rooms import Run
from aio_stage import MUCH, Guest, Stage, pair, read_all, turns, unread, until
from takeover import aio_entrance
from takeover.records import EOF_RECEIVED, PAUSED

HOUR = 3600.0


@pytest.fixture
def never_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody looks whether a protocol reads again: what comes must tell."""
    monkeypatch.setattr(aio_entrance, "PAUSE", HOUR)


class Eager(Guest):
    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        transport.resume_reading()


def test_one_that_reads_as_soon_as_it_is_made_gets_what_was_unread_first(run: Run) -> None:
    async def play() -> None:
        async with Stage(Eager) as stage:
            guest = await stage.arrive(PAUSED, b"early")
            stage.clients[0].send(b"late")
            await until(lambda: guest.events == ["made", b"early", b"late"])

    run(play())


def test_one_that_has_paused_gets_nothing_until_it_reads(run: Run) -> None:
    async def play() -> None:
        async with Stage() as stage:
            guest = await stage.arrive(PAUSED, b"early")
            stage.clients[0].send(b"late")
            await turns()
            assert guest.events == ["made"]
            guest.transport.resume_reading()
            await until(lambda: guest.events == ["made", b"early", b"late"])

    run(play())


@pytest.mark.usefixtures("never_looks")
def test_what_comes_when_it_reads_again_comes_behind_what_was_unread(run: Run) -> None:
    async def play() -> None:
        async with Stage() as stage:
            guest = await stage.arrive(PAUSED, b"early")
            await turns()
            guest.transport.resume_reading()
            stage.clients[0].send(b"late")
            await until(lambda: guest.events == ["made", b"early", b"late"])

    run(play())


def test_an_end_of_file_that_the_loop_reads_too_early_is_told_when_it_reads(run: Run) -> None:
    async def play() -> None:
        async with Stage() as stage:
            client, served = pair(tcp=False)
            client.shutdown(socket.SHUT_WR)
            guest = await stage.arrive(PAUSED, ends=(client, served))
            await turns()
            assert guest.events == ["made"]
            guest.transport.resume_reading()
            await until(lambda: guest.events == ["made", "eof"])

    run(play())


@pytest.mark.usefixtures("never_looks")
def test_an_end_of_file_that_comes_when_it_reads_again_comes_behind_what_was_unread(run: Run) -> None:
    async def play() -> None:
        async with Stage() as stage:
            guest = await stage.arrive(PAUSED, b"early")
            await turns()
            guest.transport.resume_reading()
            stage.clients[0].shutdown(socket.SHUT_WR)
            await until(lambda: guest.events == ["made", b"early", "eof"])

    run(play())


def test_one_that_does_not_read_is_told_when_to_write(run: Run) -> None:
    async def play() -> None:
        async with Stage() as stage:
            guest = await stage.arrive(PAUSED, b"early")
            await turns()
            guest.transport.write(MUCH)
            await until(lambda: guest.events == ["made", "pause"])
            assert await read_all(stage.clients[0], len(MUCH)) == MUCH
            await until(lambda: guest.events == ["made", "pause", "resume"])

    run(play())


class Waits(Guest):
    """Does not read while its client does not; here that does as soon as there is something to read."""

    client: socket.socket

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.client.recv(len(MUCH))

    def resume_writing(self) -> None:
        super().resume_writing()
        self.transport.resume_reading()


def test_one_that_reads_again_when_all_is_sent_is_not_kept_from_it_by_its_arrival(run: Run) -> None:
    async def play() -> None:
        async with Stage(Waits) as stage:
            client, served = pair(tcp=False)
            Waits.client = client
            guest = await stage.arrive(PAUSED, unsent=b"x" * 300_000, ends=(client, served))
            await until(lambda: guest.events == ["made", "pause", "resume"])
            client.send(b"and on")
            await until(lambda: guest.events == ["made", "pause", "resume", b"and on"])

    run(play())


class Leaves(Guest):
    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        transport.close()


def test_one_that_closes_its_connection_before_it_reads_gets_nothing_of_it(run: Run) -> None:
    async def play() -> None:
        async with Stage(Leaves) as stage:
            guest = await stage.arrive(PAUSED, b"early")
            await until(lambda: guest.events[-1] == "lost")
            await turns()
            assert guest.events == ["made", "lost"]
            assert not stage.taker.connections

    run(play())


def test_one_whose_client_leaves_before_it_reads_gets_what_had_come(run: Run) -> None:
    async def play() -> None:
        async with Stage() as stage:
            guest = await stage.arrive(PAUSED, b"early")
            await turns()
            stage.clients[0].close()
            guest.transport.write(b"to nobody")
            await until(lambda: guest.events == ["made", b"early", "lost"])

    run(play())


class Plain(Guest):
    connection_moved = None  # type: ignore[assignment]


@pytest.mark.parametrize("kind", [Guest, Plain])
def test_one_that_has_not_begun_to_read_moves_on_with_what_is_unread(run: Run, kind: type[Guest]) -> None:
    async def play() -> None:
        async with Stage(kind) as stage:
            first = await stage.arrive(PAUSED, b"early")
            await turns()
            stage.turn_round()
            second = await stage.move(stage.export())
            assert first.events == ["made", *(["moved"] if kind is Guest else [])]
            await turns()
            assert second.events == ["made"]
            second.transport.resume_reading()
            await until(lambda: second.events == ["made", b"early"])

    run(play())


@pytest.mark.usefixtures("never_looks")
def test_one_that_begins_to_read_on_its_way_is_put_back_with_what_is_unread(run: Run) -> None:
    async def play() -> None:
        async with Stage() as stage:
            guest = await stage.arrive(PAUSED, b"early")
            await turns()
            stage.turn_round()
            batch = stage.export()
            guest.transport.resume_reading()
            stage.giver.put_back_connections(batch.descriptors, False)
            assert guest.events == ["made", b"early"]

    run(play())


@pytest.mark.parametrize("unread", [b"", b"early"])
def test_one_that_was_told_of_the_end_of_file_is_not_told_again(run: Run, unread: bytes) -> None:
    async def play() -> None:
        async with Stage() as stage:
            guest = await stage.arrive(EOF_RECEIVED, unread)
            stage.clients[0].shutdown(socket.SHUT_WR)
            await until(lambda: guest.events == ["made", *([unread] if unread else [])])
            await turns()
            assert "eof" not in guest.events

    run(play())


def test_one_that_was_told_of_the_end_of_file_is_not_told_again_where_it_moves_on_at_once(run: Run) -> None:
    async def play() -> None:
        async with Stage() as stage:
            await stage.arrive(EOF_RECEIVED, b"early")
            await turns()
            stage.turn_round()
            guest = await stage.move(stage.export())
            stage.clients[0].shutdown(socket.SHUT_WR)
            await until(lambda: guest.events == ["made", b"early"])
            await turns()
            assert guest.events == ["made", b"early"]

    run(play())


class Movable(Guest):
    """Is to move on as soon as it has arrived."""

    stage: Stage
    reasons: dict[str, int]

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        assert self.stage.taker.export_connections(0, 1, 1, self.reasons)[1:] == (array("i"), -1)


def test_one_that_has_just_arrived_does_not_move_on_before_the_loop_knows_that_it_has_paused(run: Run) -> None:
    async def play() -> None:
        Movable.reasons = {}
        async with Stage(Movable) as stage:
            Movable.stage = stage
            await stage.arrive(PAUSED, b"early")
            assert Movable.reasons == {"busy": 1}

    run(play())


class Buffered(asyncio.BufferedProtocol):
    """Takes three bytes at a time."""

    def __init__(self) -> None:
        self.room = bytearray(3)
        self.received = b""
        self.transport: Any = None

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def get_buffer(self, sizehint: int) -> bytearray:
        return self.room

    def buffer_updated(self, nbytes: int) -> None:
        self.received += self.room[:nbytes]

    def import_state(self, state: bytes) -> None:
        assert state == b""


def test_a_protocol_with_a_buffer_of_its_own_gets_what_was_unread_through_it(run: Run) -> None:
    async def play() -> None:
        async with Stage(Buffered) as stage:
            protocol = await stage.arrive(PAUSED, b"more than three bytes")
            await turns()
            protocol.transport.resume_reading()
            await until(lambda: protocol.received == b"more than three bytes")

    run(play())


def test_one_that_the_loop_cannot_serve_is_closed_and_the_others_are_served(
    run: Run, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def play() -> None:
        loop = asyncio.get_running_loop()
        connect = loop.connect_accepted_socket

        def fail_once(*arguments: Any) -> Any:
            monkeypatch.setattr(loop, "connect_accepted_socket", connect)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        async with Stage() as stage:
            for _ in range(2):
                await stage.accept()
            batch = stage.export()
            assert stage.adopt(batch) == []
            assert stage.giver.relinquish_connections(batch.descriptors, ()) == ([], {})
            monkeypatch.setattr(loop, "connect_accepted_socket", fail_once)
            stage.taker.start_connections(batch.copies, (), {})
            stage.clients[1].send(b"on")
            await until(lambda: stage.taking[1].events == ["made", b"on"])
            await until(lambda: unread(stage.clients[0]) == b"")
            assert stage.taking[0].events == []

    run(play())
    assert "could not be served" in caplog.text
