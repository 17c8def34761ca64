"""join(): any server's part in a takeover. It asks for listeners, says when it is ready, and learns when it is over."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Collection
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any

from . import activation, blobs, listeners, original
from .control import ControlPath
from .controller import Controller
from .descriptors import grow_table
from .errors import (
    AddressError,
    Interrupted,
    ListenError,
    LocalError,
    LocalProtocolError,
    PeerLost,
    TimedOut,
    UsageError,
)
from .exchange import logger
from .holdings import Holdings
from .hosted import Server, Settings
from .link import Link, link_at
from .namespaces import in_words
from .protocol import Limits, Local
from .report import Report
from .successor import Inherited, Successor
from .systemd import ServiceManager
from .wire import LONGEST_TEXT, as_text

if TYPE_CHECKING:
    from typing_extensions import Buffer

LONGEST_NAME = LONGEST_TEXT - 24
"""Characters of a name, which leaves room for the number of a member of a group."""

ATTEMPTS = 5
"""How often a successor begins anew because the incumbent died before it had handed everything over."""


class Service:
    """A place in a line of generations, from the request for the listeners to the end of the process.

    The sockets that it returns are the caller's to accept on and to close; the control socket, the lock and the links
    are its own. It may be used from any thread, and closes itself at the end of a `with` block.
    """

    def __init__(self, control: ControlPath, server: Server, settings: Settings) -> None:
        self._control = control
        self._settings = settings
        self._successor: Successor | None = None
        self._from_original = False
        self._from_keeper = False
        self._is_ready = False
        self._lock = -1
        given = activation.take()
        if server.live:
            grow_table()
        self._controller = Controller(control, server, settings)
        self._controller.given = given
        if not settings.dry_run:
            self._controller.moments.manager = ServiceManager.from_environment()
        watched = settings.keeper or self._controller.moments.manager.may_come
        self._holdings = Holdings(self._controller.listener_closed if watched else None)
        self._controller.start()
        try:
            self._join()
        except BaseException:
            self.close()
            raise

    @property
    def generation(self) -> int:
        """1 for a cold start, plus one at each takeover; settled by ready()."""
        return self._controller.generation

    @property
    def state(self) -> str:
        """The word that `takeover status` shows for this process."""
        return self._controller.state

    @property
    def keeper(self) -> int:
        """The pid of the keeper that has been registered with last, 0 for none: a child of PID 1, or of a subreaper."""
        return self._controller.keeping.pid

    @property
    def accepts(self) -> bool:
        """Whether this process is to accept: from ready() on, until a successor takes over or the service ends.

        It turns true again when a takeover is undone. A server that is told by its `server` argument need not ask.
        """
        return self._is_ready and not self._controller.yielded and not self._controller.over.is_set()

    def listen(self, url: str, *, name: str | None = None, backlog: int = listeners.BACKLOG) -> socket.socket:
        """The one socket of an address: from the incumbent or the service manager, if they have it, else bound anew.

        It is non-blocking and must stay so until ready() has returned: the incumbent shares it. A stream socket that
        was bound anew listens from ready() on. It is the caller's; closing it gives the address up. Raises AddressError
        for an address that is wrong, was asked for before or stands for several sockets, ListenError if it cannot be
        bound.
        """
        socks = self.listen_all(url, name=name, backlog=backlog)
        if len(socks) != 1:
            raise AddressError(f"{url} stands for {len(socks)} sockets; use listen_all(), or write an IP address")
        return socks[0]

    def listen_all(self, url: str, *, name: str | None = None, backlog: int = listeners.BACKLOG) -> list[socket.socket]:
        """All sockets of an address: each member of an SO_REUSEPORT group, each family of a name; else as listen().

        A group is adopted whole, also when the incumbent's is larger than was asked for: closing one member would
        reset what waits in its queue.
        """
        if self._is_ready:
            raise LocalProtocolError("listen() after ready(): the service has been committed with its listeners")
        _check_text("name", name or url)
        unclaimed, given = self._controller.unclaimed, self._controller.given
        before = list(given)
        try:
            socks = self._holdings.claim(url, name, backlog, unclaimed, given)
        except ListenError as error:
            raise activation.explain(error, given) from None
        except OSError as error:
            raise ListenError(f"listen {url}: {error.strerror}") from None
        for each in before:
            if each not in given:
                logger.info("adopted %s, which the service manager has given (%s)", each.url, each.name)
        return socks

    def name_of(self, sock: socket.socket) -> str:
        """The name under which the report and `takeover status` show a socket that listen() returned."""
        return next(held.name for held in self._holdings if held.sock is sock)

    def ready(self, start: Callable[[], object] = bool) -> Report:
        """The commit: returns when this process owns the service and is to accept. With dry_run, returns as if it did.

        `start` is called when it owns the service and has not yet said that it accepts: what it raises is raised here,
        and at the end of the `with` block (or in close()) the incumbent takes the service back. Raises Aborted,
        TimedOut or PeerLost if the incumbent does not let go; it serves on then, and this process is to end. Raises
        LocalError for a listener that was not adopted where strict was asked for.
        """
        if self._is_ready:
            raise LocalProtocolError("ready() was called before; a process joins a service once")
        unused = tuple(kept.name for kept in self._controller.unclaimed)
        adopted = tuple(held.name for held in self._holdings.adopted)
        bound = tuple(held.name for held in self._holdings.bound)
        successor = self._successor
        if self._settings.strict and self._controller.given:
            raise LocalError(f"strict: {activation.in_words(self._controller.given)}, which is not asked for")
        inherits = successor is not None or self._from_original or self._from_keeper
        if self._settings.strict and (unused or (bound and inherits)):
            raise LocalError(
                f"strict: {len(unused)} listeners of the incumbent are not used ({', '.join(unused) or 'none'}), "
                f"{len(bound)} would be bound anew ({', '.join(bound) or 'none'})"
            )
        activation.close_unused(self._controller.given)
        self._holdings.listen(all_of_them=not self._settings.dry_run)
        began = time.monotonic()
        incumbent = 0
        if self._settings.dry_run:
            self._give_up("dry run")
            incumbent = successor.elder.pid if successor is not None else 0
        elif successor is not None:
            self._commit(successor, start, adopted, bound, unused)
            incumbent = successor.elder.pid
        else:
            start()
            self._controller.ask(self._serve_cold)
            self._controller.keeping.own()
        self._is_ready = True
        milliseconds = (time.monotonic() - began) * 1000
        elsewhere = successor is not None and successor.elsewhere
        return Report(self.generation, incumbent, adopted, bound, unused, milliseconds, self._from_keeper, elsewhere)

    def _commit(self, successor: Successor, start: Callable[[], object], *names: tuple[str, ...]) -> None:
        def warm() -> None:
            successor.ready = dict(zip(("adopted", "bound", "unused"), map(list, names), strict=True))
            self._controller.listeners = list(self._holdings)
            if not successor.finished:
                self._controller.run_step(successor, lambda: successor.step(Local.WARM))

        self._controller.ask(warm)
        successor.committed.result()
        start()
        self._controller.ask(lambda: self._controller.run_step(successor, partial(successor.step, Local.ACCEPTING)))
        self._controller.ask(self._controller.moments.ready)

    def _serve_cold(self) -> None:
        self._controller.drop_unclaimed()
        self._controller.listeners = list(self._holdings)
        if self._from_original:
            self._controller.generation = 2
        self._controller.state = "serving"
        self._controller.moments.ready()

    def wait(self, timeout: float | None = None) -> bool:
        """Blocks until the service is this process's no more: taken over, taken back, or asked to stop.

        False if that did not happen within `timeout` seconds. What is left to do then is to serve what is open, and
        end.
        """
        return self._controller.over.wait(timeout)

    @property
    def manager(self) -> ServiceManager:
        """What this process says to its service manager, beside what is said for it at a takeover: docs/systemd.md."""
        return self._controller.moments.manager

    def hand_over(self, name: str, data: Buffer) -> None:
        """Gives a copy of the data to the next process, which asks for it with inherited(name); from ready() on.

        Until there is a settled successor the newest of a name waits for it; afterwards, for instance when wait() has
        returned, it is sent at once. Nothing is kept when the service was given up or undone. Raises LocalError where
        the machine has no memory or descriptors left, or for more than 1,024 names.
        """
        _check_text("blob", name)
        if not self._is_ready:
            raise LocalProtocolError("hand_over() before ready(): there is nothing to hand over yet")
        blobs.hand_over(self._controller, name, data)

    def inherited(self, name: str, timeout: float = 0.0) -> memoryview | None:
        """What an older process has handed over, from join() on: a read-only view, no copy, freed with its last user.

        None where it does not come within `timeout` seconds, or nobody is left who could send it. Each is given once,
        so that a newer one of the name may be waited for; one that is to go on to the next process is handed over anew.
        Until it is asked for, each takes a descriptor. Raises LocalError where it cannot be mapped.
        """
        return blobs.inherited(self._controller, name, timeout)

    def give_back(self, reason: str) -> bool:
        """Leaves the service to the incumbent, who is told why, because this version has turned out not to work.

        True when the incumbent goes on, or accepts again: this process is to end then. False where there is nobody to
        take it, as at a cold start, or where it is too late: the probation is over, and it stays this process's.
        """
        successor = self._successor
        if successor is None:
            return False
        if not self._is_ready:
            self._give_up(reason)
            return True
        self._controller.ask(lambda: self._controller.run_step(successor, partial(successor.give_up, reason)))
        return not successor.kept.result()

    def status(self) -> dict[str, Any]:
        """What `takeover status --json` prints."""
        return self._controller.ask(self._controller.status)

    def leave(self) -> None:
        """Gives the service up: path and lock are free for a cold start, or go on with the successor at work."""
        self._controller.ask(self._controller.leave)

    def close(self) -> None:
        """Ends this process's part, from any state, and closes the sockets that listen() returned."""
        if self._controller.ended.is_set():
            return
        self._give_up("interrupted")
        owned = self._is_ready and self._controller.state not in ("undone", "joining")
        self.leave()
        self._controller.moments.manager.last_words()
        self._controller.close()
        self._controller.drop_unclaimed()
        self._unlock()
        for held in () if owned else self._holdings.bound:
            held.remove_path()
        self._holdings.close()

    def __enter__(self) -> Service:  # noqa: PYI034 - typing.Self needs Python 3.11
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if value is not None and not self._controller.ended.is_set():
            end = self.give_back if isinstance(value, Exception) else self._give_up
            end(str(value) or type(value).__name__)
        self.close()

    def _give_up(self, why: str) -> None:
        successor = self._successor
        if successor is not None and not self._is_ready and not successor.finished:
            give_up = partial(successor.give_up, why, Interrupted(why))
            self._controller.ask(lambda: self._controller.run_step(successor, give_up))

    def _join(self) -> None:
        if self._settings.dry_run and not self._control.is_locked():
            self._ask_keeper()
            return
        began, attempts = time.monotonic(), 0
        while True:
            lock = None if self._settings.dry_run else self._control.lock()
            self._lock = -1 if lock is None else lock
            sock = self._control.connect()
            try:
                if sock is not None:
                    self._meet(link_at(self._control.path, sock))
                    return
                if lock is not None:
                    self._start_cold()
                    return
            except PeerLost:
                self._successor = None
                attempts += 1
                if attempts == ATTEMPTS:
                    raise
                logger.info("the incumbent died, or hung up, before it had handed everything over; trying again")
                began = time.monotonic()
            finally:
                self._unlock()
            if time.monotonic() - began > self._settings.limits.greeting:
                raise TimedOut(f"somebody holds {self._control.lock_path}, but nobody listens at {self._control.path}")
            self._controller.over.wait(0.02)

    def _unlock(self) -> None:
        if self._lock >= 0:
            self._control.unlock(self._lock)
            self._lock = -1

    def _start_cold(self) -> None:
        if not self._from_original:
            self._ask_keeper()
        lock, self._lock = self._lock, -1
        self._controller.ask(lambda: self._controller.own_cold(lock))

    def _ask_keeper(self) -> None:
        pid, found = self._controller.keeping.adopt()
        if found:
            self._from_keeper = True
            self._inherit(found)
            logger.info("the keeper (%s) holds %d listeners of a process that is gone", in_words(pid), len(found))

    def _meet(self, link: Link) -> None:
        """Asks whoever listens at the path. Nobody but the original script does so without holding the lock."""
        if self._lock >= 0 and original.is_original(link, self._control.path, self._settings.limits.greeting):
            self._controller.unclaimed = [original.take_listener(link, self._control)]
            self._from_original = True
            self._start_cold()
            return
        successor = Successor(link, self._controller, dry_run=self._settings.dry_run)
        self._controller.ask(lambda: self._controller.add(successor))
        self._successor = successor
        successor.joined.result()
        if self._lock >= 0:
            lock, self._lock = self._lock, -1
            self._controller.ask(lambda: self._controller.keep_lock(lock))
        self._inherit(self._controller.ask(successor.take_listeners))

    def _inherit(self, found: list[Inherited]) -> None:
        self._controller.unclaimed = found
        ours = [kept.descriptor for kept in found]
        self._controller.given = activation.without_duplicates(self._controller.given, ours)


