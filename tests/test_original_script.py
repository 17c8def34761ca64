"""Whoever runs the original script upgrades without losing a connection."""

from __future__ import annotations

import os
import signal
import sys

import pytest

from processes import PROGRAMS, Program, Room
from takeover import query
from takeover.errors import NotRunning


@pytest.fixture
def original(room: Room) -> Program:
    host, port = room.address
    program = room.run(sys.executable, str(PROGRAMS / "original.py"), host, str(port))
    program.wait_for("ready")
    return program


def test_the_original_script_is_taken_over_from_without_a_loss(room: Room, original: Program) -> None:
    steady, load = room.steady(10), room.pound()
    load.goes_on()
    new = room.cli("echo", "--listen", room.url)
    new.wait_for("took over 1 listener")
    load.goes_on()
    steady.goes_on()
    assert original.running
    room.wait_for_owner(new)
    status = room.status()
    assert status["generation"] == 2
    assert [listener["url"] for listener in status["listeners"]] == [room.url]
    steady.stop()
    original.wait_for("over")
    assert original.wait() == 0
    third = room.echo()
    third.wait_for("generation 3")
    assert new.wait() == 0
    load.goes_on()
    load.stop()
    assert not load.lost, load.lost


def test_status_does_not_disturb_the_original_script(room: Room, original: Program) -> None:
    with pytest.raises(NotRunning):
        query.status(room.control)
    asked = room.cli("status")
    assert asked.wait() == 3
    assert original.running and os.path.exists(room.control)
    room.round_trip()


def test_a_dry_run_does_not_disturb_the_original_script(room: Room, original: Program) -> None:
    """Merely to connect to it would be a takeover."""
    dry = room.cli("echo", "--listen", room.url, "--dry-run")
    assert dry.wait() in (0, 1)
    assert original.running
    room.round_trip()
    assert room.left_behind() == ["takeover.sock"]


def test_when_the_address_does_not_match_the_listener_is_reported_as_unused(room: Room, original: Program) -> None:
    new = room.cli("echo", "--listen", "tcp://127.0.0.1:0")
    assert room.url in new.wait_for("not used by this version")


def test_an_upgrade_that_fails_after_the_listener_was_given_away_says_so(room: Room, original: Program) -> None:
    """The original script cannot take anything back; strict is checked when it is too late for it."""
    new = room.cli("echo", "--listen", room.url, "--listen", "tcp://127.0.0.1:0", "--strict")
    assert new.wait() == 1
    assert "strict" in new.lines[-1]
    original.signal(signal.SIGKILL)
