"""Zero-downtime restarts: start the new version of a server, and it takes over from the one that is running.

Guarantees, each with a test that fails without it:

1. A connect never fails because of a takeover: the incumbent accepts until the commit, the successor from then on, and
   in between the kernel's accept queue, which both share, holds.
2. A connection is served by exactly one process at a time.
3. Whichever process is killed, stopped, hangs or speaks nonsense, at whichever step: what is alive converges to one
   owner within a second, the service is accepted again, and the next takeover works.
4. A successor that fails before the commit changes nothing; one that dies in probation is undone.
5. No descriptor leaks, and every received one is close-on-exec from the first instant.
6. Only the same user (or root, or a uid that was allowed by name) may take over.
7. The operator learns the truth: exit status, last line, and `takeover status`.
"""

from __future__ import annotations

from . import _backend, errors
from ._version import VERSION as __version__
from .controller import Server
from .protocol import Limits
from .server import serve
from .service import Report, Service, join

backend = _backend.backend
ECHO = _backend.loop.ECHO
Loop = _backend.loop.Loop

__all__ = ["ECHO", "Limits", "Loop", "Report", "Server", "Service", "__version__", "backend", "errors", "join", "serve"]
