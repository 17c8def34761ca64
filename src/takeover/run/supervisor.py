"""The supervisor: takes over the listeners, has a crew serve on them, and is taken over in its turn.

Everything here runs in the main thread, in the loop of its Events, but for the methods of Server, which the control
thread calls: they only post. Signals are posted too, except while join() blocks, where SIGTERM and SIGINT interrupt it.
"""

from __future__ import annotations

import enum
import signal
import socket
from collections.abc import Callable
from types import FrameType
from typing import Any

from takeover import listeners as sockets
from takeover.announcement import tell_start
from takeover.errors import Aborted, CommandError, Interrupted, TakeoverError
from takeover.exchange import logger
from takeover.hosted import Server
from takeover.service import Service, join

from . import orphans, output, process, readiness, remains
from .command import Listening, executable_of, fill_in
from .counting import Counting
from .crew import FAILED_STOP, Crew, Plan
from .events import Events
from .options import Options
from .running import in_words

STOPPING = (signal.SIGTERM, signal.SIGINT)
PASSED_ON = (
    signal.SIGQUIT,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGALRM,
    signal.SIGCONT,
    signal.SIGWINCH,
    signal.SIGTTIN,
    signal.SIGTTOU,
    *range(signal.SIGRTMIN, signal.SIGRTMAX + 1),
)

LAST_OUTPUT = 5.0
"""Seconds for the rest of what the command has written, at the end, where it is passed on and its reader is slow."""


LAST_ACCEPTS = 0.2
"""Seconds in which the command can accept what waits in the queue of a listener that its successor does not use."""


class Moment(enum.Enum):
    """What others may want to know of, as it happens."""

    STARTING = "the command is started"
    READY = "the service is this process's, and its command is ready"
    RELOADING = "the command is being replaced in place"
    RELOADED = "that has ended, one way or the other, and the service goes on"
    STOPPING = "the service ends"
    TAKEN_OVER = "a successor has taken over"


Observer = Callable[[Moment, str], object]


