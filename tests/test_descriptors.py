"""A descriptor is what the kernel says it is, and asking leaves it as it was."""

from __future__ import annotations

import os
import pathlib
import socket
from collections.abc import Iterator

import pytest

from kernel import open_descriptors
from takeover.borrowed import BorrowedSocket
from takeover.descriptors import describe, expect, limit_and_held
from takeover.errors import RemoteProtocolError


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        yield sock


def test_a_tcp_listener(listener: socket.socket) -> None:
    found = describe(listener.fileno())
    assert (found.kind, found.family, found.type) == ("socket", socket.AF_INET, socket.SOCK_STREAM)
    assert found.protocol in (0, socket.IPPROTO_TCP)
    assert found.address == listener.getsockname()
    assert (found.listening, found.reuseport, found.v6only) == (True, False, False)


def test_a_connection_does_not_listen(listener: socket.socket) -> None:
    with socket.create_connection(listener.getsockname()) as client:
        found = describe(client.fileno())
        assert (found.listening, found.address) == (False, client.getsockname())


@pytest.mark.parametrize("v6only", [True, False])
@pytest.mark.parametrize("reuseport", [True, False])
def test_options_of_an_ipv6_socket(v6only: bool, reuseport: bool) -> None:
    with socket.socket(socket.AF_INET6) as sock:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, v6only)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, reuseport)
        found = describe(sock.fileno())
        assert (found.family, found.v6only, found.reuseport) == (socket.AF_INET6, v6only, reuseport)
        assert not found.listening


def test_a_udp_socket() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        found = describe(sock.fileno())
        assert (found.type, found.listening, found.address) == (socket.SOCK_DGRAM, False, sock.getsockname())


def test_unix_sockets_with_a_path_an_abstract_name_and_none(tmp_path: pathlib.Path) -> None:
    names: list[str | bytes] = [str(tmp_path / "socket"), b"\0takeover-%d" % os.getpid(), ""]
    for name in names:
        with socket.socket(socket.AF_UNIX) as sock:
            if name:
                sock.bind(name)
            found = describe(sock.fileno())
            assert (found.family, found.address, found.listening) == (socket.AF_UNIX, name, False)
            assert not found.reuseport


def test_what_is_no_socket(tmp_path: pathlib.Path) -> None:
    reader, writer = os.pipe()
    file = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    folder = os.open(tmp_path, os.O_RDONLY)
    try:
        found = [describe(descriptor) for descriptor in (reader, file, folder)]
        assert [each.kind for each in found] == ["fifo", "file", "other"]
        assert [(each.family, each.type, each.address, each.listening) for each in found] == [
            (None,) * 3 + (False,)
        ] * 3
        status = os.fstat(file)
        assert (found[1].device, found[1].inode) == (status.st_dev, status.st_ino)
    finally:
        for descriptor in (reader, writer, file, folder):
            os.close(descriptor)


def test_copies_share_device_and_inode_and_others_do_not(listener: socket.socket) -> None:
    with socket.socket(fileno=os.dup(listener.fileno())) as copy, socket.socket() as other:
        one, two, three = (describe(sock.fileno()) for sock in (listener, copy, other))
        assert (one.device, one.inode) == (two.device, two.inode) != (three.device, three.inode)


@pytest.mark.parametrize("timeout", [None, 60])
@pytest.mark.parametrize("blocking", [True, False])
def test_asking_changes_nothing(listener: socket.socket, timeout: float | None, blocking: bool) -> None:
    listener.setblocking(blocking)
    before = open_descriptors()
    socket.setdefaulttimeout(timeout)
    try:
        assert describe(listener.fileno()) == describe(listener.fileno())
    finally:
        socket.setdefaulttimeout(None)
    assert os.get_blocking(listener.fileno()) == blocking
    assert open_descriptors() == before
    socket.create_connection(listener.getsockname()).close()


def test_a_borrowed_socket_is_given_back_when_an_exception_flies(listener: socket.socket) -> None:
    borrowed = BorrowedSocket(listener.fileno())
    with pytest.raises(OSError, match="endpoint is not connected"), borrowed:
        borrowed.getpeername()
    assert borrowed.fileno() == -1
    assert describe(listener.fileno()).listening


@pytest.mark.parametrize("ask", [describe, lambda descriptor: expect(descriptor, kind="socket"), BorrowedSocket])
def test_a_closed_descriptor_is_an_os_error(ask: object) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    os.close(writer)
    assert callable(ask)
    for descriptor in (reader, -1):
        with pytest.raises(OSError, match="Bad file descriptor"):
            ask(descriptor)


def test_what_is_as_expected_passes(listener: socket.socket) -> None:
    found = expect(listener.fileno(), kind="socket", family=socket.AF_INET, type=socket.SOCK_STREAM, listening=True)
    assert found == describe(listener.fileno())
    assert expect(listener.fileno(), kind="socket") == found


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"kind": "fifo"}, "kind socket instead of fifo"),
        ({"family": socket.AF_UNIX}, "family AF_INET instead of AF_UNIX"),
        ({"type": socket.SOCK_DGRAM}, "type SOCK_STREAM instead of SOCK_DGRAM"),
        ({"listening": False}, "listening True instead of False"),
        ({"family": socket.AF_INET6, "listening": False}, "family AF_INET instead of AF_INET6, listening True"),
    ],
)
def test_what_differs_is_named(listener: socket.socket, wanted: dict[str, object], message: str) -> None:
    with pytest.raises(RemoteProtocolError, match=message):
        expect(listener.fileno(), **{"kind": "socket", **wanted})  # type: ignore[arg-type]


def test_a_pipe_is_not_believed_to_be_a_listener() -> None:
    reader, writer = os.pipe()
    with pytest.raises(RemoteProtocolError, match="kind fifo instead of socket, family None instead of AF_UNIX"):
        expect(reader, kind="socket", family=socket.AF_UNIX)
    os.fstat(reader)
    os.close(reader)
    os.close(writer)


def test_where_nothing_tells_how_many_are_open_some_are_counted_as_open(monkeypatch: pytest.MonkeyPatch) -> None:
    limit, held = limit_and_held()
    assert 3 < held < limit

    def fail(_: str) -> list[str]:
        raise FileNotFoundError

    monkeypatch.setattr(os, "listdir", fail)
    assert limit_and_held() == (limit, 64)
