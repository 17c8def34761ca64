"""A chat room on the native loop, written as an ordinary asyncio.Protocol.

    python examples/chat.py [URL [CONTROL]]

Who is in the room stays in it while a second one takes over; whoever comes later is in the new one's room.
"""

from __future__ import annotations

import asyncio
import sys

import takeover

ROOM: set[asyncio.BaseTransport] = set()


class Chat(asyncio.Protocol):
    """Whatever one says, everybody reads."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        ROOM.add(transport)

    def data_received(self, data: bytes) -> None:
        for transport in ROOM:
            transport.write(data)

    def connection_lost(self, error: Exception | None) -> None:
        ROOM.discard(self.transport)


if __name__ == "__main__":
    takeover.serve(
        Chat,
        listen=[sys.argv[1] if len(sys.argv) > 1 else "tcp://127.0.0.1:9997"],
        control=sys.argv[2] if len(sys.argv) > 2 else "./chat.sock",
        service="chat",
    )
