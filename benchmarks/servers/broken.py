"""A server on a listener that it is given, good or broken: `broken.py KIND VERSION`.

A good one answers each connection with its version and closes it. On SIGTERM it ends.
"""

from __future__ import annotations

import os
import selectors
import signal
import socket
import sys
import time


def serve(listener: socket.socket, version: str) -> None:
    listener.setblocking(False)
    selector = selectors.DefaultSelector()
    selector.register(listener, selectors.EVENT_READ)
    while True:
        selector.select()
        try:
            connection, _ = listener.accept()
        except BlockingIOError:
            continue
        with connection:
            connection.sendall(version.encode())


def main(kind: str, version: str) -> None:
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    if kind == "crash at import":
        raise ModuleNotFoundError("No module named 'app'")
    if kind == "hang":
        time.sleep(3600)
    if kind == "slow start":
        time.sleep(20)
    if kind == "wrong port":
        with socket.create_server(("127.0.0.1", 0)) as own:
            serve(own, version)
    serve(socket.socket(fileno=3), version)


if __name__ == "__main__":
    main(*sys.argv[1:])
