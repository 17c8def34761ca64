"""A chat room of coroutines on asyncio (or uvloop, where it is installed), whose connections move.

    python examples/aio_chat.py [URL [CONTROL]]

Start it again in the same folder: the second takes over from the first, and everybody who is in the room goes along,
with the name from their `/name` and the line that they are just typing. Nobody notices.
"""

from __future__ import annotations

import asyncio
import sys

from takeover import aio

try:
    from uvloop import new_event_loop
except ImportError:
    from asyncio import new_event_loop

ROOM: set[asyncio.StreamWriter] = set()


def tell_everybody(line: str) -> None:
    for writer in ROOM:
        writer.write(line.encode())


async def chat(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, connection: aio.Connection) -> None:
    """Whatever line one says, everybody reads."""
    ROOM.add(writer)
    try:
        while line := (await reader.readline()).decode():
            if line.startswith("/name "):
                connection.state["name"] = line[6:].strip()
            elif "name" in connection.state:
                tell_everybody(f"{connection.state['name']}: {line}")
            else:
                tell_everybody(line)
            await writer.drain()
    finally:
        ROOM.discard(writer)
        if "name" in connection.state and not connection.gone:
            tell_everybody(f"{connection.state['name']} has left\n")


async def main() -> None:
    server = await aio.start_server(
        chat,
        listen=[sys.argv[1] if len(sys.argv) > 1 else "tcp://127.0.0.1:9996"],
        control=sys.argv[2] if len(sys.argv) > 2 else "./aio_chat.sock",
        service="chat",
    )
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.set_event_loop(loop := new_event_loop())
    loop.run_until_complete(main())
