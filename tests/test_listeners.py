"""Addresses: what a URL stands for, and which inherited socket is which (the kernel says, not the name)."""

from __future__ import annotations

import contextlib
import os
import pathlib
import random
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

import takeover
from clients import LIMIT, eventually
from kernel import opened
from processes import Room, free_address
from takeover import listeners
from takeover.errors import AddressError, ListenError


@contextmanager
def taken_over(
    room: Room, old_urls: list[str], new_urls: list[str]
) -> Iterator[tuple[takeover.Report, dict[str, list[socket.socket]]]]:
    """What a successor reports, and its sockets by URL, after it has taken over."""
    with takeover.join(room.control, probation=0) as old:
        for url in old_urls:
            old.listen_all(url)
        old.ready()
        with takeover.join(room.control) as new:
            socks = {url: new.listen_all(url) for url in new_urls}
            report = new.ready()
            eventually(lambda: new.state == "serving", "the takeover is settled")
            yield report, socks


@pytest.mark.parametrize(
    "url",
    [
        "", "127.0.0.1:80", "http://127.0.0.1:80", "tcp://:80", "tcp://127.0.0.1", "tcp://127.0.0.1:http", "tcp://::1:80",
        "tcp://127.0.0.1:65536", "tcp://127.0.0.1:80?reuseport=0", "tcp://127.0.0.1:80?v6only", "tcp://127.0.0.1:80/x",
        "tcp://no.such.host.invalid:80", "unix:" + "x" * 200,
    ],
)  # fmt: skip
def test_what_is_no_address_is_refused_with_a_reason(url: str) -> None:
    with pytest.raises(AddressError) as caught:
        listeners.resolve(url)
    assert url in str(caught.value) and "\n" not in str(caught.value)


def test_the_same_address_twice_is_a_mistake_also_under_another_spelling(room: Room) -> None:
    with takeover.join(room.control) as service:
        service.listen(room.url)
        with pytest.raises(AddressError, match="already"):
            service.listen(room.url)
        service.listen(f"unix:{room.folder}/a")
        with pytest.raises(AddressError, match="already"):
            service.listen(f"unix://{room.folder}/./a")


def test_one_socket_is_not_enough_for_an_address_that_stands_for_several(room: Room) -> None:
    with takeover.join(room.control) as service, pytest.raises(AddressError, match="listen_all"):
        service.listen("tcp://127.0.0.1:0?reuseport=2")


def bind(url: str) -> socket.socket:
    (address,) = listeners.resolve(url)
    return listeners.bind(address)


