"""Builds the extension modules from ext/takeover; everything else is in pyproject.toml.

TAKEOVER_EXT says what a compiler that is missing or fails means: "auto" (the default) a warning and a package that runs
on plain Python, "require" an error, also for a compiler's warning, "skip" that nothing is compiled and the wheel is
py3-none-any. TAKEOVER_SANITIZE names sanitizers of the compiler ("address,undefined") to build the modules with, for
tests/sanitized.py; TAKEOVER_LINETRACE=1 has them tell each line to a tracer, for tests/covered.py. Where CFLAGS has a
level of optimization, it is taken in place of -O2.
"""

import os
import pathlib

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

EXT = os.environ.get("TAKEOVER_EXT") or "auto"
if EXT not in ("auto", "require", "skip"):
    raise SystemExit(f"TAKEOVER_EXT={EXT}: must be auto, require or skip")
SANITIZE = os.environ.get("TAKEOVER_SANITIZE", "")
SANITIZED = [f"-fsanitize={SANITIZE}", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g"] if SANITIZE else []
LINETRACE = os.environ.get("TAKEOVER_LINETRACE") == "1"
UNTRACED = "_keeper"
"""It has no interpreter that could trace it."""
OPTIMIZED = [] if "-O" in os.environ.get("CFLAGS", "") else ["-O2"]
SOURCES = pathlib.Path("ext/takeover")


class BuildWithInterfaces(build_py):
    """Puts the .pxd beside the compiled modules, so that other extension modules can cimport them."""

    def run(self) -> None:
        super().run()
        for path in () if self.editable_mode else SOURCES.glob("*.pxd"):
            self.copy_file(str(path), os.path.join(self.build_lib, "takeover"))


class BuildInParallel(build_ext):
    """Compiles as many modules at a time as there are processors, unless told otherwise (--parallel)."""

    def finalize_options(self) -> None:
        super().finalize_options()
        if self.parallel is None:
            self.parallel = os.cpu_count()


extension_modules = [
    Extension(
        f"takeover.{path.stem}",
        [(path.resolve() if LINETRACE else path).as_posix()],
        include_dirs=["ext"],
        define_macros=[("CYTHON_TRACE_NOGIL", "1")] if LINETRACE else [],
        optional=EXT == "auto",
        extra_compile_args=[
            *OPTIMIZED,
            *("-Wall", "-Wno-unreachable-code"),
            *(["-Werror"] if EXT == "require" and not (SANITIZE or LINETRACE) else []),
            *SANITIZED,
        ],
        extra_link_args=SANITIZED,
    )
    for path in ([] if EXT == "skip" else sorted(SOURCES.glob("*.pyx")))
]
if LINETRACE:
    from Cython.Build import cythonize

    extension_modules = [
        traced
        for module in extension_modules
        for traced in cythonize(
            [module], compiler_directives={"linetrace": not module.name.endswith(UNTRACED)}, quiet=True
        )
    ]
setup(ext_modules=extension_modules, cmdclass={"build_ext": BuildInParallel, "build_py": BuildWithInterfaces})
