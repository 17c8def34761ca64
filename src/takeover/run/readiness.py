"""When a command that was started counts as ready: the ways to tell, and the check of one started process.

docs/readiness.md says what each way proves.
"""

from __future__ import annotations

import contextlib
import math
import re
import socket
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from takeover.errors import UsageError

from .acceptance import Acceptance
from .events import Events, Timer
from .notices import Notices
from .probes import Endpoint, endpoint
from .proc import Tree

PROBE = "probe"
"""The name of the private listener, `{fd:probe}` and `{port:probe}` in the words of a command."""

SOONEST, LATEST = 0.005, 0.1
"""Seconds between two looks at a command: a tenth of the time that it has taken so far, within these bounds."""

_WAYS = (
    "auto, notify, tcp, http:PATH, http:PATH=STATUS, exec:COMMAND, delay:SECONDS or line:REGEX (a regular expression)"
)
_WORD = re.compile(r"\{(fd|port|host):probe\}")


class Listener(Protocol):
    """What is known of a listener of the command: its URL, and the socket, which stays the caller's."""

    @property
    def url(self) -> str: ...

    @property
    def sock(self) -> socket.socket: ...


class Way(NamedTuple):
    """How a command shows that it is ready.

    kind: "auto", "notify", "tcp", "http", "exec", "delay" or "line". argument: the path, command, or expression.
    status: what an HTTP answer must have; 0 for any from 200 to 399. seconds: of a delay.
    """

    kind: str
    argument: str = ""
    status: int = 0
    seconds: float = 0.0

    @property
    def reads_output(self) -> bool:
        """Whether check.output() must be given what the process writes."""
        return self.kind == "line"


def parse(how: str) -> Way:
    """What --ready says. Raises UsageError."""
    kind, colon, argument = how.partition(":")
    if kind in ("auto", "notify", "tcp") and not colon:
        return Way(kind)
    if kind == "http" and argument.startswith("/"):
        return _parse_http(how, argument)
    if kind == "exec" and argument.strip():
        return Way(kind, argument)
    if kind == "delay":
        with contextlib.suppress(ValueError):
            seconds = float(argument)
            if math.isfinite(seconds) and seconds >= 0:
                return Way(kind, argument, seconds=seconds)
        raise UsageError(f"--ready {how}: after delay: comes a number of seconds, 0 or more")
    if kind == "line" and argument:
        try:
            re.compile(argument.encode())
        except re.error as error:
            raise UsageError(f"--ready {how}: not a regular expression: {error}") from None
        return Way(kind, argument)
    raise UsageError(f"--ready {how}: write {_WAYS}")


def _parse_http(how: str, argument: str) -> Way:
    path, equals, status = argument.rpartition("=")
    if not equals or ("?" in path and not re.fullmatch(r"\d{3}", status)):
        path, status = argument, ""  # the = belongs to a query
    if re.search(r"[^!-~]", path):
        raise UsageError(f"--ready {how}: a path has no spaces and only ASCII; encode others as %XX (RFC 3986)")
    if status and not re.fullmatch(r"[1-5]\d\d", status):
        raise UsageError(f"--ready {how}: after = comes a status from 100 to 599")
    return Way("http", path, int(status or 0))


def wanted_of_probe(words: Sequence[str]) -> str:
    """What the words of a command ask of the private probe listener: "fd", "port" (it binds that itself) or nothing."""
    found = {match[1] for word in words for match in _WORD.finditer(word)}
    return "fd" if "fd" in found else "port" if found else ""


