"""Runs what `_fdpass` does under valgrind's memcheck: `python tests/valgrind.py`; exit status 1 if that found anything.

The interpreter has reports of its own, of memory that it keeps to its end among others; those in whose stack `_fdpass`
does not stand are left out. Leaks are judged by what is definitely lost, after many rounds of each call.
"""

from __future__ import annotations

import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

MODULE = "_fdpass"
PROGRAM = """
import array, os, socket, sys
from takeover import _fdpass
from takeover.errors import DescriptorsLost

left, right = socket.socketpair()
file = os.open("/", os.O_RDONLY)
for count in (1, 2, 252, 253, 0):
    for _ in range(20):
        try:
            _fdpass.send_descriptors(left.fileno(), b"some bytes", [file] * count)
        except (ValueError, OSError, TypeError):
            continue
        data, received = _fdpass.receive_descriptors(right.fileno(), 100, count)
        _fdpass.close_descriptors(received)
for wrong in ([-1], [1 << 20], ["x"], [None], [1 << 40]):
    for _ in range(20):
        try:
            _fdpass.send_descriptors(left.fileno(), b"x", wrong)
        except (ValueError, OSError, TypeError, OverflowError):
            pass
        try:
            _fdpass.receive_descriptors(right.fileno(), -1, 0)
        except (ValueError, OSError):
            pass
_fdpass.send_descriptors(left.fileno(), b"x", [file] * 5)
try:
    _fdpass.receive_descriptors(right.fileno(), 1, 2)
    raise AssertionError("more were taken than there was room for")
except DescriptorsLost:
    pass
right.setblocking(False)
for size in (1, 100, 1 << 20):
    try:
        while True:
            _fdpass.receive_descriptors(right.fileno(), size, 252)
    except BlockingIOError:
        pass
left.close()
assert _fdpass.receive_descriptors(right.fileno(), 1, 1)[0] == b""
print("done")
"""


def reports(log: str) -> list[str]:
    """The reports of memcheck in whose stack the module stands."""
    blocks = re.split(r"(?m)^==\d+== *$", log)
    return [block.strip() for block in blocks if MODULE in block and " at 0x" in block]


def main() -> int:
    """Exit status 0, or 1 for a report; 2 where valgrind is not installed."""
    if not shutil.which("valgrind"):
        print("valgrind is not installed")
        return 2
    with tempfile.TemporaryDirectory(prefix="takeover-valgrind-") as folder:
        log = pathlib.Path(folder, "log")
        options = ["--leak-check=full", "--show-leak-kinds=definite", "--num-callers=30", f"--log-file={log}"]
        environment = {**os.environ, "PYTHONMALLOC": "malloc"}
        command = ["valgrind", "--quiet", *options, sys.executable, "-c", PROGRAM]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        found = reports(log.read_text())
        print("\n\n".join(found))
        print(f"{len(found)} reports of {MODULE}")
        if done.stdout != "done\n":
            print(done.stdout + done.stderr)
        return int(bool(found) or done.stdout != "done\n")


if __name__ == "__main__":
    sys.exit(main())
