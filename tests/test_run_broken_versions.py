"""A new version that is broken in whatever way leaves the old one serving, ends with 1, and says why."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from newcomers import NEWCOMER
from processes import Room
from supervised import deploy, supervise, who

pytestmark = pytest.mark.parametrize("backend", ["python"], indirect=True)
"""Whether a command is ready has nothing to do with the backend, so one will do."""

LIMITS = (0.7, 5.0, 20.0)
"""Ready timeouts, in seconds: none matters for the outcome, but the shortest may be over before a version has come to
what is wrong with it, and then the reason is another one.
"""

BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "crash": ({}, "ended with exit status 1 before it was ready"),
    "hang": ({}, "open but never waits on it or accepts: pid "),
    "start_slowly": ({}, "open but never waits on it or accepts: pid "),
    "stop_itself": ({}, "it is stopped"),
    "listen_on_its_own_port": ({}, "it listens on tcp://127.0.0.1:"),
    "register_and_hang": ({}, "in its epoll set but does not come to wait there"),
    "close_them_and_hang": ({}, "it has closed the descriptor of tcp://"),
    "fork_away": ({}, "it forked away: pid "),
    "say_ready_and_hang": ({}, "--ready notify would go by that alone"),
    "say_only_a_status": ({"ready": "notify"}, "its last STATUS: loading 7 of 9 models"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_version_changes_nothing_and_says_why(room: Room, what: str) -> None:
    options, said = BROKEN[what]
    first = deploy(room, {"version": 1}, ready="auto")
    client = room.pound()
    for limit in LIMITS:
        broken = supervise(
            room, command=[sys.executable, NEWCOMER, what], **{"ready": "auto", "ready_timeout": limit, **options}
        )
        assert broken.wait() == 1
        client.goes_on()
        if said in broken.lines[-1]:
            break
    assert said in broken.lines[-1], broken.text
    client.stop()
    assert client.lost == []
    assert room.owner() == first.pid and who(room)["version"] == 1


@pytest.mark.parametrize(
    ("what", "ready"),
    [("say_ready_and_die", "notify"), ("accept_once_and_die", "auto"), ("accept_once_and_die", "tcp")],
)
def test_a_version_that_dies_as_soon_as_it_was_ready_gives_the_service_back(room: Room, what: str, ready: str) -> None:
    first = deploy(room, {"version": 1}, ready="auto", probation=5.0)
    broken = supervise(room, command=[sys.executable, NEWCOMER, what], ready=ready, probation=5.0)
    assert broken.wait() == 1
    room.wait_for_owner(first)
    assert who(room)["version"] == 1


def test_the_next_good_version_takes_over_after_broken_ones(room: Room) -> None:
    first = deploy(room, {"version": 1}, ready="auto")
    for what in ("crash", "fork_away"):
        assert supervise(room, command=[sys.executable, NEWCOMER, what], ready="auto").wait() == 1
    deploy(room, {"version": 2}, ready="auto")
    assert first.wait() == 0
    assert who(room)["version"] == 2


def test_a_command_whose_line_is_waited_for_writes_to_our_output_as_if_it_were_its_own(room: Room) -> None:
    supervisor = supervise(room, command=[sys.executable, NEWCOMER, "write_lines"], ready="line:Running on")
    supervisor.wait_for("is ready after")
    assert supervisor.wait_for("Running on") == "\x1b[32mINFO\x1b[0m  Running on http://127.0.0.1:8000"
    assert room.cli("stop", "--control", room.control).wait() == 0
    assert supervisor.wait() == 0


def test_a_probe_listener_is_put_into_the_words_of_the_command(room: Room) -> None:
    deploy(room, {"version": 1}, ready="auto")
    command = [sys.executable, NEWCOMER, "serve_http", "200", "{fd:probe} {port:probe}"]
    supervisor = supervise(room, command=command, ready="http:/")
    room.wait_for_owner(supervisor)
    url = supervisor.wait_for("is ready after").partition("accepted a probe on ")[2].partition(",")[0]
    started = supervisor.wait_for("started pid")
    assert started.endswith(f"serve_http 200 4 {url.rpartition(':')[2]}")
