r"""An ASGI application with a websocket echo at /ws, for any ASGI server that takes a listening descriptor.

uvicorn:
    takeover run --listen tcp://127.0.0.1:8000 -- \
        uvicorn asgi_app:app --fd {fd} --timeout-graceful-shutdown 25
hypercorn:
    takeover run --listen tcp://127.0.0.1:8000 --drain-first -- \
        hypercorn asgi_app:app --bind fd://{fd} --workers 0
gunicorn with its own ASGI worker:
    takeover run --listen tcp://127.0.0.1:8000 -- \
        gunicorn asgi_app:app --worker-class asgi --graceful-timeout 25
gunicorn with uvicorn-worker:
    takeover run --listen tcp://127.0.0.1:8000 -- \
        gunicorn asgi_app:app --worker-class uvicorn_worker.UvicornWorker --graceful-timeout 25
daphne:
    takeover run --listen tcp://127.0.0.1:8000 --drain-first -- \
        daphne --fd {fd} asgi_app:app

Started again, each of them is the deploy.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from typing import Any

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "http":
        await answer(send)
    elif scope["type"] == "websocket":
        await echo(receive, send)
    elif scope["type"] == "lifespan":
        await live(receive, send)


async def answer(send: Send) -> None:
    """Says which process it is, so that a deploy can be seen."""
    body = b"%d\n" % os.getpid()
    headers = [(b"content-type", b"text/plain"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def echo(receive: Receive, send: Send) -> None:
    while True:
        event = await receive()
        if event["type"] == "websocket.connect":
            await send({"type": "websocket.accept"})
        elif event["type"] == "websocket.receive":
            if event.get("text") is not None:
                await send({"type": "websocket.send", "text": event["text"]})
            else:
                await send({"type": "websocket.send", "bytes": event["bytes"]})
        else:
            return


async def live(receive: Receive, send: Send) -> None:
    """What a version does before it serves belongs here: takeover run waits for it, and the old version serves on."""
    while True:
        event = await receive()
        await send({"type": f"{event['type']}.complete"})
        if event["type"] == "lifespan.shutdown":
            return
