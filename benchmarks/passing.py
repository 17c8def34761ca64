"""Passing descriptors: sent, received close-on-exec and closed, in one process on one CPU, wall time for each."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing import reduction

from .build import program
from .plan import Plan
from .processes import PYTHON, SERVER_CPU, environment, start
from .subjects import REFERENCE, takeover_lacks

BATCHES = (1, 16, 64, 252)
COUNT = 50_000
Exchange = Callable[[list[int]], list[int]]
Close = Callable[[list[int]], None]


def _close_each(fds: list[int], _close: Callable[[int], None] = os.close) -> None:
    for fd in fds:
        _close(fd)


def _exchange(kind: str) -> tuple[Exchange, Close]:
    left, right = socket.socketpair()
    if kind == "reduction":

        def exchange(fds: list[int]) -> list[int]:
            reduction.sendfds(left, fds)
            return list(reduction.recvfds(right, len(fds)))

        return exchange, _close_each
    from takeover._backend import backend, fdpass

    assert backend == kind
    send, receive = left.fileno(), right.fileno()

    def exchange_with_takeover(fds: list[int], _keep: object = (left, right)) -> list[int]:
        fdpass.send_descriptors(send, b"x", fds)
        received: list[int] = fdpass.receive_descriptors(receive, 1, len(fds))[1]
        return received

    return exchange_with_takeover, fdpass.close_descriptors


def measure(kind: str, batch: int, count: int) -> tuple[float, float]:
    """Nanoseconds of wall time for each descriptor, with and without the closing."""
    (exchange, close), clock = _exchange(kind), time.perf_counter_ns
    fds = [os.open(os.devnull, os.O_RDONLY) for _ in range(batch)]
    rounds, closing = count // batch, 0
    started = clock()
    for _ in range(rounds):
        received = exchange(fds)
        passed = clock()
        close(received)
        closing += clock() - passed
    spent = clock() - started
    return spent / (rounds * batch), (spent - closing) / (rounds * batch)


def passing(plan: Plan) -> None:
    """All kinds in each batch size."""
    kinds: list[tuple[str, list[str], dict[str, str]]] = [(REFERENCE, [], {})]
    for backend in ("cython", "python"):
        name = f"takeover, {backend}"
        if plan.wants(name):
            why = takeover_lacks(backend)
            if why is None:
                kinds.append((name, [backend], {"TAKEOVER_BACKEND": backend}))
            else:
                plan.document.skip("passing", name, why)
    if plan.wants("multiprocessing.reduction"):
        kinds.append(("multiprocessing.reduction", ["reduction"], {}))
    count = COUNT // 5 if plan.quick else COUNT
    for batch in (1, 252) if plan.quick else BATCHES:
        for index in range(plan.rounds):
            for name, arguments, variables in kinds:
                plan.say(f"passing: {batch} in a message: {name}, round {index + 1} of {plan.rounds}")
                if name == REFERENCE:
                    command = [program("pass_reference"), "--batch", str(batch), "--count", str(count)]
                else:
                    command = [PYTHON, "-m", "benchmarks.passing", *arguments, str(batch), str(count)]
                process = start(
                    command,
                    SERVER_CPU,
                    env=environment(**variables),
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                )
                out, complaint = process.communicate(timeout=120)
                if process.returncode:
                    raise RuntimeError(f"{name}, {batch} in a message: {complaint.strip()[-400:]}")
                both, alone = map(float, out.split())
                plan.document.row("passing", f"{batch} in a message", name, REFERENCE).add(ns=both, pass_ns=alone)


if __name__ == "__main__":
    print(*measure(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
