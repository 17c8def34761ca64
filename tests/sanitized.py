"""Runs the tests on modules built with AddressSanitizer and UndefinedBehaviorSanitizer: `python tests/sanitized.py`.

What follows are arguments of pytest, in place of the SELECTION, whose tests come to nearly every line of the modules.
Builds in a temporary folder; the exit status is pytest's, or 1 where a process has left a report of a sanitizer behind.

The tests of the keeper are left out always: it unmaps the memory of the process it was made in, the sanitizer's too.
Leaks are not looked for here, since the interpreter keeps what it needs until its end.
"""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
FOLDERS = ("src", "ext", "tests", "benchmarks", "docs", "examples")
SANITIZERS = "address,undefined"
SELECTION = (
    *("tests/test_fdpass.py", "tests/test_loop_transport.py", "tests/test_loop_echo.py", "tests/test_loop_failures.py"),
    *("tests/test_loop_listen.py", "tests/test_loop_schedule.py", "tests/test_native_moves.py"),
    *("tests/test_compiled_calls.py", "tests/test_exporting.py", "tests/test_adoption.py"),
    *("tests/test_live_state.py", "tests/test_ledger.py", "tests/test_records.py"),
)
LEFT_OUT = ("keeper", "memory", "allocation", "huge", "many_makes_as_many_objects", "hundred_mebibytes")
"""Parts of names: the keeper; limits of memory, which the sanitizer's own shadow of it breaks; counts of objects."""


def library(name: str) -> str:
    found = subprocess.run(["gcc", f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    return found.stdout.strip()


def build(folder: pathlib.Path, **variables: str) -> None:
    """Copies what a build and the tests need, without what was built before, and compiles it there, in place."""
    for name in (*FOLDERS, "setup.py", "pyproject.toml", "README.md", "LICENSE"):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("*.so", "_*.c", "__pycache__"))
        else:
            shutil.copy(source, folder / name)
    environment = {**os.environ, "TAKEOVER_EXT": "require", **variables}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    subprocess.run(command, cwd=folder, env=environment, check=True, stderr=subprocess.DEVNULL)


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="takeover-sanitized-") as name:
        folder = pathlib.Path(name)
        build(folder, TAKEOVER_SANITIZE=SANITIZERS)
        reports = f"log_path={folder / 'report'}"
        environment = {
            **{key: value for key, value in os.environ.items() if key != "PYTEST_ADDOPTS"},
            "LD_PRELOAD": f"{library('libasan.so')} {library('libubsan.so')}",
            "PYTHONMALLOC": "malloc",
            "PYTHONPATH": str(folder / "src"),
            "ASAN_OPTIONS": f"detect_leaks=0:{reports}",
            "UBSAN_OPTIONS": f"halt_on_error=1:print_stacktrace=1:{reports}",
            "TAKEOVER_TEST_EXT": "require",
        }
        command = [sys.executable, "-m", "pytest", "-q", "-n", "2", "--timeout", "600", "-p", "no:cacheprovider"]
        left_out = " and ".join(f"not {part}" for part in LEFT_OUT)
        tests = sys.argv[1:] or [*SELECTION, "-k", f"{left_out} and not python"]
        status = subprocess.run([*command, *tests], cwd=folder, env=environment, check=False).returncode
        found = sorted(folder.glob("report*"))
        for path in found:
            print(path.read_text(errors="replace"))
        print(f"{len(found)} reports of sanitizers")
        return status or bool(found)


if __name__ == "__main__":
    sys.exit(main())
