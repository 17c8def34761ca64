"""Every echo server that is measured, the reference first; a peer that is not installed is skipped, with the reason."""

from __future__ import annotations

import functools
import importlib.util
import subprocess
from typing import NamedTuple

from . import build
from .processes import PYTHON, environment

REFERENCE = "C reference"
AGAIN = "C reference again"
"""A second process of the reference: how far its ratio is from 1 is what noise alone makes of a figure."""


class Subject(NamedTuple):
    """An echo server: a module of benchmarks.servers, what it needs to be imported, takeover's backend, its limit."""

    name: str
    module: str
    needs: str | None = None
    backend: str = ""
    most_connections: int = 1_000_000

    @property
    def variables(self) -> dict[str, str]:
        """What its environment has beyond the usual."""
        return {"TAKEOVER_BACKEND": self.backend} if self.backend else {}

    def command(self) -> list[str]:
        """The command that starts it; it prints its port."""
        if self.name in (REFERENCE, AGAIN):
            return [build.program("echo_reference")]
        return [PYTHON, "-m", f"benchmarks.servers.{self.module}"]

    def missing(self) -> str | None:
        """Why it cannot run here, if it cannot."""
        if self.needs is None:
            return None
        if self.needs == "takeover":
            return takeover_lacks(self.backend)
        return None if importlib.util.find_spec(self.needs) else f"{self.needs} is not installed"


@functools.cache
def takeover_lacks(backend: str) -> str | None:
    """Why takeover cannot be imported with a backend ("cython" or "python"), if it cannot."""
    command = [PYTHON, "-c", "import takeover.cli"]
    variables = environment(TAKEOVER_BACKEND=backend)
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    return done.stderr.strip().splitlines()[-1] if done.returncode else None


SUBJECTS = (
    Subject(REFERENCE, ""),
    Subject(AGAIN, ""),
    Subject("takeover native, cython", "takeover_native", "takeover", "cython"),
    Subject("takeover protocol, cython", "takeover_protocol", "takeover", "cython"),
    Subject("takeover native, python", "takeover_native", "takeover", "python"),
    Subject("takeover protocol, python", "takeover_protocol", "takeover", "python"),
    Subject("uvloop protocol", "uvloop_protocol", "uvloop"),
    Subject("asyncio protocol", "asyncio_protocol"),
    Subject("asyncio streams", "asyncio_streams"),
    Subject("gevent", "gevent_stream", "gevent"),
    Subject("select.epoll", "plain_epoll"),
    Subject("select.select", "plain_select", most_connections=1000),
)
