"""`python -m takeover` is the command `takeover`."""

from __future__ import annotations

from .cli import main

main(prog_name="takeover")
