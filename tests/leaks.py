"""Looks for leaks with LeakSanitizer after many moves of connections between two loops: `python tests/leaks.py`.

Builds the modules with AddressSanitizer in a temporary folder. LeakSanitizer is asked while the interpreter lives, so
that what it keeps to its end is no leak; memory that nothing points to is. A piece of memory that is lost on purpose
has to be found first. The exit status is 1 where anything else is found.
"""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
import tempfile

from sanitized import build, library

MOVES = 1000
LOST = 12345
"""Bytes that are lost on purpose."""
PROGRAM = f"""
import ctypes, gc, importlib, sys
from channel_cases import Scene, Tally

loops = importlib.import_module("takeover._loop")
library = ctypes.CDLL(None)
if sys.argv[1] == "lose":
    library.malloc({LOST})
    moves = 1
else:
    moves = {MOVES}
for handler in ("echo", Tally):
    for round in range(moves // 2 + 1):
        scene = Scene(loops, loops, handler)
        clients = scene.connect(4)
        scene.answers(clients[:2])
        for client in clients:
            client.sendall(b"unread")
        giver, taker = scene.move()
        scene.until(lambda: scene.counts() == (0, 4))
        for client in clients:
            client.close()
        scene.close()
        for listener in scene.listeners:
            listener.close()
    print(moves // 2 + 1, "moves of", handler, flush=True)
    del scene, clients, client, giver, taker, listener
gc.collect()
library.__lsan_do_leak_check()
"""


def look(folder: pathlib.Path, what: str) -> str:
    """What LeakSanitizer writes of a run; empty where it finds nothing. Raises AssertionError where the run fails."""
    environment = {
        **os.environ,
        "LD_PRELOAD": library("libasan.so"),
        "PYTHONMALLOC": "malloc",
        "PYTHONPATH": os.pathsep.join((str(folder / "src"), str(folder / "tests"))),
        "TAKEOVER_BACKEND": "cython",
        "ASAN_OPTIONS": "detect_leaks=1:fast_unwind_on_malloc=0:malloc_context_size=12",
    }
    command = [sys.executable, "-c", PROGRAM, what]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)
    assert done.stdout.count("moves of") == 2, done.stdout + done.stderr
    print(done.stdout, end="", flush=True)
    return done.stderr


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="takeover-leaks-") as name:
        folder = pathlib.Path(name)
        build(folder, TAKEOVER_SANITIZE="address")
        lost = look(folder, "lose")
        assert f"leak of {LOST} byte" in lost, f"what is lost on purpose is not found: {lost}"
        found = look(folder, "nothing")
    print(found or "no leaks")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
