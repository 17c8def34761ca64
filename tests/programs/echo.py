"""The echo server with what only tests may do to it: short limits, boundaries to wait at, high descriptor numbers."""

import atexit
import functools
import json
import logging
import os
import resource
import signal
import socket
import sys
import threading
from typing import Any

import takeover
from takeover import echo, service
from takeover.exchange import Exchange


def report_boundaries(name: str) -> None:
    """Tells each boundary to the test that listens at the abstract name, and waits there for its answer.

    The control thread and that of the loop come to their own, each on a connection of its own.
    """
    own = threading.local()

    def boundary(step: str) -> None:
        if not hasattr(own, "sock"):
            own.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            own.sock.connect(f"\0{name}")
        own.sock.send(step.encode())
        own.sock.recv(1)

    Exchange.boundary = boundary


def signal_late() -> None:
    """SIGTERM to itself when the service has ended: as its part in it is closed, and as the interpreter ends."""
    close = service.Service.close

    def close_and_signal(self: service.Service) -> None:
        close(self)
        os.kill(os.getpid(), signal.SIGTERM)

    service.Service.close = close_and_signal  # type: ignore[method-assign]
    atexit.register(os.kill, os.getpid(), signal.SIGTERM)


def main() -> None:
    """Its argument: {"options": of serve(), "limits": of join(), "boundaries", "above", "nofile", "uid", "late"}."""
    wishes: dict[str, Any] = json.loads(sys.argv[1])
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
    if "late" in wishes:
        signal_late()
    if "uid" in wishes:
        "localhost".encode("idna")  # imported now, while the standard library may be read
        os.setgroups([])
        os.setgid(wishes["uid"])
        os.setuid(wishes["uid"])
    try:
        echo.echo(**wishes["options"])
    except takeover.errors.TakeoverError as error:
        print(f"takeover: {type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(error.exit_status)


main()
