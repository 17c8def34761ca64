"""An asyncio protocol class on takeover's loop."""

from __future__ import annotations

from takeover._backend import loop as backend

from .echo_protocol import Echo
from .listener import listen

if __name__ == "__main__":
    sock = listen()
    sock.setblocking(False)
    loop = backend.Loop()
    loop.listen(sock, Echo)
    loop.run()
