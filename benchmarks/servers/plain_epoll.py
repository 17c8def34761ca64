"""What a careful script does with select.epoll: one shared buffer, EPOLLOUT only after a short send."""

from __future__ import annotations

import select
import socket

from .listener import listen


def serve(listener: socket.socket) -> None:
    listener.setblocking(False)
    epoll = select.epoll()
    epoll.register(listener, select.EPOLLIN)
    connections: dict[int, socket.socket] = {}
    unsent: dict[int, memoryview] = {}
    buffer = memoryview(bytearray(256 * 1024))

    def drop(fd: int) -> None:
        unsent.pop(fd, None)
        connections.pop(fd).close()

    while True:
        for fd, _ in epoll.poll(maxevents=512):
            if fd == listener.fileno():
                try:
                    for _ in range(64):
                        sock, _ = listener.accept()
                        sock.setblocking(False)
                        connections[sock.fileno()] = sock
                        epoll.register(sock, select.EPOLLIN)
                except BlockingIOError:
                    continue
                continue
            sock = connections[fd]
            try:
                rest = unsent.get(fd)
                if rest is not None:
                    unsent[fd] = rest[sock.send(rest) :]
                    if not unsent[fd]:
                        del unsent[fd]
                        epoll.modify(fd, select.EPOLLIN)
                elif got := sock.recv_into(buffer):
                    try:
                        sent = sock.send(buffer[:got])
                    except BlockingIOError:
                        sent = 0
                    if sent < got:
                        unsent[fd] = memoryview(bytes(buffer[sent:got]))
                        epoll.modify(fd, select.EPOLLOUT)
                else:
                    drop(fd)
            except BlockingIOError:
                continue
            except OSError:
                drop(fd)


if __name__ == "__main__":
    serve(listen())
