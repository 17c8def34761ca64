"""Processes that have imported takeover already when they begin: forked from an interpreter that has done nothing else.

The tests start thousands of them, a sweep tens of thousands, and most of what that cost was the start of interpreters.
What a forked one does from then on is what a new one does: it runs its program as `__main__`, and ends as any
interpreter does.

This is the program of the parent as well: descriptor 0 is its socket, each message a request in JSON, answered by one.
"""

from __future__ import annotations

import atexit
import json
import os
import pathlib
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import IO, Any

PROGRAMS = pathlib.Path(__file__).parent / "programs"
"""Where most of the programs that it starts are, and what they import."""
LONGEST = 65536


class Nursery:
    """The parent of the forked processes, seen from the process that asks for them; any thread may ask."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self.environment = dict(environment)
        self._lock = threading.Lock()
        self._socket, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with other:
            self._process = subprocess.Popen([sys.executable, __file__], stdin=other, env=environment)
        atexit.register(self.close)

    def close(self) -> None:
        self._socket.close()
        self._process.wait()

    def start(self, program: str, arguments: Sequence[str], folder: str, stdin: int, stdout: int) -> int:
        """Starts a program of Python; returns its pid. The two descriptors stay the caller's."""
        return self._ask({"program": program, "arguments": arguments, "folder": folder}, [stdin, stdout])

    def status(self, pid: int) -> int:
        """The exit status of a process that has ended, in the way of subprocess; its pid is free then."""
        return self._ask({"pid": pid}, [])

    def _ask(self, request: dict[str, Any], descriptors: list[int]) -> int:
        with self._lock:
            socket.send_fds(self._socket, [json.dumps(request).encode()], descriptors)
            return int(self._socket.recv(LONGEST))


class Nursling:
    """A forked process, in the way of subprocess.Popen: both of its outputs are one pipe, its input may be another."""

    def __init__(self, parent: Nursery, command: Sequence[str], *, cwd: str, stdin: int, **_: Any) -> None:
        self._parent = parent
        self._lock = threading.Lock()
        self._status: int | None = None
        reading, writing = os.pipe()
        self.stdout: IO[bytes] = open(reading, "rb")  # noqa: SIM115
        self.stdin: IO[bytes] | None = None
        given = os.open(os.devnull, os.O_RDONLY)
        if stdin == subprocess.PIPE:
            os.close(given)
            given, own = os.pipe()
            self.stdin = open(own, "wb")  # noqa: SIM115
        try:
            self.pid = parent.start(command[1], command[2:], cwd, given, writing)
        finally:
            os.close(given)
            os.close(writing)
        self._pidfd = os.pidfd_open(self.pid)

    def poll(self) -> int | None:
        return self._look(0)

    def wait(self, timeout: float | None = None) -> int:
        status = self._look(timeout)
        if status is None:
            raise subprocess.TimeoutExpired(str(self.pid), timeout or 0)
        return status

    def send_signal(self, signum: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, signum)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def _look(self, seconds: float | None) -> int | None:
        poll = select.poll()
        with self._lock:
            if self._status is not None:
                return self._status
            poll.register(self._pidfd, select.POLLIN)
        ended = poll.poll(None if seconds is None else seconds * 1000)
        with self._lock:
            if ended and self._status is None:
                self._status = self._parent.status(self.pid)
                os.close(self._pidfd)
            return self._status


def _serve() -> list[str]:
    """Answers requests; returns in each forked process, with its program and arguments, and ends with the socket."""
    own = socket.socket(fileno=os.dup(0))
    while True:
        data, descriptors, _, _ = socket.recv_fds(own, LONGEST, 2)
        if not data:
            sys.exit()
        request = json.loads(data)
        if "pid" in request:
            _, status = os.waitpid(request["pid"], 0)
            own.send(b"%d" % os.waitstatus_to_exitcode(status))
            continue
        pid = os.fork()
        if not pid:
            own.close()
            os.chdir(request["folder"])
            for target, source in enumerate([*descriptors, descriptors[-1]]):
                os.dup2(source, target)
            for descriptor in descriptors:
                os.close(descriptor)
            return [request["program"], *request["arguments"]]
        for descriptor in descriptors:
            os.close(descriptor)
        own.send(b"%d" % pid)


if __name__ == "__main__":
    sys.path[0] = str(PROGRAMS)
    import asyncio  # noqa: F401
    import ctypes  # noqa: F401  of the tracer

    import wishes  # noqa: F401

    from takeover import echo  # noqa: F401

    sys.argv = _serve()
    sys.path[0] = os.path.dirname(sys.argv[0])
    runpy.run_path(sys.argv[0], run_name="__main__")
