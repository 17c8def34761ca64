"""Runs the tests on modules built with AddressSanitizer and UndefinedBehaviorSanitizer: `python tests/sanitized.py`.

What follows are arguments of pytest, in place of all the tests of the compiled backend but for those in LEFT_OUT.
Builds in a temporary folder; the exit status is pytest's, or 1 where a process has left a report of a sanitizer behind.
Every server that the tests start runs on these modules too.

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
LEFT_OUT = (
    *("keeper", "valgrind", "packaging", "benchmarks", "socket_activate", "clock_that_jumps"),
    *("memory", "allocation", "huge", "hundred_mebibytes"),
    *("many_makes_as_many_objects", "writes_without_end", "thousand_hostile"),
)
"""Parts of names: the keeper unmaps the memory of the process that it was made in, the sanitizer's too; what builds
modules of its own, or drops the sanitizer's library from the environment; limits and figures of memory, to which the
sanitizer adds its own."""

OVERFLOW = """
import ctypes
library = ctypes.CDLL(None)
library.malloc.restype = ctypes.c_void_p
library.memset(ctypes.c_void_p(library.malloc(8)), 0, 9)
"""
"""A mistake made on purpose, of which a report has to be left before the lack of others means anything."""


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
        subprocess.run([sys.executable, "-c", OVERFLOW], env=environment, check=False)
        (told,) = folder.glob("report*")
        assert "heap-buffer-overflow" in told.read_text()
        told.unlink()
        command = [sys.executable, "-m", "pytest", "-q", "-n", "2", "--timeout", "600", "-p", "no:cacheprovider"]
        left_out = " and ".join(f"not {part}" for part in LEFT_OUT)
        tests = sys.argv[1:] or ["tests", "-k", f"{left_out} and not python"]
        status = subprocess.run([*command, *tests], cwd=folder, env=environment, check=False).returncode
        found = sorted(folder.glob("report*"))
        for path in found:
            print(path.read_text(errors="replace"))
        print(f"{len(found)} reports of sanitizers")
        return status or bool(found)


if __name__ == "__main__":
    sys.exit(main())
