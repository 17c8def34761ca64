"""The moments at which a service tells its service manager something, and the watchdog that it feeds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .systemd import ServiceManager

if TYPE_CHECKING:
    from .controller import Controller
    from .wire import Body

MANY = 3
"""Listeners that a line for an operator names one by one."""


class Moments:
    """Speaks for one Controller, in its thread; `manager` does the talking, and is for any thread."""

    def __init__(self, owner: Controller) -> None:
        self.owner = owner
        self.manager = ServiceManager()

    def ready(self) -> None:
        """The service is this process's, be it after a cold start or a commit that may still be undone."""
        if self.owner.state in ("serving", "probation"):
            self.manager.ready(self.owner.listeners, self.serving())
        self._feed_watchdog()

    def succeeded(self, body: Body) -> None:
        """A takeover is final; `body` is that of the old process's DONE, or empty where it is gone."""
        unused = [kept.descriptor for kept in self.owner.unclaimed]
        self.manager.succeed(body.get("manager"), self.owner.listeners, unused, self.serving())
        self._feed_watchdog()

    def asked(self, who: str) -> None:
        """A successor has been let in."""
        self.manager.reloading(f"{who} is taking over; {self.serving()}")

    def refused(self, reason: str) -> None:
        """It does not take over after all."""
        self.manager.reloaded(f"{self.serving()}; the last takeover is off: {reason}")

    def released(self, pid: int) -> None:
        """It owns the service for good."""
        generation = self.owner.generation + 1
        self.manager.superseded(pid, f"pid {pid} has taken over and serves (generation {generation})")

    def stopping(self, why: str) -> None:
        """The service ends here."""
        self.manager.stopping(why)

    def status(self) -> dict[str, Any]:
        """What `takeover status` shows; empty where no service manager believes this process."""
        manager = self.manager
        if not manager.is_main:
            return {}
        return {"service_manager": {"watchdog": manager.watchdog or None, "keeps": manager.keeps}}

    def serving(self) -> str:
        """The line for an operator while all is well."""
        urls = [held.url for held in self.owner.listeners]
        where = ", ".join(urls) if len(urls) <= MANY else f"{len(urls)} listeners"
        return f"serving {where or 'no listener'} (generation {self.owner.generation})"

    def _feed_watchdog(self) -> None:
        """Twice in each interval, as sd_watchdog_enabled(3) asks, by way of the loop that serves."""
        if self.manager.is_main and self.manager.watchdog:
            self.owner.server.alive(self.manager.alive)
            self.owner.call_in(self.manager.watchdog / 2, self._feed_watchdog)
