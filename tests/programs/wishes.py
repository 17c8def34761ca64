"""What the tests may do to any program that serves: short limits, boundaries to wait at, few or high descriptors."""

import contextlib
import functools
import gc
import logging
import os
import pathlib
import resource
import socket
import threading
from typing import Any

import takeover
from takeover import service
from takeover.exchange import Exchange
from takeover.giver import Giver
from takeover.taker import Taker


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


def break_channel(how: str) -> None:
    """A mistake in one end: records that are garbled, or an exception in the middle of an adoption."""

    def garble(self: Giver, batch: Any) -> None:
        self._packed = self._packed[:-1]
        send_batch(self, batch)

    def fail(self: Taker, kind: Any) -> None:
        raise RuntimeError("a mistake in the taker")

    send_batch = Giver._send_batch
    if how == "garbled":
        Giver._send_batch = garble  # type: ignore[method-assign]
    else:
        Taker.message = fail  # type: ignore[method-assign]


def prepare(wishes: dict[str, Any]) -> None:
    """Grants "broken" (how), "nofile", "memory" (MiB more), "above", "collector", "boundaries", "limits"."""
    logging.raiseExceptions = False
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(process)d %(levelname)s %(message)s")
    if "nofile" in wishes:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wishes["nofile"], wishes["nofile"]))
    if "broken" in wishes:
        break_channel(wishes["broken"])
    if "memory" in wishes:
        pages = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + (wishes["memory"] << 20)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    if wishes.get("collector") == "off":
        gc.disable()
    elif wishes.get("collector") == "always":
        gc.set_threshold(1)
    for _ in range(wishes.get("above", 0)):
        os.dup(0)
    if "boundaries" in wishes:
        report_boundaries(wishes["boundaries"])
    if "limits" in wishes:
        service.Limits = functools.partial(takeover.Limits, **wishes["limits"])  # type: ignore[assignment,attr-defined]
