"""The machinery of the tests with real processes: rooms, the servers in them, and the boundaries that they come to."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import pathlib
import random
import re
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, TypeVar

from clients import LIMIT, Pounder, Steady, Talker, echo_once, eventually
from nursery import Nursery, Nursling
from streams import Streams
from takeover import query
from takeover.errors import TakeoverError

PROGRAMS = pathlib.Path(__file__).parent / "programs"
GENTLE = os.environ.get("TAKEOVER_TEST_GENTLE") == "1"
"""Whether processes are asked to end before they are killed: a killed one does not write down what it has executed."""
STEP = int(os.environ.get("TAKEOVER_TEST_STEP", "1"))
"""Sweeps over all boundaries take every so many; CI has no time for all of them in each run."""

OFFSET = int(os.environ.get("TAKEOVER_TEST_OFFSET", "0"))
"""The first that a sweep takes, so that one run takes others than the next."""

Item = TypeVar("Item")


def sampled(items: Iterable[Item], step: int = STEP) -> list[Item]:
    """Every so many of them, from OFFSET on, and one at the least."""
    listed = list(items)
    return listed[OFFSET % min(step, len(listed)) :: step]


FAST = {"heartbeat": 0.1, "silence": 0.6, "warming_silence": 0.8, "greeting": 1.5, "starting": 0.7}
"""Limits of the exchange for tests that wait for them to pass; a busy machine needs most of what they are at least."""


def free_address() -> tuple[str, int]:
    """A loopback address and port that nobody has: each room gets a 127.x.y.z of its own."""
    host = "127.{}.{}.{}".format(*(random.randint(1, 254) for _ in range(3)))
    with socket.socket() as sock:
        sock.bind((host, 0))
        return host, sock.getsockname()[1]


def descriptors(pid: int) -> Counter[str]:
    """What a process holds open, by kind."""
    kinds: Counter[str] = Counter()
    for entry in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):
            link = os.readlink(f"/proc/{pid}/fd/{entry}")
            kinds[os.path.basename(link) if link.startswith("/") else link.rstrip("0123456789[]:")] += 1
    return kinds


def private_memory(pid: int) -> int:
    """What a process shares with nobody, in kB, by proc_pid_smaps(5)."""
    text = pathlib.Path(f"/proc/{pid}/smaps_rollup").read_text()
    return sum(map(int, re.findall(r"^Private_\w+: +(\d+) kB", text, re.MULTILINE)))


def descriptors_at_rest(pid: int) -> dict[str, int] | None:
    """What a process holds open, if no link is and nothing changes for a moment."""
    held = descriptors(pid)
    time.sleep(0.02)
    return dict(held) if held == descriptors(pid) and "anon_inode:[pidfd" not in held else None


class Program:
    """One process and the lines that it writes; it is killed at the end of its room, by its pid."""

    def __init__(self, command: Sequence[str], start: Callable[..., Any] = subprocess.Popen, **options: Any) -> None:
        """start: what makes a process of the command and the options of subprocess.Popen."""
        settings = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, **options}
        self.process = start(command, **settings)
        self.pid = self.process.pid
        self.lines: list[str] = []
        self._changed = threading.Condition()
        self._ended = self.process.stdout is None
        self._reader = threading.Thread(target=self._read, daemon=True)
        if not self._ended:
            self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._changed:
                self.lines.append(line.decode(errors="replace").rstrip())
                self._changed.notify_all()
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    @property
    def text(self) -> str:
        return "\n".join(self.lines)

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    def wait_for(self, text: str, limit: float = LIMIT) -> str:
        """The first line that holds the text; fails if the process ends without one."""
        with self._changed:
            self._changed.wait_for(lambda: self._ended or any(text in line for line in self.lines), limit)
            found = [line for line in self.lines if text in line]
        assert found, f"pid {self.pid} did not say {text!r}, but:\n{self.text}"
        return found[0]

    def wait(self, limit: float = LIMIT) -> int:
        """The exit status, when it has ended and all that it wrote has been read."""
        try:
            status = self.process.wait(limit)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"pid {self.pid} has not ended; it said:\n{self.text}") from None
        if self.process.stdout is not None:
            self._reader.join(1)
        return status

    def signal(self, signum: int) -> None:
        self.process.send_signal(signum)

    def tell(self, line: str = "") -> None:
        """Writes a line to its standard input."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{line}\n".encode())
        self.process.stdin.flush()

    def end(self) -> None:
        """Kills what is left, and frees its pipe."""
        if GENTLE and self.running:
            self._ask_to_end()
        if self.running:
            self.process.kill()
        self.process.wait(LIMIT)
        if self.process.stdin is not None:
            self.process.stdin.close()
        if self.process.stdout is not None:
            self._reader.join(1)
            if not self._reader.is_alive():
                self.process.stdout.close()

    def _ask_to_end(self) -> None:
        """Twice, since a server drains after the first time."""
        for signum in (signal.SIGCONT, signal.SIGTERM, signal.SIGTERM):
            self.signal(signum)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(0.5 if signum == signal.SIGTERM else 0.05)
                return


