"""Which interpreter of the process this is: takeover belongs into the main one."""

from __future__ import annotations

import contextlib
from typing import Any

from .errors import UsageError


def _lower_half() -> Any:
    """The module below PEP 734's, by either of its names; None where Python was built without it."""
    with contextlib.suppress(ImportError):
        import _interpreters  # type: ignore[import-not-found, unused-ignore]

        return _interpreters
    with contextlib.suppress(ImportError):
        import _xxsubinterpreters  # type: ignore[import-not-found, unused-ignore]

        return _xxsubinterpreters
    return None


def refuse_subinterpreters() -> None:
    """Raises UsageError in any interpreter but the main one.

    The compiled modules can be imported in one interpreter only, signals come to the main one, others may neither fork
    nor have daemon threads; and a service is of a process, not of a part of one.
    """
    interpreters = _lower_half()
    if interpreters is not None and interpreters.get_current() != interpreters.get_main():
        raise UsageError("takeover does not work in a subinterpreter: use it in the main one, or start a process")
