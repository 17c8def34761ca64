"""Very many connections to an echo server from one process, which compares each byte.

    python crowd.py HOST PORT COUNT

Connects one after the other, each with a round trip, and says "open". Each line on its standard input is a round trip
on all of them: "checked N".
"""

import contextlib
import os
import socket
import sys


def round_trip(sock: socket.socket) -> None:
    data = os.urandom(64)
    sock.sendall(data)
    back = sock.recv(len(data), socket.MSG_WAITALL)
    if back != data:
        raise SystemExit(f"{sock.getsockname()}: {len(back)} bytes came back, or other ones")


with contextlib.ExitStack() as stack:
    address, count = (sys.argv[1], int(sys.argv[2])), int(sys.argv[3])
    socks = []
    for _ in range(count):
        socks.append(stack.enter_context(socket.create_connection(address, 30)))
        round_trip(socks[-1])
    print("open", flush=True)
    for _ in sys.stdin:
        for sock in socks:
            round_trip(sock)
        print(f"checked {len(socks)}", flush=True)
