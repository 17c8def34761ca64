"""The owner's estate: the control socket, the lock, the listeners, and what the two roles do to them."""

from __future__ import annotations

import logging
import os
import selectors
import socket
import threading
import time
import weakref
from typing import Any

from ._backend import backend
from ._version import VERSION
from .activation import Given
from .blobs import Blobs
from .control import ControlPath, Identity, remove_own
from .control_thread import ControlThread
from .exchange import Exchange, logger, sparing
from .hosted import Server, Settings
from .incumbent import UNDECIDED, Incumbent
from .keeping import Keeping
from .link import Link, close_all
from .listeners import Held, url_of
from .moments import Moments
from .namespaces import mapping_hint
from .protocol import Local, State
from .successor import Elder, Inherited, Successor
from .wire import Type

MOST_CONNECTIONS = 256
"""Control connections at a time; the oldest that has not said what it wants makes room for a newer one."""

ACCEPTED_AT_ONCE = 16
"""Fewer than MOST_CONNECTIONS, so that each of them is listened to before it may have to make room."""


class Controller(ControlThread):
    """Owns the control socket and the lock from the moment at which the service is its own until it is handed over.

    `state` is one of the words that status shows: joining, warming, serving, probation, draining, stopped, undone.
    `unclaimed` are the inherited listeners that nobody has asked for yet, `given` those of the service manager. `over`
    is set when the service is not this process's any more, or is to end; `yielded` from the READY of a successor on,
    unless that comes to nothing.
    """

    def __init__(self, control: ControlPath, server: Server, settings: Settings) -> None:
        super().__init__(settings.limits)
        self.control = control
        self.server = server
        self.settings = settings
        self.generation = 1
        self.state = "joining"
        self.listeners: list[Held] = []
        self.unclaimed: list[Inherited] = []
        self.given: list[Given] = []
        self.blobs = Blobs()
        self.moments = Moments(self)
        self.keeping = Keeping(self, wanted=settings.keeper)
        self.over = threading.Event()
        self.last_takeover: dict[str, Any] | None = None
        self._began = time.monotonic()
        self._listening: socket.socket | None = None
        self._identity: Identity | None = None
        self._lock = -1
        self.yielded = False
        self._short = False
        _controllers.add(self)

    # What the successor's side calls.

    def own_service(self, successor: Successor) -> None:
        """The commit: socket and lock are ours now. Listening anew makes the kernel name us as the peer (unix(7))."""
        for kept in successor.inherited:
            if kept.role == "control":
                self._listening = socket.socket(fileno=kept.descriptor)
                self._listening.listen(4096)
                self._identity = kept.identity
            else:
                self.keep_lock(kept.descriptor)
        successor.inherited = []
        self.generation = successor.elder.generation + 1
        self.state = "probation"
        self.answer()

    def settled(self, successor: Successor) -> None:
        """The takeover is final, on this side; what this version has no use for is drained by the incumbent."""
        self.state = "serving"
        self.moments.succeeded({})
        self.drop_unclaimed()
        self.keeping.own_soon()
        self._note(successor, "committed")

    def drop_unclaimed(self) -> None:
        """Closes the inherited listeners that nobody has asked for."""
        close_all([kept.descriptor for kept in self.unclaimed])
        self.unclaimed.clear()

    def listener_closed(self) -> None:
        """The server has closed one of the listeners: nobody else is to hold it."""
        self.moments.manager.forget_closed()
        self.keeping.listener_closed()

    def lose_service(self, successor: Successor) -> None:
        """The incumbent took the service back: what is not ours any more is forgotten, and stays in the file system."""
        self.state = "undone"
        self.moments.stopping("the takeover was undone")
        self._let_go()
        self.over.set()
        self.server.undone(successor.reason)

    def watch_elder(self, descriptor: int, elder: Elder) -> Successor:
        """Takes over the watch on an older process; owns the descriptor of the link to it."""
        exchange = Successor.of_elder(Link(socket.socket(fileno=descriptor)), self, elder)
        self.add(exchange)
        return exchange

    # What the incumbent's side calls.

    def own_cold(self, lock: int) -> None:
        """A cold start, or what comes after the original script: the path is ours; takes the lock over."""
        self.keep_lock(lock)
        self._listening, self._identity = self.control.bind()
        self.state = "warming"
        self.answer()

    def keep_lock(self, descriptor: int) -> None:
        """Takes a locked lock file; the one that is at the path now stays, should there be two."""
        if self._lock >= 0:
            close_all([descriptor])
        else:
            self._lock = descriptor

    def answer(self) -> None:
        """Answers the control socket from now on."""
        if self._listening is not None and not self.yielded and self._listening not in self.selector.get_map():
            self.selector.register(self._listening, selectors.EVENT_READ, self._accept)

    def estate(self) -> list[tuple[dict[str, Any], int]]:
        """What is handed over besides the token: items as LISTENERS describes them, with their descriptors."""
        assert self._listening is not None
        return [
            (_item("lock", "", "", self._identity), self._lock),
            (_item("control", "", "", self._identity), self._listening.fileno()),
            *self.listener_items(),
        ]

    def listener_items(self) -> list[tuple[dict[str, Any], int]]:
        """The part of the estate that a keeper holds too."""
        return [
            (_item("listener", held.name, held.url, held.identity), held.sock.fileno())
            for held in self.listeners
            if held.is_open
        ]

    def busy_with(self, asking: Exchange) -> str | None:
        """Why no takeover may begin now, if so."""
        pid = os.getpid()
        for exchange in self.exchanges:
            if exchange is not asking and isinstance(exchange, Incumbent) and exchange.state in UNDECIDED:
                seconds = time.monotonic() - exchange.began
                return f"{exchange.link.name} has been taking over from pid {pid} for {seconds:.1f} s"
        if self.state != "serving":
            return f"pid {pid} is {'on probation' if self.state == 'probation' else self.state}; try again in a moment"
        return None

    @property
    def elders(self) -> list[Elder]:
        """The older processes that still drain."""
        return [each.elder for each in self._elder_exchanges()]

    def _elder_exchanges(self) -> list[Successor]:
        return [
            exchange
            for exchange in self.exchanges
            if isinstance(exchange, Successor) and exchange.state is State.OWNER and not exchange.link.lost
        ]

    def yield_service(self, incumbent: Incumbent) -> None:
        """The successor is ready: nobody is accepted here any more, neither on the control socket."""
        self._hold_back()
        self.yielded = True
        self.server.stop_accepting(frozenset(incumbent.ready.get("unused", ())))

    def resume_service(self) -> None:
        """The takeover is off: accept again. A listener that a successor has made blocking is mended."""
        for held in self.listeners:
            if held.is_open:
                os.set_blocking(held.sock.fileno(), False)
        if self.yielded and self._listening is not None:
            self.yielded = False
            os.set_blocking(self._listening.fileno(), False)
            self._listening.listen(4096)
            self.answer()
            self.server.start_accepting()

    def release_service(self, incumbent: Incumbent) -> None:
        """The service is the successor's for good: what is left here drains, listeners without use too."""
        self.state = "draining"
        self.moments.released(incumbent.link.peer.pid)
        self.keeping.release()
        for held in self.listeners:
            if held.name in incumbent.ready.get("unused", ()) or not held.is_open:
                held.remove_path()
        self._let_go()
        self.over.set()
        self.server.drain()

    def bequeath_elders(self, link: Link) -> None:
        """Sends DONE with the links to the older processes; they are closed here, the successor watches them now."""
        leaving = [exchange for exchange in self._elder_exchanges() if exchange.link.between_frames]
        elders = [exchange.elder._asdict() for exchange in leaving]
        body = {"left": self.server.connections(), "elders": elders, "manager": self.moments.manager.legacy()}
        links = [os.dup(exchange.link.fileno()) for exchange in leaving]
        link.send(Type.DONE, body, links, given=links)
        for exchange in leaving:
            exchange.link.close()
            self.exchanges.pop(exchange, None)

    def decided(self, incumbent: Incumbent) -> None:
        """An exchange that was under way has ended, one way or the other."""
        if incumbent.state is State.DRAINING or self.state == "draining":
            logger.info("%s has taken over; %d connections left", incumbent.link.name, self.server.connections())
        elif incumbent.dry_run:
            logger.info("dry run of %s: %s", incumbent.link.name, incumbent.reason)
        else:
            self._note(incumbent, "undone")
            self.moments.refused(incumbent.reason)
            sparing.log(
                logging.WARNING, "the takeover by %s is off: %s; serving on", incumbent.link.name, incumbent.reason
            )

    def stop_requested(self, who: str) -> None:
        """Somebody asked for the end of the service over the control socket."""
        logger.info("%s asks to stop", who)
        self.moments.stopping(f"{who} has asked to stop")
        self.post(self.leave)
        self.over.set()
        self.server.stop()

    # What the service calls.

    def leave(self) -> None:
        """This process ends: a takeover under way goes on without it, else the path and the lock are free."""
        for exchange in list(self.exchanges):
            if exchange.machine.accepts(Local.LEAVING):
                exchange.link.finish(self.limits.silence)
                self.run_step(exchange, lambda: exchange.step(Local.LEAVING))  # noqa: B023
                exchange.link.finish(self.limits.silence)
        self.blobs.no_more()
        self.moments.stopping("stopping")
        if self._lock >= 0:
            self.keeping.end()
            remove_own(self.control.path, self._identity)
            for held in self.listeners:
                if not self.moments.manager.keeps_one(held):
                    held.remove_path()
            lock, self._lock = self._lock, -1
            self._let_go()
            self.control.unlock(lock)
            self.blobs.give_up()
            self.state = "stopped"

    def hand_over(self, name: str, descriptor: int) -> list[int]:
        """See Blobs.hand_over()."""
        useless = self.blobs.hand_over(name, descriptor)
        for exchange in list(self.exchanges):
            self._watch(exchange)
        return useless

    def close_after_fork(self) -> None:
        super().close_after_fork()
        if self._listening is not None:
            self._listening.close()
        close_all([self._lock, *(each.descriptor for each in self.given)])
        self.drop_unclaimed()
        self.given.clear()
        self.blobs.close()
        self.keeping.close_after_fork()
        self._listening, self._lock = None, -1

    def status(self) -> dict[str, Any]:
        """What `takeover status` shows."""
        draining = [elder._asdict() for elder in self.elders]
        return {
            "pid": os.getpid(),
            "generation": self.generation,
            "state": self.state,
            "role": "successor" if self.state == "probation" else "incumbent",
            "service": self.settings.service,
            "backend": backend,
            "version": VERSION,
            "uptime": round(time.monotonic() - self._began, 3),
            "listeners": [
                {"name": held.name, "url": held.url, "address": url_of(held.sock)}
                for held in self.listeners
                if held.is_open
            ],
            "connections": {"open": self.server.connections(), "draining": draining},
            "moved": self.server.moves(),
            "last_takeover": self.last_takeover,
            "keeper": self.keeping.status(),
            **self.server.details(),
            **self.moments.status(),
        }

    def _accept(self, _mask: int) -> None:
        assert self._listening is not None
        for _ in range(ACCEPTED_AT_ONCE):
            try:
                sock, _ = self._listening.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            except OSError as error:
                if not self._short:
                    logger.warning("accept %s: %s; trying again", self.control.path, error.strerror)
                self._short = True
                self.selector.unregister(self._listening)
                self.at_next_tick(self.answer)
                return
            self._short = False
            self._make_room()
            try:
                link = Link(sock)
            except OSError as error:
                sock.close()
                sparing.log(logging.WARNING, "nobody knows who asks at %s: %s", self.control.path, error.strerror)
                continue
            if link.peer.uid not in self.control.allowed:
                hint = mapping_hint(link.peer.uid)
                sparing.log(logging.WARNING, "refused uid %d (%s): not allowed here%s", link.peer.uid, link.name, hint)
                link.close()
                continue
            asking = Incumbent(link, self)
            self.add(asking, asking.greet)

    def _make_room(self) -> None:
        waiting = [exchange for exchange in self.exchanges if exchange.state is State.GREETING]
        if len(waiting) >= MOST_CONNECTIONS:
            self.run_step(waiting[0], lambda: waiting[0].step(Local.OVERTIME))

    def _hold_back(self) -> None:
        """Answers nobody at the control socket, until answer()."""
        if self._listening is not None and self._listening in self.selector.get_map():
            self.selector.unregister(self._listening)

    def _let_go(self) -> None:
        self._hold_back()
        if self._listening is not None:
            self._listening.close()
            self._listening = None
        close_all([self._lock])
        self._lock = -1

    def _note(self, exchange: Exchange, outcome: str) -> None:
        self.last_takeover = {
            "outcome": outcome,
            "role": exchange.role,
            "peer": exchange.link.peer.pid or exchange.link.told,
            "elsewhere": not exchange.link.peer.pid,
            "reason": exchange.reason or None,
            "phases": {name: round(milliseconds, 3) for name, milliseconds in exchange.phases.items()},
            "at": time.time(),
        }


def _item(role: str, name: str, url: str, identity: Identity | None) -> dict[str, Any]:
    device, inode = identity or (0, 0)
    return {"role": role, "name": name, "url": url, "device": device, "inode": inode}


_controllers: weakref.WeakSet[Controller] = weakref.WeakSet()


def _after_fork() -> None:
    for controller in list(_controllers):
        controller.close_after_fork()
        controller.server.after_fork()


os.register_at_fork(after_in_child=_after_fork)
