r"""A WSGI application behind gunicorn, which takes the listener from LISTEN_FDS.

sync workers, which close each connection after its response:
    takeover run --listen tcp://127.0.0.1:8000 -- \
        gunicorn wsgi_app:app --workers 2 --graceful-timeout 25
threads, which keep connections alive:
    takeover run --listen tcp://127.0.0.1:8000 -- \
        gunicorn wsgi_app:app --worker-class gthread --threads 32 --graceful-timeout 25

Started again, each of them is the deploy.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIEnvironment


def app(_environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
    """Says which process it is, so that a deploy can be seen."""
    body = b"%d\n" % os.getpid()
    start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", str(len(body)))])
    return [body]
