"""Restarts under a steady stream of new clients: who is lost, how long a connect takes, how long nobody is served."""

from __future__ import annotations

import json
import pathlib
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable
from typing import Any

from .build import program
from .plan import Plan
from .processes import LOAD_CPU, end, start, stolen_ms
from .restart_rivals import RIVALS, Rival

NO_RESTART, RESTARTS = "no restart", "restarts"
LONGEST_RUN = 3600
POINTS = 2000


class Arrivals:
    """The generator of new clients; `finish` ends it and gives what it saw."""

    def __init__(self, rival: Rival) -> None:
        self.stolen_before = stolen_ms()
        self.timeline_path = rival.folder / "timeline"
        options: dict[str, object] = {"port": rival.port, "rate": rival.rate, "http": int(rival.http)}
        options |= {"seconds": LONGEST_RUN, "timeline": self.timeline_path}
        command = [
            program("load_arrivals"),
            *(str(word) for key, value in options.items() for word in (f"--{key}", value)),
        ]
        self.process = start(command, LOAD_CPU, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def finish(self) -> tuple[dict[str, Any], list[list[int]]]:
        """The generator's report, and its timeline: lists of the columns that c/load_arrivals.c describes."""
        try:
            out, complaint = self.process.communicate(timeout=60)
        finally:
            end(self.process)
        if self.process.returncode:
            raise RuntimeError(f"load_arrivals: {complaint.strip() or self.process.returncode}")
        lines = self.timeline_path.read_text().splitlines()
        seen = json.loads(out) | {"stolen_ms": stolen_ms() - self.stolen_before}
        return seen, [[int(word) for word in line.split()] for line in lines]


def observe(
    rival: Rival, times: int, pause: float, quiet_seconds: float, progress: Callable[[int], None]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The same server without restarts for `quiet_seconds`, then with `times` of them, `pause` seconds apart.

    Gives what the clients saw in both, in one form.
    """
    arrivals = Arrivals(rival)
    time.sleep(quiet_seconds)
    quiet = _summary(*arrivals.finish(), [])
    arrivals = Arrivals(rival)
    spans = []
    try:
        for index in range(times):
            time.sleep(pause)
            began = time.monotonic()
            rival.restart()
            spans.append((began * 1e3, time.monotonic() * 1e3))
            progress(index + 1)
        time.sleep(pause)
    except BaseException:
        end(arrivals.process)
        raise
    return quiet, _summary(*arrivals.finish(), spans)


def _summary(seen: dict[str, Any], timeline: list[list[int]], spans: list[tuple[float, float]]) -> dict[str, Any]:
    origin = timeline[0][0] if timeline else 0
    gaps = []
    for began, done in spans:
        around = [line for line in timeline if began - 10 <= line[0] <= done + 50]
        gaps.append(max((line[5] for line in around), default=0) / 1e3)
    step = len(timeline) // POINTS + 1
    curve = []
    for index in range(0, len(timeline), step):
        part = timeline[index : index + step]
        curve.append([part[0][0] - origin, *(max(line[column] for line in part) for column in (3, 4, 5))])
    return {
        **seen,
        "gaps_ms": gaps,
        "spans_ms": [[round(began - origin), round(done - origin)] for began, done in spans],
        "curve": curve,
    }


def record(plan: Plan, case: str, subject: str, kind: str, seen: dict[str, Any]) -> None:
    """One row; reset and refused are kept apart from the other ways to be lost."""
    row = plan.document.row(case, kind, subject, subject)
    failures: dict[str, int] = seen["failures"]
    row.facts.update({key: seen[key] for key in ("failures", "gaps_ms", "spans_ms", "curve", "withheld")})
    takes = [done - began for began, done in seen["spans_ms"]]
    row.add(
        clients=seen["clients"],
        lost=seen["failed"],
        refused=failures.get("refused", 0),
        reset=failures.get("reset", 0),
        connect_max_ms=seen["connect_max_ms"],
        connect_p99_us=seen["connect_p99_us"],
        first_byte_max_ms=seen["first_byte_max_ms"],
        gap_max_ms=max(seen["gaps_ms"], default=seen["gap_max_ms"]),
        own_stall_ms=seen["own_stall_ms"],
        stolen_ms=seen["stolen_ms"],
    )
    if takes:
        row.add(restart_ms=sorted(takes)[len(takes) // 2], restarts=len(takes))


def run(plan: Plan, case: str, kinds: Iterable[type[Rival]], times: int, pause: float, quiet_seconds: float) -> None:
    """Each kind in a folder of its own; one that fails is noted with the reason, and the others go on."""
    for kind in kinds:
        if not plan.wants(kind.name):
            continue
        with tempfile.TemporaryDirectory(prefix="takeover-") as folder:
            rival = kind(pathlib.Path(folder))
            try:
                why = rival.missing()
                if why is not None:
                    plan.document.skip(case, rival.name, why)
                    continue
                plan.say(f"{case}: {rival.name}: {quiet_seconds:.0f} s without a restart")
                rival.start()
                said = f"{case}: {rival.name}: restart {{}} of {times}"
                quiet, seen = observe(rival, times, pause, quiet_seconds, lambda n, said=said: plan.say(said.format(n)))  # type: ignore[misc]
            except (OSError, RuntimeError) as error:
                plan.document.skip(case, rival.name, f"failed: {error}")
            else:
                record(plan, case, rival.name, NO_RESTART, quiet)
                record(plan, case, rival.name, RESTARTS, seen)
            finally:
                rival.stop()


def restarts(plan: Plan) -> None:
    """Twenty restarts of everything that is installed, at 5,000 new clients a second (gunicorn: 700)."""
    times, quiet = (3, 2.0) if plan.quick else (20, 10.0)
    run(plan, "restarts", RIVALS, times, 0.3, quiet)
