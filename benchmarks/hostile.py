"""Clients of an echo server while hostile connections sit on its control socket: rates and latency beside a quiet run.

A thousand connections hang, send slowly, send floods, and send descriptors; whoever is hung up on comes back at once.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import selectors
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable

from .plan import Plan
from .processes import LOAD_CPU, PYTHON, SERVER_CPU, end, environment, load, start, wait_until
from .restart_rivals import free_port
from .subjects import takeover_lacks

HOSTILE = 1000
SETTLES = 2.0
"""Seconds until what the control thread had saved up is spent (BURST in takeover/allowance.py)."""

CELL = "64 B × 100"
QUIET = "takeover, {}"
DISTURBED = "takeover, {}, 1,000 hostile"


def _with_descriptors(sock: socket.socket, data: bytes, count: int) -> None:
    with open(os.devnull) as file:
        socket.send_fds(sock, [data], [file.fileno()] * count)


def _attacks(service: str) -> tuple[Callable[[socket.socket], object], ...]:
    """Hang, send slowly, send floods, send descriptors, and send one with a frame that does not go on."""
    from takeover.wire import Type, encode

    wish = {"version": 1, "capabilities": [], "room": 1000, "dry_run": False}
    join = encode(Type.JOIN, {**wish, "build": "0", "pid": 1, "service": service})
    return (
        lambda _: None,
        lambda sock: sock.send(join[:1]),
        lambda sock: sock.send(join + encode(Type.HEARTBEAT) * 1000),
        lambda sock: _with_descriptors(sock, join, 10),
        lambda sock: _with_descriptors(sock, encode(Type.STATUS)[:1], 1),
    )


class Hostiles:
    """HOSTILE connections to a control socket; `made` counts all that there have been."""

    def __init__(self, control: str, service: str = "echo") -> None:
        self.made = 0
        self._control = control
        self._attacks = _attacks(service)
        self._selector = selectors.DefaultSelector()

    def connect(self) -> None:
        """Make the connections, each with one of the attacks."""
        for index in range(HOSTILE):
            self._connect(index)

    def go_on(self, seconds: float) -> None:
        """Read what comes within so many seconds; whoever is hung up on comes back."""
        for key, _ in self._selector.select(seconds):
            sock: socket.socket = key.fileobj  # type: ignore[assignment]
            with contextlib.suppress(ConnectionError):
                if sock.recv(65536):
                    continue
            self._selector.unregister(sock)
            sock.close()
            self._connect(key.data)

    def close(self) -> None:
        """Close them all."""
        for key in list(self._selector.get_map().values()):
            key.fileobj.close()  # type: ignore[union-attr]
        self._selector.close()

    def _connect(self, index: int) -> None:
        sock = socket.socket(socket.AF_UNIX)
        self._selector.register(sock, selectors.EVENT_READ, index)
        sock.settimeout(60)
        sock.connect(self._control)
        sock.setblocking(False)
        with contextlib.suppress(OSError):
            self._attacks[index % len(self._attacks)](sock)
        self.made += 1


def hostile(plan: Plan) -> None:
    """Each backend, quiet and disturbed in turns."""
    for backend in ("cython", "python"):
        if not plan.wants(QUIET.format(backend)):
            continue
        if (why := takeover_lacks(backend)) is not None:
            plan.document.skip("hostile", QUIET.format(backend), why)
            continue
        for index in range(plan.rounds):
            for name in (QUIET, DISTURBED):
                plan.say(f"hostile: {name.format(backend)}, round {index + 1} of {plan.rounds}")
                seen = _run(plan, backend, disturbed=name is DISTURBED)
                row = plan.document.row("hostile", CELL, name.format(backend), QUIET.format(backend))
                row.add(rate=seen["messages"] / seen["seconds"], p50_us=seen["p50_us"], p99_us=seen["p99_us"])


def _run(plan: Plan, backend: str, *, disturbed: bool) -> dict[str, float]:
    with tempfile.TemporaryDirectory(prefix="takeover-") as folder:
        port, control = free_port(), str(pathlib.Path(folder, "control"))
        command = [PYTHON, "-m", "takeover", "echo", "--listen", f"tcp://127.0.0.1:{port}", "--control", control]
        server = start(command, SERVER_CPU, env=environment(TAKEOVER_BACKEND=backend), stderr=subprocess.DEVNULL)
        enemies = None
        try:
            wait_until(lambda: os.path.exists(control), "the server")
            if disturbed:
                enemies = start([PYTHON, "-m", "benchmarks.hostile", control], LOAD_CPU, stdout=subprocess.PIPE)
                assert enemies.stdout is not None and enemies.stdout.readline() == "sitting\n"
            options = ("--size", 64, "--connections", 100, "--in-flight", 1)
            timing = ("--warm-up", SETTLES if not plan.quick else plan.warm_up, "--seconds", plan.seconds)
            return load("load_echo", "--port", port, "--server-pid", server.pid, *options, *timing)
        finally:
            if enemies is not None:
                enemies.kill()
                end(enemies)
            end(server)


if __name__ == "__main__":
    hostiles = Hostiles(sys.argv[1])
    hostiles.connect()
    print("sitting", flush=True)
    while True:
        hostiles.go_on(60)
