"""What the supervisor tells its service manager beside what join() says for it: that its command is being replaced."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .supervisor import Moment, Observer, Supervisor


def observer_of(supervisor: Supervisor) -> Observer:
    """An observer that tells of a reload from its SIGHUP to its end, which is what Type=notify-reload waits for."""

    def tell(moment: Moment, text: str) -> None:
        service = supervisor.service
        if service is None:
            return
        if moment.name == "RELOADING":
            service.manager.reloading(text)
        elif moment.name == "RELOADED":
            service.manager.reloaded(text)

    return tell
