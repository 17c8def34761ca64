"""One target under libFuzzer: `python -m fuzz.one TARGET [libFuzzer's options and folders]`. It ends the process."""

from __future__ import annotations

import sys
from typing import Any

import atheris  # type: ignore[import-not-found, unused-ignore]

with atheris.instrument_imports(include=["takeover"]):
    from fuzz import targets

TARGET = sys.argv.pop(1)


def _test(data: Any) -> None:
    targets.check(TARGET, bytes(data))


atheris.Setup(sys.argv, _test)
atheris.Fuzz()
