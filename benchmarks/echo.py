"""Echo, streaming and accept: server CPU for each message, messages a second, latency."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from .plan import Plan
from .processes import load, server
from .results import Row
from .subjects import REFERENCE, Subject


class Cell(NamedTuple):
    """One load: bytes of a message, connections, messages in flight on each."""

    size: int
    connections: int
    in_flight: int

    def __str__(self) -> str:
        size = f"{self.size} B" if self.size < 1024 else f"{self.size // 1024} KiB"
        return f"{size} × {self.connections}" + (f", {self.in_flight} in flight" if self.in_flight > 1 else "")


CELLS = [Cell(size, count, 1) for size in (64, 1024, 16384) for count in (1, 10, 100, 1000, 9000)]
CELLS += [Cell(size, count, 16) for size in (64, 1024, 16384) for count in (1, 10, 100, 1000)]
QUICK_CELLS = [Cell(64, 100, 1), Cell(16384, 10, 1), Cell(64, 10, 16)]
STREAM = Cell(16384, 10, 16)


def _interleaved(
    plan: Plan, case: str, cell: str, subjects: Sequence[Subject], run: Callable[[int, int], dict[str, Any]]
) -> None:
    """All servers are up at once and idle but one: a round goes through them all, so that noise meets all alike.

    A server that fails is noted with the reason, and the others go on.
    """
    with contextlib.ExitStack() as stack:
        running: dict[Subject, tuple[int, int]] = {}
        for subject in subjects:
            plan.say(f"{case}: {cell}: starting {subject.name}")
            try:
                running[subject] = stack.enter_context(server(subject.command(), subject.variables))
            except RuntimeError as error:
                plan.document.skip(case, subject.name, f"failed in {cell}: {error}")
        for index in range(plan.rounds):
            for subject, (pid, port) in list(running.items()):
                plan.say(f"{case}: {cell}: {subject.name}, round {index + 1} of {plan.rounds}")
                try:
                    _record(plan.document.row(case, cell, subject.name, REFERENCE), run(pid, port))
                except RuntimeError as error:
                    plan.document.skip(case, subject.name, f"failed in {cell}: {error}")
                    del running[subject]


def _record(row: Row, seen: dict[str, Any]) -> None:
    if not seen["messages"]:
        raise RuntimeError("it served nothing")
    row.add(
        cpu_ns=seen["server_cpu_ns"] / seen["messages"],
        rate=seen["messages"] / seen["seconds"],
        busy=seen["server_cpu_ns"] / seen["seconds"] / 1e9,
    )
    if "p50_us" in seen:
        row.add(p50_us=seen["p50_us"], p99_us=seen["p99_us"])


def _echo(plan: Plan, case: str, cell: Cell) -> None:
    """A run takes longer with many connections, so that each of them is served several times in it."""

    def run(pid: int, port: int) -> dict[str, Any]:
        options = ("--size", cell.size, "--connections", cell.connections, "--in-flight", cell.in_flight)
        longer = 1 + cell.connections / 3000
        timing = ("--warm-up", plan.warm_up * longer, "--seconds", plan.seconds * longer)
        return load("load_echo", "--port", port, "--server-pid", pid, *options, *timing)

    subjects = []
    for subject in plan.subjects(case):
        if cell.connections >= subject.most_connections:
            plan.document.skip(case, subject.name, "select() takes no descriptor above 1023")
        else:
            subjects.append(subject)
    _interleaved(plan, case, str(cell), subjects, run)


def echo(plan: Plan) -> None:
    """Round trips over sizes, connections and messages in flight."""
    for cell in QUICK_CELLS if plan.quick else CELLS:
        _echo(plan, "echo", cell)


def stream(plan: Plan) -> None:
    """Ten connections with 256 KiB under way on each; memory is noisier than a CPU, so more rounds."""
    _echo(plan._replace(rounds=2 * plan.rounds), "stream", STREAM)


def accept(plan: Plan) -> None:
    """Connect, end-of-file, close: a message is one connection."""

    def run(pid: int, port: int) -> dict[str, Any]:
        timing = ("--warm-up", plan.warm_up, "--seconds", plan.seconds)
        return load("load_connect", "rate", "--port", port, "--server-pid", pid, "--connections", 64, *timing)

    _interleaved(plan, "accept", "64 at a time", plan.subjects("accept"), run)
