"""The state of protocol classes moves with their connections, or they stay where they are: said plainly, counted once."""

from __future__ import annotations

import pytest

from clients import eventually
from processes import Program, Room


def take_over(room: Room, old: Program, new: Program) -> None:
    """Waits until the new one owns the service and the old one has ended well."""
    room.wait_for_owner(new)
    assert old.wait() == 0, old.text


def test_the_state_moves_and_the_handler_may_know_from_where_and_how_often(room: Room) -> None:
    old = room.protocols()
    old.wait_for("serving")
    talker = room.talker()
    first = talker.say("one")
    assert (first["pid"], first["moved"], first["count"]) == (old.pid, None, 1)
    for generation in (1, 2, 3):
        new = room.protocols()
        take_over(room, old, new)
        answer = talker.say("again")
        assert (answer["pid"], answer["moved"], answer["count"]) == (new.pid, [generation, generation], generation + 1)
        assert (answer["peer"], answer["local"]) == (first["peer"], first["local"])
        old = new
