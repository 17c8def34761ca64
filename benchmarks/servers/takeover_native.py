"""The built-in echo handler on takeover's loop."""

from __future__ import annotations

from takeover._backend import loop as backend

from .listener import listen

if __name__ == "__main__":
    sock = listen()
    sock.setblocking(False)
    loop = backend.Loop()
    loop.listen(sock, backend.ECHO)
    loop.run()
