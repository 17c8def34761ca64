"""The one document that a run makes, and that tables, plots and targets are made from.

    {"format": 1, "machine": {...}, "command": "...", "rows": [row, ...], "skipped": [[case, subject, why], ...]}

A row is one subject in one cell of one case: samples of each measure in the order of the rounds. Row k of the reference
and row k of a rival were measured right after one another, so a ratio is the median of the rounds' ratios.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import pathlib
import platform
import statistics
import subprocess
import time
from typing import Any

from .processes import PYTHON, environment

FORMAT = 1


@dataclasses.dataclass
class Row:
    """What was measured of one subject in one cell; `facts` are whole-run values that are no samples."""

    case: str
    cell: str
    subject: str
    reference: str
    samples: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)

    def add(self, **measures: float) -> None:
        """Append one sample of each measure."""
        for name, value in measures.items():
            self.samples.setdefault(name, []).append(value)

    def median(self, measure: str) -> float | None:
        """The median over the rounds, or None if it was not measured."""
        values = self.samples.get(measure)
        return statistics.median(values) if values else None

    def worst(self, measure: str) -> float | None:
        """The largest of all rounds, or None if it was not measured."""
        return max(self.samples.get(measure, ()), default=None)


@dataclasses.dataclass
class Document:
    """All rows of a run."""

    machine: dict[str, Any] = dataclasses.field(default_factory=dict)
    command: str = ""
    rows: list[Row] = dataclasses.field(default_factory=list)
    skipped: list[tuple[str, str, str]] = dataclasses.field(default_factory=list)
    format: int = FORMAT

    def row(self, case: str, cell: str, subject: str, reference: str) -> Row:
        """The row of a subject in a cell, made if it is not there."""
        found = self.find(case, cell, subject)
        if found is None:
            found = Row(case, cell, subject, reference)
            self.rows.append(found)
        return found

    def find(self, case: str, cell: str, subject: str) -> Row | None:
        """The row of a subject in a cell, if it was measured."""
        for row in self.rows:
            if (row.case, row.cell, row.subject) == (case, cell, subject):
                return row
        return None

    def skip(self, case: str, subject: str, why: str) -> None:
        """Note once that a subject was left out of a case, and why."""
        if (case, subject, why) not in self.skipped:
            self.skipped.append((case, subject, why))

    def cells(self, case: str) -> list[str]:
        """The cells of a case, in the order of measurement."""
        return list(dict.fromkeys(row.cell for row in self.rows if row.case == case))

    def subjects(self, case: str) -> list[str]:
        """The subjects of a case, in the order of measurement."""
        return list(dict.fromkeys(row.subject for row in self.rows if row.case == case))

    def ratio(self, row: Row, measure: str, reference: str | None = None) -> float | None:
        """The median of the rounds' ratios to the reference (or to another subject of the cell), or None."""
        other = self.find(row.case, row.cell, reference or row.reference)
        if other is None:
            return None
        pairs = zip(row.samples.get(measure, []), other.samples.get(measure, []), strict=False)
        ratios = [ours / theirs for ours, theirs in pairs if theirs]
        return statistics.median(ratios) if ratios else None

    def save(self, path: pathlib.Path) -> None:
        """Write the document as JSON."""
        path.write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n")


def load(path: pathlib.Path) -> Document:
    """Read a document back; raises ValueError if it is of another format."""
    content = json.loads(path.read_text())
    if content.get("format") != FORMAT:
        raise ValueError(f"{path}: format {content.get('format')}, this program reads {FORMAT}")
    content["rows"] = [Row(**row) for row in content["rows"]]
    content["skipped"] = [(case, subject, why) for case, subject, why in content["skipped"]]
    return Document(**content)


def machine() -> dict[str, Any]:
    """The facts that the figures depend on."""
    model = "unknown"
    for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    versions = {}
    for package in ("uvloop", "gevent", "gunicorn", "Cython"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    command = [PYTHON, "-c", "import takeover; print(takeover.__version__, takeover.backend)"]
    ours = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False).stdout.split()
    if ours:
        versions["takeover"] = f"{ours[0]} ({ours[1]})"
    return {
        "kernel": platform.release(),
        "architecture": platform.machine(),
        "cpu": model,
        "cpus": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "libc": " ".join(platform.libc_ver()),
        "versions": versions,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }
