"""Walks the tables of both protocols exhaustively and prints how many worlds there are: `python walks.py`, in tests/.

Each line is a set of rules of test_explorer.py or test_channel_explorer.py: what may happen besides what the tables
say. The exit status is 1 if a check of theirs is false in any world, with the shortest way to that.
"""

from __future__ import annotations

import sys
import time

import test_channel_explorer
import test_explorer
from channel_explorer import walk as walk_channel
from explorer import Violation, walk


def main() -> int:
    """Exit status 0, or 1 if there was a violation."""
    violations = 0
    for what, walks, step in (
        ("takeover", test_explorer.WALKS, walk),
        ("channel", test_channel_explorer.WALKS, walk_channel),
    ):
        for name, (rules, checks) in walks.items():
            began = time.monotonic()
            try:
                walked = step(rules, {check.__name__: check for check in checks})
            except Violation as error:
                violations += 1
                print(f"{what}, {name}: {error}")
            else:
                seconds = time.monotonic() - began
                print(f"{what}, {name}: {walked.worlds:,} worlds, {walked.ends:,} ends, {seconds:.0f} s", flush=True)
    print(f"violations: {violations}")
    return int(violations > 0)


if __name__ == "__main__":
    sys.exit(main())
