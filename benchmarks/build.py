"""Compiles the C programs in c/ when they are needed; a program is kept under the hash of its source and flags."""

from __future__ import annotations

import functools
import hashlib
import os
import pathlib
import shutil
import subprocess
import tempfile

SOURCES = pathlib.Path(__file__).parent / "c"
FLAGS = ("-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror")


class NoCompiler(Exception):
    """There is no C compiler on this machine, or it refused the program."""


def compiler() -> str:
    """The path of the C compiler ($CC, else cc); raises NoCompiler."""
    path = shutil.which(os.environ.get("CC", "cc"))
    if path is None:
        raise NoCompiler("no C compiler: install one, or name it in CC")
    return path


@functools.cache
def program(name: str) -> str:
    """The path of the compiled c/NAME.c; raises NoCompiler."""
    digest = hashlib.sha256(" ".join(FLAGS).encode())
    for source in (SOURCES / "common.h", SOURCES / f"{name}.c"):
        digest.update(source.read_bytes())
    cache = pathlib.Path(tempfile.gettempdir()) / f"takeover-benchmarks-{os.getuid()}"
    cache.mkdir(mode=0o700, exist_ok=True)
    if cache.lstat().st_uid != os.getuid():
        raise NoCompiler(f"{cache} belongs to somebody else: remove it, or set TMPDIR")
    binary = cache / f"{name}-{digest.hexdigest()[:16]}"
    if not binary.exists():
        unfinished = binary.with_suffix(f".{os.getpid()}")
        command = [compiler(), *FLAGS, "-o", str(unfinished), str(SOURCES / f"{name}.c")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise NoCompiler(f"{' '.join(command)}: {done.stderr.strip()}")
        unfinished.replace(binary)
    return str(binary)
