"""Builds the extension modules from ext/takeover; everything else is in pyproject.toml.

TAKEOVER_EXT says what a compiler that is missing or fails means: "auto" (the default) a warning and a package that runs
on plain Python, "require" an error, "skip" that nothing is compiled and the wheel is py3-none-any.
"""

import os
import pathlib

from setuptools import Extension, setup

EXT = os.environ.get("TAKEOVER_EXT", "auto")
if EXT not in ("auto", "require", "skip"):
    raise SystemExit(f"TAKEOVER_EXT={EXT}: must be auto, require or skip")

sources = [] if EXT == "skip" else sorted(pathlib.Path("ext/takeover").glob("*.pyx"))
setup(
    ext_modules=[
        Extension(
            f"takeover.{path.stem}",
            [path.as_posix()],
            include_dirs=["ext"],
            optional=EXT == "auto",
            extra_compile_args=["-O2", "-Wall", "-Werror", "-Wno-unreachable-code"],
        )
        for path in sources
    ],
)
