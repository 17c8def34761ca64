"""The garbage collector rests while live connections come in by the thousand.

Each of them makes some objects that stay, and CPython takes many objects that stay for a reason to look through all of
them, again and again, for garbage that is not there. What is garbage by then is found some hundred milliseconds later.
"""

from __future__ import annotations

import gc
import threading


class Collector:
    """The one of this process. It may be told from any thread, and is left alone where somebody else has stopped it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._reasons: set[object] = set()
        self._stopped = False

    def rest(self, reason: object) -> None:
        """Rests until wake() was called for each reason."""
        with self._lock:
            if not self._reasons and gc.isenabled():
                gc.disable()
                self._stopped = True
            self._reasons.add(reason)

    def wake(self, reason: object) -> None:
        """One reason less to rest; nothing happens if it was none."""
        with self._lock:
            self._reasons.discard(reason)
            if not self._reasons and self._stopped:
                gc.enable()
                self._stopped = False


collector = Collector()
