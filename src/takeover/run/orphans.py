"""Nobody is left behind: this process is the parent of every orphan among its descendants, and finds them all.

As their subreaper (prctl(2)), or as PID 1 of a container, it inherits what a process of the command leaves behind. To
which process of the command an orphan belongs is known by its process group, or by the LISTEN_PID that it was started
with.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping

from .proc import all_processes, belongs_to


def parents() -> dict[int, tuple[int, int]]:
    """The parent and the process group of each process that lives, from proc_pid_stat(5); none without a /proc."""
    try:
        return {each.pid: (each.parent, each.group) for each in all_processes() if not each.has_ended}
    except OSError:
        return {}


def descendants(roots: Iterable[int], known: Mapping[int, tuple[int, int]]) -> list[int]:
    """The processes below some, without those."""
    below = defaultdict(list)
    for pid, (parent, _) in known.items():
        below[parent].append(pid)
    found: list[int] = []
    waiting = list(roots)
    while waiting:
        children = below.pop(waiting.pop(), [])
        found += children
        waiting += children
    return found


def tree(root: int, *, ended: bool = False) -> list[int]:
    """What lives of one process of the command: itself, its descendants, and the orphans that it has left behind.

    ended: it was waited for, and its pid may be somebody else's by now.
    """
    known = parents()
    own = os.getpid()
    roots = [
        pid for pid, (parent, group) in known.items() if parent == own and pid != root and belongs_to(pid, group, root)
    ]
    if not ended and (root in known or not known):
        roots.append(root)
    return [*roots, *descendants(roots, known)]


def kill(pids: Iterable[int], signum: int = signal.SIGKILL) -> None:
    """Sends a signal to each that is still there."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signum)


def end_all(spared: Collection[int] = ()) -> None:
    """Kills all children of this process, and what they leave behind, but for those to be spared; waits for them."""
    while True:
        known = parents()
        left = descendants([os.getpid()], {pid: of for pid, of in known.items() if pid not in spared})
        kill(left)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        if not left:
            return
        time.sleep(0.001)
