"""The command that serves: its words with the listeners put in, its executable, and its environment."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from takeover.errors import CommandError, UsageError

FIRST = 3
"""The number of the first descriptor handed over: SD_LISTEN_FDS_START of sd_listen_fds(3)."""

UNNAMED = "unknown"
"""What LISTEN_FDNAMES says of a descriptor without a name, sd_listen_fds_with_names(3)."""

PROBE = "probe"
"""The name of the private listener on which some ways to probe reach nobody but the new process."""

_NOT_PASSED_ON = (
    "FDSTORE",
    "LISTEN_FDNAMES",
    "LISTEN_FDS",
    "LISTEN_PID",
    "LISTEN_PIDFDID",
    "MAINPID",
    "NOTIFY_SOCKET",
    "WATCHDOG_PID",
    "WATCHDOG_USEC",
)
"""What speaks to this process alone: of the sockets that it was given, and of the manager that it notifies."""

_PLACE = re.compile(r"\{(fd|host|port)(?::([A-Za-z0-9_.-]+))?\}")


class Listening(NamedTuple):
    """A listener that the command is given; `name` is empty where none was asked for. The socket is the service's."""

    name: str
    url: str
    sock: socket.socket


def check_words(words: Sequence[str], names: Sequence[str]) -> None:
    """Raises UsageError for a `{fd:NAME}` whose name is not among the listeners, before anything has been done."""
    for word in words:
        for kind, name in _PLACE.findall(word):
            if name and name not in names and name != PROBE:
                known = ", ".join(filter(None, names)) or "none has a name: write --listen NAME=URL"
                raise UsageError(f"{{{kind}:{name}}} in {word!r}: no listener is called {name!r} ({known})")


def fill_in(words: Sequence[str], listeners: Sequence[Listening]) -> list[str]:
    """The words with `{fd}`, `{host}` and `{port}` of the first listener, `{fd:NAME}` and so on of a named one.

    The descriptors are numbered from 3 on, in the order of the listeners. What else stands in braces stays as it is,
    also what is said of a probe that is not among the listeners. Raises UsageError for a listener that has no host,
    stands for several sockets, or is not there.
    """

    def replace(found: re.Match[str]) -> str:
        kind, name = found[1], found[2]
        url = listeners[0].url if name is None else None
        places = [
            place
            for place, listener in enumerate(listeners)
            if (listener.url == url if name is None else listener.name == name)
        ]
        if name == PROBE and not places:
            return found[0]
        if len(places) != 1:
            problem = f"stands for {len(places)} sockets; write an IP address" if places else "is not there"
            raise UsageError(f"{found[0]}: the listener {name or url} {problem}")
        if kind == "fd":
            return str(FIRST + places[0])
        sock = listeners[places[0]].sock
        if sock.family == socket.AF_UNIX:
            raise UsageError(f"{found[0]}: {listeners[places[0]].url} has no {kind}")
        return str(sock.getsockname()[0 if kind == "host" else 1])

    return [_PLACE.sub(replace, word) for word in words]


def environment_of(names: Sequence[str], more: Mapping[str, str]) -> dict[str, str]:
    """The environment of a process that gets descriptors of these names; LISTEN_PID, its own pid, it sets itself."""
    ours = {name: value for name, value in os.environ.items() if name not in _NOT_PASSED_ON}
    listen = {"LISTEN_FDS": str(len(names)), "LISTEN_FDNAMES": ":".join(name or UNNAMED for name in names)}
    return {**ours, **(listen if names else {}), **more}


def executable_of(word: str) -> str:
    """The path of a command, searched on PATH as execvp(3) does. Raises CommandError that says what is wrong."""
    if not word:
        raise CommandError("the command is an empty word")
    if "/" in word:
        candidates = [word]
    else:
        candidates = [os.path.join(folder or ".", word) for folder in os.environ.get("PATH", os.defpath).split(":")]
    found = [path for path in candidates if os.path.isfile(path)]
    for path in found:
        if os.access(path, os.X_OK):
            return path
    if found:
        raise CommandError(f"{found[0]} is not executable; chmod +x {found[0]}")
    if "/" not in word:
        raise CommandError(f"command not found: {word} is in no folder of PATH ({os.environ.get('PATH', os.defpath)})")
    raise CommandError(f"{word} is {'not a file' if os.path.exists(word) else 'not there'}")
