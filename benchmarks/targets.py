"""What takeover set out to reach, each computed from the rows of a document; a target without its rows is left out."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from .deploys import LOST, RATE
from .importing import OURS
from .moves import DRAINED
from .restarts import NO_RESTART, RESTARTS
from .results import Document, Row
from .subjects import AGAIN, REFERENCE

NATIVE, PROTOCOL = "takeover native, cython", "takeover protocol, cython"


class Target(NamedTuple):
    """One line: the bound and the figure as text, and whether it was reached (None: for comparison)."""

    what: str
    bound: str
    measured: str
    reached: bool | None


def _rows(document: Document, case: str, subject: str) -> list[Row]:
    return [row for row in document.rows if row.case == case and row.subject == subject]


def _worst(
    document: Document, rows: Iterable[Row], measure: str, reference: str | None = None
) -> tuple[float, str] | None:
    ratios = [(ratio, row.cell) for row in rows if (ratio := document.ratio(row, measure, reference)) is not None]
    return max(ratios, default=None)


def _figure(ratio: float | None) -> str:
    return "–" if ratio is None else f"{ratio:.2f}"


def _echo(document: Document) -> Iterable[Target]:
    for flight in ("one in flight", "16 in flight"):
        many = flight == "16 in flight"
        for subject, bound in ((NATIVE, 1.03), (PROTOCOL, 1.08), (AGAIN, 0)):
            rows = [row for row in _rows(document, "echo", subject) if " × 1," not in f"{row.cell},"]
            rows = [row for row in rows if ("16 in flight" in row.cell) == many]
            worst = _worst(document, rows, "cpu_ns")
            if worst is None:
                continue
            measured = f"worst {worst[0]:.2f} at {worst[1]}"
            if subject == AGAIN:
                yield Target(f"echo, {flight}, {subject}: what noise makes", "–", measured, None)
                continue
            within = sum((document.ratio(row, "cpu_ns") or 9) <= bound for row in rows)
            what = f"echo, {flight}, {subject}: CPU a message beside C"
            yield Target(what, f"≤ {bound}", f"{measured}; {within} of {len(rows)} cells within", worst[0] <= bound)
        rows = [row for row in _rows(document, "echo", PROTOCOL) if ("16 in flight" in row.cell) == many]
        uvloop = _worst(document, rows, "cpu_ns", "uvloop protocol")
        if uvloop:
            least = 1 / uvloop[0]
            what = f"echo, {flight}, uvloop's CPU beside our protocol class"
            yield Target(what, "≥ 1.15", f"least {least:.2f} at {uvloop[1]}", least >= 1.15)


def _stream(document: Document) -> Iterable[Target]:
    for row in _rows(document, "stream", NATIVE):
        ratio = document.ratio(row, "rate")
        if ratio is not None:
            yield Target("streaming, throughput beside C", "≥ 0.97", f"{ratio:.2f}", ratio >= 0.97)
        for rival in ("asyncio protocol", "uvloop protocol"):
            ratio = document.ratio(row, "rate", rival)
            if ratio is not None:
                yield Target(f"streaming, throughput beside {rival}", "> 1", f"{ratio:.2f}", ratio > 1)


def _memory(document: Document) -> Iterable[Target]:
    for subject, bound in ((NATIVE, 64), (PROTOCOL, 256)):
        for row in _rows(document, "memory", subject):
            spent = (row.median("bytes") or 0) - (row.facts["protocol_object"] if subject == PROTOCOL else 0)
            beyond = ", beyond the protocol object" if subject == PROTOCOL else ""
            yield Target(f"idle connection, {subject}{beyond}", f"≤ {bound} B", f"{spent:.0f} B", spent <= bound)


def _passing(document: Document) -> Iterable[Target]:
    row = document.find("passing", "252 in a message", "takeover, cython")
    ratio = row and document.ratio(row, "ns")
    if ratio:
        what = "passing descriptors, 252 a batch, beside C"
        yield Target(f"{what}: sent, received, closed", "≤ 1.15", f"{ratio:.2f}", ratio <= 1.15)
        alone = document.ratio(row, "pass_ns") if row else None
        yield Target(f"{what}: without the closing", "–", _figure(alone), None)


def _restarts(document: Document, case: str) -> Iterable[Target]:
    for subject in ("takeover, cython", "takeover, python"):
        row, quiet = document.find(case, RESTARTS, subject), document.find(case, NO_RESTART, subject)
        if row is None or quiet is None:
            continue
        lost, count = row.median("lost"), row.median("restarts")
        slowest, usual = row.median("connect_max_ms") or 0, quiet.median("connect_max_ms") or 0
        gap = row.median("gap_max_ms") or 0
        prefix = f"{case}, {subject}, {count:.0f} takeovers"
        yield Target(f"{prefix}: lost", "0", f"{lost:.0f}", not lost)
        measured = f"{slowest:.2f} ms, without {usual:.2f} ms"
        yield Target(f"{prefix}: slowest connect", "≤ 2 × without", measured, slowest <= 2 * usual)
        measured = f"{gap:.2f} ms, without {quiet.median('gap_max_ms') or 0:.2f} ms"
        yield Target(f"{prefix}: longest gap", "≤ 5 ms", measured, gap <= 5)


def _move_time(document: Document) -> Iterable[Target]:
    """Beside the C program that moves bare connections; where there is state, beside C that carries as much, too."""
    for subject, bound, likewise in (
        (NATIVE, 1.25, ""),
        (f"{PROTOCOL}, 64 B", 2.5, f"{REFERENCE}, 64 B"),
        (AGAIN, 0, ""),
    ):
        row = document.find("moves", "9000 idle", subject)
        ratio = row and document.ratio(row, "move_ms")
        if row is None or ratio is None:
            continue
        what = f"moving 9,000 idle connections, {subject}: beside C"
        if subject == AGAIN:
            yield Target(f"{what}: what noise makes", "–", _figure(ratio), None)
            continue
        measured = f"{ratio:.2f} ({row.median('move_ms'):.1f} ms)"
        if likewise:
            measured += f"; beside C with as much state {_figure(document.ratio(row, 'move_ms', likewise))}"
        yield Target(what, f"≤ {bound}", measured, ratio <= bound)


def _moves(document: Document) -> Iterable[Target]:
    yield from _move_time(document)
    for subject in (NATIVE, f"{PROTOCOL}, 64 B"):
        row = document.find("moves", "9000 talking", subject)
        if row is not None:
            p99, worst = row.median("p99_ms") or 0, row.worst("worst_ms") or 0
            quiet, stall = row.worst("quiet_worst_ms") or 0, row.worst("own_stall_ms") or 0
            what = f"standstill while 9,000 talk, {subject}"
            yield Target(f"{what}: p99", "≤ 10 ms", f"{p99:.2f} ms", p99 <= 10)
            measured = f"{worst:.2f} ms; without a takeover {quiet:.2f} ms, the clients' own stall {stall:.2f} ms"
            yield Target(f"{what}: worst of all rounds", "≤ 30 ms", measured, worst <= 30)
    row = document.find("moves", "9000 idle", NATIVE)
    if row is not None:
        gone = row.median("gone_ms") or 0
        measured = f"{gone:.1f} ms, of which {row.median('exit_cpu_ms') or 0:.1f} ms are CPU"
        yield Target("old process gone after the last of 9,000 has moved", "≤ 20 ms", measured, gone <= 20)
        drained = document.ratio(row, "cpu_ms", DRAINED)
        if drained:
            what = f"CPU of {DRAINED} of 9,000 beside moving them, servers and clients"
            yield Target(what, "≥ 10", f"{1 / drained:.1f}", drained <= 0.1)
    for kind in ("uvloop", "asyncio"):
        for row in _rows(document, "moves", f"takeover.aio on {kind}, 64 B"):
            if row.cell == "1000 talking":
                moved, worst = row.median("move_ms") or 0, row.worst("worst_ms") or 0
                what = f"moving 1,000 talking connections, {row.subject}"
                yield Target(f"{what}: time", "≤ 150 ms", f"{moved:.1f} ms", moved <= 150)
                yield Target(f"{what}: worst standstill", "≤ 60 ms", f"{worst:.2f} ms", worst <= 60)
    rows = [row for row in document.rows if row.case == "moves" and "lost" in row.samples]
    if rows:
        lost, takeovers = sum(sum(row.samples["lost"]) for row in rows), sum(len(row.samples["lost"]) for row in rows)
        yield Target(f"connections lost or garbled in {takeovers} takeovers", "0", f"{lost:.0f}", not lost)


def _deploys(document: Document) -> Iterable[Target]:
    rows = [row for row in document.rows if row.case == "deploys"]
    for row in (row for row in rows if not row.cell.endswith(RATE)):
        if row.subject != row.reference or not row.subject.startswith("takeover"):
            continue
        failed = (row.median("connects_failed") or 0) + (row.median("requests_failed") or 0)
        what = f"{row.facts['deploys']} deploys, {row.subject}"
        yield Target(f"{what}: failed connects and requests", "0", f"{failed:.0f}", not failed)
        others = [other for other in rows if other.cell == row.cell and other.subject != row.subject]
        worse = [
            f"{column.replace('_', ' ')} {row.median(column):.0f}, {other.subject} {other.median(column):.0f}"
            for other in others
            for column in LOST
            if (row.median(column) or 0) > (other.median(column) or 0)
        ]
        if others:
            yield Target(f"{what}: beside its own reload", "never worse", "; ".join(worse) or "not worse", not worse)
    for row in (row for row in rows if row.cell.endswith(RATE) and row.subject != row.reference):
        ratio = document.ratio(row, "rate")
        if ratio:
            yield Target(f"requests a second, {row.subject}, beside without", "1", f"{ratio:.2f}", None)


def targets(document: Document) -> list[Target]:
    """Every target that the document has rows for."""
    found = [*_echo(document), *_stream(document), *_memory(document), *_passing(document)]
    found += [*_restarts(document, "restarts"), *_moves(document)]
    found += _deploys(document)
    for row in (row for row in document.rows if row.case == "broken"):
        deploys = len(row.samples.get("ms", ()))
        good = int(min(row.median("status") or 0, row.median("told") or 0))
        failed = int(row.median("failed") or 0)
        unnoticed = good == deploys and not failed and bool(row.median("alive"))
        measured = f"{good} of {deploys}, {failed} clients failed"
        found.append(
            Target(f"broken version, {row.subject}: exit status 1, reason told", "all, 0", measured, unnoticed)
        )
    for row in _rows(document, "import", OURS):
        ratio = document.ratio(row, "ms")
        if ratio is not None:
            found.append(Target("import takeover beside the standard modules", "< 1.3", f"{ratio:.2f}", ratio < 1.3))
    return found
