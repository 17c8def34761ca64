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

from typing import TYPE_CHECKING, Any

from ._version import VERSION as __version__

if TYPE_CHECKING:
    from . import aio as aio
    from . import errors as errors
    from ._backend import ECHO, Loop, backend
    from .hosted import Server
    from .protocol import Limits
    from .records import NOT_NOW, Moved
    from .report import Report
    from .server import serve
    from .service import Service, join

__all__ = [
    "ECHO",
    "NOT_NOW",
    "Limits",
    "Loop",
    "Moved",
    "Report",
    "Server",
    "Service",
    "__version__",
    "backend",
    "errors",
    "join",
    "serve",
]

_HOMES = {
    "ECHO": "_backend",
    "Limits": "protocol",
    "Loop": "_backend",
    "Moved": "records",
    "NOT_NOW": "records",
    "Report": "report",
    "Server": "hosted",
    "Service": "service",
    "backend": "_backend",
    "join": "service",
    "serve": "server",
}


def __getattr__(name: str) -> Any:
    """Imports a name at its first use: `import takeover` is to cost a command line next to nothing."""
    import importlib

    if name in ("aio", "errors"):
        return importlib.import_module(f".{name}", __name__)
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
