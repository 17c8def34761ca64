"""Says which lines and branches of src/ and which lines of ext/ the tests come to: `python tests/covered.py`.

Builds in a temporary folder with line tracing, runs the tests on both backends with coverage.py in every process of
theirs, and prints the report. Arguments are arguments of pytest in place of all tests. The exit status is pytest's, or
2 where less is covered than LEAST says.

A traced process is several times slower, so some tests fail here that pass without; what they execute counts.
"""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict

from coverage import CoverageData

from sanitized import build

LEAST = {"src": 98.0, "ext": 95.0}
"""Percent, of lines and branches together in src/, of lines in ext/."""
LEFT_OUT = (
    *("test_benchmarks.py", "test_chaos.py", "test_fuzz.py", "test_long_rows.py", "test_model.py", "test_packaging.py"),
    "test_valgrind.py",
)
"""What runs long for what other tests come to."""
NOT_TRACED = (
    "whichever_allocation",
    "half_adopted",
    "a_handler_that_raises_ends_a_call",
    "a_signal_without_a_handler_raises_from_run",
)
"""Parts of names: what fails allocations, the tracer's too, and what a signal's handler raises: in the Python code of
the tracer, which swallows it, so that the test waits for it until its process is killed, with all that it has counted.
"""
EXCEPTIONS = {
    "_keeper.pyx": "the keeper has unmapped the interpreter, and with it any tracer",
    "_keeper_py.py": "the keeper is an interpreter that imports nothing, no tracer either (-I -S)",
}
"""Files that are left out, and why no tracer sees them. tests/test_keeper.py tries the same on both."""

CONFIGURATION = """
[run]
branch = true
parallel = true
data_file = {folder}/data/coverage
source =
    {folder}/src/takeover
    {folder}/ext/takeover
plugins = Cython.Coverage
patch =
    subprocess
    _exit
sigterm = true
core = ctrace
disable_warnings =
    couldnt-parse
    no-data-collected
    module-not-measured
    plugin-disabled
[report]
skip_covered = true
exclude_also =
    if TYPE_CHECKING:
    @overload
    raise NotImplementedError
"""


def drop_spoilt(data: pathlib.Path) -> None:
    """Removes what cannot be combined: of a process in which files have another tracer than in most.

    coverage.py leaves that behind of a process whose plugin failed, or that was ended as it wrote.
    """
    tracers: dict[pathlib.Path, dict[str, str | None]] = {}
    votes: dict[str, Counter[str | None]] = defaultdict(Counter)
    for path in data.iterdir():
        counted = CoverageData(str(path))
        counted.read()
        tracers[path] = {file: counted.file_tracer(file) for file in counted.measured_files()}
        for file, tracer in tracers[path].items():
            votes[file][tracer] += 1
    usual = {file: counts.most_common(1)[0][0] for file, counts in votes.items()}
    spoilt = [path for path, found in tracers.items() if any(usual[file] != tracer for file, tracer in found.items())]
    for path in spoilt:
        path.unlink()
    print(f"the counts of {len(spoilt)} of {len(tracers)} processes cannot be combined", flush=True)


def total(folder: pathlib.Path, environment: dict[str, str], part: str) -> float:
    """Prints the report of src or ext; returns its percentage."""
    coverage = [sys.executable, "-m", "coverage", "report", f"--include={folder / part}/*"]
    left_out = [f"--omit={','.join(f'*/{name}' for name in EXCEPTIONS)}"]
    subprocess.run([*coverage, *left_out, "--show-missing"], cwd=folder, env=environment, check=False)
    found = subprocess.run(
        [*coverage, *left_out, "--format=total", "--precision=2"],
        cwd=folder,
        env=environment,
        check=False,
        capture_output=True,
        text=True,
    )
    return float(found.stdout or 0)


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="takeover-covered-") as name:
        folder = pathlib.Path(name)
        folder.chmod(0o755)
        build(folder, TAKEOVER_LINETRACE="1")
        (folder / "data").mkdir()
        (folder / "data").chmod(0o1777)  # some processes of the tests are another user's
        configuration = folder / ".coveragerc"
        configuration.write_text(CONFIGURATION.format(folder=folder))
        environment = {
            **{key: value for key, value in os.environ.items() if key != "PYTEST_ADDOPTS"},
            "COVERAGE_RCFILE": str(configuration),
            # the compiled modules tell a tracer paths from the folder on, which processes in other folders look up here
            "PYTHONPATH": os.pathsep.join((str(folder / "src"), str(folder))),
            "TAKEOVER_TEST_EXT": "require",
            "TAKEOVER_TEST_GENTLE": "1",
            "TAKEOVER_TEST_STEP": os.environ.get("TAKEOVER_TEST_STEP", "20"),
        }
        run = [sys.executable, "-m", "coverage", "run", "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        limits = ["-n", "3", "--timeout", "240"]
        everything = ["tests", *(f"--ignore=tests/{file}" for file in LEFT_OUT)]
        tests = sys.argv[1:] or [*everything, "-k", " and ".join(f"not {part}" for part in NOT_TRACED)]
        status = subprocess.run([*run, *limits, *tests], cwd=folder, env=environment, check=False).returncode
        drop_spoilt(folder / "data")
        combine = [sys.executable, "-m", "coverage", "combine", "-q", str(folder / "data")]
        subprocess.run(combine, cwd=folder, env=environment, check=False)
        found = {part: total(folder, environment, part) for part in LEAST}
    for file, reason in EXCEPTIONS.items():
        print(f"left out: {file}, since {reason}")
    for part, percent in found.items():
        print(f"{part}: {percent:.1f} % covered, {LEAST[part]:g} % wanted")
    return status or 2 * any(found[part] < least for part, least in LEAST.items())


if __name__ == "__main__":
    sys.exit(main())
