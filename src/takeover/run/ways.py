"""The ways in which a command can show that it is ready, as `--ready` names them."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Sequence
from typing import NamedTuple

from takeover.errors import UsageError

_WAYS = (
    "auto, notify, tcp, http:PATH, http:PATH=STATUS, exec:COMMAND, delay:SECONDS or line:REGEX (a regular expression)"
)
_WORD = re.compile(r"\{(fd|port|host):probe\}")


class Way(NamedTuple):
    """How a command shows that it is ready.

    kind: "auto", "notify", "tcp", "http", "exec", "delay" or "line". argument: the path, command, or expression.
    status: what an HTTP answer must have; 0 for any from 200 to 399. seconds: of a delay.
    """

    kind: str
    argument: str = ""
    status: int = 0
    seconds: float = 0.0

    @property
    def reads_output(self) -> bool:
        """Whether check.output() must be given what the process writes."""
        return self.kind == "line"


def parse(how: str) -> Way:
    """What --ready says. Raises UsageError."""
    kind, colon, argument = how.partition(":")
    if kind in ("auto", "notify", "tcp") and not colon:
        return Way(kind)
    if kind == "http" and argument.startswith("/"):
        return _parse_http(how, argument)
    if kind == "exec" and argument.strip():
        return Way(kind, argument)
    if kind == "delay":
        with contextlib.suppress(ValueError):
            seconds = float(argument)
            if math.isfinite(seconds) and seconds >= 0:
                return Way(kind, argument, seconds=seconds)
        raise UsageError(f"--ready {how}: after delay: comes a number of seconds, 0 or more")
    if kind == "line" and argument:
        try:
            re.compile(argument.encode())
        except re.error as error:
            raise UsageError(f"--ready {how}: not a regular expression: {error}") from None
        return Way(kind, argument)
    raise UsageError(f"--ready {how}: write {_WAYS}")


def _parse_http(how: str, argument: str) -> Way:
    path, equals, status = argument.rpartition("=")
    if not equals or ("?" in path and not re.fullmatch(r"\d{3}", status)):
        path, status = argument, ""  # the = belongs to a query
    if re.search(r"[^!-~]", path):
        raise UsageError(f"--ready {how}: a path has no spaces and only ASCII; encode others as %XX (RFC 3986)")
    if status and not re.fullmatch(r"[1-5]\d\d", status):
        raise UsageError(f"--ready {how}: after = comes a status from 100 to 599")
    return Way("http", path, int(status or 0))


def wanted_of_probe(words: Sequence[str]) -> str:
    """What the words of a command ask of the private probe listener: "fd", "port" (it binds that itself) or nothing."""
    found = {match[1] for word in words for match in _WORD.finditer(word)}
    return "fd" if "fd" in found else "port" if found else ""
