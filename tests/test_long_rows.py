"""A long row of takeovers and moves in one process: at its end there is what was there at its beginning.

Alone a row is a thousand long; where sweeps take a part, a part of that.
"""

from __future__ import annotations

import contextlib
import gc
import os
import threading
import tracemalloc
from collections.abc import Callable
from types import ModuleType

import pytest

import takeover
from channel_cases import Scene, Tally
from clients import eventually
from kernel import opened
from processes import STEP, Room, descriptors_at_rest
from takeover import namespaces

LONG = max(100, 1000 // STEP)
FIRST = 250
"""After so many takeovers the interpreter's cache of attributes has all the names that it keeps."""
OURS = tracemalloc.Filter(True, "*/takeover/*")


def growth(once: Callable[[], None], first: int) -> tuple[int, list[str]]:
    """What a long row leaves: descriptors, and what a line of takeover's allocates and keeps each time."""
    tracemalloc.start()
    try:
        for _ in range(first):
            once()
        gc.collect()
        eventually(lambda: descriptors_at_rest(os.getpid()), "no link is open")
        descriptors, before = opened(), tracemalloc.take_snapshot().filter_traces([OURS])
        for _ in range(LONG):
            once()
        gc.collect()
        eventually(lambda: descriptors_at_rest(os.getpid()), "no link is open")
        left = opened() - descriptors
        after = tracemalloc.take_snapshot().filter_traces([OURS])
    finally:
        tracemalloc.stop()
    grown = [each for each in after.compare_to(before, "lineno") if each.count_diff >= LONG]
    return left, [str(each) for each in grown]


def test_what_each_round_keeps_on_purpose_is_found() -> None:
    kept: list[object] = []
    with contextlib.ExitStack() as stack:

        def keep() -> None:
            kept.append(namespaces.in_words(len(kept) + 1000))
            stack.callback(os.close, os.open("/dev/null", os.O_RDONLY))

        descriptors, lines = growth(keep, 1)
    assert descriptors == LONG
    assert len(lines) == 1 and "namespaces.py" in lines[0]


def test_a_long_row_of_takeovers_leaves_no_memory_no_descriptor_and_no_thread(room: Room) -> None:
    services = [takeover.join(room.control, probation=0)]
    services[0].listen(room.url)
    services[0].ready()
    threads = threading.active_count()

    def take_over() -> None:
        older = services.pop()
        newer = takeover.join(room.control, probation=0)
        services.append(newer)
        newer.listen(room.url)
        newer.ready()
        assert newer.generation > older.generation
        assert eventually(lambda: older.wait(0), "the older process is released")
        older.close()

    try:
        left = growth(take_over, FIRST)
    finally:
        services[0].close()
    assert left == (0, [])
    assert services[0].generation == FIRST + LONG + 1
    eventually(lambda: threading.active_count() < threads, "the last control thread ends")
    assert room.left_behind() == []


@pytest.mark.parametrize("handler", ["echo", Tally], ids=["native", "protocol"])
def test_a_long_row_of_moves_leaves_no_memory_and_no_descriptor(
    loop_module: ModuleType, handler: str | type[Tally]
) -> None:
    def move() -> None:
        scene = Scene(loop_module, loop_module, handler)
        for client in scene.connect(3):
            client.sendall(b"unread")
        scene.move()
        scene.until(lambda: scene.counts() == (0, 3))
        scene.close()

    assert growth(move, 20) == (0, [])
