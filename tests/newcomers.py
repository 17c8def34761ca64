"""Processes of a new version, started with listeners and checked for readiness, without a supervisor around them."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from clients import LIMIT
from processes import PROGRAMS
from takeover.run.events import Events
from takeover.run.output import Relay
from takeover.run.readiness import Check, parse

NEWCOMER = str(PROGRAMS / "newcomer.py")


class Listening(NamedTuple):
    name: str
    url: str
    sock: socket.socket


def tcp(host: str = "127.0.0.1", family: int = socket.AF_INET) -> Listening:
    """A listener on a port of its own, non-blocking, as those of a service are."""
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.bind((host, 0))
    sock.listen(64)
    sock.setblocking(False)
    shown = f"[{host}]" if family == socket.AF_INET6 else host
    return Listening("", f"tcp://{shown}:{sock.getsockname()[1]}", sock)


def unix(path: str) -> Listening:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.bind(path)
    sock.listen(64)
    sock.setblocking(False)
    return Listening("", f"unix:{path}", sock)


def udp() -> Listening:
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind(("127.0.0.1", 0))
    sock.setblocking(False)
    return Listening("", f"udp://127.0.0.1:{sock.getsockname()[1]}", sock)


def spawn(
    words: Sequence[str],
    listeners: Sequence[Listening],
    more: Sequence[int] = (),
    outputs: tuple[int, int] | None = None,
    **environment: str,
) -> int:
    """Starts a process that has the listeners, and more descriptors, from 3 on; returns its pid."""
    given = [*(each.sock.fileno() for each in listeners), *more]
    high = [os.dup(each) for each in given]
    while min(high, default=100) < 3 + len(given):
        high = [os.dup(each) for each in high]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # fork() beside threads: the child only execs
        pid = os.fork()
    if pid:
        for each in high:
            with contextlib.suppress(OSError):
                os.close(each)
        return pid
    try:
        os.setpgid(0, 0)
        for number, each in enumerate(outputs or (), 1):
            os.dup2(each, number)
        for number, each in enumerate(high):
            os.dup2(each, 3 + number)
        os.closerange(3 + len(given), 256)
        variables = {**os.environ, **environment, "LISTEN_FDS": str(len(given)), "LISTEN_PID": str(os.getpid())}
        os.execvpe(words[0], list(words), variables)
    finally:
        os._exit(127)


class Trial:
    """One process and the check of it. `proof` and `failure` are what the check has said."""

    def __init__(self, events: Events, how: str, listeners: Sequence[Listening], words: Sequence[str]) -> None:
        self.events = events
        self.proof = ""
        self.failure = ""
        self.check = Check(parse(how), events, listeners, self._ready, self._failed, words)
        self.listeners = listeners
        self.words = words
        self.pid = 0
        self.exited: int | None = None
        self.output = b""
        self.relay: Relay | None = None

    def _ready(self, proof: str) -> None:
        assert not self.proof and not self.failure
        self.proof = proof

    def _failed(self, reason: str) -> None:
        assert not self.proof and not self.failure
        self.failure = reason

    def start(self) -> None:
        more = [descriptor for _, descriptor in self.check.descriptors]
        words = self.words
        if self.check.probe is not None:
            values = {"fd": str(3 + len(self.listeners)), "port": str(self.check.probe[2].getsockname()[1])}
            words = [re.sub(r"\{(fd|port):probe\}", lambda found: values[found[1]], word) for word in words]
        ends = self.relay.ends if self.relay is not None else None
        self.pid = spawn(words, self.listeners, more, ends, **self.check.environment)
        self.events.watch_child(self.pid, self._ended)
        if self.relay is not None:
            self.relay.started()
        self.check.started(self.pid)

    def _ended(self, status: int) -> None:
        self.exited = status

    def run(self, seconds: float = LIMIT) -> str:
        """Runs the loop until the check has said something, or the process has ended, or the time is over."""
        end = time.monotonic() + seconds
        while not self.proof and not self.failure and time.monotonic() < end and not self.has_ended():
            self.events.run_once(0.05)
        return self.proof

    def has_ended(self) -> bool:
        self.events.reap()
        return self.exited is not None

    def end(self) -> None:
        """Kills what is left of the process group that the command leads."""
        self.check.close()
        if self.pid:
            for kill in (os.killpg, os.kill):  # the group is there only when the child has made it
                with contextlib.suppress(ProcessLookupError):
                    kill(self.pid, signal.SIGKILL)
            while not self.has_ended():
                time.sleep(0.001)


class Trials:
    """Starts trials in one loop, and ends them all."""

    def __init__(self) -> None:
        self.events = Events()
        self.listeners: list[Listening] = []
        self.trials: list[Trial] = []

    def listen(self, listening: Listening) -> Listening:
        """One that is closed at the end."""
        self.listeners.append(listening)
        return listening

    def make(self, how: str, listeners: Sequence[Listening], *words: str) -> Trial:
        """One that is not started yet."""
        trial = Trial(self.events, how, listeners, words)
        self.trials.append(trial)
        return trial

    def start(self, how: str, listeners: Sequence[Listening], *words: str) -> Trial:
        trial = self.make(how, listeners, *words)
        trial.start()
        return trial

    def newcomer(self, how: str, listeners: Sequence[Listening], what: str, *more: str) -> Trial:
        """One that runs programs/newcomer.py."""
        return self.start(how, listeners, sys.executable, NEWCOMER, what, *more)


@contextlib.contextmanager
def trials() -> Iterator[Trials]:
    """Everything that was started in it has ended afterwards."""
    made = Trials()
    try:
        yield made
    finally:
        for trial in made.trials:
            trial.end()
        for listening in made.listeners:
            listening.sock.close()
        made.events.close()
