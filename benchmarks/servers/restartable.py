"""A plain echo server on a given port that ends as servers commonly do.

On SIGTERM it closes its listener, serves who is connected, and exits. `--reuseport` lets a second one bind beside it.
"""

from __future__ import annotations

import selectors
import signal
import socket
import sys

from .listener import BACKLOG


def main(port: int, reuse_port: bool) -> None:
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if reuse_port:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    listener.bind(("127.0.0.1", port))
    listener.listen(BACKLOG)
    listener.setblocking(False)
    told, tell = socket.socketpair()
    tell.setblocking(False)
    signal.set_wakeup_fd(tell.fileno())
    signal.signal(signal.SIGTERM, lambda *_: None)
    selector = selectors.DefaultSelector()
    selector.register(listener, selectors.EVENT_READ)
    selector.register(told, selectors.EVENT_READ)
    print(port, flush=True)
    serving = True
    while serving or len(selector.get_map()) > 0:
        for key, _ in selector.select():
            sock = key.fileobj
            assert isinstance(sock, socket.socket)
            if sock is told:
                serving = False
                for ours in (listener, told):
                    selector.unregister(ours)
                listener.close()
            elif sock is listener:
                try:
                    connection, _address = listener.accept()
                except (BlockingIOError, OSError):
                    continue
                selector.register(connection, selectors.EVENT_READ)
            else:
                try:
                    data = sock.recv(65536)
                    sock.sendall(data)
                except OSError:
                    data = b""
                if not data:
                    selector.unregister(sock)
                    sock.close()


if __name__ == "__main__":
    main(int(sys.argv[1]), "--reuseport" in sys.argv)
