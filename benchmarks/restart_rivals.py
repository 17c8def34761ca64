"""The ways to restart a server that are compared: each can start, restart once, and end."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pathlib
import shutil
import signal
import socket
import subprocess
from collections.abc import Sequence

from .processes import PYTHON, SERVER_CPU, children, end, environment, is_alive, start, wait_until
from .subjects import takeover_lacks


def free_port() -> int:
    """A port of 127.0.0.1 outside the ephemeral range's reach of this moment: free now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


class Rival:
    """`restart` returns when the new process serves and the old one has gone."""

    name = ""
    http = False
    rate = 5000

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = folder
        self.port = free_port()
        self.spawned: list[subprocess.Popen[str]] = []
        self.log = (folder / "log").open("w")

    def missing(self) -> str | None:
        """Why it cannot run here, if it cannot."""
        return None

    def spawn(self, command: Sequence[str], **variables: str) -> subprocess.Popen[str]:
        process = start(
            command, SERVER_CPU, cwd=self.folder, env=environment(**variables), stdout=self.log, stderr=self.log
        )
        self.spawned.append(process)
        return process

    def complaint(self) -> str:
        """The last line that the servers wrote."""
        self.log.flush()
        lines = (self.folder / "log").read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else "it said nothing"

    def wait_gone(self, process: subprocess.Popen[str], limit: float = 60) -> None:
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"{self.name}: pid {process.pid} is still there after {limit:.0f} s") from None
        self.spawned.remove(process)

    def accepts(self) -> bool:
        if self.spawned and self.spawned[-1].poll() is not None:
            raise RuntimeError(f"{self.name}: {self.complaint()}")
        with socket.socket() as sock:
            sock.settimeout(5)
            return sock.connect_ex(("127.0.0.1", self.port)) == 0

    def start(self) -> None:
        raise NotImplementedError

    def restart(self) -> None:
        raise NotImplementedError

    def stop(self) -> None:
        for process in reversed(self.spawned):
            end(process)
        self.log.close()


class Takeover(Rival):
    """The command itself, started again and again on the same address and control path."""

    backend = ""

    def missing(self) -> str | None:
        return takeover_lacks(self.backend)

    def serve(self) -> subprocess.Popen[str]:
        address = f"tcp://127.0.0.1:{self.port}"
        command = [
            PYTHON,
            "-m",
            "takeover",
            "echo",
            "--listen",
            address,
            "--control",
            str(self.folder / "control.sock"),
        ]
        return self.spawn(command, TAKEOVER_BACKEND=self.backend)

    def start(self) -> None:
        self.serve()
        wait_until(self.accepts, f"{self.name} to listen")

    def restart(self) -> None:
        old = self.spawned[-1]
        new = self.serve()
        wait_until(lambda: old.poll() is not None or new.poll() is not None, f"{self.name}: a takeover", 60)
        if new.poll() is not None:
            raise RuntimeError(f"{self.name}: the successor ended: {self.complaint()}")
        self.wait_gone(old)


class TakeoverCython(Takeover):
    name = "takeover, cython"
    backend = "cython"


class TakeoverPython(Takeover):
    name = "takeover, python"
    backend = "python"


class StopThenStart(Rival):
    name = "stop, then start"
    options: tuple[str, ...] = ()

    def serve(self) -> None:
        ready, announce = os.pipe()
        command = [PYTHON, "-m", "benchmarks.servers.restartable", str(self.port), *self.options]
        with open(ready) as lines:
            with open(announce, "w") as out:
                self.spawned.append(start(command, SERVER_CPU, stdout=out, stderr=self.log))
            if not lines.readline():
                raise RuntimeError(f"{self.name}: {self.complaint()}")

    def start(self) -> None:
        self.serve()

    def restart(self) -> None:
        old = self.spawned[-1]
        old.terminate()
        self.wait_gone(old)
        self.serve()


class ReusePort(StopThenStart):
    name = "SO_REUSEPORT, new then old"
    options = ("--reuseport",)

    def restart(self) -> None:
        old = self.spawned[-1]
        self.serve()
        old.terminate()
        self.wait_gone(old)


class Mastered(Rival):
    """A master with one worker, found by its pid file."""

    http = True

    def pid(self) -> int:
        try:
            return int((self.folder / "pid").read_text() or 0)
        except (FileNotFoundError, ValueError):
            return 0

    def wait_started(self) -> None:
        wait_until(lambda: self.pid() and children(self.pid()) and self.accepts(), f"{self.name} to listen")

    def replace_worker(self) -> None:
        master = self.pid()
        old = children(master)
        os.kill(master, signal.SIGHUP)
        wait_until(lambda: children(master) and not children(master) & old, f"{self.name}: a new worker")

    def stop(self) -> None:
        pid = self.pid()
        if pid and is_alive(pid):
            os.kill(pid, signal.SIGTERM)
            with contextlib.suppress(TimeoutError):
                wait_until(lambda: not is_alive(pid), f"{self.name} to end", 5)
        super().stop()


