"""Either process fails while connections move: each one goes on in one process, with every byte, or dies with its own.

The boundaries are those of a move that went well. The compiled backend takes all of them, the plain one every third.
"""

from __future__ import annotations

import os
import pathlib
import random
import re
import signal
import socket
import subprocess
import threading
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import NamedTuple

import pytest

from clients import eventually
from processes import FAST, STEP, Boundaries, Program, Room, descriptors_at_rest, sampled, stop
from streams import Streams
from takeover.giver import FIRST_BATCH

PARALLEL = 6
NOTHING_ADOPTED = (
    "giver before CONNECTIONS",
    "giver after CONNECTIONS",
    "taker at CONNECTIONS",
    "taker before ADOPT",
    "taker after ADOPT",
    "taker before ADOPTED",
    "giver at ADOPTED",
)
"""The boundaries up to which the giver has let go of nothing."""

CONNECTIONS = {"bursty": 12, "slow": 2, "idle": 126}
"""Of each room: three batches."""


class Scenario(NamedTuple):
    """At the boundary `step`, or so many seconds later, `victim` is killed or stopped, or hangs."""

    step: str
    victim: str
    action: str
    delay: float = 0

    def __str__(self) -> str:
        return f"{self.action} the {self.victim} {self.delay:g} s after {self.step!r}"


class Recording(NamedTuple):
    """A move that went well: the boundaries of both ends in their order, and what the owner held in the end."""

    boundaries: tuple[str, ...]
    held: dict[str, int]


def start(room: Room, boundaries: Boundaries | None = None) -> Program:
    return room.echo({"limits": FAST} if boundaries is None else {"limits": FAST, "boundaries": boundaries.name})


def open_streams(room: Room, seed: int = 1) -> Streams:
    streams = room.streams(**CONNECTIONS, seed=seed, largest=20_000, pause=0.01)
    streams.goes_on()
    return streams


def holders(room: Room, programs: list[Program]) -> dict[int, set[int]]:
    """The pids that hold each connection of the room, by the port of its client."""
    inodes: dict[str, int] = {}
    local = socket.inet_aton(room.address[0])[::-1].hex().upper() + f":{room.address[1]:04X}"
    for line in pathlib.Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if fields[1] == local and fields[3] != "0A":
            inodes[f"socket:[{fields[9]}]"] = int(fields[2].partition(":")[2], 16)
    found: dict[int, set[int]] = defaultdict(set)
    for program in programs:
        folder = f"/proc/{program.pid}/fd"
        for entry in os.listdir(folder) if program.running else ():
            try:
                port = inodes.get(os.readlink(f"{folder}/{entry}"))
            except FileNotFoundError:
                continue
            if port is not None:
                found[port].add(program.pid)
    return found


def each_has_one_holder(room: Room, programs: list[Program], streams: Streams) -> bool:
    held = holders(room, programs)
    return all(len(held[stream.name[1]]) == 1 for stream in streams.alive)


def moved(program: Program, direction: str) -> int:
    """How many connections the process says that it has moved."""
    found = re.search(rf"moved ([\d,]+) connections {direction} pid", program.text)
    return int(found[1].replace(",", "")) if found else 0


def said(programs: dict[str, Program]) -> str:
    return "\n".join(f"--- {role} {program.pid}\n{program.text}" for role, program in programs.items())


@cache
def record(backend: str) -> Recording:
    boundaries = Boundaries()
    with Room(backend) as room:
        old = start(room, boundaries)
        old.wait_for("serving")
        streams = open_streams(room)
        new = start(room, boundaries)
        room.wait_for_owner(new)
        assert old.wait() == 0
        last = start(room)
        room.wait_for_owner(last)
        assert new.wait() == 0
        streams.stop()
        assert not streams.failures, streams.failures
        seen = tuple(dict.fromkeys(step for step in boundaries.seen if step.startswith(("giver", "taker"))))
        held = eventually(lambda: descriptors_at_rest(last.pid), "the links are closed")
    boundaries.close()
    return Recording(seen, held)


def scenarios(backend: str) -> Iterator[Scenario]:
    """Both are killed at each boundary; in turn the one or the other hangs, if it is its own, or is stopped there."""
    for index, step in enumerate(sampled(record(backend).boundaries, STEP if backend == "cython" else 3 * STEP)):
        for victim in ("giver", "taker"):
            yield Scenario(step, victim, "kill")
        victim = ("giver", "taker")[index % 2]
        yield Scenario(step, victim, "hang" if step.startswith(victim) else "stop")


