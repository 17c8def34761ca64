"""Who is who across namespaces: pids that mean nothing here, and uids that this process cannot tell apart.

A container has a pid namespace of its own, and often a user namespace. The kernel translates what it tells of a peer:
a process that is not visible here has pid 0 (pid_namespaces(7)), and every uid without a mapping reads as one and the
same number, the overflow uid (user_namespaces(7)). So pids are for people; a pidfd or the end of a connection decides.
"""

from __future__ import annotations

import os
import re

ALL_UIDS = 2**32 - 1
"""The length of the only line of /proc/self/uid_map in a namespace that maps every uid, as the first one does."""


def in_words(pid: int, told: int = 0) -> str:
    """A process as log lines call it: `pid` as it is seen here, 0 for not at all; `told` is what it says of itself."""
    if pid:
        return f"pid {pid}"
    return f"pid {told} of another pid namespace" if told else "a process in another pid namespace"


def own_pid(pidfd: int | None) -> int | None:
    """The pid of a process in its own namespace, which is what it says of itself; None where nothing tells."""
    try:
        with open(f"/proc/self/fdinfo/{pidfd}", encoding="utf-8") as file:
            found = re.search(r"^NSpid:.*?(\d+)$", file.read(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) or None if found is not None else None


def is_process(pid: int, pidfd: int | None, told: int) -> bool:
    """Whether the process that the kernel names here is the one that says that it has the pid `told`."""
    own = own_pid(pidfd)
    return pid == told if own is None else own == told


def unmapped_uid() -> int | None:
    """The number as which every uid reads that has no mapping here; None where all have one."""
    try:
        with open("/proc/self/uid_map", encoding="utf-8") as file:
            lengths = [int(line.split()[2]) for line in file]
        if sum(lengths) >= ALL_UIDS:
            return None
        with open("/proc/sys/kernel/overflowuid", encoding="utf-8") as file:
            return int(file.read())
    except (OSError, ValueError, IndexError):
        return None


def mapping_hint(uid: int) -> str:
    """What to add to a line about a uid that may be anybody's."""
    if uid != unmapped_uid():
        return ""
    own = " (this process's own among them)" if uid == os.geteuid() else ""
    return f"; as which this user namespace shows every uid without a mapping{own}: map it"
