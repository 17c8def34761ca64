"""serve() in the moments in which its process has the service and its loop does not run, and echo() around it."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import socket
from collections.abc import Iterator
from types import ModuleType
from typing import Any, NoReturn

import pytest

import takeover
from clients import LIMIT, eventually
from processes import Room
from takeover import echo
from takeover.errors import LocalError
from takeover.server import SIGNALS


@pytest.fixture
def incumbent(room: Room, loop_module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[takeover.Service]:
    """Serves in the room; serve() takes a loop of the backend."""
    monkeypatch.setattr("takeover.server.native", loop_module)
    with takeover.join(room.control) as service:
        service.listen(room.url)
        service.ready()
        yield service


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_between_the_commit_and_the_loop_ends_the_service_as_it_would_in_the_loop(
    room: Room,
    incumbent: takeover.Service,
    signum: signal.Signals,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    name_of = takeover.Service.name_of

    def interrupted(member: takeover.Service, sock: socket.socket) -> str:
        signal.raise_signal(signum)
        return name_of(member, sock)

    caplog.set_level("INFO", "takeover")
    monkeypatch.setattr(takeover.Service, "name_of", interrupted)
    before = signal.getsignal(signum)
    takeover.serve(asyncio.Protocol, [room.url], room.control)
    assert f"{signum.name}: draining 0 connections" in caplog.messages
    assert caplog.messages.index("ended") > caplog.messages.index(f"{signum.name}: draining 0 connections")
    assert signal.getsignal(signum) == before
    assert incumbent.wait(LIMIT) and incumbent.state != "serving"
    incumbent.close()
    assert room.refuses() and room.left_behind() == []


def test_where_the_loop_takes_no_listener_the_incumbent_takes_the_service_back(
    room: Room, incumbent: takeover.Service, loop_module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full(loop_module.Loop):  # type: ignore[name-defined, misc]
        def listen(self, *_: Any) -> NoReturn:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(loop_module, "Loop", Full)
    with pytest.raises(LocalError, match="what was taken over cannot be served here: No space left"):
        takeover.serve(asyncio.Protocol, [room.url], room.control)
    eventually(lambda: incumbent.accepts, "the incumbent accepts")
    last = eventually(lambda: incumbent.status()["last_takeover"], "the takeover is told of")
    assert (last["outcome"], incumbent.state) == ("undone", "serving")


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_before_the_echo_server_has_begun_ends_it_in_order_and_later_ones_do_not_count(
    signum: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("takeover.echo.serve", lambda *_, **__: signal.raise_signal(signum))
    before = [signal.getsignal(each) for each in SIGNALS]
    try:
        with pytest.raises(SystemExit) as ended:
            echo.echo()
        assert ended.value.code == 0
        signal.raise_signal(signum)
    finally:
        for each, handler in zip(SIGNALS, before, strict=True):
            signal.signal(each, handler)