class NginxHup(Mastered):
    """In the background, since nginx ignores USR2 with `daemon off`."""

    name = "nginx, HUP"

    def missing(self) -> str | None:
        return None if shutil.which("nginx") else "nginx is not installed"

    def start(self) -> None:
        folder = self.folder
        kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        paths = "".join(f"{kind}_temp_path {folder}/{kind};\n" for kind in kinds)
        (folder / "nginx.conf").write_text(
            f"worker_processes 1; pid {folder}/pid; error_log {folder}/error.log;\n"
            "events { worker_connections 8192; }\n"
            f"http {{ access_log off; {paths}"
            f"server {{ listen 127.0.0.1:{self.port} backlog=4096; location / {{ return 200 '{'x' * 64}'; }} }} }}\n"
        )
        program = shutil.which("nginx") or "nginx"
        options = {"-p": folder, "-c": folder / "nginx.conf", "-e": folder / "error.log"}
        launcher = self.spawn([program, *(str(word) for option in options.items() for word in option)])
        self.wait_gone(launcher)
        self.wait_started()

    def restart(self) -> None:
        self.replace_worker()


class NginxUsr2(NginxHup):
    name = "nginx, USR2"

    def restart(self) -> None:
        master = self.pid()
        os.kill(master, signal.SIGUSR2)
        wait_until(lambda: self.pid() not in (0, master) and children(self.pid()), f"{self.name}: a new master")
        os.kill(master, signal.SIGQUIT)
        wait_until(lambda: not is_alive(master), f"{self.name}: the old master to end")


class Haproxy(Rival):
    name = "haproxy, -sf"
    http = True
    over_socket = False

    def missing(self) -> str | None:
        return None if shutil.which("haproxy") else "haproxy is not installed"

    def serve(self, *options: str) -> None:
        self.spawn(["haproxy", "-db", "-f", str(self.folder / "haproxy.cfg"), *options])

    def start(self) -> None:
        (self.folder / "haproxy.cfg").write_text(
            "global\n nbthread 1\n maxconn 8000\n"
            f" stats socket {self.folder}/admin.sock level admin expose-fd listeners\n"
            "defaults\n mode http\n timeout client 5s\n timeout server 5s\n timeout connect 5s\n"
            f"frontend all\n bind 127.0.0.1:{self.port} backlog 4096\n"
            f" http-request return status 200 content-type text/plain string {'x' * 64}\n"
        )
        self.serve()
        wait_until(self.accepts, f"{self.name} to listen")

    def restart(self) -> None:
        old = self.spawned[-1]
        inherit = ("-x", str(self.folder / "admin.sock")) if self.over_socket else ()
        self.serve(*inherit, "-sf", str(old.pid))
        self.wait_gone(old)


class HaproxyOverSocket(Haproxy):
    name = "haproxy, -x -sf"
    over_socket = True


class GunicornHup(Mastered):
    name = "gunicorn, HUP"
    rate = 700

    def missing(self) -> str | None:
        return None if importlib.util.find_spec("gunicorn") else "gunicorn is not installed"

    def start(self) -> None:
        options = ["-w", "1", "--backlog", "4096", "-b", f"127.0.0.1:{self.port}", "-p", str(self.folder / "pid")]
        self.spawn([PYTHON, "-m", "gunicorn", *options, "--log-level", "error", "benchmarks.servers.wsgi:application"])
        self.wait_started()

    def restart(self) -> None:
        self.replace_worker()


class GunicornUsr2(GunicornHup):
    name = "gunicorn, USR2"

    def restart(self) -> None:
        master, fresh = self.pid(), self.folder / "pid.2"
        os.kill(master, signal.SIGUSR2)
        wait_until(lambda: fresh.exists() and children(int(fresh.read_text() or 0)), f"{self.name}: a new master")
        os.kill(master, signal.SIGTERM)
        for process in [process for process in self.spawned if process.pid == master]:
            self.wait_gone(process)
        wait_until(lambda: not is_alive(master), f"{self.name}: the old master to end")
        wait_until(lambda: self.pid() not in (0, master), f"{self.name}: the new master to take the pid file")


RIVALS: tuple[type[Rival], ...] = (
    TakeoverCython,
    TakeoverPython,
    StopThenStart,
    ReusePort,
    NginxHup,
    NginxUsr2,
    Haproxy,
    HaproxyOverSocket,
    GunicornHup,
    GunicornUsr2,
)
