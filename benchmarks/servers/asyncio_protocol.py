"""A protocol class on asyncio's default loop."""

from __future__ import annotations

import asyncio

from .echo_protocol import Echo
from .listener import BACKLOG, listen


def serve(loop: asyncio.AbstractEventLoop) -> None:
    """Serve for ever; create_server listens again, so it is told the backlog."""
    loop.run_until_complete(loop.create_server(Echo, sock=listen(), backlog=BACKLOG))
    loop.run_forever()


if __name__ == "__main__":
    serve(asyncio.new_event_loop())