def play(backend: str, scenario: Scenario) -> None:
    with Room(backend) as room:
        programs: dict[str, Program] = {}
        failed = threading.Event()

        def fail() -> None:
            if scenario.action == "kill":
                programs[scenario.victim].signal(signal.SIGKILL)
                programs[scenario.victim].process.wait()
            elif scenario.action == "stop":
                stop(programs[scenario.victim])
            failed.set()

        def act() -> bool:
            if scenario.delay:
                threading.Timer(scenario.delay, fail).start()
            else:
                fail()
            return scenario.action == "hang"

        boundaries = Boundaries({scenario.step: act})
        try:
            programs["giver"] = start(room, boundaries)
            programs["giver"].wait_for("serving")
            streams = open_streams(room)
            programs["taker"] = start(room, boundaries)
            eventually(failed.is_set, "the boundary")
            if scenario.action == "kill":
                check_after_a_death(scenario, programs, streams)
            else:
                notice(room, scenario, programs, streams)
                boundaries.let_go()
                programs[scenario.victim].signal(signal.SIGCONT)
            go_on(room, programs, streams)
        except AssertionError as error:
            raise AssertionError(f"{error}; the processes said:\n{said(programs)}") from None
        finally:
            boundaries.let_go()
            boundaries.close()


def check_after_a_death(scenario: Scenario, programs: dict[str, Program], streams: Streams) -> None:
    """The connections of a process that was killed have ended, and no others: the other process has counted them."""
    programs[scenario.victim].wait()
    if scenario.victim == "taker":
        programs["giver"].wait_for("connections to pid")
        gone = moved(programs["giver"], "to")
        assert not gone or scenario.delay or scenario.step not in NOTHING_ADOPTED, gone
    else:
        eventually(lambda: "connections from pid" in programs["taker"].text or all_gone(streams), "it is over")
        kept = moved(programs["taker"], "from")
        assert kept >= FIRST_BATCH or scenario.step == "giver before CONNECTIONS", kept
        gone = len(streams.streams) - kept
    eventually(lambda: len(streams.failures) >= gone, f"{gone} connections have ended")
    assert len(streams.failures) == streams.reset == gone, (gone, streams.failures)


def all_gone(streams: Streams) -> bool:
    return not streams.alive


def notice(room: Room, scenario: Scenario, programs: dict[str, Program], streams: Streams) -> None:
    """Waits until the process that works has done what it can do alone: nothing is on its way any more."""
    giver, taker = programs["giver"], programs["taker"]
    if scenario.victim == "taker":
        giver.wait_for("connections to pid")
        return

    def all_served() -> bool:
        held = sum(taker.pid in pids for pids in holders(room, [taker]).values())
        return held == room.status()["moved"]["in"]

    eventually(all_served, "the taker serves what it holds")


def go_on(room: Room, programs: dict[str, Program], streams: Streams) -> None:
    """Every connection that is left is served by one process and goes on, through a takeover more as well."""
    before = len(streams.failures)
    eventually(lambda: each_has_one_holder(room, list(programs.values()), streams), "each has one holder")
    streams.goes_on()
    taken_over = programs["taker"].running
    programs["last"] = last = start(room)
    room.wait_for_owner(last)
    if taken_over:
        assert programs["taker"].wait() == 0
        assert not programs["giver"].running or programs["giver"].wait() == 0
    streams.goes_on()
    eventually(lambda: each_has_one_holder(room, list(programs.values()), streams), "each has one holder")
    streams.stop()
    assert len(streams.failures) == before, streams.failures
    assert programs["giver"].wait() in (0, -signal.SIGKILL)
    eventually(lambda: descriptors_at_rest(last.pid) == record(room.backend).held, "the descriptors are as before")
    last.signal(signal.SIGTERM)
    assert last.wait() == 0
    assert room.left_behind() == []


def play_all(backend: str, todo: list[Scenario]) -> None:
    failures = {}

    def attempt(scenario: Scenario) -> None:
        try:
            play(backend, scenario)
        except AssertionError as error:
            failures[str(scenario)] = str(error)

    record(backend)
    with ThreadPoolExecutor(PARALLEL) as pool:
        list(pool.map(attempt, todo))
    assert not failures, "\n\n".join(f"{scenario}: {text}" for scenario, text in failures.items())


@pytest.mark.timeout(300)
def test_whoever_fails_at_whichever_boundary_of_a_move_costs_its_own_connections_at_most(backend: str) -> None:
    """D7."""
    todo = list(scenarios(backend))
    assert len(todo) >= (50 if backend == "cython" else 15) // STEP
    play_all(backend, todo)


