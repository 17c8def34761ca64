"""An epoll server of lines that stops as many do: at SIGTERM it drops each connection that has not asked anything yet.

Its argument is JSON: `descriptor` of the listener; `turn`, seconds that it sleeps in a turn after it has accepted;
`answer`, seconds between a line and its answer, in which it serves nobody else; `cuts`: at SIGTERM it drops everybody.
"""

from __future__ import annotations

import json
import select
import signal
import socket
import sys
import time


def main(descriptor: int, turn: float = 0.0, answer: float = 0.0, cuts: bool = False) -> None:
    told, tell = socket.socketpair()
    tell.setblocking(False)
    signal.set_wakeup_fd(tell.fileno())
    signal.signal(signal.SIGTERM, lambda *_: None)
    listener = socket.socket(fileno=descriptor)
    epoll = select.epoll()
    epoll.register(listener.fileno(), select.EPOLLIN)
    epoll.register(told.fileno(), select.EPOLLIN)
    connections: dict[int, socket.socket] = {}
    asked: set[int] = set()
    print("waiting", flush=True)
    while True:
        for number, _ in epoll.poll():
            if number == listener.fileno():
                connection, _address = listener.accept()
                epoll.register(connection.fileno(), select.EPOLLIN)
                connections[connection.fileno()] = connection
                print("accepted", flush=True)
                time.sleep(turn)
            elif number == told.fileno():
                for silent in list(connections):
                    if cuts or silent not in asked:
                        connections.pop(silent).close()
                return
            else:
                data = connections[number].recv(4096)
                if data:
                    print("read", flush=True)
                    asked.add(number)
                    time.sleep(answer)
                    connections[number].sendall(data)
                else:
                    epoll.unregister(number)  # close() does not, as long as anybody has a copy
                    connections.pop(number).close()
                    print("closed", flush=True)


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
