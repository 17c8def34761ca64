"""Servers on asyncio and uvloop take over from each other, and their clients stay connected with every byte."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import shutil
import signal
import socket
import ssl
import subprocess
import sys
from typing import Any

import pytest

from aio_rooms import Aio, Client
from clients import LIMIT, eventually, receive_exactly
from processes import Program, descriptors_at_rest, state_of

BOTH = pytest.mark.parametrize("kind", ["lines", "lines-stream"])


@pytest.mark.parametrize("kind", ["echo", "echo-stream"])
def test_clients_stay_connected_over_takeovers_and_get_every_byte(aio: Aio, kind: str) -> None:
    servers = [aio.start(kind)]
    steady = aio.room.steady(5)
    pounder = aio.room.pound()
    for _ in range(4):
        servers.append(aio.start(kind))
        assert servers[-2].wait() == 0
        steady.goes_on()
        pounder.goes_on()
    assert not pounder.lost
    assert aio.moved()["in"] >= 5


@BOTH
def test_a_state_and_half_a_line_travel(aio: Aio, kind: str) -> None:
    first = aio.start(kind)
    with Client(aio.room) as client:
        assert client.ask("one")["count"] == 1
        client.sock.sendall(b"half a ")
        eventually(lambda: unread(first, client) == 0, "the server has read the half line")
        second = aio.start(kind)
        assert first.wait() == 0
        client.sock.sendall(b"line\n")
        answer = json.loads(client.read_line())
        assert (answer["text"], answer["count"]) == ("half a line", 2)
        assert (answer["pid"], answer["times"]) == (second.pid, 1)
        third = aio.start(kind)
        assert second.wait() == 0
        answer = client.ask("three")
        assert (answer["pid"], answer["count"], answer["times"]) == (third.pid, 3, 2)


def unread(program: Program, client: Client) -> int:
    """Bytes that lie in the kernel for the server, as ss(8) tells."""
    host, port = client.sock.getsockname()
    name = f"{int.from_bytes(socket.inet_aton(host), sys.byteorder):08X}:{port:04X}"
    for line in pathlib.Path(f"/proc/{program.pid}/net/tcp").read_text().splitlines():
        fields = line.split()
        if fields[2] == name:
            return int(fields[4].split(":")[1], 16)
    raise AssertionError("there is no such connection")


@BOTH
def test_who_says_not_now_moves_when_the_time_has_come(aio: Aio, kind: str) -> None:
    first = aio.start(kind)
    with Client(aio.room) as busy, Client(aio.room) as quiet:
        assert busy.ask("busy")["pid"] == quiet.ask()["pid"] == first.pid
        second = aio.start(kind)
        eventually(lambda: quiet.served_by() == second.pid, "the quiet one has moved")
        assert first.running and aio.moved()["in"] == 1
        busy.say("free")
        if kind == "lines":
            busy.read_line()
        assert first.wait() == 0
        assert busy.served_by() == second.pid


def test_a_protocol_that_knows_nothing_of_moves_drains(aio: Aio) -> None:
    first = aio.start("unmovable")
    with aio.room.connect() as sock:
        sock.sendall(b"early")
        assert receive_exactly(sock, 5) == b"early"
        aio.start("unmovable")
        eventually(lambda: aio.moved()["drained"] == {"unmovable": 1}, "it is counted")
        sock.sendall(b"late")
        assert receive_exactly(sock, 4) == b"late"
    assert first.wait() == 0


def test_without_live_nothing_moves(aio: Aio) -> None:
    first = aio.start("lines", options={"live": False})
    with Client(aio.room) as client:
        assert client.served_by() == first.pid
        aio.start("lines", options={"live": False})
        assert client.served_by() == first.pid
    assert first.wait() == 0


@BOTH
def test_a_version_that_the_successor_cannot_read_goes_back_and_drains(aio: Aio, kind: str) -> None:
    first = aio.start(kind)
    with Client(aio.room) as client:
        client.ask()
        aio.start(kind, versions=[2, 2])
        eventually(lambda: aio.moved()["refused"] == {"version": 1}, "it is refused")
        answer = client.ask()
        assert (answer["pid"], answer["count"]) == (first.pid, 2)
    assert first.wait() == 0


@BOTH
def test_a_version_that_the_successor_says_it_can_read_moves(aio: Aio, kind: str) -> None:
    first = aio.start(kind, versions=[1, 1])
    with Client(aio.room) as client:
        client.ask()
        second = aio.start(kind, versions=[2, 1, 2])
        assert first.wait() == 0
        answer = client.ask()
        assert (answer["pid"], answer["count"]) == (second.pid, 2)


@BOTH
def test_a_state_that_cannot_be_told_drains(aio: Aio, kind: str) -> None:
    aio.room.tracebacks_allowed = True
    first = aio.start(kind)
    with Client(aio.room) as broken, Client(aio.room) as whole:
        broken.ask("break")
        whole.ask()
        second = aio.start(kind)
        eventually(lambda: aio.moved()["drained"] == {"state": 1}, "it is counted")
        assert broken.served_by() == first.pid
        assert whole.served_by() == second.pid
    assert first.wait() == 0


@BOTH
def test_a_slow_reader_stays_until_it_has_read(aio: Aio, kind: str) -> None:
    size = 16 << 20
    first = aio.start(kind)
    with Client(aio.room) as slow, Client(aio.room) as quick:
        quick.ask()
        slow.say(f"fill {size}")
        assert receive_exactly(slow.sock, 1) == b"x"
        second = aio.start(kind)
        eventually(lambda: quick.served_by() == second.pid, "the quick one has moved")
        assert first.running
        assert receive_exactly(slow.sock, size - 1) == b"x" * (size - 1)
        assert slow.ask()["count"] == 2
    assert first.wait() == 0


def test_a_handler_that_was_made_to_wait_for_its_client_moves_and_is_told_to_go_on(aio: Aio) -> None:
    first = aio.start("echo")
    data = os.urandom(8 << 20)
    with aio.room.connect() as sock:
        sock.setblocking(False)
        sent = 0
        while sent < len(data):
            try:
                sent += sock.send(data[sent : sent + 65536])
            except BlockingIOError:
                break
        aio.start("echo")
        sock.setblocking(True)
        sock.settimeout(LIMIT)
        assert receive_exactly(sock, sent) == data[:sent]
        assert first.wait() == 0
        sock.sendall(b"after")
        assert receive_exactly(sock, 5) == b"after"


def test_a_protocol_goes_from_the_native_loop_to_this_one_and_back_with_all_that_is_unsent(aio: Aio) -> None:
    size = 16 << 20
    first = aio.start("lines", loop="native")
    with Client(aio.room) as slow, Client(aio.room) as quick:
        quick.ask()
        slow.say(f"fill {size}")
        assert receive_exactly(slow.sock, 1) == b"x"
        second = aio.start("lines")
        assert first.wait() == 0
        answer = quick.ask()
        assert (answer["pid"], answer["count"], answer["times"]) == (second.pid, 2, 1)
        assert receive_exactly(slow.sock, size - 1) == b"x" * (size - 1)
        third = aio.start("lines", loop="native")
        assert second.wait() == 0
        for client in (slow, quick):
            answer = client.ask()
            assert (answer["pid"], answer["times"]) == (third.pid, 2)


@pytest.fixture
def certificate(aio: Aio) -> tuple[str, str]:
    if shutil.which("openssl") is None:
        pytest.skip("there is no openssl here to make a certificate")
    names = os.path.join(aio.room.folder, "cert.pem"), os.path.join(aio.room.folder, "key.pem")
    make = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost"
    subprocess.run([*make.split(), "-out", names[0], "-keyout", names[1]], check=True, capture_output=True)
    return names


@pytest.mark.parametrize("kind", ["echo", "echo-stream"])
def test_a_connection_with_tls_drains(aio: Aio, kind: str, certificate: tuple[str, str]) -> None:
    context = ssl.create_default_context(cafile=certificate[0])
    context.check_hostname = False

    def connect() -> ssl.SSLSocket:
        return context.wrap_socket(aio.room.connect())

    def echoes(sock: ssl.SSLSocket) -> None:
        sock.sendall(b"hello")
        assert sock.recv(5) == b"hello"

    first = aio.start(kind, certificate=certificate)
    with connect() as early:
        echoes(early)
        aio.start(kind, certificate=certificate)
        eventually(lambda: aio.moved()["drained"] == {"tls": 1}, "it is counted")
        echoes(early)
        with connect() as late:
            echoes(late)
    assert first.wait() == 0


def test_a_client_that_fails_in_the_handshake_does_not_count_as_connected(
    aio: Aio, certificate: tuple[str, str]
) -> None:
    server = aio.start("echo", certificate=certificate)
    with aio.room.connect() as sock:
        eventually(lambda: aio.room.status()["connections"]["open"] == 1, "the handshake counts")
        sock.sendall(b"this is not TLS\n" * 10)
        with contextlib.suppress(ConnectionResetError):
            while sock.recv(1000):
                pass
    eventually(lambda: aio.room.status()["connections"]["open"] == 0, "it is forgotten")
    server.signal(signal.SIGTERM)
    assert server.wait() == 0
    assert "deadline" not in server.text


def test_a_client_that_has_sent_its_end_of_file_moves_and_is_told_what_comes_later(aio: Aio) -> None:
    first = aio.start("lines")
    with Client(aio.room) as half, Client(aio.room) as whole:
        half.ask("half")
        half.sock.shutdown(socket.SHUT_WR)
        assert half.read_line() == f"{first.pid} eof"
        whole.ask()
        second = aio.start("lines")
        assert first.wait() == 0
        whole.say("tell news")
        assert half.read_line() == f"{second.pid} news"
        third = aio.start("lines")
        assert second.wait() == 0
        whole.say("tell more")
        assert half.read_line() == f"{third.pid} more"


def test_who_has_paused_reading_moves_and_reads_when_it_wants(aio: Aio) -> None:
    first = aio.start("lines")
    with Client(aio.room) as paused, Client(aio.room) as other:
        paused.ask("pause")
        paused.say("patience")
        other.ask()
        for _ in range(3):
            last = aio.start("lines")
            assert first.wait() == 0
            for _ in range(5):
                assert heard(other.ask()) == 1
            first = last
        other.ask("wake")
        answer = json.loads(paused.read_line())
        assert (answer["pid"], answer["count"]) == (last.pid, 2)
        assert paused.ask()["count"] == 3


def test_a_connection_on_which_the_server_has_sent_its_end_of_file_moves_and_is_heard(aio: Aio) -> None:
    first = aio.start("lines")
    with Client(aio.room) as half, Client(aio.room) as whole:
        half.say("end")
        assert half.sock.recv(1) == b""
        whole.ask()
        second = aio.start("lines")
        assert first.wait() == 0
        assert heard(whole.ask()) == 1
        half.say("mute")
        eventually(lambda: heard(whole.ask()) == 2, "the new process has heard the line")
        assert whole.served_by() == second.pid


def heard(answer: dict[str, Any]) -> int:
    """How many lines the process has heard of others."""
    return int(answer["counts"]) - int(answer["count"])


def test_twenty_takeovers_leave_no_descriptor_behind(aio: Aio) -> None:
    previous = aio.start("lines-stream")
    held = []
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(Client(aio.room)) for _ in range(10)]
        for client in clients:
            client.ask()
        for number in range(20):
            server = aio.start("lines-stream")
            assert previous.wait() == 0
            aio.room.dismiss(previous)
            for client in clients:
                answer = client.ask()
                assert (answer["pid"], answer["count"]) == (server.pid, number + 2)
            held.append(eventually(lambda: descriptors_at_rest(server.pid), "nothing is under way"))  # noqa: B023
            previous = server
    assert held[0] == held[-1]


@BOTH
@pytest.mark.parametrize(
    "step", ["taker at CONNECTIONS", "taker before ADOPTED", "taker after ADOPTED", "taker at RELEASED"]
)
def test_when_the_successor_is_killed_in_a_move_who_is_left_goes_on(aio: Aio, kind: str, step: str) -> None:
    first = aio.start(kind, options={"drain_timeout": 60.0})
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(Client(aio.room)) for _ in range(5)]
        for client in clients:
            client.ask()
        second = aio.start(kind, settled=False, die_at=step)
        assert second.wait() == -signal.SIGKILL
        for client in clients:
            survives(client, first, step)
    assert first.wait() == 0


def survives(client: Client, server: Program, step: str) -> None:
    """The client is served on, unless its connection was the dead process's already.

    Behind ADOPTED that is as the incumbent has read it, or not.
    """
    try:
        answer = client.ask()
        assert (answer["pid"], answer["count"]) == (server.pid, 2)
        assert step != "taker at RELEASED"
    except ConnectionResetError:
        assert step in ("taker after ADOPTED", "taker at RELEASED")


@BOTH
@pytest.mark.parametrize(
    "step", ["giver after CONNECTIONS", "giver at ADOPTED", "giver before RELEASED", "giver after RELEASED"]
)
def test_when_the_incumbent_is_killed_in_a_move_its_connections_are_the_successors(
    aio: Aio, kind: str, step: str
) -> None:
    first = aio.start(kind, die_at=step)
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(Client(aio.room)) for _ in range(5)]
        for client in clients:
            client.ask()
        second = aio.start(kind)
        assert first.wait() == -signal.SIGKILL
        for client in clients:
            answer = client.ask()
            assert (answer["pid"], answer["count"]) == (second.pid, 2)


@BOTH
@pytest.mark.parametrize("who", ["taker before ADOPTED", "giver after CONNECTIONS"])
def test_when_one_end_of_a_move_is_stopped_the_other_serves_on_and_stays_the_only_one(
    aio: Aio, kind: str, who: str
) -> None:
    stops = {"stop_at": who}
    first = aio.start(kind, **(stops if who.startswith("giver") else {}))
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(Client(aio.room)) for _ in range(5)]
        for client in clients:
            client.ask()
        second = aio.start(kind, settled=False, **(stops if who.startswith("taker") else {}))
        sleeper = first if who.startswith("giver") else second
        eventually(lambda: state_of(sleeper.pid) == "T", "it has come to the step, and stands still")
        pids = {client.served_by() for client in clients}
        sleeper.signal(signal.SIGCONT)
        for client in clients:
            answer = client.ask()
            assert answer["count"] == 3
            pids.add(answer["pid"])
        assert len(pids) == 1
        if who.startswith("giver"):
            assert pids == {second.pid} and first.wait() == 0
    assert first.wait() == 0


def test_an_incumbent_accepts_again_when_its_successor_dies_in_probation(aio: Aio) -> None:
    first = aio.start("lines", options={"probation": 2.0})
    second = aio.start("lines", settled=False, die_at="successor after ALIVE")
    assert second.wait() == -signal.SIGKILL
    eventually(lambda: aio.room.owner() == first.pid, "the incumbent serves on")
    with Client(aio.room) as client:
        assert client.served_by() == first.pid
    third = aio.start("lines")
    assert first.wait() == 0
    with Client(aio.room) as client:
        assert client.served_by() == third.pid


@pytest.mark.parametrize(
    "options", [{"service": "another"}, {"listen": ["tcp://192.0.2.1:9"]}, {"listen": ["udp://127.0.0.1:0"]}]
)
def test_a_successor_that_fails_before_it_is_ready_changes_nothing(aio: Aio, options: dict[str, Any]) -> None:
    first = aio.start("lines")
    with Client(aio.room) as client:
        client.ask()
        failed = aio.start("lines", settled=False, options=options)
        assert failed.wait() > 0
        assert "takeover: " in failed.text
        assert client.ask()["count"] == 2
        assert client.served_by() == first.pid
    assert aio.room.owner() == first.pid


@pytest.mark.parametrize("step", ["incumbent at JOIN", "incumbent at READY"])
def test_a_successor_that_is_interrupted_before_the_commit_changes_nothing(aio: Aio, step: str) -> None:
    aio.room.tracebacks_allowed = True
    patient = {"warming_silence": 30.0, "silence": 30.0}
    first = aio.start("lines", stop_at=step, limits=patient)
    with Client(aio.room) as client:
        client.ask()
        second = aio.start("lines", settled=False, limits=patient)
        eventually(lambda: state_of(first.pid) == "T", "the incumbent has come to the step, and stands still")
        second.signal(signal.SIGINT)
        if step == "incumbent at JOIN":
            first.signal(signal.SIGCONT)
        assert second.wait() not in (0, -signal.SIGKILL), second.text
        first.signal(signal.SIGCONT)
        eventually(lambda: aio.room.owner() == first.pid, "the incumbent serves on")
        assert client.ask()["count"] == 2
    with Client(aio.room) as client:
        assert client.served_by() == first.pid


def test_sigterm_drains_and_the_second_one_ends_at_once(aio: Aio) -> None:
    server = aio.start("lines")
    with Client(aio.room) as client:
        client.ask()
        server.signal(signal.SIGTERM)
        server.wait_for("draining 1 connections")
        assert client.served_by() == server.pid
        eventually(aio.room.refuses, "it listens no more")
        server.signal(signal.SIGTERM)
        assert server.wait() == 0
    assert "takeover.sock" not in aio.room.left_behind()


@pytest.mark.parametrize("kind", ["lines", "lines-stream"])
def test_what_is_open_at_the_deadline_is_closed_and_counted(aio: Aio, kind: str) -> None:
    server = aio.start(kind, options={"drain_timeout": 0.2})
    with Client(aio.room) as one, Client(aio.room) as two:
        one.ask()
        two.ask()
        server.signal(signal.SIGTERM)
        assert server.wait() == 0
        assert "drain deadline of 0.2 s: closed 2 connections" in server.text
        assert one.sock.recv(1) == b""


def test_a_unix_listener_moves_its_connections_and_keeps_its_file(aio: Aio) -> None:
    path = os.path.join(aio.room.folder, "listener")
    options = {"listen": [f"unix:{path}"]}
    first = aio.start("lines", options=options)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as early:
        early.settimeout(LIMIT)
        early.connect(path)
        early.sendall(b"hello\n")
        assert json.loads(early.recv(1000))["pid"] == first.pid
        second = aio.start("lines", options=options)
        assert first.wait() == 0
        early.sendall(b"hello\n")
        answer = json.loads(early.recv(1000))
        assert (answer["pid"], answer["count"]) == (second.pid, 2)
    assert os.path.exists(path)


def test_the_package_is_imported_without_asyncio() -> None:
    script = "import sys, takeover; assert 'asyncio' not in sys.modules; takeover.aio.create_server"
    subprocess.run([sys.executable, "-c", script], check=True)
