"""Which interpreter of the process this is: takeover belongs into the main one."""

from __future__ import annotations

import contextlib
from importlib import import_module

from .errors import UsageError

LOWER_HALVES = ("_interpreters", "_xxsubinterpreters")
"""The module below PEP 734's, by either of its names; Python may have been built without it."""


def refuse_subinterpreters() -> None:
    """Raises UsageError in any interpreter but the main one.

    The compiled modules can be imported in one interpreter only, signals come to the main one, others may neither fork
    nor have daemon threads; and a service is of a process, not of a part of one.
    """
    for name in LOWER_HALVES:
        with contextlib.suppress(ImportError):
            interpreters = import_module(name)
            if interpreters.get_current() != interpreters.get_main():
                raise UsageError(
                    "takeover does not work in a subinterpreter: use it in the main one, or start a process"
                )
