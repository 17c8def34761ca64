"""A loop of each kind in a thread of its own, and a protocol that tells what happened to it."""

from __future__ import annotations

import asyncio
import importlib
import queue
import socket
import threading
from collections.abc import Callable
from types import ModuleType
from typing import Any

LIMIT = 20.0  # seconds after which a test that waits for something has failed


class Recorder(asyncio.Protocol):
    """Puts the name of each callback, and what came with it, into `events`."""

    keep_open = False

    def __init__(self) -> None:
        self.events: queue.SimpleQueue[tuple[Any, ...]] = queue.SimpleQueue()
        self.received = bytearray()
        self.transport: Any = None

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.events.put(("made",))

    def data_received(self, data: bytes) -> None:
        assert type(data) is bytes
        self.received += data
        self.events.put(("data", data))

    def eof_received(self) -> bool:
        self.events.put(("eof",))
        return self.keep_open

    def pause_writing(self) -> None:
        self.events.put(("pause",))

    def resume_writing(self) -> None:
        self.events.put(("resume",))

    def connection_lost(self, error: Exception | None) -> None:
        self.events.put(("lost", error))

    def next(self) -> tuple[Any, ...]:
        return self.events.get(timeout=LIMIT)

    def until(self, name: str) -> tuple[Any, ...]:
        while True:
            event = self.next()
            if event[0] == name:
                return event


class Case:
    """A running loop. `call` runs something on its thread and gives back what that returned or raised."""

    def __init__(self) -> None:
        self.sockets: list[socket.socket] = []
        self.thread = threading.Thread(target=self.run)

    def run(self) -> None:
        raise NotImplementedError

    def post(self, callback: Callable[..., object], *args: Any) -> None:
        raise NotImplementedError

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        result: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()

        def on_the_loop() -> None:
            try:
                result.put((function(*args), None))
            except BaseException as error:  # noqa: BLE001 - raised again by the caller
                result.put((None, error))

        self.post(on_the_loop)
        value, error = result.get(timeout=LIMIT)
        if error is not None:
            raise error
        return value

    def bind(self, family: int = socket.AF_INET, backlog: int = 128, address: Any = None) -> socket.socket:
        sock = socket.socket(family, socket.SOCK_STREAM)
        self.sockets.append(sock)
        sock.bind(address or ("127.0.0.1", 0))
        sock.listen(backlog)
        return sock

    def connect(self, listener: socket.socket) -> socket.socket:
        client = socket.socket(listener.family, socket.SOCK_STREAM)
        self.sockets.append(client)
        client.settimeout(LIMIT)
        client.connect(listener.getsockname())
        return client

    def serve(self, listener: socket.socket, factory: Callable[[], Any]) -> Any:
        raise NotImplementedError

    def pair(self, recorder: Recorder) -> socket.socket:
        """A client, and `recorder` connected to it."""
        listener = self.bind()
        self.serve(listener, lambda: recorder)
        client = self.connect(listener)
        assert recorder.next() == ("made",)
        return client

    def close(self) -> None:
        for sock in self.sockets:
            sock.close()


class OurCase(Case):
    def __init__(self, module: ModuleType) -> None:
        super().__init__()
        self.loop = module.Loop()
        self.thread.start()

    def run(self) -> None:
        self.loop.run()

    def post(self, callback: Callable[..., object], *args: Any) -> None:
        self.loop.call_soon_threadsafe(callback, *args)

    def serve(self, listener: socket.socket, factory: Callable[[], Any]) -> Any:
        return self.call(self.loop.listen, listener, factory)

    def stop(self) -> None:
        if self.thread.is_alive():
            self.post(self.loop.stop)
            self.thread.join(LIMIT)
        assert not self.thread.is_alive()

    def close(self) -> None:
        self.stop()
        self.loop.close()
        super().close()


class AsyncioCase(Case):
    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.SelectorEventLoop()
        self.made: list[Any] = []
        self.thread.start()

    def run(self) -> None:
        self.loop.run_forever()
        self.loop.run_until_complete(self.loop.shutdown_asyncgens())

    def post(self, callback: Callable[..., object], *args: Any) -> None:
        self.loop.call_soon_threadsafe(callback, *args)

    def serve(self, listener: socket.socket, factory: Callable[[], Any]) -> Any:
        listener.setblocking(False)

        def recorded() -> Any:
            self.made.append(factory())
            return self.made[-1]

        return asyncio.run_coroutine_threadsafe(self.loop.create_server(recorded, sock=listener), self.loop).result(
            LIMIT
        )

    def close(self) -> None:
        def abort() -> None:
            for protocol in self.made:
                if protocol.transport is not None and not protocol.transport.is_closing():
                    protocol.transport.abort()
            self.loop.call_later(0.01, self.loop.stop)

        self.post(abort)
        self.thread.join(LIMIT)
        self.loop.close()
        super().close()


def make_case(kind: str) -> Case:
    if kind == "asyncio":
        return AsyncioCase()
    return OurCase(importlib.import_module("takeover._loop" if kind == "cython" else "takeover._loop_py"))


def read_to_the_end(client: socket.socket) -> bytes:
    parts = []
    while part := client.recv(1 << 16):
        parts.append(part)
    return b"".join(parts)
