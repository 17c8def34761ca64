"""The successor's side: asks for the service, keeps what it is given, commits, and watches over what still drains."""

from __future__ import annotations

import os
import socket
from array import array
from concurrent.futures import Future
from typing import TYPE_CHECKING, NamedTuple

from ._version import VERSION
from .blobs import MOST_BLOBS, check
from .channel import Channel, open_channel, room_for_connections
from .descriptors import expect, expect_listener, limit_and_held
from .errors import Aborted, LocalError, PeerLost, Refused, RemoteProtocolError, TakeoverError, TimedOut
from .exchange import Exchange, logger, read_token
from .link import Link, close_all
from .namespaces import in_words, is_process, mapping_hint
from .protocol import COMMIT_BYTE, SETTLE_BYTE, SUCCESSOR, Do, Event, Local, State
from .wire import VERSIONS, Body, Frame, Type

if TYPE_CHECKING:
    from .controller import Controller

CHANNELS = 5
"""How often an older process is asked for its live connections: one of the two may have been busy or stopped."""

SPARE_DESCRIPTORS = 16
"""How many descriptors a successor keeps for itself when it says how much room it has."""


class Inherited(NamedTuple):
    """A descriptor that came from the incumbent, checked against the kernel, and what was said of it."""

    role: str
    name: str
    url: str
    descriptor: int
    identity: tuple[int, int]


class Elder(NamedTuple):
    """An older process that still drains."""

    pid: int
    generation: int
    connections: int


def room_for_descriptors() -> int:
    """How many more descriptors this process may hold, less a few that it needs itself."""
    limit, held = limit_and_held()
    return max(0, limit - held - SPARE_DESCRIPTORS)


