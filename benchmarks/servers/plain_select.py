"""What a short script does: select.select over a list of blocking sockets, sendall."""

from __future__ import annotations

import select

from .listener import listen

if __name__ == "__main__":
    listener = listen()
    sockets = [listener]
    while True:
        for sock in select.select(sockets, [], [])[0]:
            if sock is listener:
                sockets.append(listener.accept()[0])
                continue
            try:
                data = sock.recv(256 * 1024)
                sock.sendall(data)
            except OSError:
                data = b""
            if not data:
                sockets.remove(sock)
                sock.close()
