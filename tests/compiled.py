"""Compiled handlers of somebody else's for the tests of one process: built against the .pxd files, and imported."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

import pytest

from conftest import CYTHON_IS_BUILT


def compiled(name: str, source: str, folder: Path) -> ModuleType:
    """The module of that name, built in the folder; skips where there is nothing to build it with."""
    if not CYTHON_IS_BUILT:
        pytest.skip("the compiled modules are not built")
    pytest.importorskip("Cython")
    compiler = sysconfig.get_config_var("CC").split()[0]
    if shutil.which(compiler) is None:
        pytest.skip(f"no compiler: {compiler} is not found")
    (folder / f"{name}.pyx").write_text(source)
    package = Path(importlib.util.find_spec("takeover").submodule_search_locations[0])  # type: ignore[union-attr, index]
    interface = package.parent if (package / "_loop.pxd").exists() else Path(__file__).parent.parent / "ext"
    target = folder / f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
    for command in (
        [sys.executable, "-m", "cython", "-3", "-I", str(interface), f"{name}.pyx"],
        [compiler, "-shared", "-fPIC", "-O1", f"-I{sysconfig.get_path('include')}", f"{name}.c", "-o", str(target)],
    ):
        subprocess.run(command, cwd=folder, check=True, timeout=120)
    spec = importlib.util.spec_from_file_location(name, target)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