def environment(backend: str) -> dict[str, str]:
    """That of every process of the tests: a backend, and nothing else that takeover goes by, or that a test changes."""
    path = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith(("TAKEOVER_", "PYTEST_"))},
        "TAKEOVER_BACKEND": backend,
        "PYTHONPATH": os.pathsep.join(map(os.path.abspath, path)),
    }


@functools.cache
def nursery(backend: str) -> Nursery:
    """The one for a backend, which is chosen when takeover is imported."""
    return Nursery(environment(backend))


class Room:
    """A folder with a control path, an address to serve on, and the processes that a test starts there."""

    def __init__(self, backend: str) -> None:
        self.backend = backend
        self.folder = tempfile.mkdtemp(prefix="tko")
        self.control = os.path.join(self.folder, "takeover.sock")
        self.address: tuple[str, int] = free_address()
        self.url = "tcp://{}:{}".format(*self.address)
        self.programs: list[Program] = []
        self.clients: list[Pounder | Steady] = []
        self.closing: list[Streams | Talker] = []
        self.tracebacks_allowed = False
        self.tells = True
        """Whether what the processes said is printed in the end, which pytest shows for a test that has failed."""
        self.environment = environment(backend)

    def run(self, *command: str, **options: Any) -> Program:
        """Starts any command in this room."""
        settings = {"env": self.environment, "cwd": self.folder, **options}
        program = Program(command, **settings)
        self.programs.append(program)
        return program

    def cli(self, *arguments: str, **options: Any) -> Program:
        """Starts the command `takeover`."""
        return self.run(sys.executable, "-m", "takeover", *arguments, **options)

    def python(self, path: str, argument: dict[str, Any], **options: Any) -> Program:
        """Starts a program of Python whose argument is JSON, from the nursery unless more is asked than that can do."""
        if not GENTLE and not options.keys() - {"stdin"}:
            parent = nursery(self.backend)
            if parent.environment == self.environment:
                options["start"] = functools.partial(Nursling, parent)
        return self.run(sys.executable, path, json.dumps(argument), **options)

    def program(self, name: str, argument: dict[str, Any] | None = None, **options: Any) -> Program:
        """Starts one of the programs of the tests."""
        return self.python(str(PROGRAMS / name), argument or {}, **options)

    def echo(self, argument: dict[str, Any] | None = None, **options: Any) -> Program:
        """Starts the echo server: programs/echo.py with the options of serve(), quicker to start than the command."""
        settings = {"listen": [self.url], "control": self.control, "probation": 0.0, **options}
        return self.program("echo.py", {"options": settings, **(argument or {})})

    def protocols(self, argument: dict[str, Any] | None = None, **options: Any) -> Program:
        """Starts programs/protocol_server.py, whose connections have a protocol class each, with options of serve()."""
        settings = {"listen": [self.url], "control": self.control, "probation": 0.0, **options}
        return self.program("protocol_server.py", {"options": settings, **(argument or {})})

    def streams(self, bursty: int = 0, **options: Any) -> Streams:
        client = Streams(self.address, bursty, **options)
        self.closing.append(client)
        return client

    def talker(self) -> Talker:
        """A connection to programs/protocol_server.py in its lines mode."""
        client = Talker(self.connect())
        self.closing.append(client)
        return client

    def dismiss(self, program: Program) -> None:
        """Forgets a program that has ended."""
        program.end()
        self.programs.remove(program)

    def member(self, listen: Sequence[str] | None = None, **options: Any) -> Program:
        """Starts programs/member.py, a server on join(); what it reads on standard input is `tell`'s."""
        join = {"control": self.control, "probation": 0.0, **options.pop("join", {})}
        wishes = {"listen": listen or [self.url], "join": join, **options}
        return self.program("member.py", wishes, stdin=subprocess.PIPE)

    def status(self, time_limit: float = 2.0) -> dict[str, Any]:
        return query.status(self.control, time_limit=time_limit)

    def owner(self) -> int | None:
        """The pid of the process that serves and is settled; None while there is none."""
        return self.whoever_is("serving")

    def whoever_is(self, *states: str) -> int | None:
        """The pid of the process that answers, if it says that it is in one of these states."""
        try:
            report = self.status(0.5)
        except (TakeoverError, OSError):
            return None
        return int(report["pid"]) if report["state"] in states else None

    def wait_for_owner(self, program: Program, limit: float = LIMIT) -> None:
        """Returns when the program serves and is settled; fails when it ends instead."""
        try:
            eventually(
                lambda: self.owner() == program.pid or not program.running,
                f"pid {program.pid} owns the service",
                limit,
            )
            assert program.running, f"pid {program.pid} has ended with {program.wait()}"
        except AssertionError as error:
            raise AssertionError(f"{error}; it said:\n{program.text}") from None

    def connect(self, timeout: float = LIMIT) -> socket.socket:
        return socket.create_connection(self.address, timeout)

    def refuses(self) -> bool:
        """Whether nobody listens; a listener that is just being closed resets whoever came a moment before."""
        try:
            self.connect().close()
        except ConnectionRefusedError:
            return True
        except ConnectionResetError:
            pass
        return False

    def connect_control(self) -> socket.socket:
        """A bare connection to the control socket."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.settimeout(LIMIT)
        sock.connect(self.control)
        return sock

    def round_trip(self) -> None:
        """A new connection is accepted and echoed to."""
        with self.connect() as sock:
            echo_once(sock, os.urandom(16))

    def pound(self, **options: Any) -> Pounder:
        client = Pounder(self.address, **options)
        self.clients.append(client)
        return client

    def steady(self, count: int) -> Steady:
        client = Steady(self.address, count)
        self.clients.append(client)
        return client

    def left_behind(self) -> list[str]:
        return sorted(os.listdir(self.folder))

    def __enter__(self) -> Room:  # noqa: PYI034 - typing.Self needs Python 3.11
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for client in self.clients:
            client.stop()
        for each in self.closing:
            each.close()
        for program in self.programs:
            program.end()
            if self.tells:
                print(f"--- pid {program.pid} said:\n{program.text}")
        shutil.rmtree(self.folder, ignore_errors=True)
        if kind is None and not self.tracebacks_allowed:
            for program in self.programs:
                assert "Traceback" not in program.text, f"pid {program.pid} wrote a traceback:\n{program.text}"


class Boundaries:
    """Learns of every boundary that the processes of a room come to (programs/wishes.py), and may act at some of them.

    A process waits at each boundary for an answer, so what is done at it happens there and nowhere else.
    """

    def __init__(self, acts: Mapping[str, Callable[[], bool]] | None = None) -> None:
        """What is to be done at the first boundary of a name, or at the third of "name #3".

        A true answer means that the process hangs there.

        `reached` is set when everything has been done.
        """
        self.name = f"tko-{os.getpid()}-{os.urandom(6).hex()}"
        self.seen: list[str] = []
        self.reached = threading.Event()
        self._acts = dict(acts or {})
        self._hanging: list[socket.socket] = []
        self._listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listening.bind(f"\0{self.name}")
        self._listening.listen(64)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listening, selectors.EVENT_READ)
        self._ending, self._end = socket.socketpair()
        self._selector.register(self._ending, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while True:
            for key, _ in self._selector.select():
                sock: Any = key.fileobj
                if sock is self._ending:
                    return
                if sock is self._listening:
                    self._selector.register(sock.accept()[0], selectors.EVENT_READ)
                    continue
                try:
                    step = sock.recv(200).decode()
                except ConnectionResetError:
                    step = ""
                if not step:
                    self._selector.unregister(sock)
                    sock.close()
                elif not self._hangs(step):
                    self._answer(sock)
                else:
                    self._hanging.append(sock)

    def _hangs(self, step: str) -> bool:
        self.seen.append(step)
        count = self.seen.count(step)
        act = self._acts.pop(step if count == 1 else f"{step} #{count}", None)
        if act is None:
            return False
        hangs = act()
        if not self._acts:
            self.reached.set()
        return hangs

    @staticmethod
    def _answer(sock: socket.socket) -> None:
        with contextlib.suppress(OSError):
            sock.send(b"g")

    def let_go(self) -> None:
        """Who hangs goes on."""
        while self._hanging:
            self._answer(self._hanging.pop())

    def close(self) -> None:
        self._end.send(b"x")
        self._thread.join(LIMIT)
        for key in list(self._selector.get_map().values()):
            key.fileobj.close()  # type: ignore[union-attr]
        self._end.close()
        self._selector.close()


@contextlib.contextmanager
def stopped(program: Program) -> Iterator[None]:
    """The process is stopped, and has stopped, inside the block."""
    stop(program)
    try:
        yield
    finally:
        program.signal(signal.SIGCONT)


def stop(program: Program) -> None:
    """Stops a process, which does nothing more when this returns; one that has ended meanwhile does so too."""
    program.signal(signal.SIGSTOP)
    eventually(lambda: not program.running or state_of(program.pid) == "T", "the process is stopped")


def stopping(programs: Sequence[Program], which: int) -> Callable[[], bool]:
    """For a boundary: stops the program that is, or is about to be, in this place of the list."""

    def act() -> bool:
        eventually(lambda: len(programs) > which, "the program is started")
        stop(programs[which])
        return False

    return act


def state_of(pid: int) -> str:
    """The letter of proc_pid_stat(5); empty for a process that has gone."""
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""


def catches(pid: int, signum: int) -> bool:
    """Whether a process has a handler for a signal, by proc_pid_status(5)."""
    status = pathlib.Path(f"/proc/{pid}/status").read_text()
    mask = int(status.partition("SigCgt:")[2].split()[0], 16)
    return bool(mask >> (signum - 1) & 1)
