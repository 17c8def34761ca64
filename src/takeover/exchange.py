"""Drives one side of the protocol: messages and ticks in, actions out. What the two roles share."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from typing import ClassVar

from .allowance import SparingLogger
from .errors import PeerError, RemoteProtocolError, TakeoverError
from .link import Link, close_all
from .protocol import FINAL, Action, Do, Event, Limits, Local, Machine, State, Table, budget, silence_limit
from .wire import Frame, Type, as_text

logger = logging.getLogger("takeover")
sparing = SparingLogger(logger)

HEARTBEATS = frozenset(
    {
        State.OFFERING,
        State.JOINING,
        State.WARMING,
        State.COMMITTED,
        State.READY,
        State.STARTING,
        State.PROBATION,
        State.RETURNING,
    }
)
IDLE = frozenset({State.OWNER, State.STOPPING}) | FINAL


def read_token(token: int) -> bytes:
    """The next byte of the token, b"" if there is none; never waits.

    An empty pipe says EAGAIN and not end-of-file where a child, forked as the token was made, has its writing end.
    """
    try:
        return os.read(token, 1)
    except BlockingIOError:
        return b""


def say_failed(what: str, error: Exception) -> None:
    """Logs what has failed: one line where the system is short of something, a traceback where it is a mistake."""
    if isinstance(error, (OSError, MemoryError)):
        logger.error("%s failed: %s", what, error.strerror if isinstance(error, OSError) else "no memory")
    else:
        logger.error("%s failed", what, exc_info=error)


class Exchange(ABC):
    """One Machine on one Link. Everything here runs in one thread.

    `frame` is the message that is being acted on. `boundary` is a seam for tests, which die or stop at it: it is called
    with the role and the step before and after each action and at each message that arrives.
    """

    role: ClassVar[str]
    other: ClassVar[str]
    table: ClassVar[Table]
    boundary: ClassVar[Callable[[str], None] | None] = None

    def __init__(self, link: Link, limits: Limits) -> None:
        self.link = link
        self.limits = limits
        self.machine = Machine(self.table)
        link.expect({event for _, event in self.table if isinstance(event, Type)})
        self.reason = ""
        self.cause: Event | None = None
        self.error: TakeoverError | None = None
        self.frame: Frame | None = None
        self.phases: dict[str, float] = {}
        self._since = time.monotonic()
        self._silent = 0
        self._elapsed = 0
        self._events: deque[Event] = deque()
        self._stepping = False
        self._gone = self._loss_told = False

    @property
    def state(self) -> State:
        return self.machine.state

    @property
    def finished(self) -> bool:
        return self.machine.state in FINAL

    @property
    def knows_peer(self) -> bool:
        """Whether the process that the kernel named is the one at the other end, so that its death is the link's."""
        return True

    @property
    def needs_ticks(self) -> bool:
        """Whether time means anything in the present state."""
        return self.machine.state not in IDLE

    @property
    def loss(self) -> Event:
        """The event that a lost link is in the present state."""
        return Local.LOST

    @abstractmethod
    def owned(self) -> list[int]:
        """The descriptors that the role owns besides its link, for a forked child to close."""

    @abstractmethod
    def perform(self, action: Do) -> Event | None:
        """Does what a step asks for; may return the event that comes of it."""

    def message(self, kind: Type) -> None:
        """Sends the message that a step asks for; roles add bodies and descriptors to those that have any."""
        body = {"reason": as_text(self.reason)} if kind in (Type.ABORT, Type.UNDO) else None
        self.link.send(kind, body)

    @abstractmethod
    def received(self, frame: Frame) -> Event | None:
        """Looks at a message that the table allows now; may return another event in its place, or None to wait."""

    @abstractmethod
    def changed(self, before: State) -> None:
        """Called after each change of state."""

    def hang_up(self) -> None:
        """Closes the link."""
        self.link.close()

    def step(self, event: Event) -> None:
        """Feeds one event, and those that its actions bring about, in order.

        That the link is gone comes last, once in each state that it lasts for.
        """
        self._events.append(event)
        if self._stepping:
            return
        self._stepping = True
        try:
            while self._events and not self.finished:
                self._one(self._events.popleft())
                if self._gone and not (self._events or self._loss_told) and self.machine.accepts(self.loss):
                    self._events.append(self.loss)
        finally:
            self._stepping = False
            self._events.clear()

    def _one(self, event: Event) -> None:
        before = self.state
        if event is Local.LOST and not self.reason:
            self.reason = f"the {self.other} died or hung up"
        self._loss_told |= event is self.loss
        actions = self.machine.step(event)
        if self.state is not before:
            self.cause = event
            self._loss_told = False
        for action in actions:
            self._act(action)
        if self.state is not before:
            now = time.monotonic()
            self.phases[before.value] = self.phases.get(before.value, 0.0) + (now - self._since) * 1000
            self._since = now
            self._elapsed = self._silent = 0
            self.changed(before)

    def _act(self, action: Action) -> None:
        self._at_boundary("before", action.name)
        try:
            if isinstance(action, Type):
                self.message(action)
            elif action is Do.CLOSE:
                self.hang_up()
            else:
                event = self.perform(action)
                if event is not None:
                    self._events.append(event)
        except OSError as error:
            self.reason = f"{action.name}: {error.strerror}"
            if self.machine.accepts(Local.FAIL):
                self._events.append(Local.FAIL)
            else:
                self.link.lost = self._gone = True  # so that the link is closed, and the other end finds out
        self._at_boundary("after", action.name)

    def _at_boundary(self, when: str, name: str) -> None:
        if Exchange.boundary is not None:
            Exchange.boundary(f"{self.role} {when} {name}")

    def died(self) -> None:
        """The peer's process is dead: what it had sent is read, then the link counts as lost."""
        while not self.link.lost and not self.finished and self.link.first_byte():
            self.readable()
        self.link.lost = True
        self.lose()

    def readable(self) -> None:
        """Reads what has come, and acts on it; a peer that breaks the protocol loses the link."""
        try:
            frames = deque(self.link.receive())
            while frames:
                frame = frames.popleft()
                try:
                    self._frame(frame)
                except BaseException:
                    for unused in (frame, *frames):
                        close_all(unused.descriptors)
                    raise
        except PeerError as error:
            self.error, self.reason = error, str(error)
            sparing.log(logging.WARNING, "%s broke the protocol: %s", self.link.name, error)
            self.link.lost = True
        self.lose()

    def lose(self) -> None:
        """If the link is lost, that is an event now and in each state to come; what the peer had sent came before."""
        self._gone = self.link.lost
        if self._gone and self.machine.accepts(self.loss):
            self.step(self.loss)

    def _frame(self, frame: Frame) -> None:
        self._silent = 0
        if self.finished:
            close_all(frame.descriptors)
            return
        self._at_boundary("at", frame.type.name)
        if not self.machine.accepts(frame.type):
            raise RemoteProtocolError(f"{frame.type.name} is out of turn in the state {self.state.value!r}")
        self.frame = frame
        event = self.received(frame)
        if event is not None:
            self.step(event)

    def tick(self) -> None:
        """One heartbeat interval of this process has passed."""
        self._silent += 1
        self._elapsed += 1
        if self.state in HEARTBEATS and not self.link.unsent and not self.link.lost:
            with contextlib.suppress(OSError):
                self.link.send(Type.HEARTBEAT)
        silence, whole = silence_limit(self.state, self.limits), budget(self.state, self.limits)
        for limit, ticks, event, text in (
            (silence, self._silent, Local.SILENT, "said nothing for"),
            (whole, self._elapsed, Local.OVERTIME, f"did not finish the step {self.state.value!r} within"),
        ):
            if limit is not None and ticks >= limit / self.limits.heartbeat and self.machine.accepts(event):
                self._silent = 0
                self.reason = f"the {self.other} {text} {limit:g} s"
                self.step(event)
                return
