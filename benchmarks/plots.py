"""The plots of a document, each as PNG and SVG; matplotlib is needed here only."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any

from .deploys import RATE
from .moves import CURVE, MOVERS, by_number
from .restarts import NO_RESTART, RESTARTS
from .results import Document
from .subjects import AGAIN, REFERENCE

OURS, THEIRS, REFERENCE_COLOUR, BAD = "#1b7f5c", "#9aa5b1", "#3b4a5a", "#c2412d"


def _colour(subject: str) -> str:
    if subject.startswith(REFERENCE):
        return REFERENCE_COLOUR
    return OURS if subject.startswith("takeover") else THEIRS


def _bars(axes: Any, names: list[str], values: list[float], label: Callable[[float], str], colours: list[str]) -> None:
    """Horizontal bars, the first on top, each with its figure."""
    axes.barh(range(len(names)), values, color=colours)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    for index, value in enumerate(values):
        axes.text(value, index, f" {label(value)}", va="center", fontsize=8)
    axes.margins(x=0.18)
    axes.spines[["top", "right"]].set_visible(False)


def _echo(document: Document, figure: Any) -> bool:
    wanted = ("64 B × 100", "64 B × 1000", "16 KiB × 100", "64 B × 10, 16 in flight")
    cells = document.cells("echo")
    cells = [cell for cell in wanted if cell in cells] or cells[:4]
    for index, cell in enumerate(cells):
        axes = figure.add_subplot(1, len(cells), index + 1)
        found = []
        for subject in document.subjects("echo"):
            row = document.find("echo", cell, subject)
            ratio = row and document.ratio(row, "cpu_ns")
            if ratio and subject != AGAIN:
                found.append((subject, ratio))
        _bars(
            axes,
            [name for name, _ in found],
            [ratio for _, ratio in found],
            "{:.2f}".format,
            [_colour(name) for name, _ in found],
        )
        axes.axvline(1, color=REFERENCE_COLOUR, linewidth=0.8, linestyle=":")
        axes.set_title(cell, fontsize=10)
        if index:
            axes.set_yticklabels([])
    figure.suptitle("Echo: server CPU for each message, as a ratio to a C epoll loop (less is better)")
    figure.set_size_inches(3.2 * len(cells) + 1.5, 4)
    return bool(cells)


def _single(case: str, measure: str, title: str, unit: str, scale: float = 1) -> Callable[[Document, Any], bool]:
    def draw(document: Document, figure: Any) -> bool:
        rows = [
            row
            for row in document.rows
            if row.case == case and row.subject != AGAIN and row.median(measure) is not None
        ]
        if not rows:
            return False
        values = [(row.median(measure) or 0) / scale for row in rows]
        axes = figure.add_subplot()
        names = [row.subject for row in rows]
        _bars(axes, names, values, lambda value: f"{value:,.0f} {unit}", [_colour(name) for name in names])
        figure.suptitle(title)
        figure.set_size_inches(7.5, 4)
        return True

    return draw


def _passing(document: Document, figure: Any) -> bool:
    cells = document.cells("passing")
    if not cells:
        return False
    axes = figure.add_subplot()
    for subject in document.subjects("passing"):
        rows = [document.find("passing", cell, subject) for cell in cells]
        points = [(int(row.cell.split()[0]), row.median("ns")) for row in rows if row]
        axes.plot([x for x, _ in points], [y for _, y in points], marker="o", label=subject)
    axes.set(xscale="log", yscale="log", xlabel="descriptors in a message", ylabel="ns for each")
    axes.set_xticks([int(cell.split()[0]) for cell in cells], minor=False)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_major_formatter("{x:,g}")
    axes.minorticks_off()
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.suptitle("Passing descriptors between processes: sent, received, closed")
    figure.set_size_inches(7, 4)
    return True


def _restarts(document: Document, figure: Any) -> bool:
    rows = [row for row in document.rows if row.case == "restarts" and row.cell == RESTARTS]
    if not rows:
        return False
    names = [row.subject for row in rows]
    left, right = figure.add_subplot(1, 2, 1), figure.add_subplot(1, 2, 2)
    lost = [row.median("lost") or 0 for row in rows]
    _bars(left, names, lost, "{:,.0f}".format, [BAD if count else OURS for count in lost])
    left.set_title("clients lost", fontsize=10)
    left.set_xlim(0, 1.3 * max(1, *lost))
    if max(lost) > 100:
        left.set_xscale("symlog")
        left.xaxis.set_major_formatter("{x:g}")
    _bars(
        right,
        names,
        [row.median("gap_max_ms") or 0 for row in rows],
        "{:,.1f} ms".format,
        [_colour(name) for name in names],
    )
    right.set_xscale("log")
    right.set_xlim(left=0.1)
    right.xaxis.set_major_formatter("{x:g}")
    right.xaxis.set_minor_formatter("")
    right.set_title("longest time in which nobody was served", fontsize=10)
    right.set_yticklabels([])
    figure.suptitle(f"{rows[0].median('restarts'):.0f} restarts under a steady stream of new clients")
    figure.set_size_inches(11, 4)
    return True


def _deploys(document: Document, figure: Any) -> bool:
    rows = [row for row in document.rows if row.case == "deploys" and not row.cell.endswith(RATE)]
    if not rows:
        return False
    panels = (
        ("new connections failed", "connects_failed"),
        ("requests failed", "requests_failed"),
        ("keep-alives lost without notice", "keep_alives_lost"),
        ("slowest request, ms", "slowest_ms"),
    )
    names = [row.subject for row in rows]
    for index, (title, measure) in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), index + 1)
        values = [row.median(measure) or 0 for row in rows]
        counts = measure != "slowest_ms"
        colours = [BAD if counts and value else _colour(row.subject) for row, value in zip(rows, values, strict=True)]
        _bars(axes, names, values, "{:,.0f}".format, colours)
        axes.set_xlim(0, 1.35 * max(1, *values))
        axes.set_title(title, fontsize=10)
        if index:
            axes.set_yticklabels([])
    figure.suptitle(f"{rows[0].facts['deploys']} deploys under load: takeover run, and each server's own reload")
    figure.set_size_inches(13, 4.4)
    return True


def _curve(case: str) -> Callable[[Document, Any], bool]:
    """What each client waited for its first byte, with and without takeovers."""

    def draw(document: Document, figure: Any) -> bool:
        subjects = [name for name in document.subjects(case) if name.startswith("takeover")]
        if not subjects:
            return False
        row, quiet = document.find(case, RESTARTS, subjects[0]), document.find(case, NO_RESTART, subjects[0])
        assert row is not None and quiet is not None
        axes = figure.add_subplot()
        for began, done in row.facts["spans_ms"] if len(row.facts["spans_ms"]) <= 100 else []:
            axes.axvspan(began / 1e3, done / 1e3, color=OURS, alpha=0.12, linewidth=0)
        for seen, colour, label in (
            (quiet, THEIRS, "no takeover"),
            (row, OURS, f"{row.median('restarts'):.0f} takeovers"),
        ):
            curve = [point for point in seen.facts["curve"] if point[2]]
            axes.plot(
                [p[0] / 1e3 for p in curve], [p[2] / 1e3 for p in curve], color=colour, linewidth=0.7, label=label
            )
        axes.set(
            xlabel="seconds (shaded: from the successor's start to the incumbent's end)",
            ylabel="slowest first byte, ms",
            yscale="log",
        )
        axes.legend(frameon=False, loc="upper right")
        axes.spines[["top", "right"]].set_visible(False)
        figure.suptitle(
            f"{subjects[0]}: what new clients waited, {row.median('lost'):.0f} of {row.median('clients'):,.0f} lost"
        )
        figure.set_size_inches(9, 3.6)
        return True

    return draw


def _moves(document: Document, figure: Any) -> bool:
    """How long the largest number of idle clients took to move, and how long each of as many that talk stood still."""
    cells = [cell for cell in document.cells("moves") if cell.endswith(" talking")]
    if not cells:
        return False
    talking = max(cells, key=lambda cell: int(cell.split()[0]))
    idle = talking.replace("talking", "idle")
    left, right = figure.add_subplot(1, 2, 1), figure.add_subplot(1, 2, 2)
    order = [mover.name for mover in MOVERS if mover.name != AGAIN]
    for axes, cell, measure, title in (
        (left, idle, "move_ms", f"{idle}: until the last has moved"),
        (right, talking, "worst_ms", f"{talking}: worst standstill that a client saw"),
    ):
        rows = [row for name in order if (row := document.find("moves", cell, name)) and row.samples.get(measure)]
        names = [row.subject for row in rows]
        values = [row.median(measure) or 0 for row in rows]
        _bars(axes, names, values, "{:,.1f} ms".format, [_colour(name) for name in names])
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("")
        axes.set_title(title, fontsize=10)
    figure.suptitle("Moving established connections to the next process (less is better)")
    figure.set_size_inches(13, 0.9 + 0.28 * len(order))
    return True


def _moves_by_number(document: Document, figure: Any) -> bool:
    cells = by_number(document)
    if len(cells) < 2:
        return False
    axes = figure.add_subplot()
    for mover in CURVE:
        rows = [document.find("moves", cell, mover.name) for cell in cells]
        points = [(int(row.cell.split()[0]), row.median("move_ms")) for row in rows if row]
        if points and mover.name != AGAIN:
            axes.plot(*zip(*points, strict=True), marker="o", label=mover.name, color=_colour(mover.name))
    axes.set(xscale="log", yscale="log", xlabel="idle connections", ylabel="ms until the last has moved")
    axes.set_xticks([int(cell.split()[0]) for cell in cells], minor=False)
    axes.xaxis.set_major_formatter("{x:,g}")
    axes.yaxis.set_major_formatter("{x:,g}")
    axes.xaxis.set_minor_formatter("")
    axes.yaxis.set_minor_formatter("")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.suptitle("Moving established connections, by their number")
    figure.set_size_inches(7, 4)
    return True


PLOTS: dict[str, Callable[[Document, Any], bool]] = {
    "echo": _echo,
    "stream": _single(
        "stream", "rate", "Streaming: 10 connections, 16 × 16 KiB in flight on each (more is better)", "k/s", 1e3
    ),
    "accept": _single("accept", "cpu_ns", "Accept and close: server CPU for each connection (less is better)", "ns"),
    "memory": _single("memory", "bytes", "Private memory for each idle connection (less is better)", "B"),
    "passing": _passing,
    "restarts": _restarts,
    "timeline": _curve("restarts"),
    "moves": _moves,
    "moves_by_number": _moves_by_number,
    "deploys": _deploys,
}


def draw(document: Document, folder: pathlib.Path) -> list[pathlib.Path]:
    """Write every plot that the document has rows for, and give the files."""
    import matplotlib as mpl

    mpl.use("agg")
    mpl.rcParams["svg.hashsalt"] = "takeover"
    from matplotlib import pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, plot in PLOTS.items():
        figure = plt.figure(layout="constrained")
        if plot(document, figure):
            for suffix, metadata in (("png", {}), ("svg", {"Date": None})):
                path = folder / f"{name}.{suffix}"
                figure.savefig(path, dpi=144, metadata=metadata)
                written.append(path)
        plt.close(figure)
    return written
