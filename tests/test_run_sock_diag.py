"""Which socket is at the other end of a connection, and who listens, as the kernel tells it."""

from __future__ import annotations

import os
import pathlib
import socket
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest

from newcomers import Listening, tcp, unix
from takeover.run import conversations, sock_diag


def refuse(*_: object) -> NoReturn:
    raise PermissionError(1, "Operation not permitted")


@pytest.fixture(params=["tcp", "tcp6", "unix"])
def listening(request: pytest.FixtureRequest, tmp_path: pathlib.Path) -> Iterator[Listening]:
    made = {
        "tcp": tcp,
        "tcp6": lambda: tcp("::1", socket.AF_INET6),
        "unix": lambda: unix(str(tmp_path / "s")),
    }[request.param]()
    with made.sock:
        yield made


def test_the_servers_end_is_known_from_the_moment_that_it_is_accepted(listening: Listening) -> None:
    with socket.socket(listening.sock.family) as client:
        client.connect(listening.sock.getsockname())
        assert sock_diag.server_end(client) == sock_diag.IN_QUEUE
        accepted, _ = listening.sock.accept()
        with accepted:
            assert sock_diag.server_end(client) == os.fstat(accepted.fileno()).st_ino


def test_proc_tells_the_same_where_the_kernel_has_no_sock_diag(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sock_diag, "_ask", refuse)
    for listening in (tcp(), tcp("::1", socket.AF_INET6)):
        with listening.sock, socket.socket(listening.sock.family) as client:
            client.connect(listening.sock.getsockname())
            assert sock_diag.server_end(client) == sock_diag.IN_QUEUE
            accepted, _ = listening.sock.accept()
            with accepted:
                assert sock_diag.server_end(client) == os.fstat(accepted.fileno()).st_ino


def test_every_listener_is_found_with_its_url(listening: Listening) -> None:
    assert (listening.url, os.fstat(listening.sock.fileno()).st_ino) in sock_diag.all_listeners()


UNKNOWN_FAMILY = 255


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_UNIX])
def test_a_socket_without_another_end_has_none_that_is_known(family: int) -> None:
    with socket.socket(family) as sock, pytest.raises(sock_diag.Unknown):
        sock_diag.server_end(sock)


@pytest.mark.parametrize("asked", [True, False])
def test_a_connection_of_which_the_kernel_knows_nothing_any_more_has_ended(
    asked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not asked:
        monkeypatch.setattr(sock_diag, "_ask", refuse)
    ended: Any = SimpleNamespace(
        family=socket.AF_INET, getsockname=lambda: ("127.0.0.1", 1), getpeername=lambda: ("127.0.0.1", 2)
    )
    with pytest.raises(sock_diag.Unknown, match="the connection has ended"):
        sock_diag.server_end(ended)


def test_what_neither_the_kernel_nor_proc_tells_is_unknown_with_the_reason(
    listening: Listening, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sock_diag, "_ask", refuse)
    monkeypatch.setattr(sock_diag, "open", refuse, raising=False)
    with socket.socket(listening.sock.family) as client:
        client.connect(listening.sock.getsockname())
        with pytest.raises(sock_diag.Unknown, match=r"(sock_diag|/proc/net/tcp): Operation not permitted"):
            sock_diag.server_end(client)


def test_what_the_kernel_refuses_is_an_error_with_its_number() -> None:
    with pytest.raises(OSError, match="Invalid argument"):
        sock_diag._ask(bytes([UNKNOWN_FAMILY]) + bytes(55))
    with pytest.raises(OSError, match=r"\[Errno 22\] sock_diag"):
        list(conversations._dump(UNKNOWN_FAMILY, 80))
    assert sock_diag._dump(bytes([UNKNOWN_FAMILY]) + bytes(55)) == []


def test_where_the_kernel_may_not_be_asked_no_listener_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "socket", refuse)
    assert sock_diag.all_listeners() == []
