"""What the record of a soak says: latencies of its timeline, what was lost, what grew, and the plot."""

from __future__ import annotations

import argparse
import math
import pathlib
import statistics
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

FLAT = 0.01
"""The part of its median by which a figure may change over a run, if it changes by more than chance makes it."""

FEWEST = 20
"""Takeovers from which on a run says anything about a drift: three points always lie close to some line."""

CONNECT_MAX, CONNECT_P50, CONNECT_P99 = 3, 7, 8
"""Columns of the timeline of c/load_arrivals.c, in microseconds."""


class Drift(NamedTuple):
    """The line of least squares through a figure after the first tenth of a run: its change over that time.

    The error is infinite where there were too few takeovers to tell.
    """

    median: float
    change: float
    error: float

    @property
    def is_flat(self) -> bool:
        """It has changed by at most FLAT, or by no more than three standard errors of the fit."""
        return abs(self.change) <= max(FLAT * self.median, 3 * self.error)


def drift(times: Sequence[float], values: Sequence[float]) -> Drift:
    """Of a figure over time."""
    first = len(times) // 10
    x, y = times[first:], values[first:]
    if len(x) < FEWEST:
        return Drift(statistics.median(y), 0, math.inf)
    slope, intercept = statistics.linear_regression(x, y)
    middle, span = statistics.fmean(x), x[-1] - x[0]
    rest = sum((b - slope * a - intercept) ** 2 for a, b in zip(x, y, strict=True))
    error = math.sqrt(rest / (len(x) - 2) / sum((a - middle) ** 2 for a in x))
    return Drift(statistics.median(y), slope * span, error * span)


def _between(rows: Sequence[Sequence[int]], since: float, until: float) -> list[Sequence[int]]:
    return [row for row in rows if since <= row[0] < until]


def latencies(rows: Sequence[Sequence[int]], since: float, until: float) -> dict[str, float]:
    """Connects between two instants (ms): the median of the medians and the worst of the rest of each 10 ms, in ms."""
    found = [row for row in _between(rows, since, until) if row[CONNECT_MAX]]
    if not found:
        return {"p50_ms": 0, "p99_ms": 0, "worst_ms": 0}
    return {
        "p50_ms": statistics.median(row[CONNECT_P50] for row in found) / 1e3,
        "p99_ms": statistics.median(row[CONNECT_P99] for row in found) / 1e3,
        "worst_ms": max(row[CONNECT_MAX] for row in found) / 1e3,
    }


def failures_between(rows: Sequence[Sequence[int]], since: float, until: float) -> int:
    """New clients that failed between two instants (ms)."""
    return sum(row[2] for row in _between(rows, since, until))


def judge(lines: Sequence[dict[str, Any]], arrivals: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """`said`: figures for people; `faults`: what must not be."""
    faults = []
    kinds: dict[str, int] = dict(arrivals["failures"])
    for line in lines:
        if not line["excused"] and line["ended"] + line["connects_failed"]:
            lost = f"{line['ended']} streams and {line['connects_failed']} new clients"
            faults.append(f"{lost} lost at {line['at']:.1f} s, killed: {line['killed'] or 'nobody'}")
        if line["checked"] != options.streams:
            faults.append(f"{line['checked']} of {options.streams} streams went on at {line['at']:.1f} s")
    faults += [
        f"{kinds[kind]} new clients: {kind}" for kind in kinds if kind not in ("reset", "closed early", "broken pipe")
    ]
    if lines[-1]["wrong"]:
        faults.append(f"{lines[-1]['wrong']} streams got wrong bytes")
    times = [line["at"] for line in lines]
    said = []
    for name in ("memory", "descriptors"):
        seen = drift(times, [line[name] for line in lines])
        said.append(f"{name}: median {seen.median:,.0f}, drift {seen.change:+,.1f} ± {seen.error:,.1f}")
        if not seen.is_flat:
            faults.append(f"not flat: {said[-1]}")
    kills = Counter(line["killed"] for line in lines if line["killed"])
    milliseconds = [arrivals["connect_p50_us"] / 1e3, arrivals["connect_p99_us"] / 1e3, arrivals["connect_max_ms"]]
    p50, p99, worst = (f"{value:.2f} ms" for value in milliseconds)
    ended = {excused: sum(line["ended"] for line in lines if line["excused"] is excused) for excused in (True, False)}
    wrong = lines[-1]["wrong"]
    rate, stall = arrivals["served"] / times[-1], arrivals["own_stall_ms"]
    said = [
        f"{len(lines)} takeovers in {times[-1]:.0f} s; killed: {dict(kills)}",
        f"new clients: {arrivals['clients']:,}, {rate:,.0f} served a second, {arrivals['withheld']} withheld",
        f"new clients that failed: {kinds}",
        f"streams: {options.streams}, {ended[True]} ended with a killed owner, {ended[False]} lost, {wrong} wrong",
        f"connect: p50 {p50}, p99 {p99}, worst {worst}; longest stall of the generator {stall:.0f} ms",
        *said,
    ]
    return {"said": said, "faults": faults}


def plot(document: dict[str, Any], path: pathlib.Path) -> None:
    """Draw memory, descriptors, latency and failures over time."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    lines = document["lines"]
    times = [line["at"] for line in lines]
    figure, (memory, held, wait, lost) = plt.subplots(4, sharex=True, figsize=(9, 8), layout="constrained")
    memory.plot(times, [line["memory"] / 2**20 for line in lines], color="#1b7f5c")
    memory.set(ylabel="private memory, MiB", ylim=(0, None))
    held.plot(times, [line["descriptors"] for line in lines], color="#1b7f5c")
    held.set(ylabel="descriptors", ylim=(0, None))
    for name, label in (("p50_ms", "p50"), ("p99_ms", "p99"), ("worst_ms", "worst")):
        wait.plot(times, [max(line[name], 0.001) for line in lines], linewidth=0.8, label=label)
    wait.set(ylabel="connect, ms", yscale="log")
    wait.legend(frameon=False, ncols=3)
    for excused, colour, label in ((True, "#9aa5b1", "with a killed owner"), (False, "#c2412d", "lost")):
        values = [(line["ended"] + line["connects_failed"]) * (line["excused"] == excused) for line in lines]
        lost.plot(times, values, color=colour, label=label)
    lost.set(ylabel="connections ended", xlabel="seconds")
    lost.legend(frameon=False)
    for axes in (memory, held, wait, lost):
        axes.spines[["top", "right"]].set_visible(False)
    rate = f"{document['rate']:,.0f} new clients a second, {document['options']['streams']} streams"
    figure.suptitle(f"{len(lines)} takeovers under {rate}")
    figure.savefig(path, dpi=110)
    plt.close(figure)
