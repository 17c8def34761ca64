"""A protocol class that forks children, which do nothing and stay: `forking.py URL CONTROL`."""

import asyncio
import os
import signal
import sys
from typing import Any

import takeover


def fork() -> int:
    child = os.fork()
    if not child:
        signal.pause()
    return child


class Forking(asyncio.Protocol):
    """Answers whatever comes with the pid of a new child, and forks another one whenever it moves."""

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.transport.write(b"%d\n" % fork())

    def export_state(self) -> bytes:
        print(f"child is {fork()}", flush=True)
        return b""

    def import_state(self, _state: bytes) -> None:
        print(f"child is {fork()}", flush=True)


if __name__ == "__main__":
    takeover.serve(Forking, listen=[sys.argv[1]], control=sys.argv[2])