@pytest.mark.timeout(120)
def test_whoever_fails_at_any_moment_of_a_move_costs_its_own_connections_at_most(backend: str) -> None:
    """D7, between the boundaries: the moments are drawn anew each time, and the seed is in what fails."""
    seed = random.randrange(1 << 32)
    source = random.Random(seed)
    print(f"seed {seed}")
    todo = [
        Scenario(
            source.choice(("giver before CONNECTIONS", "taker at CONNECTIONS", "giver at ADOPTED")),
            source.choice(("giver", "taker")),
            source.choice(("kill", "stop")),
            source.uniform(0.0001, 0.01),
        )
        for _ in range(10 if backend == "cython" else 5)
    ]
    play_all(backend, todo)


@pytest.mark.parametrize("step", ["giver at ADOPTED", "taker at RELEASED"])
def test_a_taker_that_stops_while_the_channel_is_full_costs_nothing(room: Room, step: str) -> None:
    """The release of a batch is behind another batch that the socket has no room for."""
    programs: dict[str, Program] = {}

    def act() -> bool:
        stop(programs["taker"])
        return False

    boundaries = Boundaries({step: act})
    try:
        wishes = {"limits": FAST, "boundaries": boundaries.name}
        programs["giver"] = room.protocols(wishes)
        programs["giver"].wait_for("serving")
        talkers = [room.talker() for _ in range(150)]
        for talker in talkers:
            talker.say("poison huge 6000")
        programs["taker"] = room.protocols(wishes)
        eventually(boundaries.reached.is_set, "the boundary")
        programs["giver"].wait_for("connections to pid")
        programs["taker"].signal(signal.SIGCONT)
        pids = [talker.pid() for talker in talkers]
        assert set(pids) <= {programs["giver"].pid, programs["taker"].pid}
    finally:
        boundaries.close()


@pytest.mark.parametrize("victim", ["giver", "taker"])
def test_what_stayed_since_an_end_was_silent_for_too_long_moves_when_it_is_back(room: Room, victim: str) -> None:
    programs: dict[str, Program] = {}

    def act() -> bool:
        stop(programs[victim])
        return False

    boundaries = Boundaries({f"{victim} at {'ADOPTED' if victim == 'giver' else 'RELEASED'}": act})
    try:
        wishes = {"limits": FAST, "boundaries": boundaries.name}
        programs["giver"] = room.echo(wishes)
        programs["giver"].wait_for("serving")
        streams = room.streams(5, idle=495)
        streams.goes_on()
        programs["taker"] = room.echo(wishes)
        eventually(boundaries.reached.is_set, "the boundary")
        other = programs["taker" if victim == "giver" else "giver"]
        steps = {"giver": "giver before RECLAIM", "taker": "taker before CLAIM"}
        eventually(lambda: steps["taker" if victim == "giver" else "giver"] in boundaries.seen, f"{other.pid} goes on")
        programs[victim].signal(signal.SIGCONT)
        assert programs["giver"].wait() == 0, said(programs)
        report = room.status()
        assert (report["moved"]["in"], report["connections"]["open"]) == (500, 500), said(programs)
        streams.goes_on()
        streams.stop()
        assert not streams.failures, streams.failures
    finally:
        boundaries.close()


def test_what_fits_into_a_successor_with_few_descriptors_moves_and_the_rest_drains_and_is_counted(room: Room) -> None:
    """L7."""
    old = start(room)
    old.wait_for("serving")
    streams = room.streams(20, idle=480, largest=20_000)
    streams.goes_on()
    new = room.echo({"limits": FAST, "nofile": 256})
    room.wait_for_owner(new)
    old.wait_for("connections to pid")
    new.wait_for("connections from pid")
    count = moved(old, "to")
    assert 100 < count < 256
    assert f"the rest drains ({500 - count} room)" in old.text
    report = room.status()["moved"]
    assert (report["in"], report["drained"]) == (count, {"room": 500 - count})
    room.round_trip()
    streams.goes_on()
    assert each_has_one_holder(room, [old, new], streams)
    streams.stop()
    assert not streams.failures, streams.failures
    assert old.wait() == 0


