"""Start a keeper; `_keeper_py` is the same interface in plain Python."""

from collections.abc import Collection

def start(listening: int, first: int, allowed: Collection[int]) -> None: ...
