"""The incumbent's side of one control connection: hands the service over, tells its status, or stops it."""

from __future__ import annotations

import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ._version import VERSION
from .channel import Channel
from .descriptors import expect
from .errors import RemoteProtocolError
from .exchange import Exchange, read_token, sparing
from .link import Link, close_all
from .protocol import COMMIT_BYTE, INCUMBENT, SETTLE_BYTE, Do, Event, Local, State
from .wire import MAX_DESCRIPTORS, SCHEMA, VERSIONS, Body, Frame, Type, as_text

if TYPE_CHECKING:
    from .controller import Controller

Items = list[tuple[dict[str, Any], int]]

UNDECIDED = frozenset({State.OFFERING, State.WARMING, State.COMMITTED, State.PROBATION})


RECENTLY = 2
"""Ticks: a probation does not end while the successor is silent, for it may have stopped or died."""


class Incumbent(Exchange):
    """Owns its end of the token from the first offer until the exchange is decided."""

    role = "incumbent"
    other = "successor"
    table = INCUMBENT

    def __init__(self, link: Link, owner: Controller) -> None:
        super().__init__(link, owner.limits)
        self.owner = owner
        self.dry_run = False
        self.began = time.monotonic()
        self.ready: Body = {}
        self._refusal = ("busy", "")
        self._token = -1
        self._batches: list[Items] | None = None
        self._counted = -1

    def greet(self) -> None:
        """Says who serves here, as soon as somebody has connected."""
        self.link.send(
            Type.HELLO,
            {
                "versions": list(VERSIONS),
                "generation": self.owner.generation,
                "build": VERSION,
                "pid": os.getpid(),
                "service": self.owner.settings.service,
            },
        )

    def owned(self) -> list[int]:
        return [self._token]

    @property
    def knows_peer(self) -> bool:
        """Until the successor is settled: then it hands this link on to its own, and may end."""
        return self.state is not State.DRAINING

    def received(self, frame: Frame) -> Event | None:
        if frame.type is Type.JOIN:
            self.link.told = frame.body["pid"]
            refusal = self._refuse(frame.body)
            if refusal is not None:
                self._refusal = refusal
                sparing.log(logging.INFO, "refused %s: %s", self.link.name, refusal[1])
                return Local.DENIED
            self.dry_run = frame.body["dry_run"]
            dry = " (dry run)" if self.dry_run else ""
            sparing.log(logging.INFO, "%s asks for the service%s", self.link.name, dry)
            if not self.dry_run:
                self.owner.moments.asked(self.link.name)
        elif frame.type is Type.STOP:
            busy = self.owner.busy_with(self)
            if busy is not None:
                self._refusal = ("busy", busy)
                return Local.DENIED
        elif frame.type is Type.READY:
            self.ready = frame.body
        elif frame.type is Type.ABORT:
            self.reason = frame.body["reason"]
        return frame.type

    def _refuse(self, wish: Body) -> tuple[str, str] | None:
        pid = os.getpid()
        if wish["version"] not in VERSIONS:
            return "version", f"pid {pid} speaks protocol {list(VERSIONS)}, not {wish['version']}"
        if wish["service"] != self.owner.settings.service:
            return "service", f"the service here is {self.owner.settings.service!r}, not {wish['service']!r}"
        busy = self.owner.busy_with(self)
        if busy is not None:
            return "busy", busy
        elders = self.owner.elders
        if len(elders) >= self.owner.settings.max_generations:
            pids = ", ".join(str(elder.pid) for elder in elders)
            return "generations", f"{len(elders)} older generations still drain (pid {pids}); wait, or raise the limit"
        needed = len(self.owner.estate()) + self.owner.blobs.count() + 1
        if wish["room"] < needed:
            return "room", f"{needed} descriptors to hand over, room for {wish['room']} (see ulimit -n)"
        return None

    def message(self, kind: Type) -> None:
        if kind is Type.REFUSE:
            self.link.send(kind, {"code": self._refusal[0], "reason": as_text(self._refusal[1])})
        elif kind is Type.REPORT:
            self.link.send(kind, self.owner.status())
        elif kind is Type.STOPPING:
            self.link.send(kind, {"deadline": self.owner.settings.drain_timeout})
        elif kind is Type.DONE:
            self.owner.bequeath_elders(self.link)
            self.owner.blobs.pass_on(self.link)
        else:
            super().message(kind)

    def perform(self, action: Do) -> Event | None:
        if action is Do.OFFER:
            return self._offer()
        if action is Do.STOP_ACCEPTING:
            self.owner.yield_service(self)
        elif action is Do.START_ACCEPTING:
            self.owner.resume_service()
        elif action is Do.TAKE_BACK:
            byte = read_token(self._token) if self._token >= 0 else COMMIT_BYTE
            return {COMMIT_BYTE: Local.GOT_COMMIT, SETTLE_BYTE: Local.GOT_SETTLE}.get(byte, Local.GOT_NOTHING)
        elif action is Do.RELEASE:
            self.owner.release_service(self)
        elif action is Do.MOVE:
            self._move()
        else:
            self.owner.stop_requested(self.link.name)
        return None

    def _move(self) -> None:
        """The owner asks for the live connections: hands its channel to the server, who owns it from then on."""
        assert self.frame is not None
        wish, descriptors = self.frame.body, self.frame.descriptors
        if len(descriptors) != 3:
            raise RemoteProtocolError(f"a channel came as {len(descriptors)} descriptors: a socket, a token, a ledger")
        expect(descriptors[0], kind="socket", family=socket.AF_UNIX, type=socket.SOCK_STREAM, listening=False)
        expect(descriptors[1], kind="fifo")
        expect(descriptors[2], kind="file")
        sock, token, ledger = descriptors
        channel = Channel(sock, token, ledger, wish["pid"], wish["generation"], room=wish["room"])
        del descriptors[:]
        self.owner.server.give_connections(channel, self.limits)

    def _offer(self) -> Event | None:
        if self._batches is None:
            self._batches = self._prepare()
        if not self._batches:
            return Local.OFFERED
        batch = self._batches.pop(0)
        left = sum(map(len, self._batches))
        self.link.send(
            Type.LISTENERS,
            {"items": [item for item, _ in batch], "left": left},
            [descriptor for _, descriptor in batch],
        )
        return None

    def _prepare(self) -> list[Items]:
        self._token, writing = os.pipe()
        os.set_blocking(self._token, False)
        os.write(writing, COMMIT_BYTE + SETTLE_BYTE)
        os.close(writing)
        token = {"role": "token", "name": "", "url": "", "device": 0, "inode": 0}
        return list(_batches([(token, self._token), *self.owner.estate(), *self.owner.blobs.offer()]))

    def changed(self, before: State) -> None:
        if self.state is State.PROBATION and not self.owner.settings.probation:
            self.step(Local.PROBATION_OVER)
        if before in UNDECIDED | {State.TAKING_BACK} and self.state not in UNDECIDED | {State.TAKING_BACK}:
            close_all([self._token])
            self.owner.blobs.decided()
            if self.state is State.CLOSED and self.owner.state == "draining":
                self.owner.blobs.give_up()
            self.owner.decided(self)

    def tick(self) -> None:
        super().tick()
        passed = self._elapsed >= self.owner.settings.probation / self.limits.heartbeat
        if self.state is State.PROBATION and passed and self._silent <= RECENTLY:
            self.step(Local.PROBATION_OVER)
        if self.state is State.DRAINING:
            count = self.owner.server.connections()
            if count != self._counted and not self.link.unsent:
                self._counted = count
                self.link.send(Type.DRAINING, {"connections": count})


def _batches(items: Items) -> Iterator[Items]:
    """What fits in one frame each, by the number of descriptors and by the length of the names."""
    batch: Items = []
    room = 0
    for item in items:
        size = len(json.dumps(item[0])) + 1
        if size > room or len(batch) == MAX_DESCRIPTORS:
            if batch:
                yield batch
            batch, room = [], SCHEMA[Type.LISTENERS].limit - 100
        batch.append(item)
        room -= size
    yield batch
