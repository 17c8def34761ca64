r"""Flask behind gunicorn.

    takeover run --listen tcp://127.0.0.1:8000 -- \
        gunicorn flask_app:app --worker-class gthread --threads 32 --graceful-timeout 25

Started again, it is the deploy.
"""

from __future__ import annotations

import os

from flask import Flask

app = Flask(__name__)


@app.get("/")
def which() -> tuple[str, dict[str, str]]:
    """Says which process it is, so that a deploy can be seen."""
    return f"{os.getpid()}\n", {"Content-Type": "text/plain"}
