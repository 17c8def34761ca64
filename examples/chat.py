"""A chat room on the native loop, written as an ordinary asyncio.Protocol whose connections can move.

    python examples/chat.py [URL [CONTROL]]

Start it again in the same folder: the second takes over from the first, and everybody who is in the room goes along,
with the line that they are just typing. Nobody notices.
"""

from __future__ import annotations

import asyncio
import sys

import takeover

ROOM: set[asyncio.BaseTransport] = set()


class Chat(asyncio.Protocol):
    """Whatever line one says, everybody reads."""

    def __init__(self) -> None:
        self.begun = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        ROOM.add(transport)

    def data_received(self, data: bytes) -> None:
        *lines, self.begun = (self.begun + data).split(b"\n")
        for line in lines:
            for transport in ROOM:
                transport.write(line + b"\n")

    def connection_lost(self, error: Exception | None) -> None:
        ROOM.discard(self.transport)

    def export_state(self) -> bytes:
        """In the old process, between two callbacks: all that the new one must know of this connection."""
        return self.begun

    def import_state(self, state: bytes) -> None:
        """In the new process, before connection_made()."""
        self.begun = state

    def connection_moved(self) -> None:
        """In the old process: the connection is in good hands, and no longer here."""
        ROOM.discard(self.transport)


if __name__ == "__main__":
    takeover.serve(
        Chat,
        listen=[sys.argv[1] if len(sys.argv) > 1 else "tcp://127.0.0.1:9997"],
        control=sys.argv[2] if len(sys.argv) > 2 else "./chat.sock",
        service="chat",
    )
