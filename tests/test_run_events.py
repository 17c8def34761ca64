"""The supervisor's loop: descriptors, timers, and calls from other threads."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

import pytest

from takeover.run.events import Events


@pytest.fixture
def events() -> Iterator[Events]:
    loop = Events()
    yield loop
    loop.close()


def test_timers_fire_in_the_order_of_their_time_and_cancelled_ones_never(events: Events) -> None:
    fired: list[str] = []
    events.call_later(0.02, lambda: (fired.append("second"), events.stop()))
    events.call_later(0.01, lambda: fired.append("first"))
    events.call_later(0.015, lambda: fired.append("never")).cancel()
    events.run()
    assert fired == ["first", "second"]


def test_a_post_from_another_thread_wakes_a_loop_without_timers(events: Events) -> None:
    thread = threading.Thread(target=lambda: events.post(events.stop))
    thread.start()
    events.run()
    thread.join()


def test_a_callback_that_unwatches_another_descriptor_silences_it_in_the_same_turn(events: Events) -> None:
    pipes = [os.pipe(), os.pipe()]
    called: list[int] = []

    def only_once(index: int) -> None:
        called.append(index)
        for reading, _ in pipes:
            events.unwatch(reading)

    for index, (reading, writing) in enumerate(pipes):
        events.watch(reading, lambda index=index: only_once(index))
        os.write(writing, b"x")
    events.run_once()
    assert len(called) == 1
    for descriptors in pipes:
        for descriptor in descriptors:
            os.close(descriptor)


def test_more_posts_than_the_pipe_holds_all_come(events: Events) -> None:
    count = 100_000
    seen: list[int] = []
    for number in range(count):
        events.post(lambda number=number: seen.append(number))
    events.run_once()
    assert seen == list(range(count))


def test_a_run_that_was_stopped_can_be_run_again(events: Events) -> None:
    events.stop()
    events.run()
    events.call_later(0, events.stop)
    events.run()
