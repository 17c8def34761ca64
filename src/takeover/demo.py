"""`takeover demo`: the main job before the user's eyes, with real processes, and what it cost the clients.

Some clients stay connected and talk all the time, through every generation; new ones come all the while; three
successors are started one after another, and one of them is killed in the middle of its takeover.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from . import query
from .errors import TakeoverError

URL = "tcp://127.0.0.1:0"
PATIENCE = 20.0
"""Seconds for a step that takes milliseconds, before the demo calls it failed."""

HALF_WAY = """
import sys, time, takeover
with takeover.join(sys.argv[1], service="echo") as service:
    service.listen(sys.argv[2])
    print("has the listeners", flush=True)
    time.sleep(60)
"""
"""A successor that asks for the service, gets the listeners, and is never ready."""


class Tally:
    """What the clients have seen so far. Times are in milliseconds."""

    def __init__(self) -> None:
        self.takeovers = 0
        self.moved = 0
        self.connects = 0
        self.failed = 0
        self.echoed = 0
        self.lost = 0
        self.slowest = {False: 0.0, True: 0.0}
        self.in_takeover = False
        self.first_failure = ""

    @property
    def clean(self) -> bool:
        return not (self.failed or self.lost)

    def failure(self, what: str, error: BaseException) -> None:
        self.first_failure = self.first_failure or f"{what}: {error!r}"


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, message: bytes) -> None:
    """Sends the message, which must come back as it was."""
    writer.write(message)
    if await reader.readexactly(len(message)) != message:
        raise ValueError("another message came back")


class Demo:
    """The processes, the clients and the account; `told` is called with each step of the story.

    The clients talk to `address` until they are told that they are `leaving`.
    """

    def __init__(self, clients: int, told: Callable[[str], None]) -> None:
        self.clients = clients
        self.tally = Tally()
        self.told = told
        self.status: dict[str, Any] = {}
        self._control = ""
        self._log = Path()
        self._processes: list[subprocess.Popen[bytes]] = []
        self.address = ("", 0)
        self.leaving = asyncio.Event()

    async def run(self) -> None:
        """Plays the whole story. Raises TakeoverError if a process does not do its part."""
        with tempfile.TemporaryDirectory(prefix="takeover-demo-", ignore_cleanup_errors=True) as folder:
            self._control = os.path.join(folder, "takeover.sock")
            self._log = Path(folder, "log")
            try:
                await self._play()
            finally:
                await asyncio.get_running_loop().run_in_executor(None, self._end_processes)

    async def _play(self) -> None:
        await self._start_server(1)
        host, _, port = self.status["listeners"][0]["address"].rpartition("://")[2].rpartition(":")
        self.address = (host, int(port))
        async with self._traffic():
            self.told(f"{self.clients} clients talk to pid {self.status['pid']}, and new ones come all the while")
            await asyncio.sleep(1.5)
            await self._take_over(2)
            await self._kill_half_way()
            await self._take_over(3)

    async def _take_over(self, generation: int) -> None:
        before = self.status["pid"]
        self.tally.in_takeover = True
        await self._start_server(generation)
        await asyncio.sleep(0.3)
        self.tally.in_takeover = False
        self.tally.takeovers += 1
        await self._look()
        moved = self.status["moved"]["in"]
        self.tally.moved += moved
        self.told(f"pid {self.status['pid']} took over from pid {before}, with {moved} connections that go on talking")
        await asyncio.sleep(1.5)

    async def _kill_half_way(self) -> None:
        self.tally.in_takeover = True
        victim = self._start("-c", HALF_WAY, self._control, URL, stdout=subprocess.PIPE)
        assert victim.stdout is not None
        await asyncio.get_running_loop().run_in_executor(None, victim.stdout.readline)
        victim.stdout.close()
        victim.kill()
        await asyncio.sleep(0.5)
        self.tally.in_takeover = False
        await self._look()
        self.told(f"pid {victim.pid} was killed in the middle of its takeover; pid {self.status['pid']} goes on")
        await asyncio.sleep(1.0)

    async def _start_server(self, generation: int) -> None:
        options = ("--listen", URL, "--control", self._control, "--probation", "0.2", "--drain-timeout", "10")
        self._start("-m", "takeover", "echo", *options)
        deadline = time.monotonic() + PATIENCE
        while self.status.get("generation") != generation or self.status.get("state") != "serving":
            if time.monotonic() > deadline:
                raise TakeoverError(f"generation {generation} does not come up:\n{self._log.read_text()}")
            await asyncio.sleep(0.02)
            with contextlib.suppress(TakeoverError):
                await self._look()

    def _start(self, *arguments: str, **options: Any) -> subprocess.Popen[bytes]:
        with self._log.open("ab") as log:
            process = subprocess.Popen([sys.executable, *arguments], stderr=log, **options)
        self._processes.append(process)
        return process

    async def _look(self) -> None:
        self.status = await asyncio.get_running_loop().run_in_executor(None, query.status, self._control)

    @contextlib.asynccontextmanager
    async def _traffic(self) -> AsyncIterator[None]:
        tasks = [asyncio.create_task(self.talk()) for _ in range(self.clients)]
        tasks += [asyncio.create_task(self.knock()) for _ in range(2)]
        watch = asyncio.create_task(self._watch())
        try:
            yield
        finally:
            self.leaving.set()
            watch.cancel()
            await asyncio.gather(watch, *tasks, return_exceptions=True)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(0.1)
            with contextlib.suppress(TakeoverError):
                await self._look()

    async def talk(self) -> None:
        """A client that stays: one message after the other, each of which must come back as it was."""
        number = 0
        try:
            reader, writer = await asyncio.open_connection(*self.address)
            with contextlib.closing(writer):
                while not self.leaving.is_set():
                    number += 1
                    await echo(reader, writer, b"%063d\n" % number)
                    self.tally.echoed += 1
                    await asyncio.sleep(0.02)
        except (OSError, EOFError, ValueError) as error:
            self.tally.lost += 1
            self.tally.failure("a client that talks", error)

    async def knock(self) -> None:
        """New clients, one after the other: connect, one message, gone."""
        while not self.leaving.is_set():
            began = time.perf_counter()
            self.tally.connects += 1
            try:
                reader, writer = await asyncio.open_connection(*self.address)
                took = (time.perf_counter() - began) * 1000
                with contextlib.closing(writer):
                    await echo(reader, writer, b"hello\n")
            except (OSError, EOFError, ValueError) as error:
                self.tally.failed += 1
                self.tally.failure("a new client", error)
            else:
                during = self.tally.in_takeover
                self.tally.slowest[during] = max(self.tally.slowest[during], took)
            await asyncio.sleep(0.003)

    def _end_processes(self) -> None:
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            try:
                process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
