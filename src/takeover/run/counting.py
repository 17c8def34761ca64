"""How many connections a command has, seen from outside, for those who ask; nobody counts otherwise."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterable, Sequence

from . import conversations, proc
from .orphans import descendants, parents

FRESH = 1.0
"""Seconds for which a count is good: a process that drains is asked with each heartbeat."""


class Counting:
    """Called from any thread: TCP connections of these processes and of those below, accepted from the listeners.

    Those at UNIX sockets are not counted: nothing tells them from a connection that the command has made itself.
    """

    def __init__(self, pids: Callable[[], Iterable[int]], listeners: Callable[[], Sequence[socket.socket]]) -> None:
        self._pids, self._listeners = pids, listeners
        self._count, self._when = 0, float("-inf")

    def __call__(self) -> int:
        if time.monotonic() - self._when >= FRESH:
            try:
                roots = list(self._pids())
                listeners = [sock for sock in self._listeners() if sock.fileno() >= 0]
                holders = conversations.holders([*roots, *descendants(roots, parents())])
                self._count = len(conversations.of(holders, listeners))
            except (OSError, proc.Hidden):
                self._count = 0
            self._when = time.monotonic()
        return self._count
