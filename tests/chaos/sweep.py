"""The points of every scene, and what came of playing them."""

from __future__ import annotations

import contextlib
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import cache
from typing import Any, NamedTuple

from .calls import faults, strange_faults
from .scenes import Point, play

BACKENDS = ("cython", "python")
KINDS = ("listeners", "live")
ACTIONS = ("kill", "stop", "fault")
PROMISED = 1.0
"""Seconds in which what is alive agrees upon an owner that serves, on a machine that does nothing else."""

ATTEMPTS = 3
"""Two takeovers do not make the very same calls: a point that one play does not come to is tried so often."""


class Case(NamedTuple):
    """One thing that goes wrong. action: "kill", "stop", the name of an error, or "short"."""

    backend: str
    kind: str
    point: Point
    action: str

    def __str__(self) -> str:
        return f"{self.backend}/{self.kind}/{self.action}/{self.point}"

    @classmethod
    def parse(cls, text: str) -> Case:
        backend, kind, action, point = text.split("/", 3)
        return cls(backend, kind, Point.parse(point), action)

    @property
    def row(self) -> tuple[str, str, str]:
        """Which row of the report it counts in."""
        if self.action in ("kill", "stop"):
            return self.backend, self.kind, self.action
        return self.backend, self.kind, "fault" if self.action in faults(self.point.call) else "strange"


class Result(NamedTuple):
    case: Case
    runs: int
    reached: bool
    seconds: float
    failure: str


class Recording(NamedTuple):
    """A takeover in which nothing went wrong: its points in their order, and what the last owner held."""

    points: tuple[Point, ...]
    held: dict[str, int]


@cache
def record(backend: str, kind: str) -> Recording:
    outcome = play(backend, kind, None, "kill")
    seen: Counter[tuple[str, int, str]] = Counter()
    points = []
    for call in outcome.calls:
        seen[call] += 1
        points.append(Point(*call, seen[call]))
    return Recording(tuple(points), outcome.held)


def cases(backends: Iterable[str], kinds: Iterable[str], actions: Iterable[str]) -> Iterator[Case]:
    """Every case there is: each point with each thing that can go wrong there."""
    wanted = list(actions)
    for backend in backends:
        for kind in kinds:
            for point in record(backend, kind).points:
                for action in ("kill", "stop"):
                    if action in wanted:
                        yield Case(backend, kind, point, action)
                for action, errors in (("fault", faults), ("strange", strange_faults)):
                    if action in wanted:
                        yield from (Case(backend, kind, point, error) for error in errors(point.call))


def sample(every: Sequence[Case], count: int, seed: int) -> list[Case]:
    """So many of them, as many of each row of the report, and of a row as many of each system call as can be."""
    source = random.Random(seed)
    rows: dict[Any, dict[str, list[Case]]] = {}
    for case in every:
        rows.setdefault(case.row, {}).setdefault(f"{case.point.role} {case.point.call}", []).append(case)
    again: dict[Any, dict[str, list[Case]]] = {}
    chosen: list[Case] = []
    while rows and len(chosen) < count:
        for row, left in list(rows.items()):
            if not left:
                del rows[row]
                continue
            call = source.choice(sorted(left))
            some = left.pop(call)
            chosen.append(some.pop(source.randrange(len(some))))
            if some:
                again.setdefault(row, {})[call] = some
        if not any(rows.values()):
            rows, again = again, {}
    return chosen[:count]


def attempt(case: Case) -> Result:
    """Plays a case until its point is reached, a few times at most."""
    seconds = 0.0
    for run in range(1, ATTEMPTS + 1):
        try:
            outcome = play(case.backend, case.kind, case.point, case.action, record(case.backend, case.kind).held)
        except (AssertionError, OSError) as error:
            return Result(case, run, True, seconds, f"{type(error).__name__}: {error}")
        seconds = max(seconds, outcome.seconds)
        if outcome.reached:
            return Result(case, run, True, seconds, "")
    return Result(case, ATTEMPTS, False, seconds, "")


def run_all(todo: Iterable[Case], parallel: int) -> Iterator[Result]:
    """The results as they come."""
    pool = ThreadPoolExecutor(parallel)
    futures = [pool.submit(attempt, case) for case in todo]
    with contextlib.ExitStack() as stack:
        stack.callback(pool.shutdown, cancel_futures=True)
        for future in as_completed(futures):
            yield future.result()


class Row:
    """One line of the report."""

    def __init__(self) -> None:
        self.cases = self.runs = self.reached = self.failed = self.late = 0
        self.slowest = 0.0

    def add(self, result: Result) -> None:
        self.cases += 1
        self.runs += result.runs
        self.reached += result.reached
        self.failed += bool(result.failure)
        self.late += result.seconds > PROMISED
        self.slowest = max(self.slowest, result.seconds)

    def to_json(self) -> dict[str, Any]:
        return {
            "points": self.cases,
            "runs": self.runs,
            "not reached": self.cases - self.reached,
            "failed": self.failed,
            f"over {PROMISED:g} s": self.late,
            "slowest, s": round(self.slowest, 2),
        }


def report(results: Iterable[Result]) -> dict[str, dict[str, Any]]:
    """What came of them, a row for each backend, kind and action, and one for all."""
    rows: dict[str, Row] = {}
    for result in results:
        for name in (" ".join(result.case.row), "all"):
            rows.setdefault(name, Row()).add(result)
    return {name: rows[name].to_json() for name in sorted(rows, key=lambda name: (name == "all", name))}
