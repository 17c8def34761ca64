"""A server that blocks, with a thread for each client, and deploys without a refused connection.

    python examples/blocking.py [URL [CONTROL]]

Start it a second time in the same folder, and the second takes over from the first, which ends when its last client
has left.
"""

from __future__ import annotations

import os
import select
import socket
import sys
import threading

import takeover


def greet(client: socket.socket) -> None:
    """Tells each client which process it has reached, line by line, until it leaves."""
    with client, client.makefile("rwb") as lines:
        for line in lines:
            lines.write(b"%d: %s" % (os.getpid(), line))
            lines.flush()


def accept(service: takeover.Service, listener: socket.socket, over: threading.Event) -> None:
    """Accepts until it is over. The listener stays non-blocking: it is shared with the process before and after."""
    poll = select.poll()
    poll.register(listener, select.POLLIN)
    while not over.is_set():
        if not service.accepts:
            over.wait(0.05)  # a successor has taken over, and is on probation
        elif poll.poll(50):
            try:
                client, _ = listener.accept()
            except BlockingIOError:
                continue  # the other process was quicker
            client.setblocking(True)
            threading.Thread(target=greet, args=(client,)).start()


def main() -> None:
    url = sys.argv[1] if len(sys.argv) > 1 else "tcp://127.0.0.1:9998"
    control = sys.argv[2] if len(sys.argv) > 2 else "./blocking.sock"
    with takeover.join(control) as service:
        listener = service.listen(url)
        report = service.ready()
        print(f"pid {os.getpid()} serves {url}, generation {report.generation}", flush=True)
        over = threading.Event()
        server = threading.Thread(target=accept, args=(service, listener, over))
        server.start()
        service.wait()
        over.set()
        server.join()


if __name__ == "__main__":
    main()