class Check:
    """Whether one started process is ready; everything happens in the loop, and nothing after it was ready or closed.

    Only NOTIFY_SOCKET stays open until close(), so that a command that goes on sending has no errors: call it when
    the process has ended.
    """

    def __init__(
        self,
        way: Way,
        events: Events,
        listeners: Sequence[Listener],
        on_ready: Callable[[str], object],
        on_failed: Callable[[str], object],
        words: Sequence[str] = (),
    ) -> None:
        """on_ready: called once, with the proof in words. on_failed: called once, instead, when it can never be ready.

        words: of the command, before anything is replaced in them. If they ask for a probe listener, `probe` is the
        URL, the name and the socket, to be replaced as those of the other listeners are.
        Raises OSError if a socket cannot be made.
        """
        self.environment: dict[str, str] = {}
        self.descriptors: list[tuple[str, int]] = []
        self.ready = False
        self._way = way
        self._events = events
        self._on_ready = on_ready
        self._on_failed = on_failed
        self._listeners = list(listeners)
        self._tree: Tree | None = None
        self._timer: Timer | None = None
        self._since = 0.0
        self._announced = 0
        self._over = False
        self._notices: Notices | None = None
        self._acceptance: Acceptance | None = None
        self._probe: socket.socket | None = None
        self._probe_wanted = wanted_of_probe(words)
        if self._probe_wanted:
            self._bind_probe()
        if way.kind in ("auto", "notify"):
            self._notices = Notices(events, self._announce)
            self.environment["NOTIFY_SOCKET"] = self._notices.address

    @property
    def status(self) -> str:
        """The last STATUS= of the command; empty if it has sent none."""
        return self._notices.status if self._notices is not None else ""

    @property
    def probe(self) -> tuple[str, str, socket.socket] | None:
        """Name, URL and socket of the private listener, as those of Listening; None where nobody asked for it."""
        return None if self._probe is None else (PROBE, self._probe_url(self._probe), self._probe)

    def started(self, pid: int) -> None:
        """The process runs: it is looked at from now on."""
        self._tree = Tree(pid)
        self._since = time.monotonic()
        if self._notices is not None:
            self._notices.started(self._tree)
        endpoints = self._endpoints()
        self._release_probe()
        kind = self._way.kind
        if kind == "delay":
            self._timer = self._events.call_later(self._way.seconds, self._has_lived)
        elif kind in ("auto", "tcp"):
            self._acceptance = Acceptance(endpoints, strict=kind == "tcp")
            self._timer = self._events.call_later(SOONEST, self._look)

    def output(self, data: bytes) -> None:
        """What the process has written."""

    def why_not(self) -> str:
        """One line on what was seen, for a process that has died or has used up its time."""
        if self._notices is not None:
            self._notices.read()
            if self._notices.refused:
                return self._notices.refused
        return "it has not shown that it is ready"

    def close(self) -> None:
        """Frees everything; harmless a second time, and at any moment."""
        self._end()
        if self._notices is not None:
            self._notices.close()

    def _bind_probe(self) -> None:
        self._probe = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        try:
            self._probe.setblocking(False)
            self._probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._probe.bind(("127.0.0.1", 0))
            if self._probe_wanted == "fd":
                self._probe.listen(16)
                self.descriptors.append((PROBE, self._probe.fileno()))
        except BaseException:
            self._probe.close()
            raise

    @staticmethod
    def _probe_url(sock: socket.socket) -> str:
        host, port = sock.getsockname()
        return f"tcp://{host}:{port}"

    def _release_probe(self) -> None:
        """Nobody but the command has the listener from here on: what is accepted on it, it has accepted."""
        if self._probe is not None:
            self._probe.close()
            self._probe = None
            self.descriptors.clear()

    def _endpoints(self) -> list[Endpoint]:
        if self._probe is not None:
            where = endpoint(self._probe_url(self._probe), self._probe, private=True)
            return [where if self._probe_wanted == "fd" else where._replace(inode=0)]
        strict = self._way.kind not in ("auto", "exec")
        found = [endpoint(each.url, each.sock) for each in self._listeners]
        return [where for where in found if where.type == socket.SOCK_STREAM or not strict]

    def _announce(self, pid: int) -> None:
        """READY=1 has come from a process of the command."""
        self._announced = pid
        if self._way.kind == "notify":
            self._succeed(f"READY=1 from pid {pid}")
        elif not self._over:
            self._look()

    def _look(self) -> None:
        assert self._acceptance is not None and self._tree is not None
        proof = self._acceptance.look(self._tree)
        if not proof and self._announced and self._acceptance.hidden:
            proof = f"READY=1 from pid {self._announced}"
        if proof:
            self._succeed(proof)
        else:
            self._look_again()

    def _look_again(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        passed = time.monotonic() - self._since
        self._timer = self._events.call_later(min(max(passed / 10, SOONEST), LATEST), self._look)

    def _has_lived(self) -> None:
        self._succeed(f"alive for {self._way.argument} s, nothing else was looked at")

    def _succeed(self, proof: str) -> None:
        if not self._over:
            self._end()
            self.ready = True
            self._on_ready(proof)

    def _fail(self, reason: str) -> None:
        if not self._over:
            self._end()
            self._on_failed(reason)

    def _end(self) -> None:
        self._over = True
        if self._timer is not None:
            self._timer.cancel()
        if self._acceptance is not None:
            self._acceptance.close()
        self._release_probe()
