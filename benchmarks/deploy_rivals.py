"""HTTP servers that are deployed: by `takeover run`, and by the reload that each of them has itself."""

from __future__ import annotations

import importlib.util
import os
import pathlib
import shlex
import signal
import socket
import subprocess
from collections.abc import Iterable
from typing import NamedTuple

from .processes import PYTHON, ROOT, children, is_alive, start, wait_until
from .restart_rivals import Rival

APPS = ROOT / "examples" / "servers"


class Kind(NamedTuple):
    """A server: its module, its words with HOST:PORT or a descriptor, and whether it has websockets.

    `fd` are the words with which it serves what it is given, `bind` those with which it binds {port} itself; `workers`
    those that give it a master, which its own reload needs. `options` are for takeover run.
    """

    module: str
    words: str
    fd: str
    bind: str
    workers: str = ""
    options: str = ""
    websockets: bool = False


UVICORN = Kind(
    "uvicorn",
    "uvicorn asgi_app:app --no-access-log --log-level error --timeout-graceful-shutdown 5",
    "--fd {fd}",
    "--port {port}",
    "--workers 2",
    "--workers 2",
    True,
)
HYPERCORN = Kind(
    "hypercorn",
    "hypercorn asgi_app:app --log-level error",
    "--bind fd://{fd} --workers 0",
    "--bind 127.0.0.1:{port}",
    "--workers 1",
    "--drain-first --stop-timeout 8",
    True,
)
GUNICORN = Kind(
    "gunicorn",
    "gunicorn wsgi_app:app --worker-class gthread --threads 32 --log-level error --graceful-timeout 5",
    "",
    "--bind 127.0.0.1:{port} --backlog 4096",
)
GUNICORN_ASGI = Kind(
    "uvicorn_worker",
    "gunicorn asgi_app:app --worker-class uvicorn_worker.UvicornWorker --log-level error --graceful-timeout 5",
    "",
    "--bind 127.0.0.1:{port} --backlog 4096",
    websockets=True,
)
GRANIAN = Kind(
    "granian",
    "granian --interface asgi asgi_app:app --no-access-log --log-level error --workers 1 --workers-kill-timeout 5",
    "",
    "--port {port}",
    websockets=True,
)


def tree(pid: int) -> set[int]:
    """A process and its descendants."""
    return {pid}.union(*(tree(child) for child in children(pid)))


def workers(master: int) -> set[int]:
    """The children of a master but for multiprocessing's own, which stays."""
    found = set()
    for child in children(master):
        try:
            if b"resource_tracker" not in pathlib.Path(f"/proc/{child}/cmdline").read_bytes():
                found.add(child)
        except OSError:
            continue
    return found


class Server(Rival):
    """One kind of server on one port."""

    http = True
    kind: Kind

    def missing(self) -> str | None:
        return None if importlib.util.find_spec(self.kind.module) else f"{self.kind.module} is not installed"

    def serve(self, words: Iterable[str]) -> subprocess.Popen[str]:
        """Starts a command where the applications are, with the programs of this Python first on PATH."""
        path = os.pathsep.join((os.path.dirname(PYTHON), os.environ.get("PATH", "")))
        variables = {"PATH": path, "HOME": str(self.folder), "PYTHONDONTWRITEBYTECODE": "1"}
        paths = os.pathsep.join(filter(None, (str(ROOT / "src"), os.environ.get("PYTHONPATH", ""))))
        environment = {**os.environ, **variables, "PYTHONPATH": paths}
        process = start(
            list(words),
            self.cpus,
            cwd=APPS,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=self.log,
            stderr=self.log,
        )
        self.spawned.append(process)
        return process

    @property
    def cpus(self) -> set[int]:
        return os.sched_getaffinity(0)

    def answers(self) -> bool:
        """Whether an application answers, and not only a master has bound the port. Raises RuntimeError if it ended."""
        if not self.accepts():
            return False
        with socket.create_connection(("127.0.0.1", self.port), 5) as sock:
            sock.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            try:
                return sock.recv(12) == b"HTTP/1.1 200"
            except OSError:
                return False

    def words(self, *parts: str) -> list[str]:
        return shlex.split(" ".join((self.kind.words, *parts)).replace("{port}", str(self.port)))


