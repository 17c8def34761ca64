"""What a careful script does with select.epoll: one shared buffer, EPOLLOUT only after a short send."""

from __future__ import annotations

import select
import socket

from .listener import listen


class Server:
    def __init__(self, listener: socket.socket) -> None:
        listener.setblocking(False)
        self.listener = listener
        self.epoll = select.epoll()
        self.epoll.register(listener, select.EPOLLIN)
        self.connections: dict[int, socket.socket] = {}
        self.unsent: dict[int, memoryview] = {}
        self.buffer = memoryview(bytearray(256 * 1024))

    def accept(self) -> None:
        try:
            for _ in range(64):
                sock, _address = self.listener.accept()
                sock.setblocking(False)
                self.connections[sock.fileno()] = sock
                self.epoll.register(sock, select.EPOLLIN)
        except BlockingIOError:
            return

    def drop(self, fd: int) -> None:
        self.unsent.pop(fd, None)
        self.connections.pop(fd).close()

    def read(self, fd: int, sock: socket.socket) -> None:
        got = sock.recv_into(self.buffer)
        if not got:
            self.drop(fd)
            return
        try:
            sent = sock.send(self.buffer[:got])
        except BlockingIOError:
            sent = 0
        if sent < got:
            self.unsent[fd] = memoryview(bytes(self.buffer[sent:got]))
            self.epoll.modify(fd, select.EPOLLOUT)

    def write(self, fd: int, sock: socket.socket) -> None:
        rest = self.unsent[fd]
        self.unsent[fd] = rest[sock.send(rest) :]
        if not self.unsent[fd]:
            del self.unsent[fd]
            self.epoll.modify(fd, select.EPOLLIN)

    def serve(self) -> None:
        listener, connections, unsent = self.listener.fileno(), self.connections, self.unsent
        while True:
            for fd, _ in self.epoll.poll(maxevents=512):
                if fd == listener:
                    self.accept()
                    continue
                try:
                    (self.write if fd in unsent else self.read)(fd, connections[fd])
                except BlockingIOError:
                    continue
                except OSError:
                    self.drop(fd)


if __name__ == "__main__":
    Server(listen()).serve()
