"""The proof that a command accepts on its listeners: each is looked at from time to time until it is proven.

A process that waits on a listener is the sign to probe it; a probe that a process of the command has accepted is the
proof. Probes go out in small bursts, for processes of the old command wake up for them too.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence

from .probes import Endpoint, Probe
from .proc import Tree
from .waiting import CALLS_ARE_KNOWN, Seen, Waiter, look
from .waking import Waking, Window

LARGEST_BURST = 8
"""Probes of one listener at once; each takes a descriptor here, and one where it is accepted."""

UNASKED = 1.0
"""Seconds between probes of a listener on which no process of the command is seen waiting: it may have ways to wait
that are not seen from outside (io_uring)."""

ABANDONED = 3.0
"""Seconds after which a probe that nobody accepts is given up for another."""

PASSED_OVER = (50, 3.0)
"""Probes that others took, and seconds in which a process was seen waiting, until that counts: with one chance in ten
of being the one that accepts, 50 in a row fail once in 200 times."""

CLOSED_AT_ONCE = 5
"""Probes that were accepted and closed before anybody could look by whom, and looks at which a process was seen
waiting, until that counts: a server that answers and closes in one go gives no better proof."""

BUSY = 10.0
"""Seconds that a command must live whose processes cannot be looked into, where one of them wakes up all the time, so
that nothing can be told from that, and a probe was accepted by somebody."""


class Target:
    """One listener on its way to its proof."""

    def __init__(self, where: Endpoint) -> None:
        self.where = where
        self.proof = ""
        self.proven: Probe | None = None
        self.probes: list[Probe] = []
        self.others = 0
        self.vanished = 0
        self.seen_waiting = 0
        self.lost = ""
        self.waiter: Waiter | None = None
        self.waits_since = 0.0
        self.asked = time.monotonic()
        self.unseen = 0
        self.waking: Waking | None = None

    def close(self) -> None:
        for probe in [*self.probes, self.proven]:
            if probe is not None:
                probe.close()
        self.probes, self.proven = [], None


class Acceptance:
    """Looks at the listeners of one command until all are proven; after that and at the end it is to be closed."""

    def __init__(self, endpoints: Sequence[Endpoint], strict: bool) -> None:
        """strict: that a process waits does not do for a proof, however long others take all probes."""
        self.targets = [Target(where) for where in endpoints]
        self.seen: Seen | None = None
        self._strict = strict
        self._started = time.monotonic()

    def look(self, tree: Tree) -> str:
        """The proof in words, once there is one for every listener; else an empty text."""
        pids = tree.members()
        open_targets = [target for target in self.targets if not target.proof]
        self.seen = look(pids, [target.where.inode for target in open_targets])
        for target in open_targets:
            self._collect(target, pids)
            if not target.proof:
                self._weigh(target, self.seen)
            if not target.proof and target.where.type == socket.SOCK_STREAM:
                if not self.hidden or target.where.private:
                    self._probe(target, self.seen)
                elif target is open_targets[0]:  # a probe of another one would wake it up, too
                    self._watch(target, self.seen)
                self._collect(target, pids)
        return "; ".join(dict.fromkeys(target.proof for target in self.targets)) if self.proven else ""

    @property
    def proven(self) -> bool:
        return all(target.proof for target in self.targets)

    @property
    def hidden(self) -> str:
        """Why the command's processes cannot be looked into; empty if they can."""
        return self.seen.hidden if self.seen is not None else ""

    def take(self) -> Probe:
        """The first listener's proven connection, which is the caller's from now on; that listener is open again.

        A new one where it could not be seen who accepts. Raises OSError if there are no descriptors left.
        """
        target = self.targets[0]
        probe, target.proven, target.proof = target.proven, None, ""
        return probe or Probe(target.where)

    def close(self) -> None:
        """Ends all probes; harmless a second time."""
        for target in self.targets:
            target.close()

    def _collect(self, target: Target, pids: Sequence[int]) -> None:
        """Sees what has become of the probes."""
        left: list[Probe] = []
        for probe in target.probes:
            taken = None if target.proof else probe.taken(pids)
            url = target.where.url
            if target.proof or probe.lost:
                target.lost = probe.lost
                target.vanished += probe.vanished
                target.unseen += probe.vanished and bool(self.hidden)
                probe.close()
            elif taken is None:
                left.append(probe)
            elif taken.pid is not None:
                target.proven = probe
                target.proof = f"pid {taken.pid} accepted a probe on {url}"
            elif taken.hidden and target.where.private:
                target.proven = probe
                target.proof = f"a probe was accepted on {url}, of which only this command was told"
            elif taken.hidden:
                target.unseen += 1
                left.append(probe)  # to close it now would wake up whoever has accepted it
            else:
                target.others += 1
                probe.close()
        target.probes = left

    def _weigh(self, target: Target, seen: Seen) -> None:
        """What counts where no probe has proved anything."""
        url = target.where.url
        target.waiter = seen.waiting.get(target.where.inode)
        now = time.monotonic()
        if target.waiter is not None:
            target.waits_since = target.waits_since or now
            target.seen_waiting += 1
            if target.where.type != socket.SOCK_STREAM:
                target.proof = f"pid {target.waiter.pid} waits on {url}: {target.waiter.how}"
            elif not self._strict and target.others >= PASSED_OVER[0] and now - target.waits_since >= PASSED_OVER[1]:
                target.proof = (
                    f"pid {target.waiter.pid} waits on {url} ({target.waiter.how}); others took all "
                    f"{target.others} probes"
                )
            elif min(target.vanished, target.seen_waiting) >= CLOSED_AT_ONCE:
                target.proof = (
                    f"pid {target.waiter.pid} waits on {url} ({target.waiter.how}); {target.vanished} probes were "
                    "closed too soon to tell who had accepted them"
                )

    def _watch(self, target: Target, seen: Seen) -> None:
        """Probes a command whose processes cannot be looked into."""
        now = time.monotonic()
        target.waking = target.waking or Waking()
        window = target.waking.look(seen.processes, now)
        if window is Window.CLOSED:
            target.close()
        elif window is Window.PROBED:
            target.probes.append(Probe(target.where))
        found = target.waking.judge()
        if not found and target.waking.busy is not None and now - self._started >= BUSY:
            found = f"pid {target.waking.busy} is busy"
        if found and target.unseen:
            target.proof = (
                f"{found}; who has accepted them on {target.where.url} is not to be seen ({seen.hidden}): READY=1 or a "
                "listener {fd:probe} would prove it"
            )

    def _probe(self, target: Target, seen: Seen) -> None:
        now = time.monotonic()
        if target.probes:
            if now - target.asked < ABANDONED:
                return
            target.probes.pop(0).close()
        waits = target.waiter is not None or target.where.private
        if not waits and now - target.asked < (UNASKED if CALLS_ARE_KNOWN else UNASKED / 4):
            return
        target.asked = now
        burst = min(LARGEST_BURST, 1 << min(target.others, 3)) if waits else 1
        target.probes += [Probe(target.where) for _ in range(burst)]
