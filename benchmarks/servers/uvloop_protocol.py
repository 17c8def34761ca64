"""The same protocol class on uvloop."""

from __future__ import annotations

import uvloop

from .asyncio_protocol import serve

if __name__ == "__main__":
    serve(uvloop.new_event_loop())
