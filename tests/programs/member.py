"""A server on join() and a selector, as any server not on our loop; before ready() it does what it is told."""

import json
import logging
import os
import selectors
import signal
import socket
import subprocess
import sys
from typing import Any

import takeover


def fork(socks: list[socket.socket]) -> None:
    """A child that lives on without its parent, as a worker does that accepts nothing itself."""
    child = os.fork()
    if child == 0:
        for sock in socks:
            sock.close()
        os.write(1, b"child is %d\n" % os.getpid())  # at once, since the parent may be writing a warning
        signal.pause()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)


def do(step: str, socks: list[socket.socket]) -> None:
    """One step of the plan."""
    if step == "wait":
        print("waiting", flush=True)
        sys.stdin.readline()
    elif step == "block":
        for sock in socks:
            sock.setblocking(True)
        print("blocking", flush=True)
    elif step == "fork":
        fork(socks)
    elif step == "spawn":
        child = subprocess.Popen(["sleep", "1000"], close_fds=False)
        print(f"child is {child.pid}", flush=True)
    elif step == "fail":
        raise RuntimeError("the new version is broken")


def serve(service: takeover.Service, socks: list[socket.socket], *, deaf: bool) -> None:
    """Echoes until the service has gone on to a successor and every client has left."""
    selector = selectors.DefaultSelector()
    for sock in socks if not deaf else ():
        sock.setblocking(False)
        selector.register(sock, selectors.EVENT_READ, True)
    over = False
    while not over or selector.get_map():
        if not over and service.wait(0):
            over = True
            for sock in socks if not deaf else ():
                selector.unregister(sock)
        for key, _ in selector.select(0.02):
            sock = key.fileobj  # type: ignore[assignment]
            try:
                if key.data:
                    selector.register(sock.accept()[0], selectors.EVENT_READ, False)
                    continue
                data = sock.recv(65536)
                sock.sendall(data)
            except BlockingIOError:
                continue
            except OSError:
                data = b""
            if not data:
                selector.unregister(sock)
                sock.close()


def main() -> None:
    """Its argument: {"join": join()'s arguments, "listen": URLs, "plan": steps to ready(), "after": steps after}."""
    wishes: dict[str, Any] = json.loads(sys.argv[1])
    logging.basicConfig(level=logging.INFO, format="%(process)d %(message)s")
    options = wishes["join"]
    if "limits" in options:
        options["limits"] = takeover.Limits(**options["limits"])
    try:
        with takeover.join(**options) as service:
            socks = [sock for url in wishes["listen"] for sock in service.listen_all(url)]
            for step in wishes.get("plan", ()):
                do(step, socks)
            print(f"ready {json.dumps(service.ready()._asdict())}", flush=True)
            for step in wishes.get("after", ()):
                do(step, socks)
            serve(service, socks, deaf=wishes.get("deaf", False))
            print(f"over: {service.state}", flush=True)
    except (takeover.errors.TakeoverError, RuntimeError) as error:
        print(f"failed: {type(error).__name__}: {error}", flush=True)
        sys.exit(getattr(error, "exit_status", 1))


main()
