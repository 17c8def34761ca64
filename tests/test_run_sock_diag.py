"""Which socket is at the other end of a connection, and who listens, as the kernel tells it."""

from __future__ import annotations

import os
import pathlib
import socket
from collections.abc import Iterator

import pytest

from newcomers import Listening, tcp, unix
from takeover.run import sock_diag


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
    def refuse(request: bytes) -> bytes:
        raise PermissionError(1, "Operation not permitted")

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
