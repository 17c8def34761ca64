"""The listener that all servers share: the same options and backlog for everybody.

A block of 1 MiB is allocated and freed first. glibc maps blocks above 128 KiB afresh until one has been freed
(mallopt(3), M_MMAP_THRESHOLD), and a server that receives into 256 KiB pays for that with three times the CPU. Most
programs have freed one by the time they serve, so the rivals are given that luck.
"""

from __future__ import annotations

import resource
import socket

BACKLOG = 4096


def listen() -> socket.socket:
    """Bind an ephemeral port, print it, and raise the limit of descriptors; TCP_NODELAY is inherited on accept."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    bytearray(1 << 20)
    sock = socket.socket()
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.bind(("127.0.0.1", 0))
    sock.listen(BACKLOG)
    print(sock.getsockname()[1], flush=True)
    return sock
