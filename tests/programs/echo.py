"""The echo server with what only tests may do to it: short limits, boundaries to wait at, high descriptor numbers."""

import atexit
import json
import os
import signal
import sys
from typing import Any

from wishes import prepare

import takeover
from takeover import echo, service


def signal_late() -> None:
    """SIGTERM to itself when the service has ended: as its part in it is closed, and as the interpreter ends."""
    close = service.Service.close

    def close_and_signal(self: service.Service) -> None:
        close(self)
        os.kill(os.getpid(), signal.SIGTERM)

    service.Service.close = close_and_signal  # type: ignore[method-assign]
    atexit.register(os.kill, os.getpid(), signal.SIGTERM)


def main() -> None:
    """Its argument: {"options": of serve(), "limits": of join(), "uid", "late", "gated", and what prepare() grants}.

    With "gated" it says so and waits for a line before it does anything: whoever wants to trace it does so meanwhile.
    """
    wishes: dict[str, Any] = json.loads(sys.argv[1])
    prepare(wishes)
    if "gated" in wishes:
        print("gated", flush=True)
        sys.stdin.readline()
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
