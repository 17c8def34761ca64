"""The original script, told anew: an echo server that gives its listener to whoever connects to ./takeover.sock.

Started again, it is that itself. For the sake of tests/chaos, which finds out what it does not survive, it ends well at
SIGTERM, and names the path in full.
"""

import array
import os
import select
import signal
import socket
import sys

CONTROL = os.path.abspath("takeover.sock")


def give_away(control: socket.socket, listener: socket.socket) -> None:
    """Removes the path first, sends one zero byte with the listener's descriptor, and says nothing more."""
    peer, _ = control.accept()
    control.close()
    os.unlink(CONTROL)
    rights = array.array("i", [listener.fileno()])
    peer.sendmsg([b"\0"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
    peer.close()
    listener.close()


def take_over() -> socket.socket | None:
    """The listener of the one that runs; None where nobody does."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as control:
        try:
            control.connect(CONTROL)
        except FileNotFoundError:
            return None
        _, (descriptor,), _, _ = socket.recv_fds(control, 1, 1)
        return socket.socket(fileno=descriptor)


def main() -> None:
    """Its arguments: host and port."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    listener = take_over() or socket.create_server((sys.argv[1], int(sys.argv[2])))
    control = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    control.bind(CONTROL)
    control.listen(1)
    clients: set[socket.socket] = set()
    serving = True
    print("ready", flush=True)
    while serving or clients:
        readable, _, _ = select.select([*clients, *([listener, control] if serving else [])], [], [])
        for sock in readable:
            if sock is control:
                give_away(control, listener)
                serving = False
                break
            if sock is listener:
                clients.add(listener.accept()[0])
                continue
            data = sock.recv(4096)
            if data:
                sock.sendall(data)
            else:
                clients.remove(sock)
                sock.close()
    print("over", flush=True)


main()
