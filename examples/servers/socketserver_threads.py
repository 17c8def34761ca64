r"""The standard library's socketserver with a thread for each connection, on an inherited listener: an echo of lines.

    takeover run --listen tcp://127.0.0.1:8000 -- \
        python socketserver_threads.py {fd}

Started again, it is the deploy.
"""

from __future__ import annotations

import signal
import socket
import socketserver
import sys
import threading


class Echo(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        for line in self.rfile:
            self.wfile.write(line)
            if stopping.is_set():
                return


class Server(socketserver.ThreadingTCPServer):
    """Binds nothing: the listener is inherited. It ends when its connections have ended."""

    def __init__(self, descriptor: int) -> None:
        super().__init__(("", 0), Echo, bind_and_activate=False)
        self.socket.close()
        self.socket = socket.socket(fileno=descriptor)

    def get_request(self) -> tuple[socket.socket, object]:
        """The listener does not block, since two versions wait on it; a connection does."""
        connection, address = super().get_request()
        connection.setblocking(True)
        return connection, address


stopping = threading.Event()


def stop(*_: object) -> None:
    """From here on each answer is its connection's last; shutdown() waits for serve_forever()'s end."""
    stopping.set()
    threading.Thread(target=server.shutdown).start()


if __name__ == "__main__":
    server = Server(int(sys.argv[1]))
    signal.signal(signal.SIGTERM, stop)
    server.serve_forever(poll_interval=0.1)
    server.server_close()  # waits for the connections' threads
