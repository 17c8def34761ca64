"""The reader of takeover.aio hands out what asyncio's own hands out, and tells exactly what it still holds."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from takeover.aio_streams import Reader

LIMIT = 8

READS = st.one_of(
    st.tuples(st.just("read"), st.integers(-1, 12)),
    st.tuples(st.just("readexactly"), st.integers(0, 24)),
    st.tuples(st.just("readuntil"), st.sampled_from([b"\n", b"ab", b"aab"])),
    st.tuples(st.just("readline")),
)
CHUNKS = st.lists(st.text("ab\n", min_size=1, max_size=12).map(str.encode), max_size=8)


class Transport:
    """What a reader asks of a transport: to be read from, or not."""

    def __init__(self) -> None:
        self.reading = True

    def is_closing(self) -> bool:
        return False

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True


async def outcomes(reader: asyncio.StreamReader, chunks: list[bytes], reads: list[tuple[Any, ...]]) -> list[Any]:
    """What the reads return or raise, while the chunks come as long as the reader wants them."""
    transport: Any = Transport()
    reader.set_transport(transport)

    async def feed() -> None:
        for chunk in chunks:
            while not transport.reading:  # noqa: ASYNC110 - whoever resumes it is what is tested
                await asyncio.sleep(0)
            reader.feed_data(chunk)
            await asyncio.sleep(0)
        reader.feed_eof()

    feeding = asyncio.create_task(feed())
    found: list[Any] = []
    for name, *arguments in reads:
        try:
            found.append(await getattr(reader, name)(*arguments))
        except asyncio.IncompleteReadError as error:
            found.append(("incomplete", error.partial, error.expected))
        except asyncio.LimitOverrunError as error:
            found.append(("overrun", error.args, error.consumed))
        except ValueError as error:
            found.append(("value", error.args))
    found.append(reader.at_eof())
    feeding.cancel()
    return found


LONG = b"x" * (LIMIT + 1)


@example([LONG + b"\n"], [("readline",), ("read", -1)])
@example([LONG], [("readline",), ("read", -1)])
@example([LONG + b"\nrest"], [("readuntil", b"\n"), ("read", 3)])
@example([LONG, LONG], [("readuntil", b"\n"), ("readexactly", 4)])
@example([b"a"], [("readuntil", b""), ("readexactly", -1), ("read", -1)])
@example([b"ab", b"c"], [("readexactly", 4), ("read", -1)])
@example([LONG, LONG, b"end"], [("readexactly", 2 * len(LONG) + 3)])
@example([LONG, LONG, b"end"], [("read", 2), ("read", 2), ("read", 20), ("read", -1)])
@settings(deadline=None)
@given(CHUNKS, st.lists(READS, max_size=8))
def test_it_hands_out_what_asyncios_does(chunks: list[bytes], reads: list[tuple[Any, ...]]) -> None:
    async def both() -> None:
        loop = asyncio.get_running_loop()
        own = await outcomes(Reader(LIMIT, loop), chunks, reads)
        assert own == await outcomes(asyncio.StreamReader(LIMIT, loop), chunks, reads)

    asyncio.run(both())


WAITS: list[Callable[[Reader], Awaitable[bytes]]] = [
    lambda reader: reader.read(100),
    lambda reader: reader.readline(),
    lambda reader: reader.readexactly(100),
    lambda reader: reader.readuntil(b"END"),
]


@pytest.mark.parametrize("begin", WAITS[1:])
def test_who_waits_has_consumed_nothing(begin: Callable[[Reader], Awaitable[bytes]]) -> None:
    async def wait() -> None:
        reader = Reader(LIMIT, asyncio.get_running_loop())
        task = asyncio.ensure_future(begin(reader))
        for part in (b"some", b"more"):
            reader.feed_data(part)
            await asyncio.sleep(0)
        assert reader.waits and reader.buffer == b"somemore"
        task.cancel()

    asyncio.run(wait())


@pytest.mark.parametrize("begin", WAITS)
def test_who_is_held_consumes_nothing_until_it_is_freed(begin: Callable[[Reader], Awaitable[bytes]]) -> None:
    async def hold() -> None:
        data = b"x" * 96 + b"\nEND"
        reader = Reader(1000, asyncio.get_running_loop())
        task = asyncio.ensure_future(begin(reader))
        await asyncio.sleep(0)
        reader.feed_data(data)
        reader.hold()
        for _ in range(5):
            await asyncio.sleep(0)
        assert reader.waits and reader.turns == 0 and reader.buffer == data and not task.done()
        reader.free()
        got = await task
        assert data.startswith(got) and got + reader.buffer == data
        assert reader.turns == 1

    asyncio.run(hold())


def test_who_reads_all_has_consumed_something_and_is_never_at_rest() -> None:
    async def read_all() -> None:
        reader = Reader(LIMIT, asyncio.get_running_loop())
        task = asyncio.ensure_future(reader.read())
        await asyncio.sleep(0)
        assert not reader.waits
        reader.feed_data(b"all")
        reader.feed_eof()
        assert await task == b"all"

    asyncio.run(read_all())


def test_a_wait_that_is_given_up_while_held_counts_as_over() -> None:
    async def give_up() -> None:
        reader = Reader(LIMIT, asyncio.get_running_loop())
        task = asyncio.ensure_future(reader.readline())
        await asyncio.sleep(0)
        reader.hold()
        task.cancel()
        await asyncio.wait([task])
        assert reader.turns == 1 and not reader.waits
        reader.free()
        reader.feed_data(b"line\n")
        assert await reader.readline() == b"line\n"

    asyncio.run(give_up())


def test_what_a_connection_was_lost_by_is_raised_to_whoever_waits_and_whoever_comes() -> None:
    async def lose() -> None:
        reader = Reader(LIMIT, asyncio.get_running_loop())
        task = asyncio.ensure_future(reader.readline())
        await asyncio.sleep(0)
        reader.set_exception(ConnectionResetError("by the peer"))
        for reading in (task, reader.read(1), reader.readexactly(1)):
            with pytest.raises(ConnectionResetError, match="by the peer"):
                await reading

    asyncio.run(lose())


def test_only_one_at_a_time_may_wait() -> None:
    async def wait_twice() -> None:
        reader = Reader(LIMIT, asyncio.get_running_loop())
        task = asyncio.ensure_future(reader.readline())
        await asyncio.sleep(0)
        with pytest.raises(RuntimeError, match="already waiting"):
            await reader.readline()
        reader.feed_data(b"line\n")
        assert await task == b"line\n"

    asyncio.run(wait_twice())