class Successor(Exchange):
    """Owns what was inherited until the service takes it (`take`); an exchange that fails closes what is left.

    `joined` is done when everything has come, `committed` when this process owns the service or never will; both carry
    the exception of an exchange that failed. `kept` is whether the service, once committed, stayed with this process.
    """

    role = "successor"
    other = "incumbent"
    table = SUCCESSOR

    def __init__(self, link: Link, joiner: Controller, *, dry_run: bool = False) -> None:
        super().__init__(link, joiner.limits)
        self.joiner = joiner
        self.dry_run = dry_run
        self.joined: Future[None] = Future()
        self.committed: Future[None] = Future()
        self.kept: Future[bool] = Future()
        self.inherited: list[Inherited] = []
        self.elder = Elder(link.peer.pid, 0, 0)
        self.ready: Body = {"adopted": [], "bound": [], "unused": []}
        self._channels = 0
        self._is_peer = False
        self._version = VERSIONS[0]
        self._left = -1
        self._token = -1

    @classmethod
    def of_elder(cls, link: Link, joiner: Controller, elder: Elder) -> Successor:
        """Watches over an older process whose link came along with the service."""
        self = cls(link, joiner)
        self.elder = elder
        self._is_peer = link.peer.pid in (0, elder.pid)
        self.machine.state = State.OWNER
        return self

    @property
    def knows_peer(self) -> bool:
        """HELLO tells: the kernel names who called listen() last (unix(7)), maybe a successor undone and dead."""
        return self._is_peer

    @property
    def elsewhere(self) -> bool:
        """Whether the older process is in a pid namespace that this one cannot look into."""
        return not self.link.peer.pid

    @property
    def _elder_name(self) -> str:
        return in_words(0 if self.elsewhere else self.elder.pid, self.elder.pid)

    def owned(self) -> list[int]:
        return [self._token, *(kept.descriptor for kept in self.inherited)]

    def received(self, frame: Frame) -> Event | None:
        if frame.type is Type.HELLO:
            return self._greeted(frame.body)
        if frame.type is Type.REFUSE:
            self.error = Refused(f"{self._elder_name} refused: {frame.body['reason']}", frame.body["code"])
        elif frame.type in (Type.ABORT, Type.UNDO):
            self.reason = frame.body["reason"]
        return frame.type

    def _greeted(self, hello: Body) -> Event:
        peer = self.link.peer
        self.link.told = hello["pid"]
        seen = bool(peer.pid) and is_process(peer.pid, peer.pidfd, hello["pid"])
        self._is_peer = seen or not peer.pid
        self.elder = Elder(peer.pid if seen else hello["pid"], hello["generation"], 0)
        common = set(VERSIONS) & set(hello["versions"])
        if peer.uid not in self.joiner.control.allowed:
            self.error = LocalError(
                f"{self.link.name} at {self.joiner.control.path} belongs to uid {peer.uid}, not to us"
                f"{mapping_hint(peer.uid)}"
            )
        elif not common:
            self.error = RemoteProtocolError(
                f"{self._elder_name} (takeover {hello['build']}) speaks protocol {hello['versions']}, "
                f"this one {list(VERSIONS)}: upgrade in between, or stop it first"
            )
        else:
            self._version = max(common)
            return Type.HELLO
        return Local.FAIL

    def message(self, kind: Type) -> None:
        if kind is Type.JOIN:
            self.link.send(
                kind,
                {
                    "version": self._version,
                    "capabilities": [],
                    "room": room_for_descriptors(),
                    "dry_run": self.dry_run,
                    "build": VERSION,
                    "pid": os.getpid(),
                    "service": self.joiner.settings.service,
                },
            )
        elif kind is Type.READY:
            self.link.send(kind, self.ready)
        else:
            super().message(kind)
            if kind is Type.TAKEN and self._left == 0:
                self.step(Local.COMPLETE)

    def perform(self, action: Do) -> Event | None:
        if action is Do.KEEP:
            return self._keep()
        if action is Do.TAKE_COMMIT:
            got = read_token(self._token) == COMMIT_BYTE
            return Local.GOT_COMMIT if got else Local.GOT_NOTHING
        if action is Do.TAKE_SETTLE:
            got = read_token(self._token) == SETTLE_BYTE
            return Local.GOT_SETTLE if got else Local.GOT_NOTHING
        if action is Do.START_ACCEPTING:
            self.joiner.own_service(self)
        elif action is Do.STOP_ACCEPTING:
            self.joiner.lose_service(self)
        elif action is Do.OPEN_CHANNEL:
            self.open_channel()
        else:
            assert self.frame is not None
            self._heard(action, self.frame)
        return None

    def _heard(self, action: Do, frame: Frame) -> None:
        if action is Do.ELDERS:
            self._meet_elders(frame)
        elif action is Do.BEQUEATH:
            self._inherit(frame)
        else:
            self.elder = self.elder._replace(connections=frame.body["connections"])

    def _keep(self) -> Event | None:
        assert self.frame is not None
        body, descriptors = self.frame.body, self.frame.descriptors[:]
        items = body["items"]
        del self.frame.descriptors[:]
        try:
            if len(items) != len(descriptors):
                raise RemoteProtocolError(f"{len(items)} items came with {len(descriptors)} descriptors")
            for item in items:
                self._keep_one(item, descriptors)
            self._left = body["left"]
            missing = {"control", "lock"} - {kept.role for kept in self.inherited}
            if self._token < 0 or (self._left == 0 and missing):
                raise RemoteProtocolError("the control socket, the lock or the token is not among the descriptors")
        except RemoteProtocolError as error:
            self.error = error
            return Local.FAIL
        finally:
            close_all(descriptors)
        return None

    def open_channel(self) -> None:
        """Asks the older process for its live connections, if the server here can take them."""
        if not self.joiner.server.live or self.finished or self.link.lost or self._channels == CHANNELS:
            return
        self._channels += 1
        ours: tuple[int, ...] = ()
        try:
            room = room_for_connections()
            ours, theirs = open_channel()
            wish = {"room": room, "pid": os.getpid(), "generation": self.joiner.generation}
            self.link.send(Type.TAKE, wish, theirs, given=theirs)
        except OSError as error:
            close_all(ours)
            goes_on = "its connections drain there" if self._channels == CHANNELS else "trying again"
            logger.warning("no channel to %s: %s; %s", self._elder_name, error.strerror, goes_on)
            self._open_another()
            return
        elder = self.elder
        channel = Channel(*ours, elder.pid, elder.generation, room, elder.connections, self._open_another)
        self.joiner.server.take_connections(channel, self.limits)

    def _open_another(self) -> None:
        self.joiner.post(lambda: self.joiner.at_next_tick(self.open_channel))

    def _keep_one(self, item: Body, descriptors: array[int]) -> None:
        """Checks the first descriptor that is left, and moves it into our own keeping."""
        role, descriptor = item["role"], descriptors[0]
        if role == "token":
            expect(descriptor, kind="fifo")
            close_all([self._token])
            self._token = descriptor
            os.set_blocking(descriptor, False)
        elif role == "lock":
            expect(descriptor, kind="file")
        elif role == "control":
            expect(descriptor, kind="socket", family=socket.AF_UNIX, type=socket.SOCK_STREAM, listening=True)
        elif role == "blob":
            check(descriptor)
            if sum(kept.role == "blob" for kept in self.inherited) >= MOST_BLOBS:
                raise RemoteProtocolError(f"more than {MOST_BLOBS:,} blobs have come")
        elif role == "listener":
            expect_listener(descriptor, item["url"])
        else:
            raise RemoteProtocolError(f"a descriptor has the unknown role {role!r}")
        if role == "control":
            os.set_blocking(descriptor, False)
        if role != "token":
            identity = (item["device"], item["inode"])
            self.inherited.append(Inherited(role, item["name"], item["url"], descriptor, identity))
        del descriptors[0]

    def _inherit(self, frame: Frame) -> None:
        descriptors = frame.descriptors[:]
        del frame.descriptors[:]
        try:
            if len(descriptors) != 1:
                raise RemoteProtocolError(f"a BLOB came with {len(descriptors)} descriptors instead of one")
            self.joiner.blobs.inherit(frame.body["name"], self.elder.generation, descriptors[0])
            del descriptors[0]
        finally:
            close_all(descriptors)

    def _meet_elders(self, frame: Frame) -> None:
        self.elder = self.elder._replace(connections=frame.body["left"])
        descriptors = frame.descriptors[:]
        del frame.descriptors[:]
        try:
            for said in frame.body["elders"][: len(descriptors)]:
                expect(descriptors[0], kind="socket", family=socket.AF_UNIX, type=socket.SOCK_STREAM, listening=False)
                elder = Elder(said["pid"], said["generation"], said["connections"])
                self.joiner.watch_elder(descriptors.pop(0), elder).open_channel()
        finally:
            close_all(descriptors)
        self.joiner.moments.succeeded(frame.body)

    def changed(self, before: State) -> None:
        if self.state in (State.OWNER, State.UNDONE, State.FAILED):
            close_all([self._token])
            self._token = -1
        if self.state is State.WARMING and not self.joined.done():
            self._pass_blobs()
            self.joined.set_result(None)
        elif self.state is State.STARTING:
            self.committed.set_result(None)
        elif self.state is State.OWNER:
            self.kept.set_result(True)
            self.joiner.settled(self)
        elif self.state in (State.FAILED, State.UNDONE):
            self._fail(before)

    def _fail(self, before: State) -> None:
        error = self.error or self._explain(before)
        close_all([kept.descriptor for kept in self.inherited])
        self.inherited = []
        for future in (self.joined, self.committed):
            if not future.done():
                future.set_exception(error)
        self.kept.set_result(False)
        if self.state is State.UNDONE:
            self.joiner.blobs.forget()
            self.joiner.blobs.give_up()
            logger.error("the takeover was undone: %s", error)

    def _explain(self, before: State) -> TakeoverError:
        name = self._elder_name
        if self.cause in (Local.SILENT, Local.OVERTIME):
            return TimedOut(f"{self.reason} ({name}); is it stopped?")
        if self.cause is Local.LOST and before in (State.GREETING, State.JOINING):
            return PeerLost(f"{self.reason} ({name})")
        return Aborted(f"{name} serves on: {self.reason or 'it took the service back'}")

    def _pass_blobs(self) -> None:
        self.joiner.blobs.expect()
        for kept in [kept for kept in self.inherited if kept.role == "blob"]:
            self.joiner.blobs.inherit(kept.name, self.elder.generation, kept.descriptor)
            self.inherited.remove(kept)

    def hang_up(self) -> None:
        super().hang_up()
        if not self.joiner.elders:
            self.joiner.blobs.no_more()

    def take_listeners(self) -> list[Inherited]:
        """Hands the inherited listeners over to the caller, who owns them from now on."""
        taken = [kept for kept in self.inherited if kept.role == "listener"]
        self.inherited = [kept for kept in self.inherited if kept.role != "listener"]
        return taken

    def give_up(self, reason: str, error: TakeoverError | None = None) -> None:
        """Ends the exchange from this side, if it has not been decided yet; `error` is what the caller is to see."""
        if self.machine.accepts(Local.FAIL):
            self.error, self.reason = error, reason
            self.step(Local.FAIL)
