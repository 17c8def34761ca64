"""Chooses, once for the process, between the compiled hot path and its plain-Python twin.

TAKEOVER_BACKEND is read at the first import: "auto" (the default) takes the compiled modules where they can be
imported, "cython" insists on them, "python" never asks for them.
"""

from __future__ import annotations

import os
from types import ModuleType

from .errors import UsageError
from .interpreter import refuse_subinterpreters


def _choose(wanted: str) -> tuple[str, ModuleType, ModuleType]:
    if wanted not in ("auto", "cython", "python"):
        raise UsageError(f"TAKEOVER_BACKEND={wanted}: must be auto, cython or python")
    if wanted != "python":
        try:
            from . import _fdpass, _loop

            return "cython", _fdpass, _loop
        except ImportError as error:
            if wanted == "cython":
                raise UsageError(
                    f"TAKEOVER_BACKEND=cython, but the compiled modules cannot be imported ({error}); "
                    "install a wheel for this platform, or set TAKEOVER_BACKEND=auto"
                ) from error
    from . import _fdpass_py, _loop_py

    return "python", _fdpass_py, _loop_py


refuse_subinterpreters()
backend, fdpass, loop = _choose(os.environ.get("TAKEOVER_BACKEND") or "auto")
ECHO = loop.ECHO
Loop = loop.Loop
