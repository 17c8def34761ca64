"""gevent: a greenlet for each connection."""

from __future__ import annotations

import socket
from typing import Any

import gevent.socket  # type: ignore[import-untyped]
from gevent.server import StreamServer  # type: ignore[import-untyped]

from .listener import listen


def echo(sock: Any, _address: object) -> None:
    try:
        while data := sock.recv(256 * 1024):
            sock.sendall(data)
    except ConnectionError:
        pass


if __name__ == "__main__":
    plain: socket.socket = listen()
    StreamServer(gevent.socket.socket(fileno=plain.detach()), echo).serve_forever()
