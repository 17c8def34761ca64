"""The garbage collector's rest (collector.py)."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from takeover.collector import Collector


@pytest.fixture(autouse=True)
def enabled() -> Iterator[None]:
    gc.enable()
    yield
    gc.enable()


def test_it_rests_until_every_reason_has_gone() -> None:
    collector = Collector()
    collector.rest("one")
    collector.rest("other")
    collector.rest("other")
    assert not gc.isenabled()
    collector.wake("one")
    assert not gc.isenabled()
    collector.wake("other")
    assert gc.isenabled()


def test_one_that_somebody_else_has_stopped_stays_so() -> None:
    gc.disable()
    collector = Collector()
    collector.rest("one")
    collector.wake("one")
    assert not gc.isenabled()


def test_a_reason_that_is_none_wakes_nobody() -> None:
    collector = Collector()
    collector.rest("one")
    collector.wake("other")
    assert not gc.isenabled()
    collector.wake("one")
    gc.disable()
    collector.wake("one")
    assert not gc.isenabled()
