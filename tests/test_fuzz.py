"""A minute of the fuzzer, and every input of its corpus on both backends."""

from __future__ import annotations

import importlib.util
import os
import pathlib
import subprocess
import sys
from types import ModuleType

import pytest

from fuzz.targets import TARGETS, check

TESTS = pathlib.Path(__file__).parent
SECONDS = 60


@pytest.mark.parametrize("target", TARGETS)
def test_what_the_corpus_holds_breaks_nothing(fdpass: ModuleType, monkeypatch: pytest.MonkeyPatch, target: str) -> None:
    monkeypatch.setattr("takeover.link.fdpass", fdpass)
    inputs = sorted((TESTS / "fuzz" / "corpus" / target).iterdir())
    assert inputs
    for path in inputs:
        check(target, path.read_bytes())


@pytest.mark.once
@pytest.mark.timeout(4 * SECONDS)
@pytest.mark.skipif(not importlib.util.find_spec("atheris"), reason="atheris is not installed")
def test_a_minute_of_fuzzing_finds_nothing() -> None:
    command = [sys.executable, "-m", "fuzz", "--seconds", str(SECONDS)]
    done = subprocess.run(command, cwd=TESTS, env=os.environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout)
    assert all(f"{target} " in done.stdout for target in TARGETS)
