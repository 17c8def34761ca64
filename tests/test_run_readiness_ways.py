"""The ways to ask a new command itself: over HTTP, with a command of the user's, by a line of its output, and on a
listener that only it has.
"""

from __future__ import annotations

import fcntl
import os
import pathlib
import signal
import socket
import struct
import sys
import termios
import threading
from collections.abc import Iterator
from typing import Any, NoReturn

import pytest

from clients import LIMIT, eventually
from kernel import open_descriptors
from newcomers import NEWCOMER, Trial, Trials, tcp, trials, unix
from takeover.run import proc
from takeover.run.asking import Asking
from takeover.run.lines import Lines
from takeover.run.output import Relay, finish
from takeover.run.probes import endpoint
from takeover.run.trying import Trying


@pytest.fixture
def stage() -> Iterator[Trials]:
    with trials() as made:
        yield made


@pytest.mark.parametrize(("how", "status"), [("http:/", "200"), ("http:/", "302"), ("http:/health=503", "503")])
def test_a_command_that_answers_as_it_should_is_ready(stage: Trials, how: str, status: str) -> None:
    trial = stage.newcomer(how, [stage.listen(tcp())], "serve_http", status)
    assert trial.run().endswith(f"and answered GET {how[5:].partition('=')[0]} with {status}")
    assert trial.proof.startswith(f"pid {trial.pid} accepted a probe on tcp://")


def test_http_goes_over_a_unix_listener_too(stage: Trials, tmp_path: pathlib.Path) -> None:
    trial = stage.newcomer("http:/", [stage.listen(unix(str(tmp_path / "s")))], "serve_http")
    assert "answered GET / with 200" in trial.run()


@pytest.mark.parametrize(
    ("how", "answer", "reason"),
    [
        ("http:/health", "404", "GET /health was answered with 404, not 200 to 399"),
        ("http:/health=204", "200", "GET /health was answered with 200, not 204"),
        ("http:/", "close", "GET /: it closed the connection without an answer"),
        ("http:/", "tls", "GET /: it answered with TLS, not with HTTP"),
        ("http:/", "noise", "GET /: it answered with b'220 mail.example.org ESMTP\\r\\n', which is not HTTP"),
    ],
)
def test_another_answer_is_told(stage: Trials, how: str, answer: str, reason: str) -> None:
    trial = stage.newcomer(how, [stage.listen(tcp())], "serve_http", answer)
    eventually(lambda: trial.run(0.05) or reason in trial.check.why_not(), reason)
    assert trial.proof == ""


def test_an_answer_that_does_not_come_is_waited_for_no_longer_than_five_seconds(
    stage: Trials, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("takeover.run.asking.PATIENCE", 0.2)
    trial = stage.newcomer("http:/", [stage.listen(tcp())], "serve_http", "hang")
    eventually(lambda: trial.run(0.05) or "no answer within 0.2 s" in trial.check.why_not(), "it is told")


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        (False, "it closed the connection without an answer"),
        (True, "no answer: Connection reset by peer"),
    ],
)
def test_a_connection_that_is_reset_instead_of_answered_is_told_once(stage: Trials, asked: bool, reason: str) -> None:
    listening = stage.listen(tcp())
    client = socket.create_connection(listening.sock.getsockname(), LIMIT)
    client.setblocking(False)
    server = eventually(lambda: _accepted(listening.sock), "the connection has come")
    server.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    told: list[tuple[int, str]] = []
    if not asked:
        server.close()
    Asking(
        stage.events,
        client,
        endpoint(listening.url, listening.sock),
        "/",
        lambda status, why: told.append((status, why)),
    )
    server.close()
    eventually(lambda: stage.events.run_once(0.05) or told, "it is told")
    assert told == [(0, reason)] and client.fileno() < 0 and stage.events._timeout(None) is None


def _accepted(listener: socket.socket) -> socket.socket | None:
    try:
        return listener.accept()[0]
    except BlockingIOError:
        return None


def test_the_old_command_is_never_asked_for_the_new_one(stage: Trials) -> None:
    listeners = [stage.listen(tcp())]
    old = stage.newcomer("http:/", listeners, "serve_http", "200")
    assert old.run()
    new = stage.newcomer("http:/=201", listeners, "serve_http", "201")
    assert new.run().startswith(f"pid {new.pid} accepted")


