"""Why a command is not ready, in one plain line, from what can be seen of its processes; and what to do about it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Sequence

from . import proc, sock_diag
from .acceptance import Acceptance, Target
from .waiting import Seen, look

GRANIAN = (
    "Granian cannot take listening sockets: it binds its own. What works instead: uvicorn with --fd {fd}, hypercorn "
    "with --bind fd://{fd} or gunicorn behind `takeover run`; or Granian alone with its own --workers, each of which "
    "binds the port with SO_REUSEPORT"
)


def is_granian(pids: Iterable[int]) -> bool:
    """Whether one of these processes runs the command `granian`, itself or by an interpreter."""
    for pid in pids:
        words = proc.words(pid)
        names = [os.path.basename(word) for word in words[:3]]
        if "granian" in names[:2] or (words[1:2] == ["-m"] and names[2:] == ["granian"]):
            return True
    return False


def why_not(tree: proc.Tree, acceptance: Acceptance | None, given: Sequence[int]) -> str:
    """What is wrong with a command that lives, or has left something behind; empty if nothing is to be seen.

    given: the inodes of the listeners that it was started with. acceptance: None where nobody looks at listeners.
    """
    pids = tree.members()
    if pids and tree.root not in pids:
        holding = look(pids, given).holding
        what = " with the listeners" if holding else ""
        return (
            f"it forked away: pid {pids[0]} went on in the background{what}; tell it to stay in the foreground, "
            "as servers under a supervisor do"
        )
    if not pids or acceptance is None:
        return ""
    missing = [target for target in acceptance.targets if not target.proof]
    seen = look(pids, [target.where.inode for target in missing])
    return _about(missing[0], seen, given) if missing else ""


def _about(target: Target, seen: Seen, given: Sequence[int]) -> str:
    where = target.where
    if seen.hidden and where.inode not in seen.holding:
        return (
            f"whether it accepts on {where.url} is not to be seen from here ({seen.hidden}); --ready notify works for "
            "any user, and so does a probe listener {fd:probe}"
        )
    own = [] if not where.inode or where.inode in seen.registered else own_listeners(seen.processes, given)
    if own:
        return (
            f"it listens on {', '.join(own)}, which it has bound itself, and not on the descriptor of {where.url} that "
            "it was given; servers take it by an option like --fd {fd} or fd://{fd}"
        )
    if target.waiter is not None and target.others:
        return f"pid {target.waiter.pid} waits on {where.url}, but {target.others} probes were all taken by others"
    if where.inode in seen.waiting:
        lost = f" ({target.lost})" if target.lost else ""
        return f"pid {seen.waiting[where.inode].pid} waits on {where.url}, but has accepted no probe{lost}"
    if not where.inode:
        return f"nothing of it accepts on {where.url} ({target.lost or 'no probe was accepted'})"
    if where.inode in seen.registered:
        pid = seen.registered[where.inode]
        return f"pid {pid} has {where.url} in its epoll set but does not come to wait there: {doing([pid])}"
    if where.inode in seen.holding:
        return f"it has {where.url} open but never waits on it or accepts: {doing(seen.processes)}"
    return f"it has closed the descriptor of {where.url} that it was given, and listens nowhere else"


def doing(pids: Iterable[int]) -> str:
    """What processes do instead of serving."""
    told: list[str] = []
    for pid in pids:
        process = proc.look_at(pid)
        if process is not None:
            used = f"{process.ticks / os.sysconf('SC_CLK_TCK'):.1f} s of CPU used"
            where = proc.asleep_in(pid)
            state = {"R": "it runs", "T": "it is stopped", "D": "it waits for a disk or the like"}.get(
                process.state, f"it sleeps in {where}" if where else "it sleeps"
            )
            told.append(f"pid {pid} ({printable(process.name)}): {state}, {used}")
    more = f" and {len(told) - 3} more" if len(told) > 3 else ""
    return "; ".join(told[:3]) + more


def printable(text: str) -> str:
    """What a process has said, fit for a line on a terminal."""
    return "".join(each if each.isprintable() else " " for each in text).strip()


def own_listeners(pids: Iterable[int], given: Sequence[int]) -> list[str]:
    """The addresses on which processes listen with sockets that they were not given."""
    held: set[int] = set()
    for pid in pids:
        with contextlib.suppress(proc.Hidden):
            held |= {inode for link in proc.descriptors(pid).values() if (inode := proc.inode_of(link)) is not None}
    held -= set(given)
    return [url for url, inode in sock_diag.all_listeners() if inode in held] if held else []
