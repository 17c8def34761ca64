"""What could not travel in a message is refused before anything has been done."""

from __future__ import annotations

import pytest

import takeover
from processes import Room
from takeover.errors import RemoteProtocolError, UsageError
from takeover.wire import HEADER, MAGIC, Decoder, Type


@pytest.mark.parametrize("text", ["x" * 1001, "two\nlines"])
def test_a_name_that_no_message_could_carry_is_a_mistake_of_the_caller(room: Room, text: str) -> None:
    with pytest.raises(UsageError, match="service"):
        takeover.join(room.control, service=text)
    assert room.left_behind() == []
    with takeover.join(room.control) as service, pytest.raises(UsageError, match="name"):
        service.listen(room.url, name=text)
    assert room.left_behind() == []


def test_no_memory_is_spent_on_a_message_that_is_not_for_this_side() -> None:
    decoder = Decoder({Type.JOIN})
    with pytest.raises(RemoteProtocolError, match="REPORT is not for this side"):
        decoder.feed(HEADER.pack(MAGIC, Type.REPORT, 0, 16 << 20), [])
