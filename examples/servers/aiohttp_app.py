r"""aiohttp on an inherited listener, with a websocket echo at /ws.

    takeover run --listen tcp://127.0.0.1:8000 -- \
        python aiohttp_app.py {fd}

Started again, it is the deploy. At the end aiohttp drops a request that it has just read on a kept-alive connection, so
for two seconds before that each answer is said to be the last one on its connection.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys

from aiohttp import WSCloseCode, WSMsgType, web
from aiohttp.typedefs import Handler

SOCKETS: web.AppKey[set[web.WebSocketResponse]] = web.AppKey("sockets", set)
STOPPED: web.AppKey[asyncio.Event] = web.AppKey("stopped", asyncio.Event)
LAST_WORDS = 2.0
"""Seconds in which whoever is at work hears that its connection ends."""


async def which(_request: web.Request) -> web.Response:
    """Says which process it is, so that a deploy can be seen."""
    return web.Response(text=f"{os.getpid()}\n")


async def echo(request: web.Request) -> web.WebSocketResponse:
    sock = web.WebSocketResponse()
    await sock.prepare(request)
    request.app[SOCKETS].add(sock)
    try:
        async for message in sock:
            if message.type == WSMsgType.TEXT:
                await sock.send_str(message.data)
            elif message.type == WSMsgType.BINARY:
                await sock.send_bytes(message.data)
    finally:
        request.app[SOCKETS].discard(sock)
    return sock


@web.middleware
async def say_last(request: web.Request, handler: Handler) -> web.StreamResponse:
    response = await handler(request)
    if request.app[STOPPED].is_set():
        response.force_close()
    return response


async def say_goodbye(app: web.Application) -> None:
    """Websockets would else hold the old version until shutdown_timeout: tell them that the service restarts."""
    goodbyes = [sock.close(code=WSCloseCode.SERVICE_RESTART) for sock in app[SOCKETS]]
    await asyncio.gather(*goodbyes)


async def main(descriptor: int) -> None:
    app = web.Application(middlewares=[say_last])
    app[SOCKETS] = set()
    app[STOPPED] = stopped = asyncio.Event()
    app.add_routes([web.get("/", which), web.get("/ws", echo)])
    app.on_shutdown.append(say_goodbye)
    runner = web.AppRunner(app, shutdown_timeout=25)
    await runner.setup()
    await web.SockSite(runner, socket.socket(fileno=descriptor)).start()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopped.set)
    await stopped.wait()
    await asyncio.sleep(LAST_WORDS)
    await runner.cleanup()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1])))
