"""Takeovers under a storm of half-open connections, in a network namespace of its own.

    unshare --net python half_open.py BACKEND

A raw socket sends SYNs from addresses that never answer, so that each stays in SYN-RECV until the kernel gives it up.
Prints one line of JSON: what the storm has come to, and what the clients have lost.
"""

import ctypes
import fcntl
import json
import os
import pathlib
import random
import socket
import struct
import sys
import threading
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from clients import eventually
from processes import Room

TAKEOVERS = 3
STORM = "10.0.0.0"
"""The network from which the SYNs seem to come; answers go to the loopback device, where nobody has the address."""


class Route(ctypes.Structure):
    """struct rtentry of linux/route.h."""

    _fields_ = (
        ("rt_pad1", ctypes.c_ulong),
        ("rt_dst", ctypes.c_char * 16),
        ("rt_gateway", ctypes.c_char * 16),
        ("rt_genmask", ctypes.c_char * 16),
        ("rt_flags", ctypes.c_ushort),
        ("rt_pad2", ctypes.c_short),
        ("rt_pad3", ctypes.c_ulong),
        ("rt_pad4", ctypes.c_void_p),
        ("rt_metric", ctypes.c_short),
        ("rt_dev", ctypes.c_char_p),
        ("rt_mtu", ctypes.c_ulong),
        ("rt_window", ctypes.c_ulong),
        ("rt_irtt", ctypes.c_ushort),
    )


def name(address: str) -> bytes:
    """A struct sockaddr_in."""
    return struct.pack("=HH4s8x", socket.AF_INET, 0, socket.inet_aton(address))


def build_network() -> None:
    """The loopback device is up, and takes what goes to the storm's network."""
    up, running, siocsifflags, siocaddrt = 0x1, 0x40, 0x8914, 0x890B
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        fcntl.ioctl(sock, siocsifflags, struct.pack("16sH14x", b"lo", up | running))
        route = Route(rt_flags=up, rt_dev=b"lo")
        for field, address in (("rt_dst", STORM), ("rt_gateway", "0.0.0.0"), ("rt_genmask", "255.0.0.0")):
            ctypes.memmove(ctypes.addressof(route) + getattr(Route, field).offset, name(address), 16)
        fcntl.ioctl(sock, siocaddrt, bytes(route))


def checksum(data: bytes) -> int:
    """RFC 1071."""
    total = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


class Storm:
    """Sends SYNs until it is stopped."""

    def __init__(self, address: tuple[str, int]) -> None:
        self.sent = 0
        self._address = address
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        source = random.Random(5)
        with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW) as sock:
            while not self._stopping.wait(0.002):
                for _ in range(10):
                    sock.sendto(self._syn(source), (self._address[0], 0))
                    self.sent += 1

    def _syn(self, source: random.Random) -> bytes:
        """RFC 791 and RFC 9293: the kernel fills in the checksum and the length of the IP header."""
        sender = socket.inet_aton(f"10.{source.randrange(256)}.{source.randrange(256)}.{source.randrange(1, 255)}")
        receiver = socket.inet_aton(self._address[0])
        ports = source.randrange(1024, 65536), self._address[1]
        tcp = struct.pack(">HHIIBBHHH", *ports, source.randrange(1 << 32), 0, 5 << 4, 0x02, 65535, 0, 0)
        pseudo = sender + receiver + struct.pack(">HH", socket.IPPROTO_TCP, len(tcp))
        tcp = tcp[:16] + struct.pack(">H", checksum(pseudo + tcp)) + tcp[18:]
        head = struct.pack(">BBHHHBBH4s4s", 0x45, 0, 0, 0, 0, 64, socket.IPPROTO_TCP, 0, sender, receiver)
        return head + tcp

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join()


def half_open() -> int:
    """How many connections are in SYN-RECV (state 03)."""
    rows = pathlib.Path("/proc/net/tcp").read_text().splitlines()[1:]
    return sum(row.split()[3] == "03" for row in rows)


def cookies() -> int:
    """How many SYNs were answered with a cookie, since the queue of half-open connections was full."""
    names, values = pathlib.Path("/proc/net/netstat").read_text().splitlines()[:2]
    return int(dict(zip(names.split(), values.split(), strict=True))["SyncookiesSent"])


def main() -> None:
    build_network()
    with Room(sys.argv[1]) as room:
        room.tells = False
        owner = room.echo()
        room.wait_for_owner(owner)
        streams = room.streams(5, largest=10_000)
        load = room.pound()
        storm = Storm(room.address)
        eventually(lambda: cookies() > 1000, "the queue of half-open connections is full")
        held = half_open()
        for _ in range(TAKEOVERS):
            sent = storm.sent
            new = room.echo()
            room.wait_for_owner(new)
            assert owner.wait() == 0, owner.text
            eventually(lambda sent=sent: storm.sent > sent + 1000, "the storm goes on")  # type: ignore[misc]
            load.goes_on()
            streams.goes_on()
            owner = new
        storm.stop()
        load.stop()
        streams.stop()
        seen: dict[str, Any] = {"half_open": held, "moved": room.status()["moved"]["in"]}
        seen |= {"lost": [str(error) for error in load.lost], "failures": streams.failures}
    print(json.dumps(seen))


main()