class Supervisor(Server):
    """One generation of a service that is any command. `observers` are called in the main thread at each Moment."""

    def __init__(self, options: Options, ignored: frozenset[int] = frozenset()) -> None:
        """ignored: the signals that this process was told to ignore when it was started, and so is the command."""
        self.options = options
        self.events = Events()
        self.observers: list[Observer] = []
        self.spared: set[int] = set()
        """Children that are to live on when this process ends."""
        self.service: Service | None = None
        self.crew: Crew | None = None
        self.coming: Crew | None = None
        self._crews: list[Crew] = []
        self._ignored = ignored
        self._way = readiness.parse(options.ready)
        self._plan: Plan | None = None
        self._joining = False
        self._serving = False
        self._ending = False
        self._asked_to_stop = 0
        self._reload_again = False
        self._unused: frozenset[str] = frozenset()
        self._counting = Counting(
            lambda: [pid for crew in list(self._crews) for pid in crew.pids],
            lambda: [listener.sock for listener in self._plan.listeners] if self._plan is not None else [],
        )
        self._status = 0
        self._failure: TakeoverError | None = None

    def run(self) -> int:
        """Serves until it is over; returns the exit status. Raises a TakeoverError if it does not come to that, or if
        the service went back to the incumbent: nothing of the command is left then, and whoever served before does.
        """
        if "{" not in self.options.command[0]:
            executable_of(self.options.command[0])
        process.become_subreaper()
        self._joining = True
        # The kernel may give a signal to the control thread, signal(7): its handler would wait until this one wakes up.
        signal.set_wakeup_fd(self.events.waker, warn_on_full_buffer=False)
        for signum in (*STOPPING, *PASSED_ON, signal.SIGHUP, signal.SIGCHLD):
            signal.signal(signum, self._on_signal)
        options = self.options
        try:
            with join(
                options.control,
                server=self,
                service=options.service,
                strict=options.strict,
                dry_run=options.dry_run,
                probation=options.probation,
                drain_timeout=options.stop_timeout,
                max_generations=options.max_generations,
                keeper=options.keep,
            ) as service:
                self._plan = Plan(options, self._listen(service), self._way, self._ignored)
                self.service = service
                self._joining = False
                self._tell(Moment.STARTING, "starting the command")
                self.crew = self._muster(self._commit, self._not_ready)
                self.events.run()
        finally:
            self._joining = False
            if self.service is not None:
                self.spared.add(self.service.keeper)
            orphans.end_all(self.spared)
            output.finish(LAST_OUTPUT)
            for signum in (*STOPPING, *PASSED_ON, signal.SIGHUP):
                signal.signal(signum, signal.SIG_IGN)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            signal.set_wakeup_fd(-1)
            self.events.close()
        if self._failure is not None:
            raise self._failure
        return self._status

    def _listen(self, service: Service) -> list[Listening]:
        """The listeners of the command. What is bound anew listens at once, since the command takes it as it comes."""
        if service.state == "warming":
            remains.clear_away(self.options.control, [url for _, url in self.options.listen])
        found = []
        for name, url in self.options.listen:
            for sock in service.listen_all(url, name=name or None):
                if sock.type == socket.SOCK_STREAM:
                    if not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                        sockets.listen(sock, url)
                    if sock.family != socket.AF_UNIX:
                        # What is accepted inherits it (tcp(7)); some servers set it only on listeners of their own.
                        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                found.append(Listening(name, url, sock))
        fill_in(self.options.command, found)
        return found

    def _muster(self, on_ready: Callable[[], object], on_failed: Callable[[str], object]) -> Crew:
        assert self._plan is not None
        crew = Crew(self._plan, self.events, on_ready, on_failed, self._on_died)
        self._crews.append(crew)
        crew.start()
        return crew

    def _tell(self, moment: Moment, text: str) -> None:
        for observer in self.observers:
            observer(moment, text)

    # The first crew.

    def _commit(self) -> None:
        assert self.service is not None
        try:
            report = self.service.ready()
        except TakeoverError as error:
            self._fail(error)
            return
        count = self.options.workers
        kind = f"{count} process{'' if count == 1 else 'es'}"
        tell_start(report, [url for _, url in self.options.listen], kind, dry_run=self.options.dry_run)
        if self.options.dry_run:
            self._end()
            return
        self._serving = True
        self._tell(Moment.READY, f"serving with {kind} (generation {report.generation})")
        if self._reload_again:
            self._reload()

    def _not_ready(self, reason: str) -> None:
        self._fail(CommandError(f"the command did not get ready: {reason}"))

    def _fail(self, error: TakeoverError) -> None:
        """Ends with an error; what the new command may have accepted, it gets a moment to serve."""
        if self._failure is None and not self._ending:
            self._failure = error
            if self.service is not None and not self._serving:
                self.service.give_back(str(error))
            self._end(min(FAILED_STOP, self.options.stop_timeout))

    def _on_died(self, status: int) -> bool:
        """A process that was in service has ended: whether it is to be started again."""
        assert self.service is not None
        if not self._serving:
            return True
        if self.service.state == "probation" and self.crew is not None and not self.crew.any_ready:
            reason = f"the command ended in the probation with {in_words(status)}"
            if self.service.give_back(reason):
                self._fail(CommandError(f"{reason}; the service went back"))
                return False
        if not self.options.restart:
            self._status = status if status >= 0 else 128 - status
            self._leave()
            self._end()
            return False
        return True

    # In place.

    def _reload(self) -> None:
        """Replaces the command: a new crew beside the old one, which serves on unless the new one gets ready."""
        if self.coming is not None or not self._serving:
            self._reload_again = True
            logger.info("SIGHUP: the command is being started already; it will be once more when that is over")
            return
        self._reload_again = False
        logger.info("SIGHUP: replacing the command")
        self._tell(Moment.RELOADING, "replacing the command")
        self.coming = self._muster(self._reloaded, self._reload_failed)

    def _reloaded(self) -> None:
        old, self.crew, self.coming = self.crew, self.coming, None
        assert old is not None
        logger.info("the new command serves; stopping the old one (%s)", _pids(old))
        self._retire(old)
        self._reload_is_over("serving with a new command")

    def _reload_failed(self, reason: str) -> None:
        new, self.coming = self.coming, None
        assert new is not None
        logger.error("the command was not replaced: %s; the old one serves on", reason)
        self._retire(new, min(FAILED_STOP, self.options.stop_timeout))
        self._reload_is_over("the command was not replaced; the old one serves on")

    def _reload_is_over(self, text: str) -> None:
        self._tell(Moment.RELOADED, text)
        if self._reload_again:
            self._reload()

    # The end.

    def _retire(self, crew: Crew, timeout: float | None = None) -> None:
        """Stops a crew while another one serves on the same listeners."""
        crew.stop(lambda: self._gone(crew), timeout)

    def _gone(self, crew: Crew) -> None:
        self._crews.remove(crew)
        if self._ending and not self._crews:
            self.events.stop()

    def _end(self, timeout: float | None = None) -> None:
        """Stops every crew; the loop ends with the last of them."""
        self._ending = True
        for crew in list(self._crews):
            self._retire(crew, timeout)

    def _leave(self) -> None:
        """The service is over: path and lock are free, and who connects is refused as soon as the command stops.

        Where a successor is at work, the service is its own from now on, and who connects waits for it.
        """
        assert self.service is not None and self._plan is not None
        self._tell(Moment.STOPPING, "stopping")
        self.service.leave()
        if self.service.state == "stopped":
            for listener in self._plan.listeners:
                listener.sock.close()

    def _stop(self, why: str) -> None:
        self._asked_to_stop += 1
        if self._asked_to_stop > 1:
            logger.warning("%s once more: killing the command", why)
            for crew in self._crews:
                crew.kill()
        elif self._ending:
            logger.info("%s: stopping already; once more kills the command", why)
        elif not self._serving:
            self._fail(Interrupted(f"{why} before the service was ready"))
        else:
            logger.info("%s: stopping the command (%s)", why, ", ".join(map(_pids, self._crews)))
            self._leave()
            self._end()

    def _taken_over(self) -> None:
        if self._ending:
            return
        self._tell(Moment.TAKEN_OVER, "taken over")
        if self._refuse_on_unused():
            self.events.call_later(LAST_ACCEPTS, self._end_taken_over)
        else:
            self._end_taken_over()

    def _refuse_on_unused(self) -> bool:
        """Lets nobody new into the queues of listeners that the successor has no use for; True if there are any."""
        assert self.service is not None and self._plan is not None
        unused = [each.sock for each in self._plan.listeners if self.service.name_of(each.sock) in self._unused]
        refused = [sockets.refuse_new(sock) for sock in unused]
        return any(refused)

    def _end_taken_over(self) -> None:
        if not self._ending:
            logger.info("stopping the command (%s)", ", ".join(map(_pids, self._crews)))
            self._end()

    # Signals.

    def _on_signal(self, signum: int, _frame: FrameType | None) -> None:
        name = signal.Signals(signum).name if signum in signal.Signals.__members__.values() else f"signal {signum}"
        if signum == signal.SIGCHLD:
            self.events.post(self.events.reap)
        elif signum in STOPPING:
            if self._joining:
                self._joining = False
                raise Interrupted(f"{name} before the service was ready")
            self.events.post(lambda: self._stop(name))
        elif signum == signal.SIGHUP:
            self.events.post(self._hang_up)
        else:
            self.events.post(lambda: self._pass_on(signum))

    def _hang_up(self) -> None:
        if self._ending:
            logger.info("SIGHUP: too late, this process ends")
        else:
            self._reload()

    def _pass_on(self, signum: int) -> None:
        assert self.crew is not None
        self.crew.signal(signum)

    # Called by the control thread.

    def stop_accepting(self, kept: frozenset[str]) -> None:
        self._unused = kept

    def drain(self) -> None:
        self.events.post(self._taken_over)

    def undone(self, reason: str) -> None:
        self.events.post(lambda: self._fail(Aborted(f"the incumbent has taken the service back: {reason}")))

    def stop(self) -> None:
        self.events.post(lambda: self._stop("takeover stop"))

    def alive(self, answer: Callable[[], object]) -> None:
        self.events.post(answer)

    def connections(self) -> int:
        return self._counting()

    def details(self) -> dict[str, Any]:
        crew = self.crew
        return {
            "command": {
                "words": list(self.options.command),
                "ready": self.options.ready,
                "workers": self.options.workers,
                "reloading": self.coming is not None,
                "processes": crew.details() if crew is not None else [],
            }
        }


def _pids(crew: Crew) -> str:
    return "pid " + ", ".join(map(str, crew.pids)) if crew.pids else "not running"
