"""The crew: the processes that run one version of the command, as many as there are workers, kept alive.

A crew is formed when each of them has been ready once; until then the first that fails is the failure of the crew. In a
crew that was formed, a process that ends is started again: after 0.1 s, then after twice as long each time, up to 10 s,
and after 0.1 s again once it has served for ten seconds. One that does not get ready is killed, and tried again.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from takeover.errors import CommandError, UsageError
from takeover.exchange import logger

from . import orphans, process
from .command import Listening, environment_of, executable_of, fill_in
from .events import Events, Timer
from .options import Options
from .output import Relay
from .quieting import Quieting
from .readiness import Check, Way
from .remains import MARK, mark
from .running import Running, in_words

FIRST_PAUSE = 0.1
LONGEST_PAUSE = 10.0
HEALTHY = 10.0
"""Seconds in service after which a process counts as healthy."""

FAILED_STOP = 5.0
"""Seconds that a process which is not wanted after all has to end what it may have accepted already."""


class Plan(NamedTuple):
    """What a crew is made from; the listeners are the service's. `ignored`: signals that the command ignores."""

    options: Options
    listeners: Sequence[Listening]
    way: Way
    ignored: frozenset[int]


class Member:
    """One place in the crew, and the process that is in it now."""

    def __init__(self, crew: Crew) -> None:
        self.running: Running | None = None
        self.relay: Relay | None = None
        self.ready_since: float | None = None
        self.ready_at: float | None = None
        self.restarts = 0
        self.last_exit: str | None = None
        self._crew = crew
        self._pause = FIRST_PAUSE
        self._check: Check | None = None
        self._again: Timer | None = None
        self._overdue: Timer | None = None
        self._failure = ""

    @property
    def is_ready(self) -> bool:
        return self.ready_since is not None

    def start(self) -> None:
        """Starts a process in this place."""
        crew, plan = self._crew, self._crew.plan
        self._again = self.relay = None
        self._failure = ""
        try:
            check = self._make_check()
            probe = [] if check.probe is None else [Listening(*check.probe)]
            words = fill_in(plan.options.command, [*plan.listeners, *probe])
            names = [*(listener.name for listener in plan.listeners), *(name for name, _ in check.descriptors)]
            descriptors = [listener.sock.fileno() for listener in plan.listeners]
            descriptors += [descriptor for _, descriptor in check.descriptors]
            environment = environment_of(names, {**check.environment, MARK: mark(plan.options.control)})
            outputs = self._relay_output(check)
            pid = process.start(executable_of(words[0]), words, environment, descriptors, plan.ignored, outputs)
        except (CommandError, UsageError) as error:
            self._begin_relay()
            reason = str(error)
            self._close_check()
            crew.events.post(lambda: self._not_ready(reason))
            return
        options = plan.options
        running = Running(
            crew.events,
            pid,
            self._ended,
            lambda: crew.lost_tree(running),
            stop_signal=options.stop_signal,
            stop_timeout=options.stop_timeout,
        )
        self.running = running
        crew.trees.append(running)
        logger.info("started pid %d: %s", pid, " ".join(words))
        self._overdue = crew.events.call_later(options.ready_timeout, self._is_overdue)
        self._begin_relay()
        check.started(pid)

    def _make_check(self) -> Check:
        plan = self._crew.plan
        try:
            self._check = Check(
                plan.way,
                self._crew.events,
                plan.listeners,
                self._is_ready,
                self._has_failed,
                plan.options.command,
            )
        except OSError as error:
            raise CommandError(f"a socket to tell whether the command is ready: {error.strerror}") from None
        return self._check

    def _relay_output(self, check: Check) -> tuple[int, int] | None:
        """The outputs for a process whose output the check reads; else it inherits ours."""
        if not self._crew.plan.way.reads_output:
            return None
        try:
            self.relay = Relay(self._crew.events, check.output)
        except OSError as error:
            raise CommandError(f"a pipe for the output of the command: {error.strerror}") from None
        return self.relay.ends

    def _begin_relay(self) -> None:
        if self.relay is not None:
            self.relay.started()

    def _is_ready(self, how: str) -> None:
        assert self.running is not None
        if self.is_ready or self._crew.stopping:
            return
        self._cancel(self._overdue)
        if self.relay is not None:
            self.relay.calm()
        self.ready_since, self.ready_at = time.monotonic(), time.time()
        milliseconds = (self.ready_since - self.running.began) * 1000
        logger.info("pid %d is ready after %.0f ms: %s", self.running.pid, milliseconds, how)
        self._crew.look_whether_formed()

    def _is_overdue(self) -> None:
        why = self._check.why_not() if self._check is not None else ""
        late = f"not ready within {self._crew.plan.options.ready_timeout:g} s"
        self._has_failed(f"{late}: {why}" if why else late)

    def _has_failed(self, reason: str) -> None:
        if self.is_ready or self._crew.stopping:
            return
        assert self.running is not None
        self._failure = f"pid {self.running.pid}: {reason}"
        self._cancel(self._overdue)
        if self._crew.formed:
            self.running.kill()
        else:
            self._crew.fail(self._failure)

    def _ended(self, status: int) -> None:
        assert self.running is not None
        running, was_ready = self.running, self.is_ready
        served = 0.0 if self.ready_since is None else time.monotonic() - self.ready_since
        self.last_exit = in_words(status)
        why = "" if was_ready or self._failure or self._check is None else self._check.why_not(status)
        self._close_check()
        self._cancel(self._overdue)
        self.running, self.ready_since, self.ready_at = None, None, None
        crew = self._crew
        if crew.stopping:
            return
        if not was_ready:
            ended = f"pid {running.pid} ended with {self.last_exit} before it was ready"
            self._not_ready(self._failure or (f"{ended}: {why}" if why else ended))
            return
        if served >= HEALTHY:
            self._pause = FIRST_PAUSE
        logger.warning("pid %d ended with %s after %.1f s in service", running.pid, self.last_exit, served)
        if crew.on_died(status):
            self._start_again()

    def _not_ready(self, reason: str) -> None:
        if self._crew.stopping:
            return
        if not self._crew.formed:
            self._crew.fail(reason)
            return
        logger.warning("%s", reason)
        self._start_again()

    def _start_again(self) -> None:
        logger.info("starting it again in %.1f s", self._pause)
        self.restarts += 1
        self._again = self._crew.events.call_later(self._pause, self.start)
        self._pause = min(self._pause * 2, LONGEST_PAUSE)

    def rest(self) -> None:
        """Starts nothing any more."""
        self._cancel(self._again)
        self._cancel(self._overdue)

    @staticmethod
    def _cancel(timer: Timer | None) -> None:
        if timer is not None:
            timer.cancel()

    def _close_check(self) -> None:
        if self._check is not None:
            self._check.close()
            self._check = None

    def details(self) -> dict[str, Any]:
        """For status: times are in seconds since the epoch."""
        running = self.running
        return {
            "pid": running.pid if running is not None else None,
            "ready_since": self.ready_at,
            "restarts": self.restarts,
            "last_exit": self.last_exit,
        }


