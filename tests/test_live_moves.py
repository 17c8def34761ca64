"""Established connections move at a takeover: every byte arrives once and in order, the older process ends at once."""

from __future__ import annotations

import pathlib
import signal
import socket

import pytest

from clients import LIMIT, Talker, eventually, receive_exactly
from processes import FAST, STEP, Boundaries, Program, Room, descriptors_at_rest, free_address
from streams import Streams


def take_over(room: Room, old: Program, new: Program) -> None:
    """Returns when the new one owns the service and the old one has ended well."""
    room.wait_for_owner(new)
    assert old.wait() == 0, old.text


def resident(program: Program) -> int:
    """KiB of memory that a process has."""
    status = pathlib.Path(f"/proc/{program.pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0])


def held_at_rest(program: Program) -> dict[str, int]:
    """What it holds open, with its clients, when every link is closed."""
    return dict(eventually(lambda: descriptors_at_rest(program.pid), "every link is closed"))


@pytest.mark.parametrize("kind", ["echo", "protocols"])
def test_clients_that_never_stop_lose_no_byte_in_many_takeovers(room: Room, kind: str) -> None:
    """L1, L2: bursts of 1 byte to 1 MB, slow readers, senders that never pause, and some that only listen."""

    def start() -> Program:
        return room.echo() if kind == "echo" else room.protocols({"kind": "Sums"})

    old = start()
    old.wait_for("serving")
    streams = room.streams(15, idle=10, slow=3, endless=2, pause=0.001)
    streams.goes_on()
    takeovers = 6
    for _ in range(takeovers):
        new = start()
        take_over(room, old, new)
        assert "rest drains" not in old.text
        eventually(lambda: room.status()["moved"]["in"] == 30, "all have moved")
        streams.goes_on()
        old = new
    streams.stop()
    assert (streams.lost, streams.reordered, streams.reset) == (0, 0, 0), streams.failures
    for stream in streams.streams if kind == "protocols" else ():
        assert stream.trailer == b"%d %d %d" % (stream.back, stream.checksum, takeovers)


@pytest.mark.timeout(180)
def test_after_many_live_takeovers_the_owner_holds_no_descriptor_and_no_memory_more(room: Room) -> None:
    """L9: a hundred on the compiled backend, fifteen on the plain one."""
    takeovers = (100 if room.backend == "cython" else 15) // min(STEP, 5)
    new = room.echo({"limits": FAST})
    room.wait_for_owner(new)
    streams = room.streams(10, idle=80, slow=1, largest=50_000, pause=0.005)
    streams.goes_on()
    sizes = []
    held = None
    for generation in range(2, takeovers + 2):
        old, new = new, room.echo({"limits": FAST})
        take_over(room, old, new)
        room.dismiss(old)
        report = room.status()
        assert (report["generation"], report["moved"]["in"]) == (generation, 91)
        sizes.append(resident(new))
        if generation == 3:
            held = held_at_rest(new)
    streams.goes_on()
    assert held_at_rest(new) == held
    streams.stop()
    assert not streams.failures, streams.failures
    assert max(sizes[-5:]) < 1.2 * max(sizes[:5]), sizes


@pytest.mark.parametrize("side", ["old", "new"])
def test_where_either_side_does_not_want_it_live_connections_drain(room: Room, side: str) -> None:
    old = room.echo(live=side != "old")
    old.wait_for("serving")
    streams = room.streams(5, largest=50_000)
    streams.goes_on()
    new = room.echo(live=side != "new")
    room.wait_for_owner(new)
    streams.goes_on()
    room.round_trip()
    assert old.running
    assert room.status()["moved"]["in"] == 0
    assert room.status()["connections"]["draining"][0]["connections"] == 5
    streams.stop()
    assert old.wait() == 0
    assert not streams.failures, streams.failures


def test_what_drains_in_older_processes_moves_on_to_the_newest(room: Room) -> None:
    """Three generations at once, each with a connection that is in the middle of something."""
    programs: list[Program] = []
    talkers: list[Talker] = []
    for _ in range(3):
        programs.append(room.protocols())
        room.wait_for_owner(programs[-1])
        talkers.append(room.talker())
        talkers[-1].say("poison busy 1000000")
    newest = room.protocols()
    room.wait_for_owner(newest)
    assert [talker.pid() for talker in talkers] == [program.pid for program in programs]
    for talker in talkers:
        talker.say("poison")
    for program in programs:
        assert program.wait() == 0, program.text
    answers = [talker.say() for talker in talkers]
    assert [answer["pid"] for answer in answers] == [newest.pid] * 3
    assert [answer["count"] for answer in answers] == [4] * 3
    assert eventually(lambda: room.status()["connections"]["draining"] == [], "nobody drains any more")


def test_the_generation_after_one_that_takes_no_live_connections_gets_them_from_the_one_before(room: Room) -> None:
    first = room.echo()
    first.wait_for("serving")
    streams = room.streams(5, idle=70, largest=50_000)
    streams.goes_on()
    second = room.echo(live=False)
    room.wait_for_owner(second)
    late = room.connect()
    late.sendall(b"x")
    assert late.recv(1) == b"x"
    third = room.echo()
    room.wait_for_owner(third)
    assert first.wait() == 0
    eventually(lambda: room.status()["moved"]["in"] == 75, "as many as expected have moved")
    assert second.running
    streams.goes_on()
    with late:
        late.sendall(b"y")
        assert late.recv(1) == b"y"
    assert second.wait() == 0
    streams.stop()
    assert not streams.failures, streams.failures


@pytest.mark.parametrize("kind", ["echo", "protocols"])
def test_connections_of_a_listener_that_the_successor_does_not_ask_for_drain(room: Room, kind: str) -> None:
    other = free_address()
    serve = room.echo if kind == "echo" else room.protocols
    old = serve({"kind": "Sums"}, listen=[room.url, "tcp://{}:{}".format(*other)])
    old.wait_for("serving")
    streams, unwanted = room.streams(5, idle=70, largest=50_000), Streams(other, 3, idle=3, seed=2, largest=50_000)
    room.closing.append(unwanted)
    streams.goes_on()
    unwanted.goes_on()
    new = serve({"kind": "Sums"})
    room.wait_for_owner(new)
    new.wait_for("the rest drains there (6 listener)")
    streams.goes_on()
    unwanted.goes_on()
    report = room.status()["moved"]
    assert (report["in"], report["drained"], report["refused"]) == (75, {"listener": 6}, {"listener": 6})
    assert old.running
    unwanted.stop()
    assert old.wait() == 0
    streams.stop()
    assert (streams.failures, unwanted.failures) == ([], [])


def test_connections_of_every_family_move_with_the_names_of_their_peers(room: Room) -> None:
    path = f"{room.folder}/served.sock"
    with socket.socket(socket.AF_INET6) as sock:
        sock.bind(("::1", 0))
        port = sock.getsockname()[1]
    urls = [room.url, f"tcp://[::1]:{port}", f"unix:{path}"]
    old = room.protocols(listen=urls)
    old.wait_for("serving")
    talkers = []
    for family, address in ((socket.AF_INET, room.address), (socket.AF_INET6, ("::1", port)), (socket.AF_UNIX, path)):
        sock = socket.socket(family)
        if family == socket.AF_UNIX:
            sock.bind(f"\0{path}")
        sock.settimeout(LIMIT)
        sock.connect(address)
        talkers.append(Talker(sock))
    room.closing += talkers
    before = [talker.say() for talker in talkers]
    new = room.protocols(listen=urls)
    take_over(room, old, new)
    after = [talker.say() for talker in talkers]
    assert [answer["pid"] for answer in after] == [new.pid] * 3
    for was, now in zip(before, after, strict=True):
        assert (now["peer"], now["local"]) == (was["peer"], was["local"])


def test_a_process_that_has_moved_everything_ends_while_its_clients_go_on(room: Room) -> None:
    old = room.echo()
    old.wait_for("serving")
    socks = [room.connect() for _ in range(5)]
    for sock in socks:
        sock.sendall(b"x")
        assert sock.recv(1) == b"x"
    new = room.echo()
    take_over(room, old, new)
    assert room.status()["moved"]["longest_standstill_ms"] > 0
    for sock in socks:
        with sock:
            sock.sendall(b"still here")
            assert receive_exactly(sock, 10) == b"still here"
    eventually(lambda: room.status()["connections"]["open"] == 0, "they have left")


def test_connections_whose_handler_is_of_another_kind_in_the_next_process_drain(room: Room) -> None:
    old = room.echo()
    old.wait_for("serving")
    streams = room.streams(3, largest=50_000)
    streams.goes_on()
    new = room.protocols({"kind": "Sums"}, service="echo")
    room.wait_for_owner(new)
    assert "the rest drains (3 handler)" in old.wait_for("moved 0 connections")
    streams.goes_on()
    streams.stop()
    assert not streams.failures, streams.failures
    assert old.wait() == 0


@pytest.mark.parametrize(
    ("step", "told"),
    [
        ("taker at CONNECTIONS", 1),
        ("taker after START", 1),
        ("giver after CONNECTIONS", 0),
        ("giver after RELINQUISH", 0),
    ],
)
def test_a_process_that_is_told_to_stop_in_the_middle_of_a_move_serves_to_the_end(
    room: Room, step: str, told: int
) -> None:
    programs: list[Program] = []

    def act() -> bool:
        programs[told].signal(signal.SIGTERM)
        return False

    boundaries = Boundaries({step: act})
    try:
        for _ in range(2):
            programs.append(room.echo({"boundaries": boundaries.name}))
            programs[-1].wait_for("serving" if len(programs) == 1 else "took over")
            if len(programs) == 1:
                streams = room.streams(5, idle=145, largest=50_000)
                streams.goes_on()
        eventually(boundaries.reached.is_set, "the boundary")
        programs[told].wait_for("SIGTERM: draining")
        streams.goes_on()
        streams.stop()
        assert not streams.failures, streams.failures
        assert programs[told].wait() == programs[0].wait() == 0
    finally:
        boundaries.close()
