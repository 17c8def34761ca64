"""What is said to a service manager arrives as sd_notify(3) has it, and what cannot be said harms nobody."""

from __future__ import annotations

import errno
import logging
import os
import pathlib
import socket
import threading
from collections.abc import Iterator

import pytest

from clients import LIMIT
from kernel import failing
from takeover.notify import LONGEST_NAME, Notifier, descriptor_name


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: pathlib.Path) -> Iterator[tuple[socket.socket, str]]:
    """A socket that hears, and its address as NOTIFY_SOCKET has it."""
    name = f"tko-{os.getpid()}-{os.urandom(4).hex()}"
    path = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.settimeout(LIMIT)
        sock.bind(path if request.param == "path" else f"\0{name}")
        yield sock, path if request.param == "path" else f"@{name}"


def test_fields_arrive_in_one_datagram(manager: tuple[socket.socket, str]) -> None:
    sock, address = manager
    assert Notifier(address).say("READY=1", "STATUS=serving")
    assert sock.recv(4096) == b"READY=1\nSTATUS=serving"


def test_a_descriptor_comes_along_and_stays_open_here(manager: tuple[socket.socket, str]) -> None:
    sock, address = manager
    reading, writing = os.pipe()
    assert Notifier(address).say("FDSTORE=1", "FDNAME=web", descriptors=[writing])
    data, (received,), _, _ = socket.recv_fds(sock, 4096, 1)
    assert data == b"FDSTORE=1\nFDNAME=web"
    os.write(received, b"a")
    os.write(writing, b"b")
    assert os.read(reading, 2) == b"ab"
    for descriptor in (reading, writing, received):
        os.close(descriptor)


def test_a_text_with_line_breaks_cannot_say_anything_else(manager: tuple[socket.socket, str]) -> None:
    sock, address = manager
    Notifier(address).say("STATUS=refused: \nMAINPID=1\r\0\udcff é")
    assert sock.recv(4096).decode() == "STATUS=refused:  MAINPID=1    é"


@pytest.mark.parametrize(
    "address", ["/nowhere/notify", "vsock:2:1234", "notify", "@", "/" + 200 * "x"], ids=lambda address: address[:12]
)
def test_who_does_not_hear_is_logged_once_and_nothing_else_happens(
    address: str, caplog: pytest.LogCaptureFixture
) -> None:
    notifier = Notifier(address)
    with caplog.at_level(logging.WARNING, "takeover"):
        assert not notifier.say("READY=1")
        assert not notifier.say("STOPPING=1")
        assert not notifier.wait_until_read(LIMIT)
    (line,) = caplog.messages
    assert line.startswith(f"cannot tell the service manager at {address}: ")


def test_a_manager_that_reads_nothing_delays_nobody_for_long(manager: tuple[socket.socket, str]) -> None:
    _, address = manager
    notifier = Notifier(address)
    while notifier.say("STATUS=" + 1000 * "x"):
        pass
    assert not notifier.say("STATUS=once more")


def test_a_barrier_is_over_when_the_manager_has_closed_its_descriptor(manager: tuple[socket.socket, str]) -> None:
    sock, address = manager
    notifier = Notifier(address)
    notifier.say("STOPPING=1")
    assert not notifier.wait_until_read(0.01)
    assert sock.recv(4096) == b"STOPPING=1"
    data, (received,), _, _ = socket.recv_fds(sock, 4096, 1)
    assert data == b"BARRIER=1"
    os.close(received)

    def hear() -> None:
        data, (received,), _, _ = socket.recv_fds(sock, 4096, 1)
        os.close(received)
        heard.append(data)

    heard: list[bytes] = []
    reader = threading.Thread(target=hear)
    reader.start()
    assert notifier.wait_until_read(LIMIT)
    reader.join(LIMIT)
    assert heard == [b"BARRIER=1"]


def test_where_no_descriptor_is_left_for_a_barrier_nobody_waits(
    manager: tuple[socket.socket, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, address = manager
    monkeypatch.setattr(os, "pipe", failing(errno.EMFILE))
    assert not Notifier(address).wait_until_read(LIMIT)


def test_a_forked_child_is_mute(manager: tuple[socket.socket, str]) -> None:
    sock, address = manager
    notifier = Notifier(address)
    child = os.fork()
    if child == 0:
        os._exit(1 if notifier.say("STOPPING=1") else 0)
    assert os.waitpid(child, 0)[1] == 0
    notifier.say("READY=1")
    assert sock.recv(4096) == b"READY=1"


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("tcp://127.0.0.1:80", "tcp%3A//127.0.0.1%3A80"),
        ("unix:/run/größe 100%", "unix%3A/run/gr%C3%B6%C3%9Fe 100%25"),
        ("a\nb\x7f", "a%0Ab%7F"),
    ],
)
def test_the_name_of_a_stored_descriptor_is_one_that_systemd_takes(text: str, name: str) -> None:
    assert descriptor_name(text) == name


def test_a_long_name_of_a_stored_descriptor_is_cut() -> None:
    assert len(descriptor_name(1000 * "é")) <= LONGEST_NAME
