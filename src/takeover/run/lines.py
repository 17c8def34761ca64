"""Looks for a line in what a process writes, whatever pieces it comes in."""

from __future__ import annotations

import re

_CONTROL = re.compile(rb"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)|\x1b[@-Z\\-_]|[\x00-\x08\x0b-\x1f]")
"""The colours and the like of a terminal: control sequences of ECMA-48, and other control characters but for a tab."""

_LONGEST = 8192
"""Bytes of a line that are looked at."""


class Lines:
    """Searches each line for an expression, in bytes. `last` is the last line that had something in it, as text."""

    def __init__(self, expression: str) -> None:
        self.last = ""
        self._expression = re.compile(expression.encode())
        self._unfinished = b""

    def search(self, data: bytes) -> str | None:
        """The first line that has ended with what has come now and that matches; None if there is none."""
        *lines, self._unfinished = (self._unfinished + data).split(b"\n")
        self._unfinished = self._unfinished[:_LONGEST]
        return next(filter(None, map(self._match, lines)), None)

    def search_unfinished(self) -> str | None:
        """The line that has not ended yet, a prompt for instance, if it matches as far as it goes."""
        return self._match(self._unfinished)

    def _match(self, line: bytes) -> str | None:
        plain = _CONTROL.sub(b"", line[:_LONGEST])
        text = plain.decode(errors="replace").strip()
        self.last = text or self.last
        return text if text and self._expression.search(plain) else None
