"""The server object of takeover.aio, inside of a program that does more than serve."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import queue
import signal
import socket
import threading
import warnings
from collections.abc import Awaitable
from typing import Any

import pytest

import takeover
from aio_rooms import Run
from clients import LIMIT
from processes import FAST, Room
from takeover import aio


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, connection: aio.Connection) -> None:
    while line := await reader.readline():
        writer.write(line)


def start(room: Room, **options: Any) -> Awaitable[aio.Server]:
    return aio.start_server(echo, [room.url], room.control, **options)


def gone(room: Room) -> bool:
    """Whether nobody listens, and nobody answers at the control path."""
    return room.refuses() and not os.path.exists(room.control)


def test_a_block_serves_and_gives_the_service_up_at_its_end(room: Room, run: Run) -> None:
    async def serve() -> None:
        async with await start(room) as server:
            assert server.service.state == "serving"
            assert [sock.getsockname() for sock in server.sockets] == [room.address]
            reader, writer = await asyncio.open_connection(*room.address)
            writer.write(b"hello\n")
            assert await reader.readline() == b"hello\n"
            writer.close()

    run(serve())
    assert gone(room)


def test_what_was_accepted_in_the_turn_in_which_accepting_stops_is_served(
    room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def serve() -> None:
        accept = socket.socket.accept

        def close_as_well(sock: socket.socket) -> Any:
            accepted = accept(sock)
            if sock.getsockname() == room.address:
                asyncio.get_running_loop().call_soon(server.close)
            return accepted

        server = await start(room)
        monkeypatch.setattr(socket.socket, "accept", close_as_well)
        reader, writer = await asyncio.open_connection(*room.address)
        writer.write(b"just in time\n")
        assert await reader.readline() == b"just in time\n"
        writer.close()
        await server.wait_closed()

    asyncio.run(asyncio.wait_for(serve(), LIMIT))
    assert gone(room)


def test_a_server_is_closed_by_whoever_does_not_wait_for_a_signal(room: Room, run: Run) -> None:
    async def serve() -> None:
        server = await start(room)
        serving = asyncio.ensure_future(server.serve_forever())
        reader, writer = await asyncio.open_connection(*room.address)
        writer.write(b"early\n")
        assert await reader.readline() == b"early\n"
        server.close()
        writer.write(b"late\n")
        assert await reader.readline() == b"late\n"
        assert not serving.done()
        writer.close()
        await serving
        await server.wait_closed()

    run(serve())
    assert gone(room)


def test_a_task_that_is_cancelled_while_it_serves_ends_the_server_at_once(room: Room, run: Run) -> None:
    async def serve() -> None:
        server = await start(room)
        serving = asyncio.ensure_future(server.serve_forever())
        reader, writer = await asyncio.open_connection(*room.address)
        writer.write(b"hello\n")
        await reader.readline()
        serving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await serving
        assert await reader.read() == b""
        writer.close()

    run(serve())
    assert gone(room)


def test_a_block_in_which_the_server_has_ended_already_has_nothing_left_to_end(room: Room, run: Run) -> None:
    async def serve() -> None:
        async with await start(room) as server:
            asyncio.get_running_loop().call_soon(server.close)
            await server.serve_forever()

    run(serve())
    assert gone(room)


def test_outside_of_the_main_thread_no_signal_is_handled(room: Room, run: Run) -> None:
    ended: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
    before = {signum: signal.getsignal(signum) for signum in aio.SIGNALS}

    async def serve() -> None:
        server = await start(room)
        serving = asyncio.ensure_future(server.serve_forever())
        await asyncio.sleep(0)
        assert {signum: signal.getsignal(signum) for signum in aio.SIGNALS} == before
        server.close()
        await serving

    def work() -> None:
        try:
            run(serve())
            ended.put(None)
        except BaseException as error:  # noqa: BLE001 - raised where it is waited for
            ended.put(error)

    thread = threading.Thread(target=work)
    thread.start()
    error = ended.get(timeout=LIMIT)
    thread.join(LIMIT)
    if error is not None:
        raise error
    assert gone(room)


def test_the_handlers_of_the_program_are_put_back_and_those_that_python_does_not_know_are_left(
    room: Room, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def handler(*_: object) -> None:
        pass

    getsignal = signal.getsignal
    before = {signum: signal.signal(signum, handler) for signum in aio.SIGNALS}
    monkeypatch.setattr(signal, "getsignal", lambda signum: None if signum == signal.SIGINT else getsignal(signum))

    async def serve() -> None:
        server = await start(room)
        asyncio.get_running_loop().call_soon(server.close)
        await server.serve_forever()
        assert getsignal(signal.SIGTERM) is handler
        assert getsignal(signal.SIGINT) is not handler

    try:
        run(serve())
    finally:
        for signum, each in before.items():
            signal.signal(signum, each)


def test_who_is_cancelled_while_it_listens_leaves_nothing(
    room: Room, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    listens, may_go_on = threading.Event(), threading.Event()
    listen = aio.listen_for_streams

    def listen_slowly(*arguments: Any) -> Any:
        listens.set()
        may_go_on.wait(LIMIT)
        return listen(*arguments)

    monkeypatch.setattr(aio, "listen_for_streams", listen_slowly)

    async def serve() -> None:
        starting = asyncio.ensure_future(start(room))
        await asyncio.get_running_loop().run_in_executor(None, listens.wait, LIMIT)
        starting.cancel()
        asyncio.get_running_loop().call_soon(may_go_on.set)
        with pytest.raises(asyncio.CancelledError):
            await starting

    run(serve())
    assert gone(room)


def test_without_a_descriptor_left_accepting_is_tried_again(
    room: Room, run: Run, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(aio, "RETRY", 0.0)

    async def serve() -> None:
        async with await start(room) as server:
            (listener,) = server._hosted.listeners.values()
            listener.stop()
            tries: list[asyncio.Task[None]] = []
            duplicate = socket.socket.dup

            def fail_once(sock: socket.socket) -> socket.socket:
                monkeypatch.setattr(socket.socket, "dup", duplicate)
                tries.append(listener.start())
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

            monkeypatch.setattr(socket.socket, "dup", fail_once)
            opening = listener.start()
            await opening
            assert tries == [opening]
            reader, writer = await asyncio.open_connection(*room.address)
            writer.write(b"hello\n")
            assert await reader.readline() == b"hello\n"
            writer.close()

    run(serve())
    assert "Too many open files; trying again" in caplog.text


def test_a_child_forked_in_a_handler_has_no_listener(room: Room, run: Run) -> None:
    def held_by_child(listening: int) -> int:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # there are other threads
            child = os.fork()
        if child == 0:
            os._exit(sum(is_open(int(name), listening) for name in os.listdir("/proc/self/fd")))
        return os.waitpid(child, 0)[1]

    async def serve() -> None:
        async with await start(room) as server:
            inode = os.fstat(server.sockets[0].fileno()).st_ino
            assert held_by_child(inode) == 0
            reader, writer = await asyncio.open_connection(*room.address)
            writer.write(b"hello\n")
            assert await reader.readline() == b"hello\n"
            server.close()
            await asyncio.sleep(0)
            assert held_by_child(inode) == 0
            writer.close()

    run(serve())


def is_open(descriptor: int, inode: int) -> bool:
    with contextlib.suppress(OSError):
        return os.fstat(descriptor).st_ino == inode
    return False


def test_a_dry_run_serves_nobody_and_leaves_no_trace(room: Room, run: Run) -> None:
    async def serve() -> None:
        await (await start(room, dry_run=True)).serve_forever()

    run(serve())
    assert room.left_behind() == [] and gone(room)


def test_what_is_wrong_is_said_before_anything_is_done(room: Room, run: Run) -> None:
    async def wrong(**options: Any) -> None:
        await aio.start_server(echo, **{"listen": [room.url], "control": room.control, **options})

    with pytest.raises(TypeError, match="a list of URLs"):
        run(wrong(listen=room.url))
    with pytest.raises(takeover.errors.AddressError):
        run(wrong(listen=["http://nowhere"]))
    with pytest.raises(takeover.errors.ListenError, match="stream sockets only"):
        run(wrong(listen=["udp://127.0.0.1:0"]))
    assert gone(room)


def test_a_handler_that_raises_costs_its_own_connection_only(
    room: Room, run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    async def fail(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, connection: aio.Connection) -> None:
        if await reader.readline() == b"fail\n":
            raise RuntimeError("this handler is broken")
        writer.write(b"fine\n")

    async def serve() -> None:
        async with await aio.start_server(fail, [room.url], room.control):
            for line, answer in ((b"fail\n", b""), (b"work\n", b"fine\n")):
                reader, writer = await asyncio.open_connection(*room.address)
                writer.write(line)
                assert await reader.read() == answer
                writer.close()

    run(serve())
    assert "this handler is broken" in caplog.text


def test_a_protocol_that_cannot_be_made_costs_its_own_connection_only(
    room: Room, run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> asyncio.Protocol:
        raise RuntimeError("this factory is broken")

    async def serve() -> None:
        async with await aio.create_server(fail, [room.url], room.control):
            reader, writer = await asyncio.open_connection(*room.address)
            with contextlib.suppress(ConnectionResetError):
                assert await reader.read() == b""
            writer.close()

    run(serve())
    assert "this factory is broken" in caplog.text


def test_where_a_loop_cannot_accept_the_incumbent_takes_the_service_back(
    room: Room, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a probation too: the incumbent is not told that all is well before the loop accepts."""

    async def fail(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    async def serve() -> None:
        server = await start(room, service="echo", probation=0.0)
        await server.serve_forever()

    old = room.echo({"limits": FAST})
    room.wait_for_owner(old)
    pounder = room.pound()
    pounder.goes_on()
    monkeypatch.setattr(aio.Listener, "_serve", fail)
    with pytest.raises(takeover.errors.Aborted, match="did not finish the step 'committed'"):
        run(serve())
    room.wait_for_owner(old)
    pounder.goes_on()
    pounder.stop()
    assert not pounder.lost, pounder.lost
