"""The echo server: every byte that comes in goes out again. It has a handler of its own in the compiled loop."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

from ._backend import loop
from .server import SIGNALS, serve

LISTEN = "tcp://127.0.0.1:9999"
CONTROL = "./takeover.sock"


def echo(**options: Any) -> None:
    """Runs the echo server, as the last thing that a process does; the options are those of serve().

    How the process ends is settled when this returns: from then on SIGTERM and SIGINT are ignored.
    """
    for signum in SIGNALS:
        signal.signal(signum, _end)
    try:
        serve(loop.ECHO, service="echo", **options)
    finally:
        for signum in SIGNALS:
            signal.signal(signum, signal.SIG_IGN)


def _end(_signum: int, _frame: FrameType | None) -> None:
    """For the instants in which serve() does not have the signals yet, or any more."""
    raise SystemExit(0)
