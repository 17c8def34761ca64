"""Several successors, several generations, and a successor that takes its time (D5, D8, D9)."""

from __future__ import annotations

import os
import signal

from clients import eventually
from processes import FAST, Room, stopped


def test_a_successor_that_warms_up_for_longer_than_the_silence_limit_lives(room: Room) -> None:
    """D5: it heartbeats. Three greeting limits, each twice that of its silence, pass by the incumbent's own clock."""
    old = room.member(join={"limits": FAST})
    old.wait_for("ready")
    new = room.member(join={"limits": FAST}, plan=["wait"])
    new.wait_for("waiting")
    for _ in range(3):
        silent = room.connect_control()
        assert silent.recv(1 << 16) and silent.recv(1) == b""
        silent.close()
    new.tell()
    new.wait_for("ready")
    assert old.wait() == 0


def test_of_two_successors_one_wins_and_the_other_is_told_busy(room: Room) -> None:
    """D8, the second in the middle of the other's takeover."""
    old = room.member()
    old.wait_for("ready")
    first = room.member(plan=["wait"])
    first.wait_for("waiting")
    second = room.cli("echo", "--listen", room.url)
    room.member().wait_for("failed: Refused: pid")
    assert second.wait() == 1
    busy = room.member()
    assert busy.wait() == 1
    assert f"pid {first.pid} has been taking over from pid {old.pid}" in busy.text
    first.tell()
    first.wait_for("ready")
    assert old.wait() == 0
    room.wait_for_owner(first)


def test_of_many_successors_at_once_the_last_that_won_serves_and_nobody_hangs(room: Room) -> None:
    """D8: the same command ten times at once."""
    old = room.echo()
    old.wait_for("serving")
    load = room.pound()
    rivals = [room.echo() for _ in range(10)]
    for rival in rivals:
        eventually(lambda: not rival.running or "took over" in rival.text, "everybody knows")  # noqa: B023
    eventually(lambda: sum(program.running for program in room.programs) == 1, "one is left")
    owner = next(program for program in room.programs if program.running)
    room.wait_for_owner(owner)
    won = [rival for rival in rivals if "took over" in rival.text]
    assert room.status()["generation"] == 1 + len(won) > 1
    for rival in rivals:
        if rival not in won:
            assert rival.wait() == 1
            assert "refused" in rival.lines[-1], rival.text
    load.goes_on()
    load.stop()
    assert not load.lost, load.lost


def test_of_many_cold_starts_at_once_one_serves(room: Room) -> None:
    starters = [room.echo() for _ in range(6)]
    eventually(lambda: sum(program.running for program in starters) == 1, "one is left")
    owner = next(program for program in starters if program.running)
    room.wait_for_owner(owner)
    room.round_trip()
    for starter in starters:
        assert starter is owner or starter.wait() in (0, 1)
    assert sum("generation 1," in starter.text for starter in starters) == 1


def test_generations_that_still_drain_are_watched_over_and_capped(room: Room) -> None:
    """D9: four generations, each with a client that stays; the cap refuses the fifth until one has left."""
    steady, generations = [], []
    for generation in range(1, 5):
        program = room.echo(max_generations=3, live=False)
        program.wait_for("serving" if generation == 1 else "took over")
        room.wait_for_owner(program)
        generations.append(program)
        steady.append(room.steady(generation))

    def draining() -> list[tuple[int, int, int]]:
        elders = room.status()["connections"]["draining"]
        return sorted((elder["generation"], elder["pid"], elder["connections"]) for elder in elders)

    expected = [(number, program.pid, number) for number, program in enumerate(generations[:3], start=1)]
    eventually(lambda: draining() == expected, f"{expected} drain")
    refused = room.echo(max_generations=3, live=False)
    assert refused.wait() == 1
    assert "3 older generations still drain" in refused.lines[-1]
    for client in steady:
        client.goes_on()
    generations[1].signal(signal.SIGKILL)
    eventually(lambda: draining() == [expected[0], expected[2]], "the death of an elder is noticed")
    last = room.echo(max_generations=3, live=False)
    last.wait_for("took over")
    expected[1:] = [expected[2], (4, generations[3].pid, 4)]
    eventually(lambda: draining() == expected, f"{expected} drain")
    for client in (steady[0], steady[2], steady[3]):
        client.goes_on()
        client.stop()
    for program in (generations[0], generations[2], generations[3]):
        assert program.wait() == 0
    eventually(lambda: draining() == [], "all have left")


def test_two_stopped_successors_one_after_the_other_do_not_block_the_third(room: Room) -> None:
    old = room.echo({"limits": FAST})
    old.wait_for("serving")
    for _ in range(2):
        hanging = room.member(join={"service": "echo", "limits": FAST}, plan=["wait"])
        hanging.wait_for("waiting")
        with stopped(hanging):
            old.wait_for(f"pid {hanging.pid} is off")
        hanging.tell()
        assert hanging.wait() in (1, 4)
    new = room.echo({"limits": FAST})
    new.wait_for("took over")
    assert old.wait() == 0
    assert room.status()["pid"] == new.pid


def test_an_incumbent_that_leaves_in_the_middle_of_a_takeover_leaves_the_service_to_the_successor(room: Room) -> None:
    old = room.echo()
    old.wait_for("serving")
    load = room.pound()
    new = room.member(join={"service": "echo"}, plan=["wait"])
    new.wait_for("waiting")
    old.signal(signal.SIGTERM)
    assert old.wait() == 0
    new.tell()
    new.wait_for("ready")
    room.wait_for_owner(new)
    load.goes_on()
    load.stop()
    assert not load.lost, load.lost
    assert os.path.exists(room.control)