def test_after_the_kernel_has_refused_a_batch_it_is_sent_again(room: Room) -> None:
    """ETOOMANYREFS: what a user has on its way counts against RLIMIT_NOFILE, wherever it is."""
    if os.geteuid():
        pytest.skip("only root can be another user")
    os.chown(room.folder, 65534, 65534)
    clog = room.program("clog.py", {"uid": 65534, "count": 310}, stdin=subprocess.PIPE)

    def change(to: str) -> bool:
        clog.tell()
        clog.wait_for(to)
        return False

    boundaries = Boundaries(
        {"incumbent before RELEASE": lambda: change("clogged"), "giver after CONNECTIONS #3": lambda: change("free")}
    )
    try:
        old = room.echo({"limits": FAST, "uid": 65534, "nofile": 300, "boundaries": boundaries.name})
        old.wait_for("serving")
        streams = room.streams(10, idle=190, largest=20_000)
        streams.goes_on()
        new = room.echo({"limits": FAST, "uid": 65534})
        assert old.wait() == 0, old.text
        assert boundaries.reached.is_set()
        assert (moved(old, "to"), moved(new, "from")) == (200, 200)
        assert boundaries.seen.count("giver after CONNECTIONS") > 6  # those that were refused, and smaller ones
        assert "drains" not in old.text
        streams.goes_on()
        streams.stop()
        assert not streams.failures, streams.failures
    finally:
        boundaries.close()


def answers(sock: socket.socket) -> bool:
    try:
        sock.sendall(b"again\n")
        return sock.recv(6) == b"again\n"
    except ConnectionError:
        return False


@pytest.mark.parametrize("kind", ["echo", "protocols"])
@pytest.mark.parametrize("step", ["giver after CONNECTIONS", "giver at ADOPTED"])
def test_the_drain_deadline_may_come_while_connections_are_on_their_way(room: Room, kind: str, step: str) -> None:
    """The taker hangs: what is on its way is closed at the deadline with the rest, and nothing of it comes back."""
    programs: dict[str, Program] = {}

    def act() -> bool:
        stop(programs["taker"])
        return False

    boundaries = Boundaries({step: act})
    serve = room.echo if kind == "echo" else room.protocols
    wishes = {"kind": "Sums", "limits": {"silence": 60}, "boundaries": boundaries.name}
    try:
        programs["giver"] = serve(wishes, drain_timeout=0.3)
        programs["giver"].wait_for("serving")
        socks = []
        for _ in range(300):  # more than the taker may have answered for by then
            socks.append(room.connect())
            socks[-1].sendall(b"hello\n")
            assert socks[-1].recv(6)
        programs["taker"] = serve({"kind": "Sums"})
        eventually(boundaries.reached.is_set, "the boundary")
        assert programs["giver"].wait() == 0, programs["giver"].text
        programs["giver"].wait_for("drain deadline of 0.3 s: closed")
        programs["taker"].signal(signal.SIGCONT)
        room.wait_for_owner(programs["taker"])
        served = [sock for sock in socks if answers(sock)]
        report = room.status()
        assert report["moved"]["in"] == report["connections"]["open"] == len(served)
        closed = int(re.search(r"closed (\d+) connections", programs["giver"].text)[1])
        assert closed == len(socks) - len(served)
        for sock in socks:
            sock.close()
    finally:
        boundaries.close()


@pytest.mark.parametrize("kind", ["echo", "protocols"])
@pytest.mark.parametrize("broken", ["garbled", "mistake"])
def test_a_mistake_in_either_end_costs_the_move_and_no_connection(room: Room, kind: str, broken: str) -> None:
    room.tracebacks_allowed = True
    serve = room.echo if kind == "echo" else room.protocols
    old = serve({"kind": "Sums", **({"broken": broken} if broken == "garbled" else {})})
    old.wait_for("serving")
    streams = room.streams(5, idle=145, largest=20_000)
    streams.goes_on()
    new = serve({"kind": "Sums", **({"broken": broken} if broken == "mistake" else {})})
    room.wait_for_owner(new)
    old.wait_for("moved 0 connections to pid")
    streams.goes_on()
    assert each_has_one_holder(room, [old, new], streams)
    assert set.union(*holders(room, [old, new]).values()) == {old.pid}
    room.round_trip()
    streams.stop()
    assert not streams.failures, streams.failures
    assert old.wait() == 0


def test_a_successor_that_an_import_ends_leaves_the_connections_where_they_were(room: Room) -> None:
    old = room.protocols()
    old.wait_for("serving")
    talkers = [room.talker() for _ in range(5)]
    for talker in talkers:
        talker.say()
    talkers[2].say("poison leave")
    new = room.protocols()
    assert new.wait() == 7
    assert [talker.pid() for talker in talkers] == [old.pid] * 5