class Crew:
    """Calls on_ready once, when it is formed, or on_failed with the reason; on_died with the exit status of a process
    that was in service, which is started again if that returns true.
    """

    def __init__(
        self,
        plan: Plan,
        events: Events,
        on_ready: Callable[[], object],
        on_failed: Callable[[str], object],
        on_died: Callable[[int], bool],
    ) -> None:
        self.plan = plan
        self.events = events
        self.on_died = on_died
        self.formed = self.stopping = self.failed = False
        self.trees: list[Running] = []
        self.members = [Member(self) for _ in range(plan.options.workers)]
        self._on_ready, self._on_failed = on_ready, on_failed
        self._on_gone: Callable[[], object] | None = None
        self._quieting: Quieting | None = None

    @property
    def pids(self) -> list[int]:
        """Of the processes that were started and run, without their descendants."""
        return [member.running.pid for member in self.members if member.running is not None]

    @property
    def any_ready(self) -> bool:
        return any(member.is_ready for member in self.members)

    def start(self) -> None:
        """Starts all processes; what comes of it is told later."""
        for member in self.members:
            member.start()

    def look_whether_formed(self) -> None:
        if not self.formed and not self.failed and all(member.is_ready for member in self.members):
            self.formed = True
            self._on_ready()

    def fail(self, reason: str) -> None:
        """Tells that this crew will not be formed; it is the caller of stop() who ends what has been started."""
        if not self.failed:
            self.failed = True
            self._on_failed(reason)

    def signal(self, signum: int) -> None:
        """Passes a signal on to each process."""
        for member in self.members:
            if signum == signal.SIGWINCH and member.relay is not None:
                member.relay.resized()
            if member.running is not None:
                member.running.signal(signum)

    def stop(self, on_gone: Callable[[], object], timeout: float | None = None) -> None:
        """Asks all processes to end, kills what is left after the stop timeout, and calls back when nothing is left.

        They are asked when what they have accepted has become a request (quieting.py), in a second at most; or when
        that has been served, where the command is to be drained first.
        """
        if self.stopping:
            return
        self.stopping = True
        self._on_gone = on_gone
        for member in self.members:
            member.rest()

        def ask() -> None:
            for tree in list(self.trees):
                tree.stop(timeout)

        options = self.plan.options
        drain = (options.stop_timeout if timeout is None else timeout) if options.drain_first else 0.0
        listeners = [listener.sock for listener in self.plan.listeners]
        if self.trees:
            self._quieting = Quieting(
                self.events, self._all_pids, listeners, ask, drain=drain, spare_idle=options.spare_idle
            )
        self._look_whether_gone()

    def _all_pids(self) -> list[int]:
        return [pid for tree in self.trees for pid in orphans.tree(tree.pid)]

    def kill(self) -> None:
        """Ends everything at once."""
        if self._quieting is not None:
            self._quieting.cancel()
        for tree in list(self.trees):
            tree.kill()

    def lost_tree(self, running: Running) -> None:
        """Nothing is left of a process that was started here."""
        self.trees.remove(running)
        self._look_whether_gone()

    def _look_whether_gone(self) -> None:
        if self.stopping and not self.trees and self._on_gone is not None:
            if self._quieting is not None:
                self._quieting.cancel()
            on_gone, self._on_gone = self._on_gone, None
            self.events.post(on_gone)

    def details(self) -> list[dict[str, Any]]:
        """The processes, for status."""
        return [member.details() for member in self.members]
