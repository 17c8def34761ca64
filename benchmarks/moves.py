"""Moving established connections: how long it takes, how long each one stands still, and what it costs.

Each round of each subject is one takeover from the beginning: an old process on one CPU, a new one on another, and
clients that stay connected, all idle or all talking. Beside it a C program that moves idle ones with no protocol at
all, and what one does without moves: the old process closes its connections, and the clients connect again.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import pathlib
import select
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from .build import program
from .plan import Plan
from .processes import (
    LOAD_CPU,
    OTHER_CPUS,
    PYTHON,
    SERVER_CPU,
    cpu_ns,
    end,
    environment,
    load,
    raise_descriptor_limit,
    start,
)
from .restart_rivals import free_port
from .results import Document
from .subjects import AGAIN, REFERENCE, takeover_lacks

STATES = (0, 64, 1024)
RATE = 20_000
"""Messages a second of all talkers together: a fifth of a CPU, so that both processes still have one for the move."""
LIMIT = 20.0
"""Seconds for anything to happen; less than a server drains."""
DRAINED = "drain and reconnect"
NATIVE_CYTHON = "takeover native, cython"


class Mover(NamedTuple):
    """What moves connections: a kind of benchmarks.servers.moving, or the C program where that is empty.

    With a window the C program keeps what was not acknowledged, as takeover does: what that alone costs.
    """

    name: str
    kind: str
    state: int = 0
    backend: str = ""
    window: int = 0

    @property
    def is_reference(self) -> bool:
        return not self.kind

    @property
    def on_asyncio(self) -> bool:
        return self.kind in ("asyncio", "uvloop")

    def missing(self) -> str | None:
        """Why it cannot run here, if it cannot."""
        if self.is_reference:
            return None
        return _lacks_aio(self.kind) if self.on_asyncio else takeover_lacks(self.backend)


class Cell(NamedTuple):
    """How many clients, and whether they talk; one that is there for the curve only has few subjects."""

    connections: int
    talking: bool
    curve: bool = False

    def __str__(self) -> str:
        return f"{self.connections} {'talking' if self.talking else 'idle'}"


def size_name(size: int) -> str:
    """`64 B`, `1 KiB`"""
    return f"{size} B" if size < 1024 else f"{size // 1024} KiB"


def _movers() -> Iterator[Mover]:
    yield Mover(REFERENCE, "")
    yield Mover(AGAIN, "")
    yield Mover(f"{REFERENCE}, acknowledged", "", window=3)
    for size in STATES[1:]:
        yield Mover(f"{REFERENCE}, {size_name(size)}", "", size)
    for backend in ("cython", "python"):
        yield Mover(f"takeover native, {backend}", "native", 0, backend)
        for size in STATES:
            yield Mover(f"takeover protocol, {backend}, {size_name(size)}", "protocol", size, backend)
    for kind in ("uvloop", "asyncio"):
        for size in STATES:
            yield Mover(f"takeover.aio on {kind}, {size_name(size)}", kind, size)
    yield Mover(DRAINED, "draining", 0, "cython")


MOVERS = tuple(_movers())
CURVE = tuple(mover for mover in MOVERS if mover.name in (REFERENCE, AGAIN, NATIVE_CYTHON))
CELLS = [Cell(count, talking) for count in (1000, 9000) for talking in (False, True)]
CELLS += [Cell(count, False, curve=True) for count in (100, 300, 3000, 18000)]
QUICK_CELLS = [Cell(200, False), Cell(200, True)]


def by_number(document: Document) -> list[str]:
    """The cells with idle clients, in the order of their number."""
    idle = [cell for cell in document.cells("moves") if cell.endswith(" idle")]
    return sorted(idle, key=lambda cell: int(cell.split()[0]))


@functools.cache
def _lacks_aio(kind: str) -> str | None:
    """Why a server on asyncio or uvloop cannot move its connections, if it cannot."""
    modules = "takeover.aio" if kind == "asyncio" else "takeover.aio, uvloop"
    done = subprocess.run(
        [PYTHON, "-c", f"import {modules}"], env=environment(), capture_output=True, text=True, check=False
    )
    return done.stderr.strip().splitlines()[-1] if done.returncode else None


class Lines:
    """A process and the lines that it writes, read one at a time, each within LIMIT."""

    def __init__(self, command: Sequence[str], cpu: Any, complaints: pathlib.Path, **options: Any) -> None:
        self.complaints = complaints
        with complaints.open("w") as log:
            self.process = start(command, cpu, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, **options)
        self.pid = self.process.pid
        self._read = b""

    def line(self) -> str:
        """The next line. Raises RuntimeError at the end of the output, and when nothing comes."""
        assert self.process.stdout is not None
        poll = select.poll()
        poll.register(self.process.stdout, select.POLLIN)
        while b"\n" not in self._read:
            ready = poll.poll(LIMIT * 1000)
            more = os.read(self.process.stdout.fileno(), 65536) if ready else b""
            if not more:
                raise RuntimeError(self.complaint() if ready else f"pid {self.pid} has said nothing for {LIMIT:g} s")
            self._read += more
        line, self._read = self._read.split(b"\n", 1)
        return line.decode()

    def complaint(self) -> str:
        """The last line on standard error."""
        lines = self.complaints.read_text(errors="replace").strip().splitlines()
        return f"pid {self.pid}: {lines[-1] if lines else 'it ended without a word'}"

    def end(self) -> None:
        self.process.kill()
        end(self.process)


class Generation(Lines):
    """One server process, and what it has logged so far, with its times."""

    def stamp(self, *beginnings: str) -> dict[str, Any]:
        """The next line of its log that begins so: `at` (CLOCK_MONOTONIC), `cpu_ns`, `what`."""
        while True:
            stamp: dict[str, Any] = json.loads(self.line())
            if stamp["what"].startswith(beginnings):
                return stamp

    def wait_gone(self, successor: Generation) -> tuple[int, int]:
        """When it has ended (CLOCK_MONOTONIC, ns), and the CPU time that it had used by then.

        Raises RuntimeError if it fails, or if its successor ends instead; TimeoutError if neither does.
        """
        poll = select.poll()
        with contextlib.ExitStack() as stack:
            ours, theirs = (os.pidfd_open(each.pid) for each in (self, successor))
            for pidfd in (ours, theirs):
                stack.callback(os.close, pidfd)
                poll.register(pidfd, select.POLLIN)
            ended = {pidfd for pidfd, _ in poll.poll(LIMIT * 1000)}
            at = time.monotonic_ns()
        if theirs in ended:
            raise RuntimeError(f"the successor ended, {successor.complaint()}")
        if not ended:
            raise TimeoutError(f"the old process is still there after {LIMIT:g} s")
        _, status, usage = os.wait4(self.pid, 0)
        self.process.returncode = os.waitstatus_to_exitcode(status)
        if self.process.returncode:
            raise RuntimeError(f"the old process failed, {self.complaint()}")
        return at, int((usage.ru_utime + usage.ru_stime) * 1e9)


class Clients(Lines):
    """c/load_moves.c; the constructor returns once all connections are open."""

    def __init__(self, folder: pathlib.Path, port: int, cell: Cell, *, reconnect: bool) -> None:
        options = {"port": port, "connections": cell.connections, "talkers": cell.connections if cell.talking else 0}
        options |= {"rate": RATE, "reconnect": int(reconnect)}
        words = [str(word) for key, value in options.items() for word in (f"--{key}", value)]
        super().__init__([program("load_moves"), *words], OTHER_CPUS, folder / "clients")
        self.wait("open")

    def wait(self, word: str) -> int:
        """The number in the next line, which must begin with that word."""
        line = self.line()
        if line.split()[0] != word:
            raise RuntimeError(f"the clients said {line!r}, not {word!r}")
        return int(line.partition(" ")[2] or 0)

    def tell(self, command: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{command}\n")
        self.process.stdin.flush()

    def report(self, began: int, ended: int) -> dict[str, Any]:
        """The round trips that were under way between two instants."""
        self.tell(f"report {began} {ended}")
        seen: dict[str, Any] = json.loads(self.line())
        return seen

    def check(self) -> int:
        """How many connections still echo the right bytes."""
        self.tell("check")
        return self.wait("checked")


def _status(control: pathlib.Path) -> dict[str, Any]:
    command = [PYTHON, "-m", "takeover", "status", "--json", "--control", str(control)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"takeover status: {done.stderr.strip()}")
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def _take_over(mover: Mover, cell: Cell, quiet: float) -> dict[str, float]:
    """One takeover, and all that was measured of it; the clients have `quiet` seconds before it begins.

    What talking costs cannot be told from what moving costs, so CPU is measured of idle clients only.
    """
    reconnect = mover.name == DRAINED
    with tempfile.TemporaryDirectory(prefix="takeover-") as name, contextlib.ExitStack() as stack:
        folder, port = pathlib.Path(name), free_port()

        def serve(number: int, cpu: int) -> Generation:
            words = [mover.kind, f"tcp://127.0.0.1:{port}", str(folder / "control"), str(mover.state)]
            command = [PYTHON, "-m", "benchmarks.servers.moving", *words]
            variables = environment(TAKEOVER_BACKEND=mover.backend) if mover.backend else environment()
            generation = Generation(command, cpu, folder / f"log-{number}", env=variables)
            stack.callback(generation.end)
            return generation

        old = serve(1, SERVER_CPU)
        old.stamp("serving")
        clients = Clients(folder, port, cell, reconnect=reconnect)
        stack.callback(clients.end)
        time.sleep(quiet)
        before, old_cpu, client_cpu = time.monotonic_ns(), cpu_ns(old.pid), cpu_ns(clients.pid)
        new = serve(2, LOAD_CPU)
        try:
            gone, old_cpu_in_the_end = old.wait_gone(new)
        except TimeoutError as error:
            raise RuntimeError(f"{error}; so far {_status(folder / 'control')['moved']}") from None
        commit = new.stamp("took over")
        if reconnect:
            given, done = old.stamp("drain deadline"), clients.wait("back")
            new_cpu = cpu_ns(new.pid)
        else:
            given, taken = old.stamp("moved "), new.stamp("moved ")
            done, new_cpu = taken["at"], taken["cpu_ns"]
        client_cpu = cpu_ns(clients.pid) - client_cpu
        took = done - commit["at"]
        usual, seen = clients.report(before - took, before), clients.report(commit["at"], done)
        alive = clients.check()
        in_the_end = clients.report(commit["at"], done)
        measured = {
            "commit_ms": took / 1e6,
            "exit_cpu_ms": (old_cpu_in_the_end - given["cpu_ns"]) / 1e6,
            "closed": in_the_end["closed"],
            "lost": cell.connections - alive + in_the_end["wrong"],
        }
        if reconnect:
            measured["move_ms"] = measured["commit_ms"]
        else:
            moved = _status(folder / "control")["moved"]
            if moved["in"] != cell.connections:
                raise RuntimeError(f"{moved['in']} of {cell.connections} connections moved: {moved}")
            measured |= {"move_ms": moved["last_move_ms"], "longest_batch_ms": moved["longest_standstill_ms"]}
            measured["gone_ms"] = max(0, gone - done) / 1e6
        if cell.talking:
            measured |= {key: seen[key] for key in ("p50_ms", "p99_ms", "worst_ms", "own_stall_ms", "messages")}
            measured |= {f"quiet_{key}": usual[key] for key in ("p50_ms", "p99_ms", "worst_ms")}
        else:
            server_cpu = given["cpu_ns"] - old_cpu + new_cpu - commit["cpu_ns"]
            measured |= {"server_cpu_ms": server_cpu / 1e6, "client_cpu_ms": client_cpu / 1e6}
            measured["cpu_ms"] = (server_cpu + client_cpu) / 1e6
        return measured


def _run_reference(mover: Mover, cell: Cell) -> dict[str, float]:
    cpus = ("--old-cpu", SERVER_CPU, "--new-cpu", LOAD_CPU)
    what = ("--connections", cell.connections, "--state", mover.state, "--window", mover.window)
    seen = load("move_reference", *what, *cpus)
    return {"move_ms": seen["ns"] / 1e6, "server_cpu_ms": (seen["old_cpu_ns"] + seen["new_cpu_ns"]) / 1e6}


def _wanted(plan: Plan, cell: Cell) -> list[Mover]:
    """The subjects of a cell; the C program moves idle connections only, and state where somebody else does too."""
    found = []
    for mover in CURVE if cell.curve else MOVERS:
        if mover.is_reference or not plan.wants(mover.name):
            continue
        why = mover.missing()
        if why is None:
            found.append(mover)
        else:
            plan.document.skip("moves", mover.name, why)
    if cell.talking:
        return found
    states = {0, *(mover.state for mover in found)}
    return [mover for mover in MOVERS if mover.is_reference and mover.state in states] + found


def moves(plan: Plan) -> None:
    """Idle and talking clients, each size of state; and a curve over the number of idle ones."""
    limit = raise_descriptor_limit()
    most = limit - limit // 16 - 100
    for cell in QUICK_CELLS if plan.quick else CELLS:
        here = cell
        if cell.connections > most:
            here = cell._replace(connections=most // 1000 * 1000)
            why = f"a process with {limit} descriptors keeps a sixteenth free for new ones; {here} instead"
            plan.document.skip("moves", str(cell), why)
        if here.connections:
            _measure(plan, here)


def _measure(plan: Plan, cell: Cell) -> None:
    """A round goes through all subjects; one that fails is noted with the reason, and the others go on."""
    movers = _wanted(plan, cell)
    for index in range(plan.rounds):
        for mover in movers[:]:
            plan.say(f"moves: {cell}: {mover.name}, round {index + 1} of {plan.rounds}")
            try:
                measured = _run_reference(mover, cell) if mover.is_reference else _take_over(mover, cell, plan.seconds)
            except (OSError, RuntimeError, ValueError) as error:
                plan.document.skip("moves", mover.name, f"failed in {cell}: {error}")
                movers.remove(mover)
            else:
                plan.document.row("moves", str(cell), mover.name, REFERENCE).add(**measured)
