"""The benchmarks' harness: it compiles, it measures, and its load generator notices each kind of loss."""

from __future__ import annotations

import argparse
import contextlib
import json
import pathlib
import shutil
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

ROOT = pathlib.Path(__file__).parent.parent

pytestmark = [
    pytest.mark.skipif(not shutil.which("cc"), reason="the benchmarks need a C compiler"),
    pytest.mark.skipif(not (ROOT / "benchmarks").is_dir(), reason="the benchmarks are not beside the tests"),
]


def benchmarks(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command to its end."""
    command = [sys.executable, "-m", "benchmarks", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Compiles c/NAME.c and gives its path."""
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.build import program

    return program


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0), backlog=128) as sock:
        yield sock
        sock.shutdown(socket.SHUT_RDWR)


def serve(listener: socket.socket, handle: Callable[[socket.socket], object]) -> None:
    """Hand each connection to `handle` in a thread that ends when the listener is shut down."""

    def run() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                handle(connection)

    threading.Thread(target=run, daemon=True).start()


def arrivals(path: str, port: int) -> dict[str, Any]:
    """What some thirty new clients see at a port."""
    arguments = ["--port", str(port), "--rate", "100", "--seconds", "0.3"]
    with subprocess.Popen([path, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        seen: dict[str, Any] = json.loads(process.stdout.read())
    assert seen["clients"] > 5
    return seen


def test_a_small_run_measures_a_rival_beside_the_reference(tmp_path: pathlib.Path) -> None:
    document = tmp_path / "quick.json"
    only = ["--rounds", "1", "--seconds", "0.05", "--only", "select.epoll"]
    arguments = ["echo", "memory", "passing", "--quick", *only, "--json", str(document)]
    done = benchmarks(*arguments)
    assert done.returncode == 0, done.stderr
    rows = json.loads(document.read_text())["rows"]
    echo = [row for row in rows if row["case"] == "echo"]
    assert {row["subject"] for row in echo} == {"C reference", "C reference again", "select.epoll"}
    for row in echo:
        assert 50 < row["samples"]["cpu_ns"][0] < 1e6, row
        assert row["samples"]["rate"][0] > 100, row
        assert row["samples"]["p50_us"][0] <= row["samples"]["p99_us"][0], row
    reference, again, plain = (row["samples"]["bytes"][0] for row in rows if row["case"] == "memory")
    assert reference < 64 and again < 64 and 50 < plain < 5000
    report = benchmarks("report", str(document))
    assert report.returncode == 0, report.stderr
    assert "select.epoll" in report.stdout and "64 B × 100" in report.stdout


def test_a_small_run_moves_connections_beside_the_reference(tmp_path: pathlib.Path) -> None:
    document = tmp_path / "moves.json"
    ours, drained = "takeover protocol, python, 64 B", "drain and reconnect"
    only = ["--only", ours, "--only", drained]
    done = benchmarks("moves", "--quick", "--rounds", "1", "--seconds", "0.1", *only, "--json", str(document))
    assert done.returncode == 0, done.stderr
    rows = {(row["cell"], row["subject"]): row["samples"] for row in json.loads(document.read_text())["rows"]}
    assert rows["200 idle", "C reference"]["move_ms"][0] > 0
    assert rows["200 idle", "C reference, 64 B"]["move_ms"][0] > 0
    for cell in ("200 idle", "200 talking"):
        assert rows[cell, ours]["lost"] == rows[cell, ours]["closed"] == [0]
        assert rows[cell, ours]["move_ms"][0] > 0
    assert rows["200 idle", ours]["server_cpu_ms"][0] > 0
    talking = rows["200 talking", ours]
    assert 0 < talking["p50_ms"][0] <= talking["p99_ms"][0] <= talking["worst_ms"][0]
    if ("200 idle", drained) in rows:  # it is there where the compiled backend is
        assert rows["200 idle", drained]["closed"] == [200] and rows["200 idle", drained]["lost"] == [0]
    report = benchmarks("report", str(document))
    assert report.returncode == 0, report.stderr
    assert ours in report.stdout and "200 talking" in report.stdout


def test_broken_versions_are_counted_by_what_they_leave(tmp_path: pathlib.Path) -> None:
    document = tmp_path / "broken.json"
    done = benchmarks("broken", "--deploys", "1", "--json", str(document))
    assert done.returncode == 0, done.stderr
    rows = json.loads(document.read_text())["rows"]
    assert {row["subject"] for row in rows} == {"crash at import", "hang", "wrong port", "slow start"}
    for row in rows:
        samples = row["samples"]
        assert samples["status"] == [1] and samples["failed"] == [0], row
        assert samples["told"] == [1] or row["subject"] == "wrong port", row  # it may not have come to that in a second
        assert samples["clients"][0] > 0 and samples["alive"] == [True]
    assert "wrong port" in done.stdout


def test_a_small_run_deploys_a_server_under_load(tmp_path: pathlib.Path) -> None:
    pytest.importorskip("gunicorn")
    document = tmp_path / "deploys.json"
    ours = "takeover run, gunicorn threads"
    done = benchmarks("deploys", "--quick", "--only", ours, "--json", str(document))
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(document.read_text())["rows"]
    assert row["subject"] == ours and row["facts"]["deploys"] == 2
    assert row["samples"]["connects_failed"] == row["samples"]["requests_failed"] == [0], row
    assert row["samples"]["requests"][0] > 10
    report = benchmarks("report", str(document))
    assert report.returncode == 0, report.stderr
    assert ours in report.stdout and "Deploys under load" in report.stdout


def test_a_target_is_judged_by_the_median_of_the_rounds_ratios(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.results import Document
    from benchmarks.subjects import REFERENCE
    from benchmarks.targets import NATIVE, targets

    document = Document()
    for cell, ours in (("64 B × 100", (1.0, 1.02, 9.0)), ("64 B × 100, 16 in flight", (1.0, 1.2, 1.3))):
        for ratio in ours:
            document.row("echo", cell, REFERENCE, REFERENCE).add(cpu_ns=100)
            document.row("echo", cell, NATIVE, REFERENCE).add(cpu_ns=100 * ratio)
    one, many = targets(document)
    assert "one in flight" in one.what and one.reached and "1.02" in one.measured
    assert "16 in flight" in many.what and not many.reached and "1.20" in many.measured


def test_a_small_soak_with_a_kill_in_each_takeover_loses_nothing_that_it_should_not(tmp_path: pathlib.Path) -> None:
    record = tmp_path / "soak.json"
    load = ["--connects", "50", "--streams", "20", "--messages", "20", "--backend", "python"]
    done = benchmarks("soak", "--seconds", "2", "--interval", "0.2", *load, "--kills", "1", "--json", str(record))
    assert done.returncode == 0, done.stdout + done.stderr
    seen = json.loads(record.read_text())
    assert seen["faults"] == [] and f"seed {seen['options']['seed']}" in done.stdout
    assert seen["arrivals"]["served"] > 20
    for line in seen["lines"]:
        assert line["killed"] and line["checked"] == 20 and line["memory"] > 1 << 20


@pytest.mark.parametrize(
    "word", ["lost", "went on", "refused", "wrong bytes", "not flat: memory", "not flat: descriptors"]
)
def test_a_soak_names_each_kind_of_fault(monkeypatch: pytest.MonkeyPatch, word: str) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import soak_record

    lines = [
        {
            "at": at,
            "killed": "",
            "excused": False,
            "ended": 0,
            "connects_failed": 0,
            "checked": 20,
            "closed": 0,
            "wrong": 0,
        }
        | {"memory": 10_000 + at % 7, "descriptors": 30 + at % 3}
        for at in range(1, 101)
    ]
    times = dict.fromkeys(("connect_p50_us", "connect_p99_us", "connect_max_ms", "own_stall_ms"), 1.0)
    arrivals = {"failures": {}, "clients": 100, "served": 100, "withheld": 0, **times}
    options = argparse.Namespace(streams=20)
    assert soak_record.judge(lines, arrivals, options)["faults"] == []
    if word == "lost":
        lines[50]["ended"] = 1
    elif word == "went on":
        lines[50]["checked"] = 19
    elif word == "refused":
        arrivals["failures"] = {"refused": 1}
    elif word == "wrong bytes":
        lines[-1]["wrong"] = 1
    else:
        for line in lines:
            line[word.rsplit(maxsplit=1)[-1]] += line["at"] * 10
    (fault,) = soak_record.judge(lines, arrivals, options)["faults"]
    assert word in fault


def test_an_unknown_case_is_wrong_usage() -> None:
    done = benchmarks("no-such-case")
    assert done.returncode == 2
    assert "no-such-case" in done.stderr


def test_clients_of_an_honest_echo_are_all_served(program: Callable[[str], str], listener: socket.socket) -> None:
    serve(listener, lambda connection: connection.sendall(connection.recv(64)))
    seen = arrivals(program("load_arrivals"), listener.getsockname()[1])
    assert seen["served"] == seen["clients"]
    assert seen["failures"] == {}


def test_wrong_bytes_are_noticed(program: Callable[[str], str], listener: socket.socket) -> None:
    serve(listener, lambda connection: connection.sendall(connection.recv(64)[::-1]))
    seen = arrivals(program("load_arrivals"), listener.getsockname()[1])
    assert seen["failures"] == {"wrong bytes": seen["clients"]}


def test_a_reset_is_noticed(program: Callable[[str], str], listener: socket.socket) -> None:
    def reset(connection: socket.socket) -> None:
        connection.recv(64)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    serve(listener, reset)
    seen = arrivals(program("load_arrivals"), listener.getsockname()[1])
    assert seen["failures"] == {"reset": seen["clients"]}


def test_a_close_without_an_answer_is_noticed(program: Callable[[str], str], listener: socket.socket) -> None:
    serve(listener, lambda connection: connection.recv(64))
    seen = arrivals(program("load_arrivals"), listener.getsockname()[1])
    assert seen["failures"] == {"closed early": seen["clients"]}


class Staying:
    """c/load_moves.c with a few clients that stay connected."""

    def __init__(self, path: str, port: int) -> None:
        command = [path, "--port", str(port), "--connections", "3", "--talkers", "0"]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.line() == "open\n"

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def ask(self, command: str) -> str:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{command}\n")
        self.process.stdin.flush()
        return self.line()

    def end(self) -> None:
        self.process.communicate(timeout=10)


@pytest.mark.parametrize(
    ("second", "seen"),
    [
        (lambda data: data, {"checked": 3, "closed": 0, "wrong": 0}),
        (lambda data: data[::-1], {"checked": 0, "closed": 3, "wrong": 3}),
        (lambda data: b"", {"checked": 0, "closed": 3, "wrong": 0}),
    ],
    ids=["honest", "garbling", "closing"],
)
def test_clients_that_stay_notice_what_becomes_of_them(
    program: Callable[[str], str],
    listener: socket.socket,
    second: Callable[[bytes], bytes],
    seen: dict[str, int],
) -> None:
    def echo_twice(connection: socket.socket) -> None:
        with connection, contextlib.suppress(ConnectionError):
            connection.sendall(connection.recv(64))
            connection.sendall(second(connection.recv(64)))
            if second(b"x"):
                connection.recv(64)

    serve(listener, lambda connection: threading.Thread(target=echo_twice, args=[connection.dup()]).start())
    clients = Staying(program("load_moves"), listener.getsockname()[1])
    try:
        assert clients.ask("check") == f"checked {seen['checked']}\n"
        report = json.loads(clients.ask(f"report 0 {1 << 62}"))
    finally:
        clients.end()
    assert {key: report[key] for key in ("closed", "wrong")} == {key: seen[key] for key in ("closed", "wrong")}
    assert report["answered"] == seen["checked"]


def test_a_refused_connect_is_noticed(program: Callable[[str], str]) -> None:
    with socket.socket() as bound_but_deaf:
        bound_but_deaf.bind(("127.0.0.1", 0))
        seen = arrivals(program("load_arrivals"), bound_but_deaf.getsockname()[1])
    assert seen["failures"] == {"refused": seen["clients"]}
