"""Looks for a line in what a process writes, whatever pieces it comes in."""

from __future__ import annotations

import re

_CONTROL = re.compile(rb"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)|\x1b[@-Z\\-_]|[\x00-\x08\x0b-\x1f]")
"""The colours and the like of a terminal: control sequences of ECMA-48, and other control characters but for a tab."""

_LONGEST = 8192
"""Bytes of a line that are looked at."""


class Lines:
    """Searches each line for an expression, in bytes; a line that has not ended yet is searched as far as it goes.

    `last` is the last line that had something in it, as text.
    """

    def __init__(self, expression: str) -> None:
        self.last = ""
        self._expression = re.compile(expression.encode())
        self._unfinished = b""

    def search(self, data: bytes) -> str | None:
        """The first line that matches, with what has come now; None if there is none."""
        *lines, self._unfinished = (self._unfinished + data).split(b"\n")
        self._unfinished = self._unfinished[:_LONGEST]
        for line in [*lines, self._unfinished]:
            plain = _CONTROL.sub(b"", line[:_LONGEST])
            text = plain.decode(errors="replace").strip()
            self.last = text or self.last
            if plain and self._expression.search(plain):
                return text
        return None
