"""What `takeover run` was asked for, on its way from the command line to the process that does it."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Sequence
from typing import NamedTuple

from takeover.errors import UsageError

NOT_BY_HAND = "takeover.run is started by the command `takeover run`, with its options as JSON"


class Wish(NamedTuple):
    """One `--listen [NAME=]URL`; `name` is empty where none was given."""

    name: str
    url: str


class Options(NamedTuple):
    """Times are in seconds; `stop_signal` is a number of signal(7), `workers` how many processes run the command."""

    listen: tuple[Wish, ...]
    command: tuple[str, ...]
    control: str = "./takeover.sock"
    service: str = "run"
    ready: str = "auto"
    ready_timeout: float = 60.0
    workers: int = 1
    restart: bool = True
    stop_signal: int = int(signal.SIGTERM)
    stop_timeout: float = 30.0
    drain_first: bool = False
    spare_idle: bool = False
    probation: float = 1.0
    max_generations: int = 8
    dry_run: bool = False
    strict: bool = False
    detach: bool = False
    keep: bool = False

    def to_json(self) -> str:
        """One line for from_json()."""
        return json.dumps(self._asdict())

    @classmethod
    def from_json(cls, text: str) -> Options:
        """What to_json() made a text of; raises UsageError for anything else."""
        try:
            found = json.loads(text)
            listen = tuple(Wish(*wish) for wish in found.pop("listen"))
            return cls(listen=listen, command=tuple(found.pop("command")), **found)
        except (ValueError, TypeError, AttributeError, KeyError):
            raise UsageError(NOT_BY_HAND) from None


_NAMED = re.compile(r"([A-Za-z0-9_.-]+)=(.+)\Z", re.DOTALL)


def parse_listen(texts: Sequence[str]) -> tuple[Wish, ...]:
    """Each `[NAME=]URL`. Raises UsageError for two of one name, and for names that LISTEN_FDNAMES cannot carry."""
    wishes: list[Wish] = []
    for text in texts:
        found = _NAMED.match(text)
        wish = Wish(found[1], found[2]) if found else Wish("", text)
        if wish.name and any(wish.name == other.name for other in wishes):
            raise UsageError(f"--listen: two listeners are called {wish.name!r}; each name may be given once")
        wishes.append(wish)
    return tuple(wishes)


def parse_signal(text: str) -> int:
    """The number of a signal that is written TERM, SIGTERM or 15. Raises UsageError."""
    name = text.upper()
    if name.isdigit() and int(name) in {int(each) for each in signal.Signals}:
        return int(name)
    try:
        return int(signal.Signals[name if name.startswith("SIG") else f"SIG{name}"])
    except KeyError:
        raise UsageError(f"--stop-signal {text}: no such signal; see kill -l") from None
