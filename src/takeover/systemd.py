"""What a service says to systemd, in whose words, and what it keeps there; docs/systemd.md tells the whole story.

systemd supervises one process of a unit, its main process, and with NotifyAccess=main it believes no other. So whoever
is the main process speaks: after a takeover the old process says MAINPID= of the new one, at the moment from which the
service cannot come back to it, and tells the new one along the control connection how it is to go on (DONE).
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from .borrowed import BorrowedSocket
from .listeners import Held, url_of
from .notify import Notifier, descriptor_name

logger = logging.getLogger("takeover")

LAST_WORDS = 1.0
"""Seconds that a process which ends gives the service manager to read what it has said."""

_UNIT = re.compile(r".*\.(?:service|scope)(?=/|\Z)")


class ServiceManager:
    """The service manager of this process, if it has one; every method may be called without, and does nothing then.

    `is_main` is whether this process is the one that the manager supervises and believes. `watchdog` is how often the
    manager wants to hear that we are alive, in seconds; 0.0 if it does not. The methods are for any thread.
    """

    def __init__(self, notifier: Notifier | None = None, watchdog: float = 0.0, *, stores: bool = False) -> None:
        self.is_main = False
        self.watchdog = watchdog
        self._notifier = notifier
        self._stores = stores
        self._started_as_main = True
        self._kept: dict[int, tuple[str, Held]] = {}
        self._heir = 0
        self._status = ""
        self._reloading = False
        self._spoke = False

    @classmethod
    def from_environment(cls) -> ServiceManager:
        """Reads NOTIFY_SOCKET, WATCHDOG_USEC and WATCHDOG_PID, FDSTORE and MAINPID, as systemd.exec(5) has them."""
        address = os.environ.get("NOTIFY_SOCKET", "")
        started_as_main = "MAINPID" not in os.environ  # that is for what ExecReload= and the like start
        if not address:
            self = cls()
            self._started_as_main = started_as_main
            return self
        # systemd has FDSTORE since 254, and MEMORY_PRESSURE_WATCH too: where only the latter is set, nothing can be
        # stored. Where neither is, it is to be tried.
        limit = os.environ.get("FDSTORE", "0" if "MEMORY_PRESSURE_WATCH" in os.environ else "unknown")
        self = cls(Notifier(address), _watchdog(), stores=limit != "0")
        self._started_as_main = started_as_main
        return self

    @property
    def may_come(self) -> bool:
        """Whether there is a manager, or the process that is taken over from may tell of one."""
        return self._notifier is not None or not self._started_as_main

    @property
    def keeps(self) -> int:
        """How many listeners the manager has been given, so that they survive every process of the service."""
        return len(self._kept) if self.is_main else 0

    def keeps_one(self, held: Held) -> bool:
        """Whether this is one of them, also when the service has ended: the manager is to give it to the next start."""
        return any(held is kept for _, kept in self._kept.values())

    # What the process says that starts, and serves.

    def ready(self, listeners: Iterable[Held], status: str) -> None:
        """The service is this process's, and serves; who was started as a reload waits until it is made main."""
        if self._started_as_main:
            self._begin(listeners, status)

    def succeed(self, said: Any, listeners: Collection[Held], unused: Iterable[int], status: str) -> None:
        """The takeover is final. `said` is what the old process has passed on, if it has; `unused` are descriptors of
        listeners that this version has no use for.

        Without the old one's word, a process that was started as a reload says itself that it is the main one;
        NotifyAccess=exec or all lets it.
        """
        if self.is_main:
            return
        if _is_legacy(said):
            self._notifier = Notifier(said["notify"])
            self.watchdog = said["watchdog"] / 1e6
            self._stores = said["stores"]
            self._begin(listeners, status)
            if self._stores:
                for name in {_name_of(each) for each in unused} - {name for name, _ in self._kept.values()}:
                    self._say("FDSTOREREMOVE=1", f"FDNAME={name}")
        elif self._notifier is not None:
            self._begin(listeners, status, f"MAINPID={os.getpid()}")

    def reloading(self, status: str) -> None:
        """A new version is on its way: that of a successor, or a replacement in place. reloaded() ends it."""
        if self.is_main:
            self._reloading = True
            self._say("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}", f"STATUS={status}")

    def reloaded(self, status: str) -> None:
        """The new version serves, or the old one serves on; `status` says which."""
        if self.is_main and self._reloading:
            self._reloading = False
            self._status = status
            self._say("READY=1", f"STATUS={status}")

    def alive(self) -> None:
        """Feeds the watchdog; to be called by the loop that does the work, so that nothing is said where it hangs."""
        if self.is_main:
            self._say("WATCHDOG=1")

    def _begin(self, listeners: Iterable[Held], status: str, *fields: str) -> None:
        self.is_main = self._notifier is not None
        self._status = status
        self._say("READY=1", *fields, f"STATUS={status}")
        if not self.is_main or not self._stores:
            return
        for held in listeners:
            if held.is_open:
                descriptor = held.sock.fileno()
                name = _name_of(descriptor)
                if self._say("FDSTORE=1", f"FDNAME={name}", descriptors=[descriptor]):
                    self._kept[os.fstat(descriptor).st_ino] = (name, held)

    # What the process says that is superseded, or ends.

    def superseded(self, pid: int, status: str) -> None:
        """The service is another process's for good, which the manager is to supervise from now on.

        One that belongs to another unit, or to none, cannot be the main process of this one: the service ends here.
        """
        if not self.is_main:
            return
        if pid <= 0 or not in_our_unit(pid):
            logger.warning(
                "pid %d, which has taken over, does not belong to this unit: systemd takes the service for ended; "
                "start new versions with systemctl reload",
                pid,
            )
            self._take_back(list(self._kept))
            self.stopping(f"taken over by pid {pid}, which does not belong to this unit")
            return
        self._heir = pid
        self._say("READY=1", f"MAINPID={pid}", f"STATUS={status}")
        self._fall_silent()

    def legacy(self) -> Mapping[str, Any] | None:
        """What the process that superseded() has named needs to know; None where it has named nobody."""
        if self._notifier is None or not self._heir:
            return None
        usec = round(self.watchdog * 1e6)
        return {"notify": self._notifier.address, "watchdog": usec, "stores": self._stores}

    def stopping(self, status: str) -> None:
        """The service ends. What the manager keeps stays with it: the next start of the unit is given that."""
        if self.is_main:
            self._say("STOPPING=1", f"STATUS={status}")
            self._fall_silent()

    def last_words(self) -> None:
        """Returns when the manager has read what was said, a second later at most; for the end of the process."""
        if self._notifier is not None and self._spoke:
            self._spoke = False
            self._notifier.wait_until_read(LAST_WORDS)

    def forget_closed(self) -> None:
        """Takes back what the server has closed meanwhile: clients would wait in a queue that nobody looks at."""
        if self.is_main:
            self._take_back([inode for inode, (_, held) in list(self._kept.items()) if not held.is_open])

    def _take_back(self, inodes: Iterable[int]) -> None:
        """A name may stand for a whole group of sockets, and goes with the last of them."""
        gone = {self._kept.pop(inode)[0] for inode in inodes}
        for name in gone - {name for name, _ in self._kept.values()}:
            self._say("FDSTOREREMOVE=1", f"FDNAME={name}")

    def _fall_silent(self) -> None:
        self.is_main = self._reloading = False

    def _say(self, *fields: str, descriptors: Collection[int] = ()) -> bool:
        if self._notifier is None:
            return False
        self._spoke = True
        return self._notifier.say(*fields, descriptors=list(descriptors))


