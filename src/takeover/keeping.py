"""What a process does about a keeper: asks the one that is there, has one while it owns the service, ends it with it.

The keeper is met by whoever holds the lock, at four moments: a cold start asks it for the listeners that outlived their
owner; an owner registers its listeners, with the keeper that is there or with one that it starts, and again when one of
them is closed or the keeper has died; a successor without a wish for one ends it; and so does the orderly end of the
service. What takes time is done in a thread that ends when it is done; the control thread only watches the connection.
"""

from __future__ import annotations

import contextlib
import selectors
import socket
import threading
from typing import TYPE_CHECKING, Any

from . import keeper
from .control import ControlPath, remove_own
from .control import identity as identity_of
from .errors import PeerError, TakeoverError, TimedOut, UsageError
from .exchange import logger
from .keeper import Keeper
from .successor import Inherited

if TYPE_CHECKING:
    from .controller import Controller

SHORTEST_PAUSE, LONGEST_PAUSE = 0.1, 10.0
"""Seconds until a keeper that could not be started is started again; each time twice as many."""


class Keeping:
    """The keeper of a service as one process sees it. `wanted` says whether there is to be one."""

    def __init__(self, owner: Controller, *, wanted: bool) -> None:
        self.owner = owner
        self.wanted = wanted
        self.path: ControlPath | None = None
        self.failure = ""
        self.pid = 0
        self._keeper: Keeper | None = None
        self._held = 0
        self._owns = False
        self._mutex = threading.Lock()
        self._busy = threading.Lock()
        self._worker: threading.Thread | None = None
        self._stale = False
        self._woken = threading.Event()
        try:
            self.path = keeper.path_of_keeper(owner.control)
        except UsageError:
            if wanted:
                raise

    def adopt(self) -> tuple[int, list[Inherited]]:
        """At a cold start: the listeners that a keeper holds, which are the caller's, and its pid.

        Raises TimedOut for a keeper that is stopped: what it holds can neither be adopted nor bound.
        """
        found = keeper.find(self.path) if self.path is not None else None
        if found is None:
            return 0, []
        try:
            found.greet()
            return found.pid, found.listeners()
        except TimedOut as error:
            raise TimedOut(f"{error} It holds the listeners; let it go on, or kill it") from None
        except PeerError as error:
            logger.warning("the keeper at %s is of no use: %s", found.path.path, error)
            return 0, []
        finally:
            found.close()

    def own(self) -> None:
        """The service is ours: has a keeper hold our listeners before this returns; where that fails, a while later."""
        self._owns = True
        if self._concerned and not self._bring_up():
            self._try_again()

    def own_soon(self) -> None:
        """The same, without waiting."""
        self._owns = True
        if self._concerned:
            self._try_again()

    def listener_closed(self) -> None:
        """One of our listeners was closed: the keeper is to close its copy."""
        if self._owns and self.wanted:
            self._try_again()

    def release(self) -> None:
        """The service is a successor's, who registers with the same keeper."""
        self._owns = False
        self._woken.set()
        self._forget()

    def end(self) -> None:
        """The service ends: so does the keeper, and its path goes. Does nothing for who does not own the service."""
        if not self._owns:
            return
        self._owns = False
        self._woken.set()
        with self._busy:
            self._forget()
            try:
                if self.path is not None:
                    self._end_it(self.path)
            except (TakeoverError, OSError) as error:
                logger.warning("the keeper could not be ended: %s", error)

    def status(self) -> dict[str, Any] | None:
        """What `takeover status` shows of it; None where none is wanted."""
        if not self.wanted:
            return None
        known = self._keeper
        if known is None:
            return {"pid": 0, "listeners": 0, "private_kib": None, "failure": self.failure or None}
        memory = keeper.private_memory(known.pid) if known.pid else None
        return {"pid": known.pid, "listeners": self._held, "private_kib": memory, "failure": None}

    def close_after_fork(self) -> None:
        """In a forked child."""
        self._owns = False
        if self._keeper is not None:
            self._keeper.close()
            self._keeper = None

    @property
    def _concerned(self) -> bool:
        """Whether there is anything to do at all, once the service is ours."""
        return self.path is not None and (self.wanted or identity_of(self.path.path) is not None)

    def _try_again(self) -> None:
        with self._mutex:
            self._stale = True
            self._woken.set()
            if self._worker is None:
                self._worker = threading.Thread(target=self._work, name="takeover-keeper", daemon=True)
                with contextlib.suppress(RuntimeError):  # the interpreter is ending
                    self._worker.start()

    def _work(self) -> None:
        pause = SHORTEST_PAUSE
        while True:
            with self._mutex:
                if not self._stale or not self._owns:
                    self._worker = None
                    return
                self._stale = False
                self._woken.clear()
            if not self._bring_up():
                self._stale = True
                self._woken.wait(pause)
                pause = min(2 * pause, LONGEST_PAUSE)

    def _bring_up(self) -> bool:
        """Registers with a keeper, or ends one that is not wanted; whether there is nothing left to do."""
        with self._busy:
            if not self._owns or self.path is None:
                return True
            try:
                if not self.wanted:
                    self._end_it(self.path)
                else:
                    self._register(self.path)
            except (TakeoverError, OSError) as error:
                if not self.wanted:
                    logger.warning("the keeper that was there could not be ended: %s", error)
                    return True
                if str(error) != self.failure:
                    logger.warning("no keeper holds the listeners: %s; trying again", error)
                self.failure = str(error)
                return False
            self.failure = ""
            return True

    def _register(self, path: ControlPath) -> None:
        found = keeper.find(path)
        if found is not None:
            try:
                found.greet()
            except PeerError as error:
                logger.warning("the keeper is replaced: %s", error)
                _end(found, by_force=isinstance(error, TimedOut))
                found = None
        started = found is None
        current = found if found is not None else keeper.start(path)
        self.pid = current.pid
        try:
            items = self.owner.listener_items()
            current.register(items)
        except BaseException:
            current.close()
            raise
        if started:
            logger.info("the keeper (%s) holds %d listeners", current.peer, len(items))
        self.owner.post(lambda: self._watch(current, len(items)))
        if self.owner.ended.is_set():
            current.close()

    def _end_it(self, path: ControlPath) -> None:
        found = keeper.find(path)
        if found is not None:
            _end(found)
        remove_own(path.path, identity_of(path.path))

    def _watch(self, current: Keeper, held: int) -> None:
        self._forget()
        if not self._owns:
            current.close()
            return
        self._keeper, self._held = current, held
        self.owner.selector.register(current.sock, selectors.EVENT_READ, lambda _mask: self._lost())

    def _lost(self) -> None:
        assert self._keeper is not None
        logger.warning("the keeper (%s) has died; starting another", self._keeper.peer)
        self._keeper.reap()
        self._forget()
        self._try_again()

    def _forget(self) -> None:
        if self._keeper is not None:
            self.owner.selector.unregister(self._keeper.sock)
            self._keeper.close()
            self._keeper = None