@pytest.mark.parametrize("what", ["hang", "register_and_hang", "listen_on_its_own_port"])
def test_an_old_command_that_answers_makes_no_new_one_ready(stage: Trials, what: str) -> None:
    listeners = [stage.listen(tcp())]
    assert stage.newcomer("http:/", listeners, "serve_http").run()
    assert stage.newcomer("http:/", listeners, what).run(1.3) == ""


def test_a_command_of_the_users_is_given_the_address_and_its_exit_status_counts(stage: Trials) -> None:
    listening = stage.listen(tcp())
    host, port = listening.sock.getsockname()
    same = (
        f'test "$TAKEOVER_URL $TAKEOVER_HOST $TAKEOVER_PORT" = "{listening.url} {host} {port}" && kill -0 $TAKEOVER_PID'
    )
    assert stage.newcomer(f"exec:{same}", [listening], "wait_in_epoll").run().endswith("exec ended with exit status 0")


def test_a_command_of_the_users_that_fails_is_tried_again(stage: Trials, tmp_path: pathlib.Path) -> None:
    once = tmp_path / "once"
    command = f"if test -e {once}; then exit 0; fi; touch {once}; echo not yet; exit 7"
    trial = stage.newcomer(f"exec:{command}", [stage.listen(tcp())], "wait_in_epoll")
    assert trial.run()
    assert "ended with exit status 7: not yet" in trial.check.why_not()