def _watchdog() -> float:
    """Seconds of WATCHDOG_USEC, if it is meant for this process (sd_watchdog_enabled(3))."""
    usec, pid = os.environ.get("WATCHDOG_USEC", ""), os.environ.get("WATCHDOG_PID", "")
    if pid not in ("", str(os.getpid())) or not (usec.isascii() and usec.isdigit()):
        return 0.0
    return int(usec) / 1e6


def _name_of(descriptor: int) -> str:
    """A listener's name in the store: where it is bound, so that every version gives it the same one."""
    with BorrowedSocket(descriptor) as sock:
        return descriptor_name(url_of(sock))


def _is_legacy(said: Any) -> bool:
    return (
        isinstance(said, dict)
        and isinstance(said.get("notify"), str)
        and type(said.get("watchdog")) is int
        and 0 <= said["watchdog"] < 1 << 63
        and isinstance(said.get("stores"), bool)
    )


def in_our_unit(pid: int) -> bool:
    """Whether a process is in the control group of our unit, or below it; true where nobody can tell."""
    try:
        with open("/proc/self/cgroup") as ours, open(f"/proc/{pid}/cgroup") as theirs:
            return unit_of(ours.read()) == unit_of(theirs.read())
    except (OSError, ValueError):
        return True


def unit_of(text: str) -> str:
    """The control group of the unit that a process belongs to, from its /proc/PID/cgroup (cgroups(7)): the path up to
    the last part that ends in .service or .scope, since a unit may have groups below it; the whole path without one.
    """
    for line in text.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers in ("", "name=systemd"):
            unit = _UNIT.match(path)
            return unit[0] if unit is not None else path
    return ""
