"""A batch is adopted as a whole or not at all: each connection is served or refused, each descriptor closed once."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import gc
import os
import pathlib
import resource
import socket
import sys
from array import array
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest

from aio_rooms import Run
from channel_cases import Scene, Tally
from takeover import _loop_py
from takeover import taker as taker_module
from takeover._transport_py import Transport
from takeover.aio_entrance import Home
from takeover.aio_moving import Mover
from takeover.errors import RemoteProtocolError
from takeover.records import FULL, HAS_STATE, Record, pack_peer

COUNT = 5
THIRD = 2
PEER = pack_peer(socket.AF_INET, ("127.0.0.1", 1))


class Troubled(Tally):
    """Its state says what goes wrong where it is read."""

    def import_state(self, state: bytes) -> None:
        trouble = {b"memory": MemoryError, b"value": ValueError, b"exit": SystemExit}.get(state)
        if trouble is not None:
            raise trouble
        super().import_state(state)


class Offer:
    """Connections as they come from another process: the clients' ends are kept, the others are the loop's to take."""

    def __init__(self, inode: int, states: list[bytes], **more: Any) -> None:
        pairs = [socket.socketpair() for _ in states]
        self.clients = [client for client, _ in pairs]
        self.descriptors = array("i", [served.detach() for _, served in pairs])
        self.inodes = [os.fstat(fd).st_ino for fd in self.descriptors]
        fixed = Record(inode, HAS_STATE, 0, PEER, 0, 65536, 16384, b"", b"", b"")._replace(**more)
        self.records = [fixed._replace(state=state) for state in states]

    @property
    def body(self) -> bytes:
        return b"".join(record.pack() for record in self.records)

    def open_here(self, index: int) -> bool:
        """Whether the descriptor is open still, and is the one that came."""
        try:
            return os.fstat(self.descriptors[index]).st_ino == self.inodes[index]
        except OSError:
            return False

    def close(self) -> None:
        for client in self.clients:
            client.close()


@pytest.fixture
def offers() -> Iterator[Callable[..., Offer]]:
    made: list[Offer] = []

    def make(*arguments: Any, **more: Any) -> Offer:
        made.append(Offer(*arguments, **more))
        return made[-1]

    yield make
    for offer in made:
        offer.close()


@pytest.fixture
def scene(loop_module: ModuleType) -> Iterator[Scene]:
    scene = Scene(loop_module, loop_module, Troubled)
    yield scene
    scene.close()


@pytest.fixture
def plain() -> Iterator[Scene]:
    """A scene on the plain loop, whose system calls can be watched and be made to fail from here."""
    scene = Scene(_loop_py, _loop_py, Troubled)
    yield scene
    scene.close()


def take(scene: Scene, offer: Offer) -> list[list[Any]]:
    return scene.loops[1].adopt_connections(offer.body, offer.descriptors, 1)  # type: ignore[no-any-return]


def check(offer: Offer, refused: list[list[Any]], connections: int) -> None:
    """Who was refused is closed, and all the others are in the loop."""
    indices = {index for index, _ in refused}
    assert connections == len(offer.descriptors) - len(indices)
    for index in range(len(offer.descriptors)):
        assert offer.open_here(index) is (index not in indices)


def check_none(offer: Offer, connections: int) -> None:
    """The descriptors are the caller's still, and nobody else has a copy."""
    assert connections == 0
    assert all(map(offer.open_here, range(len(offer.descriptors))))
    for fd in offer.descriptors:
        os.close(fd)
    for client in offer.clients:
        assert client.recv(1) == b""


def serve(scene: Scene, offer: Offer, refused: list[list[Any]]) -> None:
    """Starts what was adopted, which answers."""
    skip = [index for index, _ in refused]
    scene.loops[1].start_connections(offer.descriptors, skip, {})
    scene.answers([client for index, client in enumerate(offer.clients) if index not in skip])


@pytest.mark.parametrize(("trouble", "word"), [(b"memory", "memory"), (b"value", "state")])
def test_one_whose_state_cannot_be_read_is_refused_and_the_others_are_served(
    scene: Scene, offers: Callable[..., Offer], trouble: bytes, word: str
) -> None:
    offer = offers(scene.inode, [trouble if index == THIRD else b"" for index in range(COUNT)])
    refused = take(scene, offer)
    assert refused == [[THIRD, word]]
    check(offer, refused, scene.counts()[1])
    serve(scene, offer, refused)


@pytest.mark.parametrize("index", [0, THIRD, COUNT - 1])
def test_one_that_ends_the_program_leaves_none_of_the_batch_behind(
    scene: Scene, offers: Callable[..., Offer], index: int
) -> None:
    offer = offers(scene.inode, [b"exit" if each == index else b"" for each in range(COUNT)])
    with pytest.raises(SystemExit):
        take(scene, offer)
    check_none(offer, scene.counts()[1])