def _check_text(what: str, text: str) -> None:
    """Refuses what no message could carry, before anything has been done."""
    if as_text(text) != text or len(text) > LONGEST_NAME:
        raise UsageError(f"{what} {text[:40]!r}: at most {LONGEST_NAME} characters, none of them a control character")


def join(
    control: str = "./takeover.sock",
    *,
    server: Server | None = None,
    service: str = "",
    strict: bool = False,
    dry_run: bool = False,
    probation: float = 1.0,
    drain_timeout: float = 30.0,
    max_generations: int = 8,
    allow_uids: Collection[int] = (),
    limits: Limits | None = None,
    keeper: bool = False,
) -> Service:
    """Asks the owner of the control socket for the service, or starts it cold where there is none.

    control: path of the control socket. server: what to call at the commit and after; without one, wait() tells.
    service: a name that both sides must agree on. strict: ready() raises unless every listener is adopted. dry_run: go
    through everything but the commit, and leave no trace. probation, drain_timeout: seconds. max_generations: how many
    older processes may drain at a time. allow_uids: users other than this one and root who may take over. keeper: have
    a second process hold copies of the listeners, which outlives this one if it is killed (docs/keeper.md).

    Returns when the listeners have come. Raises UsageError, ControlPathError, Refused, TimedOut, PeerLost or
    RemoteProtocolError; the incumbent, if there is one, serves on then.
    """
    _check_text("service", service)
    settings = Settings(service, strict, dry_run, probation, drain_timeout, max_generations, limits or Limits(), keeper)
    return Service(ControlPath(control, allow_uids), server or Server(), settings)