def test_a_socket_file_that_nobody_listens_on_is_replaced(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "s"
    bind(f"unix:{path}").close()
    assert path.is_socket()
    with bind(f"unix:{path}") as sock, socket.socket(socket.AF_UNIX) as client:
        listeners.listen(sock, str(path))
        client.connect(str(path))


@pytest.mark.parametrize("way", ["listens", "has a full queue", "takes datagrams"])
def test_a_socket_file_of_somebody_who_lives_stays(tmp_path: pathlib.Path, way: str) -> None:
    path = str(tmp_path / "s")
    kind = socket.SOCK_DGRAM if way == "takes datagrams" else socket.SOCK_STREAM
    with socket.socket(socket.AF_UNIX, kind) as theirs, socket.socket(socket.AF_UNIX, kind) as client:
        theirs.bind(path)
        if kind == socket.SOCK_STREAM:
            theirs.listen(0)
        if way == "has a full queue":
            client.connect(path)
        before, inode = opened(), os.lstat(path).st_ino
        with pytest.raises(ListenError, match="somebody else is listening there"):
            bind(f"unix:{path}")
        assert (opened(), os.lstat(path).st_ino) == (before, inode)


def test_what_is_in_the_way_of_a_unix_listener_and_is_no_socket_stays(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "s"
    path.write_text("somebody's")
    before = opened()
    with pytest.raises(ListenError, match="something in the way that is not a socket"):
        bind(f"unix:{path}")
    assert (opened(), path.read_text()) == (before, "somebody's")


def test_an_address_on_which_somebody_else_began_to_listen_meanwhile_is_said_to_be_taken() -> None:
    """Two may be bound to one address (SO_REUSEADDR) as long as neither listens."""
    host, port = free_address()
    url = f"tcp://{host}:{port}"
    with bind(url) as theirs, bind(url) as ours:
        listeners.listen(theirs, url)
        with pytest.raises(ListenError, match=f"listen {url}: somebody else is listening there"):
            listeners.listen(ours, url)


def test_where_the_kernel_takes_no_filter_a_listener_goes_on_letting_in() -> None:
    lock_filter = 44  # SO_LOCK_FILTER of socket(7): what is attached stays, also where that is nothing
    with socket.create_server(("127.0.0.1", 0)) as sock:
        sock.setsockopt(socket.SOL_SOCKET, lock_filter, 1)
        assert not listeners.refuse_new(sock)
        socket.create_connection(sock.getsockname(), LIMIT).close()


def test_an_ipv6_listener_takes_ipv6_only_unless_told_otherwise(room: Room) -> None:
    with takeover.join(room.control) as service:
        only = service.listen("tcp://[::]:0")
        both = service.listen("tcp://[::]:0?v6only=0")
        service.ready()
        with socket.create_connection(("127.0.0.1", both.getsockname()[1]), 5):
            eventually(lambda: _accepts(both), "the IPv4 client is in the queue")
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", only.getsockname()[1]), 5)


def _accepts(sock: socket.socket) -> bool:
    try:
        sock.accept()[0].close()
    except BlockingIOError:
        return False
    return True


def lasting_port() -> int:
    """A port that is free on every address, and that the kernel gives to nobody else meanwhile: it is not ephemeral."""
    while True:
        with socket.socket(socket.AF_INET6) as probe:
            probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            port = random.randint(20_000, 32_000)
            with contextlib.suppress(OSError):
                probe.bind(("::", port))
                return port


def test_a_listener_for_both_families_is_not_adopted_as_one_for_ipv6_alone(room: Room) -> None:
    port = lasting_port()
    both, only = f"tcp://[::]:{port}?v6only=0", f"tcp://[::]:{port}"
    with takeover.join(room.control) as old:
        old.listen(both)
        old.ready()
        with takeover.join(room.control) as new, pytest.raises(ListenError, match="somebody else"):
            new.listen(only)
    with taken_over(room, [both], [both]) as (report, _):
        assert (report.adopted, report.bound) == ((both,), ())


def test_a_listener_on_any_port_is_adopted_by_its_url_and_keeps_its_port(room: Room) -> None:
    with takeover.join(room.control, probation=0) as old:
        port = old.listen("tcp://127.0.0.1:0").getsockname()[1]
        old.ready()
        with takeover.join(room.control) as new:
            assert new.listen("tcp://127.0.0.1:0").getsockname()[1] == port
            assert new.ready().bound == ()


def test_an_adopted_listener_is_known_by_its_address_and_not_by_its_name(room: Room) -> None:
    with takeover.join(room.control, probation=0) as old:
        old.listen(room.url, name="old name")
        old.ready()
        with takeover.join(room.control) as new:
            new.listen(room.url, name="new name")
            report = new.ready()
            assert (report.adopted, report.bound, report.unused) == (("new name",), (), ())
            assert new.status()["listeners"][0]["name"] == "new name"


def test_datagrams_that_wait_in_a_udp_socket_are_read_by_the_successor(room: Room) -> None:
    url = "udp://127.0.0.1:0"
    with takeover.join(room.control, probation=0) as old, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        address = old.listen(url).getsockname()
        old.ready()
        client.sendto(b"sent to the old process", address)
        with takeover.join(room.control) as new:
            sock = new.listen(url)
            assert sock.getsockname() == address
            new.ready()
            assert sock.recv(100) == b"sent to the old process"


def test_a_unix_listener_keeps_its_path_and_its_queue_and_only_the_last_owner_removes_it(room: Room) -> None:
    path = os.path.join(room.folder, "service.sock")
    url = f"unix:{path}"
    with takeover.join(room.control, probation=0) as old:
        old.listen(url)
        old.ready()
        inode = os.lstat(path).st_ino
        with socket.socket(socket.AF_UNIX) as client, takeover.join(room.control) as new:
            client.connect(path)
            client.sendall(b"waits")
            sock = new.listen(url)
            new.ready()
            assert old.wait(30)
            old.close()
            assert os.lstat(path).st_ino == inode
            with sock.accept()[0] as served:
                assert served.recv(5) == b"waits"
    assert room.left_behind() == []


def test_a_successor_that_fails_removes_the_unix_listener_that_it_had_bound_anew(room: Room) -> None:
    with takeover.join(room.control) as old:
        old.listen(room.url)
        old.ready()
        with takeover.join(room.control) as new:
            new.listen(f"unix:{room.folder}/new")
        assert "new" not in room.left_behind()
        assert old.state == "serving"


def test_several_listeners_of_all_kinds_change_hands_at_once(room: Room) -> None:
    urls = [
        "tcp://127.0.0.1:0",
        "tcp://[::1]:0",
        f"unix:{room.folder}/a",
        "udp://127.0.0.1:0",
        "tcp://127.0.0.2:0?reuseport=3",
    ]
    with taken_over(room, urls, urls) as (report, socks):
        assert len(report.adopted) == 7 and report.bound == report.unused == ()
        assert [len(found) for found in socks.values()] == [1, 1, 1, 1, 3]
        assert not any(sock.getblocking() or sock.get_inheritable() for found in socks.values() for sock in found)