def test_a_command_of_the_users_that_hangs_is_killed_with_all_that_it_has_started(
    stage: Trials, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("takeover.run.trying.PATIENCE", 0.3)
    pids = tmp_path / "pids"
    trial = stage.newcomer(f"exec:echo $$ >> {pids}; sleep 60; true", [stage.listen(tcp())], "wait_in_epoll")
    eventually(lambda: trial.run(0.05) or "ended with signal 9" in trial.check.why_not(), "it is told")
    trial.check.close()
    for line in pids.read_text().split():
        eventually(lambda line=line: stage.events.reap() or not os.path.exists(f"/proc/{line}"), "it is gone")


def test_a_command_of_the_users_is_given_the_path_of_a_unix_listener(stage: Trials, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "s"
    same = f'test "$TAKEOVER_URL $TAKEOVER_PATH" = "unix:{path} {path}"'
    trial = stage.newcomer(f"exec:{same}", [stage.listen(unix(str(path)))], "wait_in_epoll")
    assert trial.run().endswith("exec ended with exit status 0")


def test_a_command_of_the_users_that_is_given_up_is_killed_and_tells_nothing(stage: Trials) -> None:
    ended: list[int] = []
    trying = Trying(stage.events, "sleep 60", {}, lambda status, last: ended.append(status))
    trying.close()
    trying.close()
    eventually(lambda: stage.events.reap() or not proc.is_there(trying._pid), "it is gone")
    assert ended == []


def _refuse(*_: object, **__: object) -> NoReturn:
    raise OSError(24, "Too many open files")


def test_a_command_of_the_users_that_cannot_be_started_is_a_failure_and_leaves_no_pipe(
    stage: Trials, monkeypatch: pytest.MonkeyPatch
) -> None:
    trial = stage.newcomer("exec:true", [stage.listen(tcp())], "wait_in_epoll")
    monkeypatch.setattr(os, "posix_spawn", _refuse)
    trial.run()
    assert trial.failure == "start /bin/sh for --ready exec: Too many open files"
    before = open_descriptors()
    with pytest.raises(OSError, match="Too many"):
        Trying(stage.events, "true", {}, lambda *_: None)
    assert open_descriptors() == before


def test_a_command_of_the_users_is_not_asked_about_an_old_one(stage: Trials) -> None:
    listeners = [stage.listen(tcp())]
    assert stage.newcomer("tcp", listeners, "wait_in_epoll").run()
    assert stage.newcomer("exec:true", listeners, "hang").run(1.2) == ""


def test_a_line_is_found_in_pieces_and_under_colours(stage: Trials) -> None:
    trial = _relayed(stage, "line:^INFO +Running on http://", "write_lines")
    assert trial.run() == "it wrote: INFO  Running on http://127.0.0.1:8000"


def test_where_no_line_matches_the_last_one_is_told(stage: Trials) -> None:
    trial = _relayed(stage, "line:serving", "write_lines")
    told = "no line of it matches 'serving'; the last one: INFO  Running on http"
    eventually(lambda: trial.run(0.05) or told in trial.check.why_not(), told)
    assert trial.proof == ""


def test_a_line_that_does_not_end_counts_after_a_pause(stage: Trials) -> None:
    assert _relayed(stage, "line:ready", "ask_without_a_newline").run() == "it wrote: ready?"


def test_what_is_written_by_a_process_that_has_ended_makes_nothing_ready(stage: Trials) -> None:
    trial = stage.make("line:serving", [], "true")
    trial.check.close()
    trial.check.output(b"serving\n")
    assert trial.proof == ""


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_lines_do_not_depend_on_the_pieces_that_they_come_in(size: int) -> None:
    text = b"one\r\n\x1b[1mtwo\x1b[0m lines\nthree"
    for wanted, found in (("^two lines$", "two lines"), ("three", "three"), ("four", None)):
        lines = Lines(wanted)
        pieces = [text[at : at + size] for at in range(0, len(text), size)]
        assert (next(filter(None, map(lines.search, pieces)), None) or lines.search_unfinished()) == found
    assert lines.last == "three"


def test_a_line_without_an_end_is_not_collected_for_ever() -> None:
    lines = Lines("x$")
    for _ in range(100):
        assert lines.search(b"y" * 65536) is None
    assert len(lines._unfinished) <= 8192


def _relayed(stage: Trials, how: str, *words: str, outputs: tuple[int, int] | None = None) -> Trial:
    """A trial whose output goes through a relay, to nowhere if it is not said where."""
    trial = stage.make(how, [], sys.executable, NEWCOMER, *words)
    null = os.open(os.devnull, os.O_WRONLY)
    try:
        trial.relay = Relay(stage.events, trial.check.output, outputs or (os.dup(null), os.dup(null)))
    finally:
        os.close(null)
    trial.start()
    return trial


def _read_line(descriptor: int) -> bytes:
    line = b""
    while not line.endswith(b"\n"):
        line += os.read(descriptor, 1)
    return line


@pytest.mark.parametrize("blocking", [True, False])
def test_output_passes_through_untouched_however_much_it_is(stage: Trials, blocking: bool) -> None:
    """blocking: as a pipe is, unless somebody else who has it has changed that."""
    reading, writing = os.pipe()
    os.set_blocking(writing, blocking)
    trial = _relayed(stage, "delay:0.05", "write_much", "20", outputs=(writing, writing))
    received = bytearray()

    def read() -> None:
        while data := os.read(reading, 65536):
            received.extend(data)

    thread = threading.Thread(target=read)
    thread.start()
    assert trial.run()
    finish(LIMIT)
    os.close(writing)
    thread.join(LIMIT)
    os.close(reading)
    assert bytes(received) == bytes(range(256)) * 4096 * 20


def test_a_reader_that_does_not_read_slows_the_process_down_and_not_the_loop(stage: Trials) -> None:
    reading, writing = os.pipe()
    trial = _relayed(stage, "delay:0.3", "write_much", "20", outputs=(writing, writing))
    assert trial.run() and not trial.has_ended()
    os.close(reading)  # and now it gets what it would have got without a relay: its output is broken
    eventually(lambda: stage.events.run_once(0.05) or trial.has_ended(), "it has ended")
    assert trial.exited
    os.close(writing)


def test_a_terminal_stays_a_terminal_and_has_its_size(stage: Trials) -> None:
    master, slave = os.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 33, 77, 0, 0))
    trial = _relayed(stage, "line:terminal", "describe_terminal", outputs=(slave, slave))
    assert trial.run() == "it wrote: terminal True True (77, 33)"
    assert _read_line(master) == b"terminal True True (77, 33)\r\n"
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 90, 0, 0))
    assert trial.relay is not None
    trial.relay.calm()
    trial.relay.resized()
    os.kill(trial.pid, signal.SIGWINCH)
    assert _read_line(master) == b"terminal True True (90, 40)\r\n"
    trial.end()
    finish(LIMIT)
    os.close(master)
    os.close(slave)


def test_two_outputs_stay_two(stage: Trials) -> None:
    master, slave = os.openpty()
    reading, writing = os.pipe()
    trial = _relayed(stage, "line:terminal", "describe_terminal", outputs=(writing, slave))
    assert trial.run() == "it wrote: terminal False True ()"
    assert _read_line(reading) == b"terminal False True ()\n"
    assert trial.relay is not None
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 90, 0, 0))
    trial.relay.resized()
    sizes = [fcntl.ioctl(each._reading, termios.TIOCGWINSZ, bytes(8))[:4] for each in trial.relay._streams[1:]]
    assert sizes == [struct.pack("HH", 40, 90)]
    trial.end()
    finish(LIMIT)
    for descriptor in (master, slave, reading, writing):
        os.close(descriptor)


