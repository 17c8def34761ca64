"""An echo server that takes over from itself: one line for each thing that it logs, with the time and its CPU time.

python -m benchmarks.servers.moving KIND URL CONTROL [STATE]. KIND is native, protocol, asyncio or uvloop; `draining`
is native, but closes all its connections at once when it is taken over. STATE is how many bytes travel with each
connection of a protocol class. Each kind imports what it needs only: what was imported costs time at the end as well.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import takeover
from takeover._backend import loop as native

if TYPE_CHECKING:
    import asyncio


class Stamps(logging.Handler):
    """Tells the benchmark what the server logs, and when (CLOCK_MONOTONIC, ns)."""

    def emit(self, record: logging.LogRecord) -> None:
        stamp = {"at": time.monotonic_ns(), "cpu_ns": time.process_time_ns(), "what": record.getMessage()}
        print(json.dumps(stamp), flush=True)


def movable(size: int) -> Callable[[], asyncio.Protocol]:
    """The class that all benchmarks have, with so many bytes of state of its own."""
    from .echo_protocol import Echo

    class Movable(Echo):
        __slots__ = ("state",)

        def __init__(self) -> None:
            self.state = bytes(size)

        def export_state(self) -> bytes:
            return self.state

        def import_state(self, state: bytes) -> None:
            if len(state) != size:
                raise ValueError(f"{len(state)} bytes came, {size} were sent")
            self.state = state

    return Movable


def serve_on(loop: asyncio.AbstractEventLoop, factory: Callable[[], asyncio.Protocol], url: str, control: str) -> None:
    """The same on another loop."""
    import takeover.aio

    async def serve() -> None:
        server = await takeover.aio.create_server(factory, listen=[url], control=control, probation=0)
        await server.serve_forever()

    loop.run_until_complete(serve())


def main(kind: str, url: str, control: str, size: int = 0) -> None:
    """Serve until a successor has taken over."""
    logger = logging.getLogger("takeover")
    logger.addHandler(Stamps())
    logger.setLevel(logging.INFO)
    logger.propagate = False
    if kind == "draining":
        takeover.serve(native.ECHO, [url], control, probation=0, live=False, drain_timeout=0)
    elif kind == "native":
        takeover.serve(native.ECHO, [url], control, probation=0)
    elif kind == "protocol":
        takeover.serve(movable(size), [url], control, probation=0)
    elif kind == "asyncio":
        import asyncio

        serve_on(asyncio.new_event_loop(), movable(size), url, control)
    elif kind == "uvloop":
        import uvloop

        serve_on(uvloop.new_event_loop(), movable(size), url, control)
    else:
        sys.exit(f"no such kind: {kind}")


if __name__ == "__main__":
    main(*sys.argv[1:4], *map(int, sys.argv[4:]))
