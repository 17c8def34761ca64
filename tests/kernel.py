"""What the process of the tests has of the kernel, and calls that the kernel refuses."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

OPENED = "/proc/self/fd" if sys.platform == "linux" else "/dev/fd"


def open_descriptors() -> list[str]:
    """What this process holds. Garbage is collected before each test of a module that looks (conftest.py)."""
    return os.listdir(OPENED)


def opened() -> int:
    """How many descriptors this process holds."""
    return len(open_descriptors())


def failing(number: int) -> Callable[..., None]:
    """What takes any arguments and raises OSError with that number."""

    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail
