"""What the tests may do to any of the programs that serve: short limits, boundaries to wait at, few or high descriptors."""

import contextlib
import functools
import logging
import os
import resource
import socket
import threading
from typing import Any

import takeover
from takeover import service
from takeover.exchange import Exchange


def report_boundaries(name: str) -> None:
    """Tells each boundary to the test that listens at the abstract name, and waits there for its answer.

    The exchanges of a process have two threads, and each has a connection of its own to the test.
    """
    own = threading.local()

    def boundary(step: str) -> None:
        if not hasattr(own, "sock"):
            own.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            own.sock.connect(f"\0{name}")
        with contextlib.suppress(ConnectionError):  # the test is over
            own.sock.send(step.encode())
            own.sock.recv(1)

    Exchange.boundary = boundary


def prepare(wishes: dict[str, Any]) -> None:
    """Grants "nofile", "above", "boundaries" and "limits"."""
    logging.raiseExceptions = False
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(process)d %(levelname)s %(message)s")
    if "nofile" in wishes:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wishes["nofile"], wishes["nofile"]))
    for _ in range(wishes.get("above", 0)):
        os.dup(0)
    if "boundaries" in wishes:
        report_boundaries(wishes["boundaries"])
    if "limits" in wishes:
        service.Limits = functools.partial(takeover.Limits, **wishes["limits"])  # type: ignore[assignment,attr-defined]
