"""A protocol class that forks a child, which does nothing and stays: `forking.py URL CONTROL`."""

import asyncio
import os
import signal
import sys
from typing import Any

import takeover


class Forking(asyncio.Protocol):
    """Answers whatever comes with the pid of a new child."""

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        child = os.fork()
        if not child:
            signal.pause()
        self.transport.write(b"%d\n" % child)


if __name__ == "__main__":
    takeover.serve(Forking, listen=[sys.argv[1]], control=sys.argv[2])
