"""Deploys of broken versions under `takeover run`, while clients connect: the old version must serve on, unnoticed."""

from __future__ import annotations

import concurrent.futures
import pathlib
import re
import socket
import subprocess
import tempfile
import threading
import time

from .plan import Plan
from .processes import PYTHON, ROOT, end, environment, wait_until
from .restart_rivals import free_port
from .results import Row

SERVER = str(ROOT / "benchmarks" / "servers" / "broken.py")
TOGETHER = 2
"""Kinds that are tried at the same time, each with a service of its own."""

READY_TIMEOUT = {"crash at import": "60"}
"""Seconds; 1 for the others, which would be ready after twenty or never."""

KINDS = {
    "crash at import": r"ended with exit status 1 before it was ready$",
    "hang": r"not ready within 1 s: it has tcp://\S+ open but never waits on it or accepts: pid \d+ ",
    "wrong port": r"not ready within 1 s: it listens on tcp://127\.0\.0\.1:\d+, which it has bound itself",
    "slow start": r"not ready within 1 s: it has tcp://\S+ open but never waits on it or accepts: pid \d+ ",
}
"""What the last line of a deploy says of each."""


class Clients:
    """Connects all the time, and counts who is not answered by the version that serves."""

    def __init__(self, port: int, version: bytes) -> None:
        self.served = 0
        self.failed: list[str] = []
        self._port, self._version = port, version
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stopping.wait(0.002):
            try:
                with socket.create_connection(("127.0.0.1", self._port), 30) as sock:
                    answer = sock.recv(100)
            except OSError as error:
                self.failed.append(str(error))
                continue
            if answer == self._version:
                self.served += 1
            else:
                self.failed.append(f"answered with {answer!r}")

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join()


def broken(plan: Plan, deploys: int) -> None:
    """Each kind that is wanted so many times, in a row of its own."""
    kinds = [kind for kind in KINDS if not plan.only or any(word in kind for word in plan.only)]
    rows = {kind: plan.document.row("broken", f"{deploys} deploys", kind, "") for kind in kinds}
    with concurrent.futures.ThreadPoolExecutor(TOGETHER) as pool:
        done = [pool.submit(_try, plan, kind, rows[kind], deploys) for kind in kinds]
        for each in done:
            each.result()


def _command(port: int, folder: pathlib.Path, kind: str, version: str) -> list[str]:
    options = ["--listen", f"tcp://127.0.0.1:{port}", "--control", str(folder / "control")]
    command = [PYTHON, SERVER, kind, version]
    return [PYTHON, "-m", "takeover", "run", *options, "--ready-timeout", READY_TIMEOUT.get(kind, "1"), "--", *command]


def _try(plan: Plan, kind: str, row: Row, deploys: int) -> None:
    with tempfile.TemporaryDirectory(prefix="takeover-broken-") as name:
        folder, port = pathlib.Path(name), free_port()
        log = (folder / "log").open("w")
        old = subprocess.Popen(_command(port, folder, "good", "old"), env=environment(), stdout=log, stderr=log)
        try:
            wait_until(lambda: "is ready" in (folder / "log").read_text(), "the first version")
            clients = Clients(port, b"old")
            told = status = 0
            for number in range(deploys):
                plan.say(f"broken: {kind}, {number + 1} of {deploys}")
                began = time.monotonic()
                new = subprocess.run(
                    _command(port, folder, kind, "new"), env=environment(), capture_output=True, text=True, check=False
                )
                row.add(ms=(time.monotonic() - began) * 1000)
                last = (new.stderr.strip().splitlines() or [""])[-1]
                status += new.returncode == 1
                if re.search(KINDS[kind], last):
                    told += 1
                else:
                    row.facts.setdefault("unexpected", []).append(last)
            clients.stop()
            row.add(
                status=status, told=told, alive=old.poll() is None, clients=clients.served, failed=len(clients.failed)
            )
            row.facts["failures"] = clients.failed[:5]
        finally:
            end(old)
            log.close()
