"""What a takeover asks of the server around it, and what that asks of a takeover."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from .channel import Channel
    from .protocol import Limits


class Server:
    """What a takeover asks of the server around it. Each method is called in the control thread and must not block.

    `live` says whether it can take live connections from an older process.
    """

    live = False

    def start_accepting(self) -> None:
        """Accept again: a takeover that had been committed was undone."""

    def stop_accepting(self, kept: frozenset[str]) -> None:
        """Stop accepting on all listeners but those named, which the successor has no use for."""

    def drain(self) -> None:
        """The successor is settled: serve what is left, close the listeners, end."""

    def undone(self, reason: str) -> None:
        """The incumbent took the service back in our probation: stop accepting, serve what is left, end."""

    def stop(self) -> None:
        """Somebody asked for the end of the service."""

    def take_connections(self, channel: Channel, limits: Limits) -> None:
        """An older process moves its live connections here along a channel, which is the server's from now on."""
        channel.close()

    def give_connections(self, channel: Channel, limits: Limits) -> None:
        """The successor asks for the live connections, along a channel that is the server's from now on."""
        channel.close()

    def connections(self) -> int:
        """How many connections are open."""
        return 0

    def moves(self) -> dict[str, Any]:
        """What has moved, for status; empty where nothing ever does."""
        return {}

    def details(self) -> dict[str, Any]:
        """What status shows besides, under names of its own."""
        return {}

    def alive(self, answer: Callable[[], object]) -> None:
        """The watchdog of a service manager asks for an answer, given by the loop that serves, from any thread."""
        answer()

    def after_fork(self) -> None:
        """In a forked child, where this server does not run: close what only the server needs."""


class Settings(NamedTuple):
    """How this process takes part; see join()."""

    service: str
    strict: bool
    dry_run: bool
    probation: float
    drain_timeout: float
    max_generations: int
    limits: Limits
    keeper: bool = False
