"""Which socket is at the other end of a connection, and who listens, as the kernel tells it."""

from __future__ import annotations

import os
import pathlib
import socket
import struct
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest

from clients import eventually
from newcomers import Listening, tcp, unix
from takeover.run import conversations, proc, sock_diag
from takeover.run.probes import Probe, Taken, endpoint


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


@pytest.fixture
def accepted() -> Iterator[tuple[Probe, socket.socket]]:
    """A probe, and the connection at the other end of it."""
    listening = tcp()
    with listening.sock:
        probe = Probe(endpoint(listening.url, listening.sock))
        try:
            eventually(lambda: sock_diag.server_end(probe.sock) == sock_diag.IN_QUEUE, "the probe is in the queue")
            with listening.sock.accept()[0] as server:
                yield probe, server
        finally:
            probe.close()


def test_where_the_kernel_does_not_tell_who_accepted_a_greeting_shows_that_somebody_did(
    accepted: tuple[Probe, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    def tell_nothing(sock: socket.socket) -> int:
        raise sock_diag.Unknown("sock_diag: Operation not permitted")

    monkeypatch.setattr(sock_diag, "server_end", tell_nothing)
    probe, server = accepted
    assert probe.taken([]) is None and probe.lost == "sock_diag: Operation not permitted"
    server.sendall(b"220 mail.example.org ESMTP\r\n")
    assert probe.taken([]) == Taken(None, "sock_diag: Operation not permitted")
    assert not probe.vanished
    server.shutdown(socket.SHUT_WR)
    assert probe.taken([]) is None and probe.vanished
    assert probe.lost == "it was accepted and closed at once"


def test_a_probe_that_is_reset_was_accepted_by_nobody_knows_whom(accepted: tuple[Probe, socket.socket]) -> None:
    probe, server = accepted
    assert probe.taken([os.getpid()]) == Taken(os.getpid())
    server.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    server.close()
    assert probe.taken([os.getpid()]) is None
    assert (probe.lost, probe.vanished) == ("it was accepted and ended with Connection reset by peer", True)


@pytest.mark.parametrize(
    ("holds", "hidden", "taken"),
    [
        (None, {1}, Taken(None, "pid 1: Permission denied")),
        (None, {1, 2}, Taken(None, "pid 1: Permission denied")),
        (3, {1, 2}, Taken(None)),
        (1, set(), Taken(1)),
    ],
)
def test_who_has_accepted_a_probe_is_told_as_far_as_processes_can_be_looked_into(
    accepted: tuple[Probe, socket.socket],
    monkeypatch: pytest.MonkeyPatch,
    holds: int | None,
    hidden: set[int],
    taken: Taken,
) -> None:
    """Process 1 is the command's, and processes 2 and 3 are other people's."""
    probe, server = accepted
    inode = os.fstat(server.fileno()).st_ino

    def descriptors(pid: int) -> dict[int, str]:
        if pid in hidden:
            raise proc.Hidden(f"pid {pid}: Permission denied")
        return {5: f"socket:[{inode}]"} if pid == holds else {}

    monkeypatch.setattr(proc, "descriptors", descriptors)
    monkeypatch.setattr(proc, "all_processes", lambda: iter([SimpleNamespace(pid=pid) for pid in (1, 2, 3)]))
    assert probe.taken([1]) == taken
