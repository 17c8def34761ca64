"""Takeovers while clients connect all the time and others stay: nobody is refused, nobody is reset, no byte is lost."""

from __future__ import annotations

import json
import signal

import pytest

from clients import eventually
from processes import FAST, STEP, Program, Room, descriptors_at_rest


def test_a_takeover_under_load_loses_nothing_and_established_connections_are_served_until_they_leave(
    room: Room,
) -> None:
    old = room.echo(live=False)
    old.wait_for("serving")
    steady, load = room.steady(20), room.pound()
    load.goes_on()
    new = room.echo(probation=0.3)
    new.wait_for("took over")
    load.goes_on()
    room.wait_for_owner(new)
    steady.goes_on()
    assert old.running
    eventually(
        lambda: room.status()["connections"]["draining"][0]["connections"] == 20,
        "the old process serves the steady ones, and no connection that has come and gone",
    )
    steady.stop()
    assert old.wait() == 0
    load.goes_on()
    load.stop()
    assert (load.lost, steady.lost) == ([], [])
    assert room.status()["generation"] == 2


@pytest.mark.timeout(240)
@pytest.mark.parametrize("kind", ["echo", "member"])
def test_after_many_takeovers_the_owner_holds_no_descriptor_more(room: Room, kind: str) -> None:
    """A hundred of the native server, twenty of one on join()."""
    takeovers = (100 if kind == "echo" else 20) // min(STEP, 5)

    def start() -> Program:
        return room.echo({"limits": FAST}) if kind == "echo" else room.member(join={"limits": FAST})

    def held_at_rest(program: Program) -> dict[str, int]:
        load.stop()
        return dict(eventually(lambda: descriptors_at_rest(program.pid), "every link is closed"))

    new = start()
    room.wait_for_owner(new)
    load = room.pound(pause=0.005)
    for generation in range(2, takeovers + 2):
        old, new = new, start()
        assert old.wait() == 0, old.text
        room.dismiss(old)
        room.wait_for_owner(new)
        assert room.status()["generation"] == generation
        if generation == 3:
            held = held_at_rest(new)
            load = room.pound(pause=0.005)
    load.goes_on()
    assert held_at_rest(new) == held
    for client in room.clients:
        assert not client.lost, client.lost


def test_a_server_on_join_hands_over_to_the_native_one_and_takes_over_from_it(room: Room) -> None:
    first = room.member(join={"service": "echo"})
    first.wait_for("ready")
    load = room.pound()
    second = room.echo()
    second.wait_for("took over")
    assert first.wait() == 0
    room.wait_for_owner(second)
    third = room.member(join={"service": "echo"})
    report = json.loads(third.wait_for("ready").removeprefix("ready "))
    assert (report["generation"], report["incumbent"], report["adopted"]) == (3, second.pid, [room.url])
    assert second.wait() == 0
    load.goes_on()
    load.stop()
    assert not load.lost, load.lost


def test_after_the_drain_deadline_connections_that_stay_are_closed_and_counted(room: Room) -> None:
    old = room.echo(drain_timeout=0.3, live=False)
    old.wait_for("serving")
    with room.connect() as sock:
        sock.send(b"x")
        assert sock.recv(1) == b"x"
        room.echo().wait_for("took over")
        assert old.wait() == 0
        old.wait_for("drain deadline of 0.3 s: closed 1 connection")


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_server_that_is_told_to_stop_drains_first_and_a_second_signal_ends_it(room: Room, signum: int) -> None:
    server = room.echo()
    server.wait_for("serving")
    steady = room.steady(1)
    server.signal(signum)
    server.wait_for("draining 1 connection")
    steady.goes_on()
    server.signal(signum)
    assert server.wait() == 0
    assert room.left_behind() == []