def test_each_wrong_record_is_refused_by_its_word(scene: Scene, offers: Callable[..., Offer]) -> None:
    offer = offers(scene.inode, [b""] * 6)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagrams:
        os.dup2(datagrams.fileno(), offer.descriptors[1])
        offer.inodes[1] = os.fstat(offer.descriptors[1]).st_ino
    offer.records[2] = offer.records[2]._replace(listener=1)
    offer.records[3] = offer.records[3]._replace(version=7)
    offer.records[4] = offer.records[4]._replace(unread=b"unread")
    offer.records[5] = offer.records[5]._replace(flags=0)
    refused = take(scene, offer)
    assert refused == [[1, "socket"], [2, "listener"], [3, "version"], [4, "unread"], [5, "handler"]]
    check(offer, refused, scene.counts()[1])
    serve(scene, offer, refused)


def test_a_class_that_names_the_versions_it_reads_gets_no_other(
    scene: Scene, offers: Callable[..., Offer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Troubled, "readable_state_versions", (1, 2), raising=False)
    offer = offers(scene.inode, [b""] * COUNT, version=2)
    offer.records[THIRD] = offer.records[THIRD]._replace(version=0)
    refused = take(scene, offer)
    assert refused == [[THIRD, "version"]]
    check(offer, refused, scene.counts()[1])
    serve(scene, offer, refused)


@pytest.mark.parametrize("cut", [slice(None, -1), slice(1, None), slice(0, 0), slice(None, 40)])
def test_garbled_records_leave_none_of_the_batch_behind(scene: Scene, offers: Callable[..., Offer], cut: slice) -> None:
    offer = offers(scene.inode, [b"state"] * COUNT)
    with pytest.raises(RemoteProtocolError):
        scene.loops[1].adopt_connections(offer.body[cut], offer.descriptors, 1)
    check_none(offer, scene.counts()[1])


def test_a_loop_that_is_closed_takes_nothing(scene: Scene, offers: Callable[..., Offer]) -> None:
    offer = offers(scene.inode, [b""] * COUNT)
    scene.loops[1].close()
    with pytest.raises(RuntimeError):
        take(scene, offer)
    check_none(offer, 0)


def test_each_descriptor_is_closed_once(
    plain: Scene, offers: Callable[..., Offer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A number that is closed twice may be somebody else's by then."""
    closed: list[int] = []
    close = os.close

    def watched(fd: int) -> None:
        closed.append(fd)
        close(fd)

    monkeypatch.setattr(os, "close", watched)
    for states in ([b"", b"value", b"memory"], [b"", b"value", b"exit", b""]):
        offer = offers(plain.inode, states)
        closed.clear()
        with contextlib.suppress(SystemExit):
            take(plain, offer)
        assert closed == list(offer.descriptors[1:3] if len(states) == 3 else ())
    for fd in offer.descriptors:
        close(fd)


def test_fcntl_that_fails_refuses_that_one_connection(
    plain: Scene, offers: Callable[..., Offer], monkeypatch: pytest.MonkeyPatch
) -> None:
    offer = offers(plain.inode, [b""] * COUNT)
    set_blocking = os.set_blocking

    def fail(fd: int, blocking: bool) -> None:
        if fd == offer.descriptors[THIRD]:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        set_blocking(fd, blocking)

    monkeypatch.setattr(os, "set_blocking", fail)
    refused = take(plain, offer)
    assert refused == [[THIRD, "socket"]]
    check(offer, refused, plain.counts()[1])
    serve(plain, offer, refused)


@pytest.fixture(params=[Troubled, "echo"], ids=["protocol", "native"])
def either(request: pytest.FixtureRequest, loop_module: ModuleType) -> Iterator[Scene]:
    """A scene with protocols, and one with the built-in echo."""
    scene = Scene(loop_module, loop_module, request.param)
    yield scene
    scene.close()


def offer_of(scene: Scene, offers: Callable[..., Offer]) -> Offer:
    """What the handler of the scene can read, adopted."""
    flags = 0 if scene.handlers[0] == "echo" else HAS_STATE
    offer = offers(scene.inode, [b""] * COUNT, flags=flags)
    assert take(scene, offer) == []
    return offer


def only_the_third_is_lost(scene: Scene, offer: Offer) -> None:
    scene.until(lambda: scene.counts()[1] == COUNT - 1)
    if scene.handlers[0] != "echo":
        assert [protocol.lost for protocol in scene.protocols[1]] == [index == THIRD for index in range(COUNT)]
    assert offer.clients[THIRD].recv(1) == b""
    scene.answers([client for index, client in enumerate(offer.clients) if index != THIRD])


def test_epoll_ctl_that_fails_costs_that_one_connection_and_its_handler_is_told(
    either: Scene, offers: Callable[..., Offer], tmp_path: os.PathLike[str]
) -> None:
    """A file in the place of the socket: epoll_ctl says EPERM."""
    offer = offer_of(either, offers)
    with open(os.path.join(tmp_path, "file"), "wb") as file:
        os.dup2(file.fileno(), offer.descriptors[THIRD])
    either.loops[1].start_connections(offer.descriptors, (), {})
    only_the_third_is_lost(either, offer)


def test_one_whose_late_bytes_there_is_no_memory_for_is_ended_and_the_others_are_served(
    either: Scene, offers: Callable[..., Offer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """RLIMIT_AS, where the bytes are copied; the plain loop does not copy them."""
    offer = offer_of(either, offers)
    tails = {THIRD: bytes(1 << 30)}
    append = Transport.append

    def fail(self: Transport, data: bytes) -> None:
        if data:
            raise MemoryError
        append(self, data)

    monkeypatch.setattr(Transport, "append", fail)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    used = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (32 << 20), limits[1]))
    try:
        either.loops[1].start_connections(offer.descriptors, (), tails)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    only_the_third_is_lost(either, offer)


def test_one_that_raises_when_it_is_told_to_pause_again_is_ended_and_the_others_are_served(
    scene: Scene, offers: Callable[..., Offer], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Troubled) -> None:
        raise ValueError

    monkeypatch.setattr(Troubled, "pause_writing", fail)
    offer = offers(scene.inode, [b""] * COUNT)
    offer.records[THIRD] = offer.records[THIRD]._replace(flags=HAS_STATE | FULL)
    assert take(scene, offer) == []
    scene.loops[1].start_connections(offer.descriptors, (), {})
    only_the_third_is_lost(scene, offer)


def test_what_was_adopted_under_high_numbers_moves_on(either: Scene, offers: Callable[..., Offer]) -> None:
    flags = 0 if either.handlers[0] == "echo" else HAS_STATE
    offer = offers(either.inode, [b""] * COUNT, flags=flags, peer=pack_peer(socket.AF_UNIX, ""))
    for index in range(1, COUNT):
        low = offer.descriptors[index]
        offer.descriptors[index] = fcntl.fcntl(low, fcntl.F_DUPFD_CLOEXEC, 800)
        os.close(low)
    assert take(either, offer) == []
    either.loops[1].start_connections(offer.descriptors, (), {})
    _, descriptors, cursor = either.loops[1].export_connections(0, 251, 1 << 20, {})
    assert (list(descriptors), cursor) == (sorted(offer.descriptors), -1)
    either.loops[1].put_back_connections(descriptors, False)
    either.answers(offer.clients)


def test_one_that_ends_the_program_at_its_start_keeps_the_others_from_nothing(
    scene: Scene, offers: Callable[..., Offer], monkeypatch: pytest.MonkeyPatch
) -> None:
    offer = offers(scene.inode, [b""] * COUNT)
    assert take(scene, offer) == []
    made: list[Any] = []

    def connection_made(self: Troubled, transport: Any) -> None:
        self.transport = transport
        made.append(self)
        if len(made) == THIRD:
            raise SystemExit

    monkeypatch.setattr(Troubled, "connection_made", connection_made)
    with pytest.raises(SystemExit):
        scene.loops[1].start_connections(offer.descriptors, (), {})
    assert len(made) == COUNT
    scene.answers(offer.clients)


def test_a_batch_that_the_taker_cannot_note_down_goes_back(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    scene.connect(COUNT)
    giver, taker = scene.move()

    def fail(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(taker_module, "Batch", fail)
    scene.until(lambda: giver.finished and taker.finished)
    assert scene.counts() == (COUNT, 0)
    scene.answers()
    assert caplog.text.count("the channel to pid") == 1


# Each allocation of the interpreter fails in its turn.


NO_MEMORY = (MemoryError, SystemError) if sys.version_info < (3, 11) else (MemoryError,)
"""CPython 3.10 may lose a MemoryError on its way up, and says "returned NULL without setting an exception" then."""


def sweep(adopt: Callable[..., list[list[Any]]], make: Callable[[], Offer], count: Callable[[], int]) -> int:
    """Has each allocation fail until none does any more; after each try either all is refused or adopted, or nothing.

    Returns how many connections were refused for want of memory, in all.
    """
    testcapi = pytest.importorskip("_testcapi", reason="this Python cannot fail allocations")
    refusals = 0
    for number in range(1, 3000):
        offer = make()
        arguments = offer.body, offer.descriptors, 1
        testcapi.set_nomemory(number, number + 1)
        try:
            refused = adopt(*arguments)
        except NO_MEMORY:
            refused = None  # type: ignore[assignment]
        finally:
            testcapi.remove_mem_hooks()
        if refused is None:
            check_none(offer, count())
            continue
        check(offer, refused, count())
        refusals += len(refused)
        assert {word for _, word in refused} <= {"memory", "state"}
        if not refused and number > 200:
            return refusals
    raise AssertionError("there is no end of allocations")


@pytest.fixture
def no_collector() -> Iterator[None]:
    """It would call others' callbacks, which are not to fail."""
    gc.disable()
    yield
    gc.enable()


survivable = pytest.mark.skipif(sys.version_info >= (3, 12), reason="this interpreter itself does not survive it")


@survivable
@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("handler", [Troubled, "echo"], ids=["protocol", "native"])
def test_whichever_allocation_fails_no_connection_is_half_adopted(
    loop_module: ModuleType, offers: Callable[..., Offer], handler: Any
) -> None:
    scene = Scene(loop_module, loop_module, handler)
    scene.protocols = (Nothing(), Nothing())
    flags = 0 if handler == "echo" else HAS_STATE
    made: list[Offer] = []

    def make() -> Offer:
        for offer in made:
            scene.loops[1].drop_connections(offer.descriptors, [i for i in range(COUNT) if not offer.open_here(i)])
            offer.close()
        made[:] = [offers(scene.inode, [b"" if handler == "echo" else b"state"] * COUNT, flags=flags)]
        return made[0]

    refusals = sweep(scene.loops[1].adopt_connections, make, lambda: scene.counts()[1])
    assert refusals or handler == "echo"
    serve(scene, made[0], [])
    scene.close()


class Nothing(list[Any]):
    """Keeps nothing."""

    def append(self, _: Any) -> None:
        pass


@survivable
@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_on_other_loops_too_no_connection_is_half_adopted(loop: str, offers: Callable[..., Offer]) -> None:
    made = asyncio.new_event_loop() if loop == "asyncio" else pytest.importorskip("uvloop").new_event_loop()

    async def play() -> None:
        mover = Mover(made)
        mover.homes[1] = Home(1, Troubled)
        last: list[Offer] = []

        def make() -> Offer:
            for offer in last:
                mover.drop_connections(offer.descriptors, [i for i in range(COUNT) if not offer.open_here(i)])
                offer.close()
            last[:] = [offers(1, [b"state"] * COUNT)]
            return last[0]

        assert sweep(mover.adopt_connections, make, lambda: mover.connections)
        mover.start_connections(last[0].descriptors, (), {})
        for client in last[0].clients:
            client.setblocking(False)
            await made.sock_sendall(client, b"ask")
            assert await made.sock_recv(client, 10) == b"ASK"
        mover.abort()
        await asyncio.sleep(0)

    with contextlib.closing(made):
        made.run_until_complete(play())


def test_on_other_loops_too_each_wrong_record_is_refused_by_its_word(run: Run, offers: Callable[..., Offer]) -> None:
    async def play() -> None:
        mover = Mover(asyncio.get_running_loop())
        mover.homes[1] = Home(1, Troubled)
        offer = offers(1, [b"", b"", b"", b"", b"", b"", b"value", b"memory"])
        others = socket.socket(socket.AF_INET, socket.SOCK_DGRAM).detach(), os.memfd_create("no socket")
        for index, other in enumerate(others, 1):
            os.dup2(other, offer.descriptors[index])
            os.close(other)
            offer.inodes[index] = os.fstat(offer.descriptors[index]).st_ino
        offer.records[3] = offer.records[3]._replace(listener=2)
        offer.records[4] = offer.records[4]._replace(version=7)
        offer.records[5] = offer.records[5]._replace(flags=0)
        refused = mover.adopt_connections(offer.body, offer.descriptors, 1)
        words = ("socket", "socket", "listener", "version", "handler", "state", "memory")
        assert refused == [[index, word] for index, word in enumerate(words, 1)]
        check(offer, refused, mover.connections)
        mover.drop_connections(offer.descriptors, range(1, 8))
        assert offer.clients[0].recv(1) == b""

    run(play())


@pytest.mark.parametrize("index", [0, THIRD, COUNT - 1])
def test_on_other_loops_too_one_that_ends_the_program_leaves_none_of_the_batch_behind(
    run: Run, offers: Callable[..., Offer], index: int
) -> None:
    async def play() -> None:
        mover = Mover(asyncio.get_running_loop())
        mover.homes[1] = Home(1, Troubled)
        offer = offers(1, [b"exit" if each == index else b"" for each in range(COUNT)])
        with pytest.raises(SystemExit):
            mover.adopt_connections(offer.body, offer.descriptors, 1)
        check_none(offer, mover.connections)

    run(play())
