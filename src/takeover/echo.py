"""The echo server: every byte that comes in goes out again. It has a handler of its own in the compiled loop."""

from __future__ import annotations

from typing import Any

from ._backend import loop
from .server import serve

LISTEN = "tcp://127.0.0.1:9999"
CONTROL = "./takeover.sock"


def echo(**options: Any) -> None:
    """Runs the echo server; the options are those of serve()."""
    serve(loop.ECHO, service="echo", **options)
