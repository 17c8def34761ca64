"""Every echo server that is measured, the reference first; a peer that is not installed is skipped, with the reason."""

from __future__ import annotations

import importlib.util
import subprocess
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from . import build
from .processes import PYTHON, environment

REFERENCE = "C reference"


class Subject(NamedTuple):
    """An echo server: a module of benchmarks.servers, what it needs to be imported, its environment, its limit."""

    name: str
    module: str
    needs: str | None = None
    variables: Mapping[str, str] = MappingProxyType({})
    most_connections: int = 1_000_000

    def command(self) -> list[str]:
        """The command that starts it; it prints its port."""
        if self.name == REFERENCE:
            return [build.program("echo_reference")]
        return [PYTHON, "-m", f"benchmarks.servers.{self.module}"]

    def missing(self) -> str | None:
        """Why it cannot run here, if it cannot."""
        if self.needs is None:
            return None
        if self.needs in ("takeover._loop", "takeover._loop_py"):
            return None if takeover_has(self.needs) else f"{self.needs} cannot be imported"
        return None if importlib.util.find_spec(self.needs) else f"{self.needs} is not installed"


def takeover_has(module: str) -> bool:
    """Whether a module of takeover can be imported in a server's environment."""
    command = [PYTHON, "-c", f"import {module}"]
    return subprocess.run(command, env=environment(), capture_output=True, check=False).returncode == 0


CYTHON, PLAIN = {"TAKEOVER_BACKEND": "cython"}, {"TAKEOVER_BACKEND": "python"}

SUBJECTS = (
    Subject(REFERENCE, ""),
    Subject("takeover native, cython", "takeover_native", "takeover._loop", CYTHON),
    Subject("takeover protocol, cython", "takeover_protocol", "takeover._loop", CYTHON),
    Subject("takeover native, python", "takeover_native", "takeover._loop_py", PLAIN),
    Subject("takeover protocol, python", "takeover_protocol", "takeover._loop_py", PLAIN),
    Subject("uvloop protocol", "uvloop_protocol", "uvloop"),
    Subject("asyncio protocol", "asyncio_protocol"),
    Subject("asyncio streams", "asyncio_streams"),
    Subject("gevent", "gevent_stream", "gevent"),
    Subject("select.epoll", "plain_epoll"),
    Subject("select.select", "plain_select", most_connections=1000),
)
