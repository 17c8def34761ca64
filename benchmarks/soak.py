"""Takeovers every few seconds under new clients and streams, with kills: what is lost, and whether anything grows.

`python -m benchmarks soak --seconds 3600 --interval 2 --connects 5000 --streams 5000 --kills 0.1 --json F --plot P.png`

Each takeover is a line of the record: the owner's private memory and descriptors, how long connects took, what failed.
With the probability `--kills` the successor, the incumbent or the keeper is killed at a random moment of it. The server
has a keeper, so that a connect may never be refused. Only connections of a killed owner may end; they are counted apart
and come back. Everything else that ends, and every wrong byte, is a loss.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pathlib
import random
import signal
import statistics
import subprocess
import tempfile
import time
from collections.abc import Sequence
from typing import Any

from .build import NoCompiler, compiler, program
from .processes import (
    LOAD_CPU,
    PYTHON,
    SERVER_CPU,
    descriptors,
    end,
    environment,
    private_memory,
    raise_descriptor_limit,
    wait_until,
)
from .processes import start as start_on
from .restart_rivals import free_port
from .results import machine
from .soak_record import failures_between, judge, latencies, plot

VICTIMS = ("successor", "incumbent", "keeper")
LIMIT = 60.0
"""Seconds within which a service must have settled again."""


class Service:
    """The built-in echo with a keeper, whose generations follow each other."""

    def __init__(self, folder: pathlib.Path, backend: str) -> None:
        self.folder, self.backend = folder, backend
        self.port = free_port()
        self.control = folder / "control.sock"
        self.running: list[subprocess.Popen[str]] = []
        self.newest: subprocess.Popen[str] | None = None
        self.logs: dict[int, pathlib.Path] = {}

    def start(self) -> subprocess.Popen[str]:
        command = [PYTHON, "-m", "takeover", "echo", "--keep", "--probation", "0.1"]
        command += ["--listen", f"tcp://127.0.0.1:{self.port}", "--control", str(self.control)]
        path = self.folder / "log"
        with path.open("w") as log:
            variables = environment(TAKEOVER_BACKEND=self.backend)
            process = start_on(command, SERVER_CPU, env=variables, stdout=log, stderr=log)
        self.logs[process.pid] = path.rename(self.folder / f"log-{process.pid}")
        self.running.append(process)
        self.newest = process
        return process

    def has_taken_over(self, process: subprocess.Popen[str]) -> bool:
        return "took over" in self.logs[process.pid].read_text(errors="replace")

    def status(self) -> dict[str, Any]:
        """What the owner says of itself; nothing while it does not answer. Raises NotRunning where there is none."""
        from takeover import query
        from takeover.errors import NotRunning, TakeoverError

        try:
            return query.status(str(self.control), time_limit=1.0)
        except NotRunning:
            raise
        except (TakeoverError, OSError):
            return {}

    def settle(self) -> dict[str, Any]:
        """Wait until one process is left and serves with its keeper; gives its status.

        Starts one where none owns the service and the last one to come is dead, as a service manager would: the one
        before it may live on for as long as it drains, but accepts no more.
        """
        from takeover.errors import NotRunning

        seen: dict[str, Any] = {}

        def settled() -> bool:
            nonlocal seen
            for process in [process for process in self.running if process.poll() is not None]:
                self.running.remove(process)
                self.logs.pop(process.pid).unlink()
            try:
                seen = self.status()
            except NotRunning:
                if self.newest is None or self.newest.poll() is not None:
                    self.start()
                return False
            if len(self.running) != 1:
                return False
            kept = (seen.get("keeper") or {}).get("listeners")
            return bool(kept and seen["state"] == "serving" and seen["pid"] == self.running[0].pid)

        try:
            wait_until(settled, "one owner that serves", LIMIT)
        except TimeoutError as error:
            said = "\n".join(path.read_text(errors="replace")[-400:] for path in self.logs.values())
            raise RuntimeError(f"{error}; they said:\n{said}") from None
        return seen

    def stop(self) -> None:
        """SIGTERM ends the keeper too."""
        for process in self.running:
            end(process)


class Streams:
    """c/load_moves.c: connections that stay, each byte compared; those that end come back."""

    def __init__(self, port: int, count: int, rate: int, seconds: float) -> None:
        command = [program("load_moves"), "--port", port, "--connections", count, "--talkers", count]
        command += ["--rate", rate, "--seconds", int(seconds), "--reconnect", 1, "--forget", 1]
        self.process = start_on(
            [str(word) for word in command],
            LOAD_CPU,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        self._expect("open")

    def _expect(self, word: str) -> str:
        assert self.process.stdout is not None and self.process.stderr is not None
        while not (line := self.process.stdout.readline()).startswith(word):
            if not line:
                raise RuntimeError(f"load_moves has ended: {self.process.stderr.read().strip()}")
        return line

    def _tell(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()

    def check(self) -> int:
        """How many streams made another round trip within 20 s."""
        self._tell("check")
        return int(self._expect("checked").split()[1])

    def report(self) -> dict[str, Any]:
        """What has happened since the last report; `closed` and `wrong` since the beginning."""
        self._tell(f"report 0 {1 << 62}")
        seen: dict[str, Any] = json.loads(self._expect("{"))
        return seen


class Soak:
    """One run; `lines` is its record."""

    def __init__(self, options: argparse.Namespace, folder: pathlib.Path) -> None:
        self.options = options
        self.random = random.Random(options.seed)
        self.service = Service(folder, options.backend)
        self.timeline = folder / "timeline"
        self.lines: list[dict[str, Any]] = []
        self.lasting = [0.5]

    def run(self) -> dict[str, Any]:
        """The arrivals' totals, the record, and the verdict."""
        options, service = self.options, self.service
        try:
            status = service.settle()
            streams = Streams(service.port, options.streams, options.messages, options.seconds + 600)
            try:
                arrivals = self._arrivals()
                try:
                    began = time.monotonic()
                    due = began
                    while (now := time.monotonic()) < began + options.seconds:
                        time.sleep(max(0.0, due - now))
                        due = max(due + options.interval, time.monotonic())
                        status = self._takeover(status, streams, began)
                    out, complaint = arrivals.communicate(timeout=LIMIT)
                finally:
                    end(arrivals)
            finally:
                end(streams.process)
        finally:
            service.stop()
        if arrivals.returncode:
            raise RuntimeError(f"load_arrivals: {complaint.strip() or arrivals.returncode}")
        seen = json.loads(out)
        rows = [[int(word) for word in line.split()] for line in self.timeline.read_text().splitlines()]
        for line in self.lines:
            line.update(latencies(rows, line["from_ms"], line["to_ms"]))
            line["connects_failed"] = failures_between(rows, line["from_ms"], line["to_ms"])
        failed = sum(row[2] for row in rows)
        seconds = self.lines[-1]["at"]
        document = {"arrivals": seen, "rate": seen["served"] / seconds, "lines": self.lines, "failed": failed}
        return document | judge(self.lines, seen, options)

    def _arrivals(self) -> subprocess.Popen[str]:
        values = {"port": self.service.port, "rate": self.options.connects, "seconds": self.options.seconds + 600}
        values |= {"timeline": self.timeline}
        words = [str(word) for key, value in values.items() for word in (f"--{key}", value)]
        command = [program("load_arrivals"), *words]
        return start_on(command, LOAD_CPU, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def _takeover(self, status: dict[str, Any], streams: Streams, origin: float) -> dict[str, Any]:
        service = self.service
        began = time.monotonic()
        old, new = service.running[0], service.start()
        victim, excuses = "", False
        if self.random.random() < self.options.kills:
            victim = self.random.choice(VICTIMS)
            moment = began + self.random.uniform(0, 1.2 * statistics.median(self.lasting[-20:]))
            with contextlib.suppress(subprocess.TimeoutExpired):
                old.wait(max(0.0, moment - time.monotonic()))
            process = {"successor": new, "incumbent": old}.get(victim)
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid if process else status["keeper"]["pid"], signal.SIGKILL)
            excuses = victim == "incumbent" or (victim == "successor" and service.has_taken_over(new))
        status = service.settle()
        took = time.monotonic() - began
        if not victim:
            if status["pid"] != new.pid:
                raise RuntimeError(f"the takeover to pid {new.pid} failed though nobody was killed")
            self.lasting.append(took)
        checked, seen = streams.check(), streams.report()
        before = self.lines[-1] if self.lines else {"closed": 0, "wrong": 0, "to_ms": origin * 1e3}
        self.lines.append(
            {
                "at": round(time.monotonic() - origin, 3),
                "from_ms": before["to_ms"],
                "to_ms": time.monotonic() * 1e3,
                "took": round(took, 3),
                "killed": victim,
                "excused": excuses,
                "memory": private_memory(status["pid"]),
                "descriptors": descriptors(status["pid"]),
                "checked": checked,
                "closed": seen["closed"],
                "ended": seen["closed"] - before["closed"],
                "wrong": seen["wrong"],
                "standstill_ms": seen["worst_ms"],
            }
        )
        return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks soak", description=__doc__)
    parser.add_argument("--seconds", type=float, default=3600, help="how long (default 3600)")
    parser.add_argument("--interval", type=float, default=2, help="seconds from takeover to takeover (default 2)")
    parser.add_argument("--connects", type=int, default=5000, help="new clients a second (default 5000)")
    parser.add_argument("--streams", type=int, default=5000, help="connections that stay and talk (default 5000)")
    parser.add_argument("--messages", type=int, default=2500, help="of the streams in all, a second (default 2500)")
    parser.add_argument("--kills", type=float, default=0.1, help="probability of one in a takeover (default 0.1)")
    parser.add_argument("--backend", choices=("cython", "python"), default="cython")
    parser.add_argument("--seed", type=int, default=None, help="of the kills (default: another one each time)")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write the record")
    parser.add_argument("--plot", type=pathlib.Path, metavar="FILE", help="draw it (matplotlib)")
    return parser


def main(arguments: Sequence[str]) -> int:
    """Exit status 0; 1 if something was lost or grew, or if it could not run."""
    options = _parser().parse_args(arguments)
    if options.seed is None:
        options.seed = random.SystemRandom().randrange(1 << 32)
    raise_descriptor_limit()
    print(f"seed {options.seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="takeover-") as folder:
        try:
            compiler()
            document = Soak(options, pathlib.Path(folder)).run()
        except (NoCompiler, OSError, RuntimeError) as error:
            print(f"failed: {error}")
            return 1
    document["machine"] = machine()
    document["options"] = {name: str(value) for name, value in vars(options).items()}
    if options.json:
        options.json.write_text(json.dumps(document) + "\n")
    if options.plot:
        plot(document, options.plot)
    for line in document["said"]:
        print(line)
    for fault in document["faults"]:
        print(f"FAULT: {fault}")
    return 1 if document["faults"] else 0
