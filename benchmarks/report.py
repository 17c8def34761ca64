"""The tables of a document on the terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from rich.console import Console
from rich.table import Table

from .deploys import RATE
from .moves import CURVE, by_number
from .restarts import NO_RESTART, RESTARTS
from .results import Document, Row
from .targets import targets


def _number(value: float | None, digits: int = 2) -> str:
    return "–" if value is None else f"{value:,.{digits}f}"


def _table(title: str, columns: Iterable[str], caption: str = "") -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", caption=caption, caption_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", no_wrap=not index)
    return table


def _grid(
    document: Document, case: str, cells: list[str], title: str, show: Callable[[Row], str], caption: str
) -> Table:
    """Subjects down, cells across."""
    table = _table(title, ["", *cells], caption)
    for subject in document.subjects(case):
        rows = [document.find(case, cell, subject) for cell in cells]
        if any(rows):
            table.add_row(subject, *(show(row) if row else "–" for row in rows))
    return table


def _ratio(document: Document, measure: str, unit: str, scale: float = 1) -> Callable[[Row], str]:
    def show(row: Row) -> str:
        median = row.median(measure)
        if row.subject == row.reference:
            return f"1.00 ({_number(median and median / scale)} {unit})"
        return _number(document.ratio(row, measure))

    return show


def _echo(document: Document) -> Iterable[Table]:
    groups: dict[str, list[str]] = {}
    for cell in document.cells("echo"):
        size, _, rest = cell.partition(" × ")
        groups.setdefault(f"{size}, {rest.partition(', ')[2] or '1 in flight'}", []).append(cell)
    for group, cells in groups.items():
        caption = "ratio to the C reference, lower is better; columns: message size × connections"
        yield _grid(
            document,
            "echo",
            cells,
            f"Echo, {group}: server CPU for each message",
            _ratio(document, "cpu_ns", "µs", 1e3),
            caption,
        )
        caption = "ratio to the C reference, higher is better"
        yield _grid(
            document, "echo", cells, f"Echo, {group}: messages a second", _ratio(document, "rate", "k/s", 1e3), caption
        )


def _simple(document: Document, case: str, title: str, measures: list[tuple[str, str, str, float]]) -> Iterable[Table]:
    """One cell: measures across, each with its ratio to the reference."""
    for cell in document.cells(case):
        table = _table(f"{title} ({cell})", ["", *(f"{label}, {unit}" for _, label, unit, _ in measures), "ratio"])
        for row in (row for row in document.rows if row.case == case and row.cell == cell):
            values = [
                _number(None if (median := row.median(measure)) is None else median / scale)
                for measure, _, _, scale in measures
            ]
            ratio = document.ratio(row, measures[0][0]) if row.subject != row.reference else 1.0
            table.add_row(row.subject, *values, _number(ratio))
        yield table


def _memory(document: Document) -> Table:
    table = _table("Private memory for each idle connection", ["", "bytes"])
    for row in (row for row in document.rows if row.case == "memory"):
        table.add_row(row.subject, _number(row.median("bytes"), 0))
    return table


def _beside(value: float | None, usual: float | None) -> str:
    return f"{_number(value)} ({_number(usual)})"


def _restarts(document: Document, case: str) -> Table:
    columns = [
        "",
        "restarts",
        "clients",
        "lost",
        "how",
        "slowest connect, ms",
        "longest gap, ms",
        "own stall, ms",
        "restart takes, ms",
    ]
    caption = (
        "in brackets: the same server without a restart; gap: the longest time around a restart in which no client "
        "was served; own stall: the longest time for which the load generator itself did not run, so that a gap up "
        "to it proves nothing"
    )
    table = _table(f"{case.capitalize()} under a steady stream of new clients", columns, caption)
    for row in (row for row in document.rows if row.case == case and row.cell == RESTARTS):
        quiet = document.find(case, NO_RESTART, row.subject) or row
        how = ", ".join(f"{count} {kind}" for kind, count in row.facts["failures"].items())
        table.add_row(
            row.subject,
            _number(row.median("restarts"), 0),
            _number(row.median("clients"), 0),
            _number(row.median("lost"), 0),
            how or "–",
            _beside(row.median("connect_max_ms"), quiet.median("connect_max_ms")),
            _beside(row.median("gap_max_ms"), quiet.median("gap_max_ms")),
            _beside(row.median("own_stall_ms"), quiet.median("own_stall_ms")),
            _number(row.median("restart_ms"), 0),
        )
    return table


def _broken(document: Document) -> Table:
    columns = ["the new version", "deploys", "exit status 1", "reason told", "clients", "failed", "took, ms", "old one"]
    caption = "while clients connect all the time; the old version must answer every one of them, and live"
    table = _table("Deploys of broken versions under takeover run", columns, caption)
    for row in (row for row in document.rows if row.case == "broken"):
        table.add_row(
            row.subject,
            str(len(row.samples.get("ms", ()))),
            _number(row.median("status"), 0),
            _number(row.median("told"), 0),
            _number(row.median("clients"), 0),
            _number(row.median("failed"), 0),
            _number(row.median("ms"), 0),
            "serves" if row.median("alive") else "has ended",
        )
    return table


IDLE = (
    ("moved in", "move_ms"),
    ("beside C", ""),
    ("longest batch", "longest_batch_ms"),
    ("old one gone after", "gone_ms"),
    ("CPU, servers", "server_cpu_ms"),
    ("CPU, clients", "client_cpu_ms"),
    ("CPU, old one's end", "exit_cpu_ms"),
    ("lost", "lost"),
)
TALKING = (
    ("moved in", "move_ms"),
    ("longest batch", "longest_batch_ms"),
    ("old one gone after", "gone_ms"),
    ("stood still, p50", "p50_ms"),
    ("p99", "p99_ms"),
    ("worst", "worst_ms"),
    ("own stall", "own_stall_ms"),
    ("lost", "lost"),
)
"""Columns of the moves: title, measure."""


def _moves(document: Document) -> Iterable[Table]:
    """A table for each number of clients that are idle or talk, and one over the numbers."""
    captions = {
        IDLE: "C moves the bare connections; longest batch: how long it was between the two loops; CPU: from the "
        "commit until the last connection has moved",
        TALKING: "what the clients saw: the longest round trip of each while they moved (in brackets: in as long a "
        "time before), the worst of all rounds; own stall: the longest time for which their program itself did not "
        "run, so that a standstill up to it proves nothing",
    }
    for cell in document.cells("moves"):
        rows = [row for row in document.rows if (row.case, row.cell) == ("moves", cell)]
        if {row.subject for row in rows} <= {mover.name for mover in CURVE}:
            continue
        columns = TALKING if cell.endswith(" talking") else IDLE
        title = f"Moving {cell} connections, ms"
        table = _table(title, ["", *(title for title, _ in columns)], captions[columns])
        for row in rows:
            table.add_row(row.subject, *(_moved(document, row, measure) for _, measure in columns))
        yield table
    cells = by_number(document)
    if not cells:
        return
    table = _table("Moving idle connections, by their number: ms (ratio to C)", ["", *cells])
    for mover in CURVE:
        found = [document.find("moves", cell, mover.name) for cell in cells]
        if any(found):
            table.add_row(mover.name, *(_beside_c(document, row) if row else "–" for row in found))
    yield table


def _beside_c(document: Document, row: Row) -> str:
    return _beside(row.median("move_ms"), document.ratio(row, "move_ms"))


def _moved(document: Document, row: Row, measure: str) -> str:
    if not measure:
        return _number(document.ratio(row, "move_ms"))
    if measure == "lost":
        return _number(sum(row.samples[measure]), 0) if measure in row.samples else "–"
    if f"quiet_{measure}" in row.samples:
        return _beside(_median_or_worst(row, measure), _median_or_worst(row, f"quiet_{measure}"))
    return _number(_median_or_worst(row, measure))


def _median_or_worst(row: Row, measure: str) -> float | None:
    return row.worst(measure) if measure.endswith("worst_ms") else row.median(measure)


def _deploys(document: Document) -> Iterable[Table]:
    """What clients saw, and the rates with and without takeover run."""
    columns = [
        "",
        "deploys",
        "new connections failed",
        "requests failed",
        "keep-alives lost without notice",
        "with notice",
        "websockets closed",
        "requests a second",
        "slowest, ms",
        "one takes, s",
    ]
    caption = (
        "requests failed: sent and not answered in full; keep-alives lost without notice: closed under a request that "
        "was on its way and that nobody had read (RFC 9112, 9.5); websockets: by code, 1006 is without a close frame"
    )
    table = _table("Deploys under load", columns, caption)
    rates = _table("Requests a second", ["", "median", "beside the same without takeover run"])
    for row in (row for row in document.rows if row.case == "deploys"):
        if not row.cell.endswith(RATE):
            codes = ", ".join(f"{count} × {code}" for code, count in row.facts["websockets_closed"].items())
            counts = ("connects_failed", "requests_failed", "keep_alives_lost", "keep_alives_noticed")
            table.add_row(
                row.subject,
                str(row.facts["deploys"]),
                *(_number(row.median(measure), 0) for measure in counts),
                codes or "–",
                _number(row.median("rate"), 0),
                _number(row.median("slowest_ms"), 0),
                _number(row.median("deploy_s"), 1),
            )
        else:
            rates.add_row(row.subject, _number(row.median("rate"), 0), _number(document.ratio(row, "rate")))
    yield table
    if rates.row_count:
        yield rates


def _targets(document: Document) -> Table | None:
    found = targets(document)
    if not found:
        return None
    table = _table("Targets", ["what", "at most or at least", "measured", "reached"])
    for target in found:
        reached = {True: "[green]yes[/]", False: "[red]no[/]", None: ""}[target.reached]
        table.add_row(target.what, target.bound, target.measured, reached)
    return table


def tables(document: Document) -> Iterable[Table]:
    """All tables for which the document has rows."""
    cases = {row.case for row in document.rows}
    if "echo" in cases:
        yield from _echo(document)
    timing = [("cpu_ns", "server CPU", "µs", 1e3), ("rate", "rate", "k/s", 1e3)]
    if "stream" in cases:
        yield from _simple(document, "stream", "Streaming", [timing[1], timing[0]])
    if "accept" in cases:
        yield from _simple(document, "accept", "Accept and close", timing)
    if "memory" in cases:
        yield _memory(document)
    if "passing" in cases:
        cells, caption = document.cells("passing"), "ratio to C"
        for measure, what in (("ns", "sent, received and closed"), ("pass_ns", "sent and received")):
            title = f"Passing descriptors, {what}: wall time for each"
            yield _grid(document, "passing", cells, title, _ratio(document, measure, "ns"), caption)
    if "import" in cases:
        yield from _simple(document, "import", "Import", [("ms", "time", "ms", 1)])
    if "restarts" in cases:
        yield _restarts(document, "restarts")
    if "moves" in cases:
        yield from _moves(document)
    if "hostile" in cases:
        waits = [("p50_us", "p50", "µs", 1.0), ("p99_us", "p99", "µs", 1.0)]
        yield from _simple(document, "hostile", "Clients beside hostile control connections", [timing[1], *waits])
    if "broken" in cases:
        yield _broken(document)
    if "deploys" in cases:
        yield from _deploys(document)
    if (found := _targets(document)) is not None:
        yield found


def show(document: Document, console: Console) -> None:
    """Print the machine, every table, and what was left out."""
    facts = document.machine
    versions = ", ".join(f"{name} {version}" for name, version in facts.get("versions", {}).items())
    console.print(
        f"Linux {facts.get('kernel')}, {facts.get('cpus')} CPUs ({facts.get('cpu')}), Python {facts.get('python')}"
        f"{', ' + versions if versions else ''}; {facts.get('date')}; {document.command}",
        soft_wrap=True,
        highlight=False,
    )
    for table in tables(document):
        console.print()
        console.print(table)
    if document.skipped:
        console.print()
    for case, subject, why in document.skipped:
        console.print(f"{case}: skipped {subject}: {why}", soft_wrap=True, highlight=False, markup=False)
