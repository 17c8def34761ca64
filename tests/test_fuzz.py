"""Every input of the fuzzer's corpus, on both backends."""

from __future__ import annotations

import gc
import pathlib
from types import ModuleType

import pytest

from fuzz.targets import TARGETS, check

TESTS = pathlib.Path(__file__).parent


@pytest.mark.parametrize("target", TARGETS)
def test_what_the_corpus_holds_breaks_nothing(fdpass: ModuleType, monkeypatch: pytest.MonkeyPatch, target: str) -> None:
    monkeypatch.setattr("takeover.link.fdpass", fdpass)
    inputs = sorted((TESTS / "fuzz" / "corpus" / target).iterdir())
    assert inputs
    gc.collect()  # what other tests have left is not to be closed meanwhile
    for path in inputs:
        check(target, path.read_bytes())
