"""What the supervisor tells its service manager beside what join() says for it: that its command is being replaced."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .supervisor import Moment, Observer, Supervisor


def observer_of(supervisor: Supervisor) -> Observer:
    """An observer that tells of a reload from its SIGHUP to its end, which is what Type=notify-reload waits for."""

    def tell(moment: Moment, text: str) -> None:
        assert supervisor.service is not None
        manager = supervisor.service.manager
        if moment.name == "RELOADING":
            manager.reloading(text)
        elif moment.name == "RELOADED":
            manager.reloaded(text)

    return tell