def test_a_relay_for_which_there_are_not_enough_descriptors_leaves_none(
    stage: Trials, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = os.pipe(), os.pipe()
    before = open_descriptors()
    left = [os.pipe()]
    monkeypatch.setattr(os, "pipe", lambda: left.pop() if left else _refuse())
    with pytest.raises(OSError, match="Too many"):
        Relay(stage.events, print, (one[1], other[1]))
    assert open_descriptors() == before
    for descriptor in (*one, *other):
        os.close(descriptor)


def test_output_that_was_read_before_nobody_needed_it_any_more_only_passes_through(stage: Trials) -> None:
    reading, writing = os.pipe()
    told: list[bytes] = []
    relay = Relay(stage.events, told.append, (writing, writing))
    os.write(relay.ends[0], b"serving\n")
    relay.started()
    assert _read_line(reading) == b"serving\n"
    eventually(lambda: stage.events._posted, "the loop is to have it, too")
    relay.calm()
    finish(LIMIT)
    stage.events.run_once(0)
    assert told == []
    os.close(reading)
    os.close(writing)


PROBED = """
import os, select, socket, sys, time
shared = socket.socket(fileno=3)
number = int(sys.argv[2])
probe = socket.socket(fileno=number) if sys.argv[1] == "fd" else socket.create_server(("127.0.0.1", number))
kept = []
while True:
    for each in select.select([probe], [], [])[0]:
        kept.append(each.accept()[0])
"""


@pytest.mark.parametrize("place", ["fd", "port"])
@pytest.mark.parametrize("how", ["auto", "tcp"])
def test_a_listener_that_only_the_new_command_has_is_probed_instead_of_the_shared_one(
    stage: Trials, how: str, place: str
) -> None:
    listeners = [stage.listen(tcp())]
    assert stage.newcomer("tcp", listeners, "wait_in_epoll").run()
    trial = stage.make(how, listeners, sys.executable, "-c", PROBED, place, f"{{{place}:probe}}")
    assert trial.check.probe is not None
    url = trial.check.probe[1]
    trial.start()
    assert trial.run().startswith(f"pid {trial.pid} accepted a probe on {url}")
    assert trial.check.probe is None and trial.check.descriptors == []


def test_http_is_asked_on_the_probe_listener(stage: Trials) -> None:
    shared = stage.listen(tcp())
    trial = stage.make("http:/ready", [shared], sys.executable, NEWCOMER, "serve_http", "200", "{fd:probe}")
    assert trial.check.probe is not None
    url = trial.check.probe[1]
    trial.start()
    assert trial.run() == f"pid {trial.pid} accepted a probe on {url}, and answered GET /ready with 200"
    assert socket.create_connection(shared.sock.getsockname(), LIMIT).close() is None


def test_a_probe_that_was_accepted_on_the_probe_listener_proves_it_of_a_command_that_cannot_be_looked_into(
    stage: Trials, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hidden(pid: int) -> dict[int, str]:
        raise proc.Hidden(f"pid {pid}: Permission denied")

    monkeypatch.setattr(proc, "descriptors", hidden)
    trial = stage.make("auto", [stage.listen(tcp())], sys.executable, "-c", PROBED, "fd", "{fd:probe}")
    assert trial.check.probe is not None
    url = trial.check.probe[1]
    trial.start()
    assert trial.run() == f"a probe was accepted on {url}, of which only this command was told"


@pytest.mark.parametrize(("where", "name"), [(socket.socket, "listen"), ("takeover.run.readiness.Notices", "__init__")])
def test_a_check_that_cannot_be_made_leaves_no_descriptor(
    stage: Trials, monkeypatch: pytest.MonkeyPatch, where: Any, name: str
) -> None:
    before = open_descriptors()
    with monkeypatch.context() as broken:
        if isinstance(where, str):
            broken.setattr(f"{where}.{name}", _refuse)
        else:
            broken.setattr(where, name, _refuse)
        with pytest.raises(OSError, match="Too many"):
            stage.make("notify", [], "true", "{fd:probe}")
    assert open_descriptors() == before
