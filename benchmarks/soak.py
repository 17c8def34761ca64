"""A thousand takeovers in a row under 5,000 new clients a second, beside the same load without one."""

from __future__ import annotations

import os

from .plan import Plan
from .restart_rivals import TakeoverCython, TakeoverPython
from .restarts import run


def soak(plan: Plan, takeovers: int, pause: float, quiet_seconds: float) -> None:
    """Both backends; the slowest of many depends on how many there are, so the quiet run should be about as long.

    A takeover that follows within the probation of the last one is told BUSY, so the probation is short here.
    """
    os.environ.setdefault("TAKEOVER_PROBATION", "0.1")
    run(plan, "soak", (TakeoverCython, TakeoverPython), takeovers, pause, quiet_seconds)
