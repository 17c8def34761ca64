"""What the operator learns: a dry run, what was adopted, bound or left over, and --strict (S5, S6)."""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest

import takeover
from clients import LIMIT, eventually, receive_exactly
from processes import Program, Room, descriptors_at_rest, free_address
from takeover import announcement, query
from takeover.errors import Refused
from takeover.report import Report


@pytest.fixture
def server(room: Room) -> Program:
    program = room.echo()
    room.wait_for_owner(program)
    return program


@pytest.mark.parametrize("fails", [False, True])
def test_a_dry_run_leaves_no_trace(room: Room, server: Program, fails: bool) -> None:
    held = eventually(lambda: descriptors_at_rest(server.pid), "the server is at rest")
    files, status = room.left_behind(), room.status()
    wrong = ["--strict", "--listen", "tcp://127.0.0.1:0"] if fails else []
    dry = room.cli("echo", "--listen", room.url, "--dry-run", *wrong)
    assert dry.wait() == (1 if fails else 0), dry.text
    if not fails:
        assert f"would have worked (from pid {server.pid})" in dry.lines[-1]
    eventually(lambda: room.owner() == server.pid, "the incumbent serves")
    after = room.status()
    for name in ("pid", "generation", "state", "listeners", "connections", "last_takeover"):
        assert after[name] == status[name]
    assert room.left_behind() == files
    eventually(lambda: descriptors_at_rest(server.pid) == held, "the incumbent holds what it held")
    room.round_trip()


@pytest.mark.parametrize("fails", [False, True])
def test_a_dry_run_where_nothing_runs_leaves_no_trace(room: Room, fails: bool) -> None:
    path = f"{room.folder}/echo.sock"
    stranger = socket.create_server(room.address) if fails else None
    dry = room.cli("echo", "--listen", f"unix:{path}", "--listen", room.url, "--dry-run")
    assert dry.wait() == (1 if fails else 0), dry.text
    assert ("somebody else is listening" if fails else "nothing is running here") in dry.lines[-1]
    assert room.left_behind() == []
    if stranger is not None:
        stranger.close()


def test_a_dry_run_tells_that_a_takeover_is_under_way(room: Room, server: Program) -> None:
    first = room.member(join={"service": "echo"}, plan=["wait"])
    first.wait_for("waiting")
    dry = room.cli("echo", "--listen", room.url, "--dry-run")
    assert dry.wait() == 1
    assert f"pid {first.pid} has been taking over" in dry.lines[-1]


def test_the_report_names_what_was_adopted_bound_and_left_over(room: Room, server: Program) -> None:
    other = "tcp://{}:{}".format(*free_address())
    second = room.member([room.url, other], join={"service": "echo"})
    report = json.loads(second.wait_for("ready ").removeprefix("ready "))
    assert (report["adopted"], report["bound"], report["unused"]) == ([room.url], [other], [])
    assert server.wait() == 0
    room.wait_for_owner(second)
    third = room.echo(listen=[other])
    assert room.url in third.wait_for("not used by this version")
    assert second.wait() == 0


@pytest.mark.parametrize("more", [True, False], ids=["one would be bound", "one would be left over"])
def test_strict_fails_where_the_listeners_differ_and_the_incumbent_serves_on(room: Room, more: bool) -> None:
    other = "tcp://{}:{}".format(*free_address())
    server = room.echo(listen=[room.url] if more else [room.url, other])
    room.wait_for_owner(server)
    strict = room.cli("echo", "--strict", "--listen", room.url, *(["--listen", other] if more else []))
    assert strict.wait() == 1
    assert "strict" in strict.lines[-1] and other in strict.lines[-1]
    server.wait_for("is off")
    room.wait_for_owner(server)
    room.round_trip()
    exact = room.cli("echo", "--strict", "--listen", room.url, *([] if more else ["--listen", other]))
    exact.wait_for("took over")


def test_a_stop_in_the_middle_of_a_takeover_is_asked_for_again_until_that_is_over(
    room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = query._ask
    with takeover.join(room.control) as old:
        old.ready()
        with takeover.join(room.control) as new:

            def ask_and_call_off(*arguments: Any) -> Any:
                answer = ask(*arguments)
                new.close()
                return answer

            def end_when_told_to() -> None:
                old.wait(LIMIT)
                old.close()

            monkeypatch.setattr(query, "_ask", ask_and_call_off)
            ending = threading.Thread(target=end_when_told_to)
            ending.start()
            assert query.stop(room.control) == os.getpid()
            ending.join(LIMIT)
    assert room.left_behind() == []


def test_a_stop_is_refused_where_a_takeover_is_not_over_in_time(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    ask, passed = query._ask, [0.0]

    def ask_and_let_time_pass(*arguments: Any) -> Any:
        answer = ask(*arguments)
        passed[0] += 2 * query.TIME_LIMIT
        return answer

    monkeypatch.setattr(query, "_ask", ask_and_let_time_pass)
    monkeypatch.setattr(query, "time", SimpleNamespace(monotonic=lambda: time.monotonic() + passed[0]))
    with takeover.join(room.control) as old:
        old.ready()
        with takeover.join(room.control) as new:
            with pytest.raises(Refused, match="has been taking over") as refused:
                query.stop(room.control)
            assert refused.value.code == "busy"
            assert new.ready().generation == 2


def test_connections_that_wait_on_a_listener_that_is_left_over_are_served_not_reset(room: Room) -> None:
    """S6: the older process lets nobody new in there, and accepts until the queue is empty."""
    other = free_address()
    old = room.echo(listen=[room.url, "tcp://{}:{}".format(*other)])
    room.wait_for_owner(old)
    let_in = [socket.create_connection(other, LIMIT) for _ in range(50)]
    new = room.echo()

    def shut() -> bool:
        try:
            let_in.append(socket.create_connection(other, 0.2))
        except (ConnectionRefusedError, TimeoutError):
            return True
        return False

    eventually(shut, "nobody is let in any more")
    new.wait_for("took over")
    for sock in let_in:
        with sock:
            sock.settimeout(LIMIT)
            sock.send(b"late")
            assert receive_exactly(sock, 4) == b"late"
    assert old.wait() == 0


def test_the_status_tells_of_the_last_takeover_its_outcome_and_its_phases(room: Room, server: Program) -> None:
    broken = room.member(join={"service": "echo"}, plan=["fail"])
    assert broken.wait() == 1
    last = eventually(lambda: room.status()["last_takeover"], "the incumbent tells")
    assert (last["outcome"], last["role"], last["peer"]) == ("undone", "incumbent", broken.pid)
    assert last["reason"] and last["phases"]
    new = room.echo()
    new.wait_for("took over")
    room.wait_for_owner(new)
    last = room.status()["last_takeover"]
    assert (last["outcome"], last["role"], last["peer"]) == ("committed", "successor", server.pid)
    assert all(milliseconds >= 0 for milliseconds in last["phases"].values())


def test_a_cold_start_tells_what_became_of_the_listeners_that_a_keeper_held(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    announcement.tell_start(Report(1, 0, (), ("tcp://a:1",), ("tcp://b:2",), 0.0, True), [], "python", dry_run=False)
    assert [(record.levelname, record.getMessage()) for record in caplog.records[1:]] == [
        ("INFO", "adopted from the keeper: none"),
        ("WARNING", "bound anew, the keeper did not have them: tcp://a:1"),
        ("WARNING", "held by the keeper, not used by this version, closed: tcp://b:2"),
    ]
