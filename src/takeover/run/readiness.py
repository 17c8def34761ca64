"""Whether a command that was started is ready: the check of one started process, and why it is not.

docs/readiness.md says what each way (ways.py) proves.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from . import diagnosis
from .acceptance import Acceptance
from .asking import Asking
from .events import Events, Timer
from .lines import Lines
from .notices import Notices
from .probes import Endpoint, endpoint
from .proc import Tree
from .trying import Trying
from .ways import Way, parse, wanted_of_probe

__all__ = ["PROBE", "Check", "Listener", "Way", "parse", "wanted_of_probe"]

PROBE = "probe"
"""The name of the private listener, `{fd:probe}` and `{port:probe}` in the words of a command."""

SOONEST, LATEST = 0.005, 0.1
"""Seconds between two looks at a command: a tenth of the time that it has taken so far, within these bounds."""

PAUSE = 0.3
"""Seconds without output after which a line that has not ended counts as one."""

RARELY = 1.0
"""Seconds between two requests or commands that ask it, at most; else as between two looks."""


class Listener(Protocol):
    """What is known of a listener of the command: its URL, and the socket, which stays the caller's."""

    @property
    def url(self) -> str: ...

    @property
    def sock(self) -> socket.socket: ...


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

        words: of the command, before anything is replaced in them. If they ask for a probe listener, `probe` is its
        name, URL and socket, to be replaced as those of the other listeners are.
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
        self._given = [os.fstat(each.sock.fileno()).st_ino for each in listeners]
        self._tree: Tree | None = None
        self._timer = Timer(0.0, lambda: None)
        self._since = 0.0
        self._announced = 0
        self._told = ""
        self._over = False
        self._acceptance: Acceptance | None = None
        self._asking: Asking | Trying | None = None
        self._lines = Lines(way.argument) if way.reads_output else None
        self._probe: socket.socket | None = None
        self._probe_wanted = wanted_of_probe(words)
        if self._probe_wanted:
            self._bind_probe()
        self._notices: Notices | None = None
        if way.kind in ("auto", "notify"):
            try:
                self._notices = Notices(events, self._announce)
            except BaseException:
                self._release_probe()
                raise
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
        elif kind in ("auto", "tcp", "http", "exec"):
            if not endpoints:
                reason = f"--ready {kind} needs a listener to probe, and it was given none"
                self._timer = self._events.call_later(0, lambda: self._fail(reason))
                return
            self._acceptance = Acceptance(endpoints, strict=kind in ("tcp", "http"))
            self._timer = self._events.call_later(SOONEST, self._look)

    def output(self, data: bytes) -> None:
        """What the process has written."""
        lines = self._lines
        if lines is not None and not self._over:
            self._has_written(lines.search(data))
            if not self._over:
                self._timer.cancel()
                self._timer = self._events.call_later(PAUSE, lambda: self._has_written(lines.search_unfinished()))

    def _has_written(self, line: str | None) -> None:
        if line is not None:
            self._succeed(f"it wrote: {diagnosis.printable(line)[:200]}")

    def why_not(self, status: int | None = None) -> str:
        """One line on what was seen, for a process that has died or has used up its time; empty if that was nothing.

        status: its exit status, if it has ended; it is not ready any more then, whatever it has sent before.
        """
        self._over = self._over or status is not None
        told = [self._told]
        if self._tree is not None and not status:
            told.insert(0, diagnosis.why_not(self._tree, self._acceptance, self._given))
        if self._notices is not None:
            self._notices.read()
            if self._announced and status is None:
                told.append(f"READY=1 came from pid {self._announced}; --ready notify would go by that alone")
            elif self._notices.refused:
                told.append(self._notices.refused)
            elif self._way.kind == "notify" and not self._announced:
                told.append("it has not sent READY=1 to NOTIFY_SOCKET")
            if self.status:
                told.append(f"its last STATUS: {self.status}")
        if self._lines is not None:
            last = diagnosis.printable(self._lines.last)[:200]
            told.append(f"no line of it matches {self._way.argument!r}; the last one: {last or 'there was none'}")
        if self._way.kind == "delay":
            told.append(f"it was to live for {self._way.argument} s first")
        return "; ".join(filter(None, told))

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
                self._given.append(os.fstat(self._probe.fileno()).st_ino)
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
        found = [endpoint(each.url, each.sock) for each in self._listeners]
        if self._way.kind in ("tcp", "http"):
            found = [where for where in found if where.type == socket.SOCK_STREAM]
        return found[:1] if self._way.kind == "http" else found

    def _announce(self, pid: int) -> None:
        """READY=1 has come from a process of the command."""
        self._announced = pid
        if self._way.kind == "notify":
            self._succeed(f"READY=1 from pid {pid}")
        elif not self._over and self._acceptance is not None:
            self._look()

    def _look(self) -> None:
        assert self._acceptance is not None and self._tree is not None
        proof = self._acceptance.look(self._tree)
        if not proof and self._announced and self._acceptance.hidden:
            proof = f"READY=1 from pid {self._announced}"
        if self._acceptance.seen is not None and diagnosis.is_granian(self._acceptance.seen.processes):
            self._fail(diagnosis.GRANIAN)
        elif not proof:
            self._look_again()
        elif self._way.kind == "http":
            self._ask(proof)
        elif self._way.kind == "exec":
            self._try(proof)
        else:
            self._succeed(proof)

    def _look_again(self, latest: float = LATEST) -> None:
        self._timer.cancel()
        passed = time.monotonic() - self._since
        self._timer = self._events.call_later(min(max(passed / 10, SOONEST), latest), self._look)

    def _ask(self, proof: str) -> None:
        assert self._acceptance is not None
        where = self._acceptance.targets[0].where
        probe = self._acceptance.take()

        def answered(status: int, problem: str) -> None:
            asked = f"GET {self._way.argument}"
            wanted = f"{self._way.status}" if self._way.status else "200 to 399"
            if status and (status == self._way.status or (not self._way.status and 200 <= status < 400)):
                self._succeed(f"{proof}, and answered {asked} with {status}")
                return
            self._told = f"{asked}: {problem}" if problem else f"{asked} was answered with {status}, not {wanted}"
            self._look_again(RARELY)

        self._asking = Asking(self._events, probe.sock, where, self._way.argument, answered)

    def _try(self, proof: str) -> None:
        def ended(status: int, last: str) -> None:
            if not status:
                self._succeed(f"{proof}; exec ended with exit status 0")
                return
            how = f"exit status {status}" if status > 0 else f"signal {-status}"
            self._told = f"exec:{self._way.argument} ended with {how}" + (
                f": {diagnosis.printable(last)[:200]}" * bool(last)
            )
            self._look_again(RARELY)

        try:
            self._asking = Trying(self._events, self._way.argument, self._address_for_command(), ended)
        except OSError as error:
            self._fail(f"start /bin/sh for --ready exec: {error.strerror}")

    def _address_for_command(self) -> dict[str, str]:
        assert self._acceptance is not None and self._tree is not None
        where = self._acceptance.targets[0].where
        given = {"TAKEOVER_URL": where.url, "TAKEOVER_PID": str(self._tree.root)}
        if where.family == socket.AF_UNIX:
            return {**given, "TAKEOVER_PATH": str(where.address)}
        return {**given, "TAKEOVER_HOST": str(where.address[0]), "TAKEOVER_PORT": str(where.address[1])}

    def _has_lived(self) -> None:
        self._succeed(f"alive for {self._way.argument} s, nothing else was looked at")

    def _succeed(self, proof: str) -> None:
        if not self._over:
            self._end()
            self.ready = True
            self._on_ready(proof)

    def _fail(self, reason: str) -> None:
        self._end()
        self._on_failed(reason)

    def _end(self) -> None:
        self._over = True
        self._timer.cancel()
        if self._asking is not None:
            self._asking.close()
        if self._acceptance is not None:
            self._acceptance.close()
        self._release_probe()
