"""Connections on their way out of an asyncio or uvloop loop, step by step: whatever happens, one side has them."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket
from collections.abc import Callable
from typing import Any

import pytest

from aio_rooms import Run
from aio_stage import MUCH, Guest, Stage, read_all, texts, turns, unread, until
from takeover import aio_moving
from takeover.aio_streams import Connection, Stream
from takeover.records import EOF_WRITTEN, HAS_STATE, unpack


def stream(handler: Callable[..., Any]) -> Callable[[], Stream]:
    return lambda: Stream(handler, 2**16, asyncio.get_running_loop())


def write_too_much(guest: Guest, client: socket.socket) -> None:
    guest.transport.write(MUCH)


def read_and_hear(guest: Guest, client: socket.socket) -> None:
    guest.transport.resume_reading()
    client.send(b"news")


def read_to_the_end(guest: Guest, client: socket.socket) -> None:
    guest.transport.resume_reading()
    client.shutdown(socket.SHUT_WR)


def end(guest: Guest, client: socket.socket) -> None:
    guest.transport.write_eof()


def close(guest: Guest, client: socket.socket) -> None:
    guest.transport.close()


@pytest.mark.parametrize("tcp", [False, True], ids=["unix", "tcp"])
@pytest.mark.parametrize(
    ("disturb", "told"),
    [
        (write_too_much, ["pause"]),
        (read_and_hear, [b"news"]),
        (read_to_the_end, ["eof"]),
        (end, []),
        (close, ["lost"]),
    ],
)
def test_one_that_is_disturbed_on_its_way_stays_and_its_protocol_is_told_everything(
    run: Run, tcp: bool, disturb: Callable[[Guest, socket.socket], None], told: list[Any]
) -> None:
    async def play() -> None:
        async with Stage() as stage:
            guest = await stage.accept(tcp=tcp)
            batch = stage.export()
            assert stage.adopt(batch) == []
            disturb(guest, stage.clients[0])
            await until(lambda: guest.events == ["made", *told])
            if disturb is end:
                await until(lambda: unread(stage.clients[0]) == b"")  # uvloop sends it in its next turn
            assert stage.giver.relinquish_connections(batch.descriptors, ()) == ([0], {})
            stage.giver.put_back_connections(batch.descriptors, True)
            stage.taker.drop_connections(batch.copies, ())
            assert (stage.giver.connections, stage.taker.connections) == (int(told != ["lost"]), 0)
            if told == ["pause"]:
                assert await read_all(stage.clients[0], len(MUCH)) == MUCH
                await until(lambda: guest.events[-1] == "resume")
            if told not in (["lost"], ["eof"]):
                stage.clients[0].send(b"more")
                await until(lambda: texts(guest.events).endswith(b"more"))
            assert stage.export().reasons == {}

    run(play())


def test_one_whose_client_reads_on_the_way_what_was_written_there_is_told_to_write_on(run: Run) -> None:
    async def play() -> None:
        async with Stage() as stage:
            guest = await stage.accept()
            batch = stage.export()
            guest.transport.write(MUCH)
            assert await read_all(stage.clients[0], len(MUCH)) == MUCH
            await until(lambda: guest.events == ["made", "pause", "resume"])
            stage.giver.put_back_connections(batch.descriptors, False)

    run(play())


def test_a_stream_handler_that_gives_its_read_up_on_the_way_stays(run: Run) -> None:
    reads: list[asyncio.Task[bytes]] = []

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, connection: Connection) -> None:
        reads.append(asyncio.ensure_future(reader.readline()))
        await asyncio.wait(reads)
        writer.write(await reader.readline())

    async def play() -> None:
        async with Stage(stream(handle)) as stage:
            await stage.accept()
            await until(lambda: reads)
            await turns()
            batch = stage.export()
            reads[0].cancel()
            await turns()
            assert stage.giver.relinquish_connections(batch.descriptors, ()) == ([0], {})
            stage.giver.put_back_connections(batch.descriptors, True)
            stage.clients[0].send(b"line\n")
            assert await read_all(stage.clients[0], 5) == b"line\n"

    run(play())


def test_a_protocol_that_was_replaced_on_the_way_is_not_put_back(run: Run) -> None:
    async def play() -> None:
        async with Stage() as stage:
            guest = await stage.accept()
            batch = stage.export()
            other = Guest()
            guest.transport.set_protocol(other)
            stage.giver.put_back_connections(batch.descriptors, False)
            stage.clients[0].send(b"for the other")
            await until(lambda: other.events == [b"for the other"])
            assert guest.events == ["made"]

    run(play())


def test_what_is_too_much_for_one_batch_goes_with_the_next(run: Run) -> None:
    async def play() -> None:
        async with Stage() as stage:
            for _ in range(3):
                await stage.accept()
            following, batches = 0, []
            while following >= 0:
                batches.append(stage.export(following, most=2))
                following = batches[-1].following
            assert [len(batch.descriptors) for batch in batches] == [2, 1]
            for batch in batches:
                await stage.move(batch)
            for number, client in enumerate(stage.clients):
                client.send(b"%d" % number)
            await until(lambda: [texts(guest.events) for guest in stage.taking] == [b"0", b"1", b"2"])
            assert [guest.events for guest in stage.giving] == [["made", "moved"]] * 3

    run(play())


def test_where_an_export_ends_the_program_all_of_the_batch_is_served_on(run: Run) -> None:
    class Last(Guest):
        def export_state(self) -> bytes:
            if self.events[1:] == [b"last"]:
                raise SystemExit
            return b""

    async def play() -> None:
        async with Stage(Last) as stage:
            for word in (b"first", b"last"):
                guest = await stage.accept()
                stage.clients[-1].send(word)
                await until(lambda: guest.events == ["made", word])  # noqa: B023
            with pytest.raises(SystemExit):
                stage.export()
            stage.clients[0].send(b" and on")
            await until(lambda: texts(stage.giving[0].events) == b"first and on")

    run(play())


def test_one_that_memory_runs_out_for_right_behind_its_export_is_served_on(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    export = aio_moving._export

    def fail(seat: Any) -> Any:
        export(seat)
        raise MemoryError

    async def play() -> None:
        async with Stage() as stage:
            guest = await stage.accept()
            monkeypatch.setattr(aio_moving, "_export", fail)
            batch = stage.export()
            assert (len(batch.descriptors), batch.reasons) == (0, {"memory": 1})
            stage.clients[0].send(b"on")
            await until(lambda: guest.events == ["made", b"on"])

    run(play())


class Closes(Guest):
    def export_state(self) -> bytes:
        self.transport.close()
        return b""


class Writes(Guest):
    def export_state(self) -> bytes:
        self.transport.write(MUCH)
        return b""


class Large(Guest):
    def export_state(self) -> bytes:
        return b"x" * 2000


@pytest.mark.parametrize(("kind", "word"), [(Closes, "closing"), (Writes, "busy"), (Large, "state")])
def test_one_whose_export_stands_in_its_own_way_is_counted_by_its_word(
    run: Run, monkeypatch: pytest.MonkeyPatch, kind: type[Guest], word: str
) -> None:
    async def play() -> None:
        async with Stage(kind) as stage:
            guest = await stage.accept()
            assert stage.export().reasons == {word: 1}
            if kind is Writes:
                await read_all(stage.clients[0], len(MUCH))
            if kind is not Closes:
                stage.clients[0].send(b"on")
                await until(lambda: texts(guest.events) == b"on")

    monkeypatch.setattr("takeover.records.LARGEST_PART", 1000)
    run(play())


def test_one_that_closes_with_bytes_unsent_stays_until_they_have_gone_out(run: Run) -> None:
    async def play() -> None:
        async with Stage() as stage:
            guest = await stage.accept()
            guest.transport.write(MUCH)
            guest.transport.close()
            assert stage.export().reasons == {"closing": 1}
            assert await read_all(stage.clients[0], len(MUCH)) == MUCH
            await until(lambda: guest.events[-1] == "lost")

    run(play())


def test_without_a_descriptor_left_one_is_asked_again(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: int) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    async def play() -> None:
        async with Stage() as stage:
            await stage.accept()
            with monkeypatch.context() as patch:
                patch.setattr(os, "dup", fail)
                assert stage.export().reasons == {"busy": 1}
            guest = await stage.move(stage.export())
            stage.clients[0].send(b"on")
            await until(lambda: guest.events == ["made", b"on"])

    run(play())


def test_a_stream_that_somebody_has_put_another_protocol_before_counts_as_one_with_tls(run: Run) -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, connection: Connection) -> None:
        writer.transport.set_protocol(Guest())
        await reader.readline()

    async def play() -> None:
        async with Stage(stream(handle)) as stage:
            protocol = await stage.accept()
            await until(lambda: protocol.reader.waits)
            assert stage.export().reasons == {"tls": 1}

    run(play())


def test_a_stream_whose_client_has_left_is_not_asked_while_its_handler_is_busy_with_the_end(run: Run) -> None:
    begun, may_end = asyncio.Event(), asyncio.Event()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, connection: Connection) -> None:
        await reader.read()
        writer.close()
        await writer.wait_closed()
        begun.set()
        await may_end.wait()

    async def play() -> None:
        async with Stage(stream(handle)) as stage:
            await stage.accept()
            stage.clients[0].close()
            await begun.wait()
            batch = stage.export()
            assert (len(batch.descriptors), batch.reasons, stage.giver.connections) == (0, {}, 1)
            may_end.set()
            await until(lambda: not stage.giver.connections)

    run(play())


def test_what_the_successor_serves_by_now_is_let_go_whatever_has_happened_to_it(run: Run) -> None:
    async def play() -> None:
        async with Stage() as stage:
            guest = await stage.accept()
            batch = stage.export()
            assert stage.adopt(batch) == []
            guest.transport.resume_reading()
            stage.giver.forgo_connections(batch.descriptors)
            stage.taker.start_connections(batch.copies, (), {})
            stage.clients[0].send(b"on")
            await until(lambda: stage.taking[0].events == ["made", b"on"])
            assert guest.events == ["made", "moved"]

    run(play())


def test_of_a_batch_only_those_are_started_that_have_not_stayed(run: Run) -> None:
    async def play() -> None:
        async with Stage() as stage:
            for _ in range(3):
                await stage.accept()
            batch = stage.export()
            assert stage.adopt(batch) == []
            stays = stage.giving[1]
            stays.transport.resume_reading()
            kept, _ = stage.giver.relinquish_connections(batch.descriptors, ())
            assert kept == [1]
            stage.giver.put_back_connections(batch.descriptors[1:2], True)
            stage.taker.start_connections(batch.copies, kept, {})
            stage.taker.drop_connections(batch.copies, [0, 2])
            for client in stage.clients:
                client.send(b"on")
            served = [stage.taking[0], stays, stage.taking[2]]
            await until(lambda: [texts(guest.events) for guest in served] == [b"on"] * 3)
            assert (stage.giver.connections, stage.taker.connections) == (1, 2)

    run(play())


def test_an_end_of_file_travels_behind_what_a_stream_handler_has_not_consumed(run: Run) -> None:
    got: list[bytes] = []

    async def count(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, connection: Connection) -> None:
        got.append(await reader.readexactly(1000))

    async def take_all(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, connection: Connection) -> None:
        got.append(await reader.read())

    async def play() -> None:
        async with Stage(stream(count), stream(take_all)) as stage:
            protocol = await stage.accept()
            stage.clients[0].send(b"the rest")
            await until(lambda: protocol.reader.buffer)
            protocol.reader.hold()  # the handler has not had its turn when the end comes
            stage.clients[0].shutdown(socket.SHUT_WR)
            await until(lambda: protocol.reader.ended)
            await stage.move(stage.export())
            await until(lambda: got == [b"the rest"])

    run(play())


@pytest.mark.parametrize("tcp", [False, True], ids=["unix", "tcp"])
def test_an_end_of_file_that_we_have_sent_travels(run: Run, tcp: bool) -> None:
    async def play() -> None:
        async with Stage() as stage:
            old = await stage.accept(tcp=tcp)
            old.transport.write_eof()
            await until(lambda: unread(stage.clients[0]) == b"")
            guest = await stage.move(stage.export())
            stage.clients[0].send(b"heard still")
            await until(lambda: guest.events == ["made", b"heard still"])
            records, descriptors, _ = stage.taker.export_connections(0, 1, 1, {})
            assert unpack(records, len(descriptors))[0].flags == EOF_WRITTEN | HAS_STATE
            stage.taker.put_back_connections(descriptors, False)

    run(play())


def test_a_handler_that_raises_because_its_connection_has_moved_is_no_matter_for_the_log(
    run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    ended: list[bool] = []

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, connection: Connection) -> None:
        try:
            await reader.readline()
        finally:
            ended.append(connection.gone)
            raise RuntimeError("nobody is to see this")

    async def go_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, connection: Connection) -> None:
        await reader.readline()

    async def play() -> None:
        async with Stage(stream(handle), stream(go_on)) as stage:
            protocol = await stage.accept()
            await until(lambda: protocol.reader.waits)
            await stage.move(stage.export())
            await until(lambda: ended)
            assert ended == [True]

    run(play())
    assert "nobody is to see this" not in caplog.text


def test_a_handler_whose_client_has_reset_the_connection_is_no_error(
    run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    ended = asyncio.Event()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, connection: Connection) -> None:
        try:
            await reader.readline()
        except ConnectionResetError:
            ended.set()
            raise

    async def play() -> None:
        async with Stage(stream(handle)) as stage:
            protocol = await stage.accept(tcp=True)
            await until(lambda: protocol.reader.waits)
            client = stage.clients[0]
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            client.close()
            await ended.wait()
            await until(lambda: not stage.giver.connections)

    run(play())
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
