"""Each server of examples/servers is deployed under load, with the command line that stands at the head of its example
(but for servers that are told to wait for 25 s for what is open: here for 3).

TAKEOVER_TEST_DEPLOYS tells how often; three times without it.
"""

from __future__ import annotations

import importlib.util
import os
import pathlib
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from http_load import PROGRAM, HttpLoad
from processes import Program, Room, sampled
from takeover.run import conversations, hush, orphans

EXAMPLES = pathlib.Path(__file__).parent.parent / "examples" / "servers"
DEPLOYS = int(os.environ.get("TAKEOVER_TEST_DEPLOYS", "3"))
ADDRESS = "tcp://127.0.0.1:8000"
WITH_WEBSOCKETS = ("asgi_app.py", "aiohttp_app.py")
GIVES_NOTICE = ("http_server.py", "socketserver_threads.py")
"""Those whose every answer says whether the connection is kept: no client can lose a request to a close."""

pytestmark = pytest.mark.skipif(not PROGRAM.exists(), reason="the benchmarks, which have the clients, are not there")


def commands() -> Iterator[tuple[str, str]]:
    """File and command line of each `takeover run` at the head of an example; a backslash continues a line."""
    for path in sorted(EXAMPLES.glob("*.*")):
        head = re.sub(r"\\\n\s*", "", path.read_text().partition("import ")[0])
        for line in re.findall(r"takeover run .*", head):
            yield path.name, line


CASES = list(commands())
IDS = [re.sub(r"[^a-z]+", "-", f"{name.partition('.')[0]} {line.partition(' -- ')[2]}") for name, line in CASES]


def missing(name: str, words: list[str]) -> str | None:
    """What a command needs and this machine has not."""
    modules = {"flask_app.py": "flask", "django_app.py": "django", "aiohttp_app.py": "aiohttp"}
    wanted = [modules[name]] if name in modules else []
    wanted += [word for word in ("uvicorn", "hypercorn", "daphne", "gunicorn") if word in words]
    wanted += ["uvicorn_worker"] if any("uvicorn_worker" in word for word in words) else []
    for module in wanted:
        if importlib.util.find_spec(module) is None:
            return f"{module} is not installed"
    tool = {"go_server.go": "go", "node_server.js": "node"}.get(name)
    return f"{tool} is not installed" if tool and not shutil.which(tool) else None


class Deployed:
    """A server of the examples and its deploys."""

    def __init__(self, room: Room, name: str, line: str) -> None:
        words = shlex.split(line)
        why = missing(name, words)
        if why:
            pytest.skip(why)
        room.environment["PATH"] = os.pathsep.join((os.path.dirname(sys.executable), os.environ["PATH"]))
        room.environment["PYTHONDONTWRITEBYTECODE"] = "1"
        if name.endswith(".go"):
            program = os.path.join(room.folder, "go_server")
            caches = {"GOCACHE": os.path.join(room.folder, "go-cache"), "GOFLAGS": "-mod=mod"}
            source = str(EXAMPLES / name)
            subprocess.run(["go", "build", "-o", program, source], env={**os.environ, **caches}, check=True)
            words = [program if word == "./go_server" else word for word in words]
        assert words[:2] == ["takeover", "run"] and ADDRESS in words
        room.environment["HOME"] = room.folder  # gunicorn has a control socket there
        room.tracebacks_allowed = "hypercorn" in words  # it cancels what is left at the end, and asyncio shows that
        options = ["--control", room.control, "--probation", "0.2"]
        options += ["--stop-timeout", "10"] if "--drain-first" in words else []
        rest = [room.url if word == ADDRESS else "6" if word == "25" else word for word in words[2:]]
        self.command = [sys.executable, "-m", "takeover", "run", *options, *rest]
        self.room = room
        self.current: Program | None = None

    def deploy(self) -> None:
        """Returns when the new one serves and the old one has ended."""
        old, new = self.current, self.room.run(*self.command, cwd=EXAMPLES)
        self.current = new
        self.room.wait_for_owner(new)
        if old is not None:
            assert old.wait() == 0

    def stop(self) -> None:
        """Ends the last one with all its workers, which would hold its output open."""
        if self.current is not None and self.current.running:
            self.current.signal(signal.SIGTERM)
            self.current.wait()


@pytest.fixture
def room() -> Iterator[Room]:
    with Room("python") as room:
        yield room


@pytest.mark.parametrize(("name", "line"), sampled(CASES), ids=sampled(IDS))
def test_a_server_is_deployed_under_load_without_a_failed_request(room: Room, name: str, line: str) -> None:
    server = Deployed(room, name, line)
    server.deploy()
    options = ["--keep-alive", "6", "--new", "6", "--pause", "10"]
    if name in WITH_WEBSOCKETS:
        options += ["--websockets", "3"]
    if name == "socketserver_threads.py":
        options += ["--lines"]
    load = HttpLoad(room.address, *options)
    try:
        for _ in range(DEPLOYS):
            server.deploy()
        seen = load.finish()
    finally:
        load.close()
        server.stop()
    print(name, seen)
    assert seen["connects_failed"] == {} and seen["requests_failed"] == {}, (
        seen,
        [each.text for each in room.programs],
    )
    if name not in GIVES_NOTICE or name == "http_server.py":
        assert seen["processes"] > DEPLOYS
    if name in GIVES_NOTICE:
        assert seen["keep_alives_lost"] == 0, seen


def test_each_example_has_its_command_line() -> None:
    assert {name for name, _ in CASES} == {path.name for path in EXAMPLES.glob("*.*")}


def test_connections_of_uvicorn_have_tcp_nodelay_from_their_listener(room: Room) -> None:
    """With --fd uvicorn takes them for UNIX sockets, and sets nothing."""
    server = Deployed(room, *next((name, line) for name, line in CASES if "uvicorn asgi_app:app" in line))
    try:
        server.deploy()
        assert server.current is not None
        with room.connect() as sock:
            sock.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert sock.recv(15) == b"HTTP/1.1 200 OK"
            listener: Any = SimpleNamespace(family=socket.AF_INET, getsockname=lambda: room.address)
            holders = conversations.holders(orphans.tree(server.current.pid))
            (found,) = conversations.of(holders, [listener])
            with socket.socket(fileno=hush.fetch(found.pid, found.descriptor)) as copy:
                assert copy.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    finally:
        server.stop()