class Alone(Server):
    """Without takeover run, and with the server's own reload by SIGHUP to its master."""

    def start(self) -> None:
        self.serve(self.words(self.kind.bind, self.kind.workers))
        wait_until(self.answers, f"{self.name} to answer")

    def restart(self) -> None:
        master = self.spawned[-1].pid
        old = workers(master)
        os.kill(master, signal.SIGHUP)
        wait_until(lambda: not any(map(is_alive, old)), f"{self.name}: the old workers to end", 90)
        count = int(self.kind.workers.partition("--workers ")[2] or 1)
        wait_until(lambda: len(workers(master) - old) >= count and self.answers(), f"{self.name}: new workers")


class UsrTwo(Alone):
    """gunicorn's other way: a new master beside the old one, which is told to end when the new one has workers."""

    def start(self) -> None:
        self.serve(self.words(self.kind.bind, f"--pid {self.folder}/pid"))
        wait_until(self.answers, f"{self.name} to answer")
        self.master = self.spawned[-1].pid

    def restart(self) -> None:
        fresh, old = self.folder / "pid.2", tree(self.master)
        os.kill(self.master, signal.SIGUSR2)
        wait_until(lambda: fresh.exists() and children(int(fresh.read_text() or 0)), f"{self.name}: a new master")
        new = int(fresh.read_text())
        os.kill(self.master, signal.SIGTERM)
        for process in [process for process in self.spawned if process.pid == self.master]:
            self.wait_gone(process)
        wait_until(lambda: not any(map(is_alive, old - tree(new))), f"{self.name}: the old master to end")
        wait_until(lambda: not fresh.exists(), f"{self.name}: the new master to take the pid file")
        self.master = new

    def stop(self) -> None:
        if is_alive(self.master):
            os.kill(self.master, signal.SIGTERM)
            wait_until(lambda: not is_alive(self.master), f"{self.name} to end", 20)
        super().stop()


class UnderTakeover(Server):
    """`takeover run`, started again for each deploy."""

    def run(self) -> subprocess.Popen[str]:
        address = ["--listen", f"tcp://127.0.0.1:{self.port}", "--control", str(self.folder / "control.sock")]
        options = ["--probation", "0.2", *shlex.split(self.kind.options)]
        command = [PYTHON, "-m", "takeover", "run", *address, *options, "--"]
        return self.serve([*command, *self.words(self.kind.fd)])

    def start(self) -> None:
        self.run()
        wait_until(lambda: "serving tcp" in self.said(), f"{self.name} to serve")

    def said(self) -> str:
        self.log.flush()
        return pathlib.Path(self.folder / "log").read_text(errors="replace")

    def restart(self) -> None:
        old = self.spawned[-1]
        new = self.run()
        wait_until(lambda: old.poll() is not None or new.poll() is not None, f"{self.name}: a takeover", 90)
        if new.poll() is not None:
            raise RuntimeError(f"{self.name}: the successor ended: {self.complaint()}")
        self.wait_gone(old)


def _make(base: type[Server], name: str, kind: Kind) -> type[Server]:
    return type(name, (base,), {"name": name, "kind": kind})


GROUPS: dict[str, tuple[type[Server], ...]] = {
    "uvicorn": (_make(UnderTakeover, "takeover run, uvicorn", UVICORN), _make(Alone, "uvicorn, HUP", UVICORN)),
    "hypercorn": (
        _make(UnderTakeover, "takeover run, hypercorn", HYPERCORN),
        _make(Alone, "hypercorn, HUP", HYPERCORN),
    ),
    "gunicorn, threads": (
        _make(UnderTakeover, "takeover run, gunicorn threads", GUNICORN),
        _make(Alone, "gunicorn threads, HUP", GUNICORN),
        _make(UsrTwo, "gunicorn threads, USR2", GUNICORN),
    ),
    "gunicorn, uvicorn-worker": (
        _make(UnderTakeover, "takeover run, gunicorn uvicorn-worker", GUNICORN_ASGI),
        _make(Alone, "gunicorn uvicorn-worker, HUP", GUNICORN_ASGI),
        _make(UsrTwo, "gunicorn uvicorn-worker, USR2", GUNICORN_ASGI),
    ),
    "granian": (_make(Alone, "granian, HUP", GRANIAN),),
}
"""What is compared with each other: in each group takeover run comes first."""
