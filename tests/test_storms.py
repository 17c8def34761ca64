"""Takeovers while clients do what costs a server most: they read nothing, come all at once, halfway, or in numbers."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import random
import selectors
import signal
import socket
import subprocess
import sys

import pytest

from clients import LIMIT, echo_once, eventually
from processes import PROGRAMS, STEP, Room, private_memory, stop
from test_namespaces import may

NET = may("--net")
CROWD = 18_000 // min(STEP, 3)
BACKLOG = int(pathlib.Path("/proc/sys/net/core/somaxconn").read_text()) if sys.platform == "linux" else 0
BURST = BACKLOG + 1500


class Deaf:
    """A client that sends as long as anything is taken, and reads nothing before finish()."""

    def __init__(self, address: tuple[str, int], seed: int) -> None:
        self.sock = socket.socket()
        for option in (socket.SO_RCVBUF, socket.SO_SNDBUF):
            self.sock.setsockopt(socket.SOL_SOCKET, option, 1 << 16)
        # Loopback's segments of 64 KiB would have the kernel keep 6 MB for each connection, more than it has for all.
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 1400)
        self.sock.settimeout(LIMIT)
        self.sock.connect(address)
        self.sock.setblocking(False)
        self._data = random.Random(seed).randbytes(1 << 16)
        self.sent = 0

    def send(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while True:
                rest = memoryview(self._data)[self.sent % len(self._data) :]
                self.sent += self.sock.send(rest)

    def finish(self) -> None:
        """Sends no more, and reads all that is due and the end."""
        self.sock.settimeout(LIMIT)
        self.sock.shutdown(socket.SHUT_WR)
        received = 0
        while part := self.sock.recv(1 << 16):
            start = received % len(self._data)
            assert part == (self._data * 2)[start : start + len(part)], f"after {received} bytes"
            received += len(part)
        assert received == self.sent


def test_clients_that_send_and_read_nothing_cost_little_memory_and_no_byte(room: Room) -> None:
    """300 of them, each with all that both kernels hold and the server's own bounded backlog."""
    old = room.echo()
    room.wait_for_owner(old)
    empty = private_memory(old.pid)
    with contextlib.ExitStack() as stack, selectors.DefaultSelector() as selector:
        deaf = [Deaf(room.address, seed) for seed in range(300)]
        for each in deaf:
            stack.callback(each.sock.close)
            selector.register(each.sock, selectors.EVENT_WRITE, each)
        while ready := selector.select(0.5):
            for key, _ in ready:
                key.data.send()
        assert private_memory(old.pid) - empty < len(deaf) * 320
        load = room.pound()
        load.goes_on()
        new = room.echo()
        room.wait_for_owner(new)
        assert old.wait() == 0, old.text
        assert room.status()["moved"]["in"] >= len(deaf)
        load.goes_on()
        load.stop()
        assert not load.lost, load.lost
        for each in deaf:
            each.finish()


@pytest.mark.skipif(not BACKLOG or BURST > 15_000, reason="the backlog is too large here to be overrun")
def test_a_burst_beyond_the_backlog_at_a_takeover_is_served_to_the_last(room: Room) -> None:
    """More SYNs at once than the queue takes, while the incumbent stands still: the kernel answers the rest later."""
    old = room.echo()
    room.wait_for_owner(old)
    stop(old)
    with contextlib.ExitStack() as stack:
        socks = []
        for _ in range(BURST):
            sock = stack.enter_context(socket.socket())
            sock.setblocking(False)
            sock.connect_ex(room.address)
            socks.append(sock)
        new = room.echo()
        old.signal(signal.SIGCONT)
        room.wait_for_owner(new)
        for sock in socks:
            sock.settimeout(2 * LIMIT)
            with selectors.DefaultSelector() as selector:
                selector.register(sock, selectors.EVENT_WRITE)
                assert selector.select(2 * LIMIT)
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0
            echo_once(sock, b"came in a burst")
        assert old.wait() == 0, old.text


@pytest.mark.skipif(bool(NET), reason=NET)
@pytest.mark.skipif(os.geteuid() != 0, reason="raw sockets are root's")
def test_a_storm_of_half_open_connections_costs_no_client_anything(backend: str) -> None:
    command = ["unshare", "--net", sys.executable, str(PROGRAMS / "half_open.py"), backend]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=4 * LIMIT, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    seen = json.loads(ran.stdout)
    assert (seen["lost"], seen["failures"]) == ([], [])
    assert seen["moved"] >= 5 and seen["half_open"] > 100


@pytest.mark.timeout(300)
def test_as_many_connections_as_descriptors_allow_move_and_are_served(room: Room) -> None:
    """18,000 with a hard limit of 20,000; a third of them in a sampled run."""
    old = room.echo()
    room.wait_for_owner(old)
    crowd = room.run(
        *(sys.executable, str(PROGRAMS / "crowd.py"), room.address[0], str(room.address[1]), str(CROWD)),
        stdin=subprocess.PIPE,
    )
    crowd.wait_for("open", 4 * LIMIT)
    new = room.echo()
    room.wait_for_owner(new, 4 * LIMIT)
    assert old.wait(4 * LIMIT) == 0, old.text
    eventually(lambda: room.status()["moved"]["in"] == CROWD, "all have moved")
    crowd.tell()
    crowd.wait_for(f"checked {CROWD}", 4 * LIMIT)
