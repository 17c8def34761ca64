"""A connection of the built-in echo costs the interpreter nothing when it moves: no Python object is made for it."""

from __future__ import annotations

import gc
import importlib
import os
import sys
from array import array
from collections.abc import Callable
from typing import Any

import pytest

from channel_cases import Scene
from conftest import CYTHON_IS_BUILT

pytestmark = pytest.mark.skipif(not CYTHON_IS_BUILT, reason="the compiled modules are not built")


def blocks(work: Callable[[], Any]) -> tuple[int, Any]:
    """How many blocks of memory the interpreter has more after this work, with its result."""
    before = sys.getallocatedblocks()
    result = work()
    return sys.getallocatedblocks() - before, result


def cost(count: int) -> list[int]:
    """Blocks that are left by each step of moving so many connections, what it returns included."""
    loops = importlib.import_module("takeover._loop")
    scene = Scene(loops, loops, "echo")
    try:
        scene.connect(count)
        giving, taking = scene.loops
        reasons: dict[str, int] = {}
        exported, (records, descriptors, _) = blocks(lambda: giving.export_connections(0, 251, 1 << 20, reasons))
        assert len(descriptors) == count
        theirs = array("i", map(os.dup, descriptors))
        relinquished, _ = blocks(lambda: giving.relinquish_connections(descriptors, ()))
        adopted, refused = blocks(lambda: taking.adopt_connections(records, theirs, 1))
        assert not refused
        started, _ = blocks(lambda: taking.start_connections(theirs, (), {}))
        scene.answers()
        return [exported, relinquished, adopted, started]
    finally:
        scene.close()


def test_moving_many_makes_as_many_objects_as_moving_few() -> None:
    gc.disable()
    try:
        cost(10)
        few, many = cost(10), cost(200)
    finally:
        gc.enable()
    assert all(after - before < 20 for before, after in zip(few, many, strict=True)), (few, many)
