"""The descriptor-passing module under valgrind."""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

import valgrind
from conftest import CYTHON_IS_BUILT

LOG = """==7== Invalid write of size 4
==7==    at 0x10A1B2: __pyx_f_7_fdpass_receive_batch (_fdpass.c:4321)
==7==    by 0x10A1FF: PyObject_Vectorcall (in /usr/bin/python3)
==7==  Address 0x4a2c0c0 is 0 bytes after a block of size 16 alloc'd
==7==    at 0x48407B4: malloc (in vgpreload_memcheck.so)
==7==
==7== Conditional jump or move depends on uninitialised value(s)
==7==    at 0x20B3C4: PyUnicode_New (in /usr/bin/python3)
==7==
"""


def test_a_report_is_one_of_the_module_if_that_stands_in_its_stack() -> None:
    (found,) = valgrind.reports(LOG)
    assert found.startswith("==7== Invalid write") and "uninitialised" not in found


@pytest.mark.skipif(not CYTHON_IS_BUILT, reason="the compiled modules are not built")
@pytest.mark.skipif(not shutil.which("valgrind"), reason="valgrind is not installed")
@pytest.mark.timeout(300)
def test_valgrind_finds_no_error_and_no_leak_in_passing_descriptors() -> None:
    program = pathlib.Path(valgrind.__file__)
    done = subprocess.run(
        [sys.executable, str(program)], env=os.environ, capture_output=True, text=True, timeout=280, check=False
    )
    assert (done.returncode, done.stdout.strip()) == (0, "0 reports of _fdpass"), done.stdout + done.stderr
