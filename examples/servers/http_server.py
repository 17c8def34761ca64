r"""The standard library's http.server with a thread for each connection, on an inherited listener.

    takeover run --listen tcp://127.0.0.1:8000 -- \
        python http_server.py {fd}

Started again, it is the deploy.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        """Says which process it is, so that a deploy can be seen."""
        body = b"%d\n" % os.getpid()
        self.send_response(200)
        self.send_header("Content-Type", "text/plain")
        self.send_header("Content-Length", str(len(body)))
        if stopping.is_set():
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    """Binds nothing: the listener is inherited. It ends when its connections have ended."""

    daemon_threads = False

    def __init__(self, descriptor: int) -> None:
        super().__init__(("", 0), Handler, bind_and_activate=False)
        self.socket.close()
        self.socket = socket.socket(fileno=descriptor)

    def get_request(self) -> tuple[socket.socket, object]:
        """The listener does not block, since two versions wait on it; a connection does."""
        connection, address = super().get_request()
        connection.settimeout(20)
        return connection, address


stopping = threading.Event()


def stop(*_: object) -> None:
    """From here on each response says that it is the connection's last; shutdown() waits for serve_forever()'s end."""
    stopping.set()
    threading.Thread(target=server.shutdown).start()


if __name__ == "__main__":
    server = Server(int(sys.argv[1]))
    signal.signal(signal.SIGTERM, stop)
    server.serve_forever(poll_interval=0.1)
    server.server_close()