def _end(found: Keeper, *, by_force: bool = False) -> None:
    try:
        found.kill() if by_force else found.end()
    finally:
        found.close()


def orphan(control: ControlPath) -> tuple[int, int] | None:
    """The pid of a keeper that nobody needs to own, and how many listeners it holds; None where there is none."""
    with contextlib.suppress(TakeoverError):
        found = keeper.find(keeper.path_of_keeper(control))
        if found is not None:
            try:
                return found.pid, found.greet()
            finally:
                found.close()
    return None


def end_orphan(control: ControlPath) -> int | None:
    """Ends a keeper whose owner is gone, with the UNIX paths that it holds; its pid, None where there is none.

    Whoever waits in its queues is refused then. None too where somebody has just started, and holds the lock.
    """
    lock = control.lock()
    if lock is None:
        return None
    try:
        path = keeper.path_of_keeper(control)
        found = keeper.find(path)
        if found is None:
            return None
        kept: list[Inherited] = []
        with contextlib.suppress(PeerError):
            kept = found.listeners()
        for listener in kept:
            with socket.socket(fileno=listener.descriptor) as sock:
                if sock.family == socket.AF_UNIX:
                    remove_own(sock.getsockname(), listener.identity)
        _end(found)
        remove_own(path.path, identity_of(path.path))
        return found.pid
    finally:
        control.unlock(lock)
