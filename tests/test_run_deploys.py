"""Deploys through `takeover run`: the same command line again takes over; a version that fails changes nothing."""

from __future__ import annotations

import contextlib
import os
import pathlib
import signal
import socket

import pytest

from clients import LIMIT, eventually
from processes import Room, descriptors_at_rest, free_address, state_of
from supervised import deploy, do, is_gone, processes_of, supervise, wait_for_version, wait_until_gone, who


def test_starting_it_again_is_the_deploy_and_no_connection_fails(room: Room) -> None:
    first = deploy(room, {"version": 1})
    old = who(room)["pid"]
    client = room.pound()
    for version in range(2, 5):
        second = deploy(room, {"version": version})
        assert first.wait() == 0
        wait_until_gone(old)
        found = who(room)
        assert found["version"] == version
        client.goes_on()
        first, old = second, found["pid"]
    client.stop()
    assert client.lost == []
    assert room.status()["generation"] == 4


def test_the_old_command_serves_its_connections_to_their_end(room: Room) -> None:
    first = deploy(room, {"version": 1})
    with room.connect() as sock:
        sock.sendall(b"one")
        assert sock.recv(10) == b"one"
        deploy(room, {"version": 2})
        first.wait_for("stopping the command")
        wait_for_version(room, 2)
        sock.sendall(b"two")
        assert sock.recv(10) == b"two"
        assert first.running
    assert first.wait() == 0
    first.wait_for("ended")


@pytest.mark.parametrize(
    ("wishes", "options", "said"),
    [
        ({"exit": 3}, {"ready": "delay:30"}, "exit status 3 before it was ready"),
        ({"version": 2}, {"ready": "delay:30", "ready_timeout": 0.3}, "not ready within 0.3 s"),
    ],
)
def test_a_version_that_does_not_get_ready_leaves_the_old_one_serving(
    room: Room, wishes: dict[str, object], options: dict[str, object], said: str
) -> None:
    first = deploy(room, {"version": 1})
    client = room.pound()
    second = supervise(room, wishes, **options)
    assert second.wait() == 1
    assert said in second.text.splitlines()[-1]
    client.goes_on()
    client.stop()
    assert client.lost == []
    assert room.owner() == first.pid and who(room)["version"] == 1


def test_stop_ends_the_service_and_leaves_nothing(room: Room) -> None:
    first = deploy(room)
    pid = who(room)["pid"]
    assert room.cli("stop", "--control", room.control).wait() == 0
    assert first.wait() == 0
    wait_until_gone(pid)
    eventually(lambda: room.left_behind() == [], "nothing is left behind")


def test_hup_replaces_the_command_in_place_and_no_connection_fails(room: Room) -> None:
    wishes = os.path.join(room.folder, "wishes")
    supervisor = deploy(room, {"version": 1, "file": wishes})
    old = who(room)["pid"]
    client = room.pound()
    pathlib.Path(wishes).write_text('{"version": 2}')
    supervisor.signal(signal.SIGHUP)
    supervisor.wait_for("the new command serves; stopping the old one")
    wait_until_gone(old)
    assert who(room)["version"] == 2
    client.goes_on()
    client.stop()
    assert client.lost == []
    assert room.status()["generation"] == 1


def test_a_replacement_that_fails_leaves_the_old_command_serving(room: Room) -> None:
    wishes = os.path.join(room.folder, "wishes")
    supervisor = deploy(room, {"file": wishes})
    old = who(room)["pid"]
    pathlib.Path(wishes).write_text('{"exit": 5}')
    supervisor.signal(signal.SIGHUP)
    supervisor.wait_for("the command was not replaced")
    assert "exit status 5" in supervisor.text and who(room)["pid"] == old
    pathlib.Path(wishes).unlink()
    supervisor.signal(signal.SIGHUP)
    supervisor.wait_for("the new command serves")
    wait_until_gone(old)


def test_a_hup_during_a_hup_replaces_once_more_afterwards(room: Room) -> None:
    gate = os.path.join(room.folder, "gate")
    pathlib.Path(gate).touch()
    supervisor = deploy(room, {"waits_for": gate})
    os.unlink(gate)
    supervisor.signal(signal.SIGHUP)
    supervisor.wait_for("replacing the command")
    supervisor.signal(signal.SIGHUP)
    supervisor.wait_for("once more when that is over")
    pathlib.Path(gate).touch()
    eventually(lambda: supervisor.text.count("the new command serves") == 2, "it was replaced twice")
    eventually(lambda: len(supervisor.text.split("ended ")) == 3, "the two older ones have ended")


def test_a_hup_while_a_successor_takes_over_leaves_the_successor_alone(room: Room) -> None:
    gate = os.path.join(room.folder, "gate")
    first = deploy(room, {"version": 1})
    second = supervise(room, {"version": 2, "waits_for": gate})
    first.wait_for("asks for the service")
    first.signal(signal.SIGHUP)
    first.wait_for("the new command serves")
    first.signal(signal.SIGHUP)
    pathlib.Path(gate).touch()
    room.wait_for_owner(second)
    assert first.wait() == 0
    assert who(room)["version"] == 2


def test_a_dry_run_tells_whether_it_would_work_and_changes_nothing(room: Room) -> None:
    first = deploy(room, {"version": 1})
    good = supervise(room, {"version": 2}, dry_run=True)
    assert good.wait() == 0
    good.wait_for("would have worked")
    bad = supervise(room, {"exit": 9}, dry_run=True, ready="delay:30")
    assert bad.wait() == 1
    assert room.owner() == first.pid and who(room)["version"] == 1
    first.signal(signal.SIGTERM)
    assert first.wait() == 0
    assert supervise(room, dry_run=True).wait() == 0
    assert room.left_behind() == []


def test_strict_fails_unless_the_listeners_are_those_of_the_incumbent(room: Room) -> None:
    first = deploy(room, {"version": 1})
    second = supervise(room, listen=[room.url, f"unix:{room.folder}/more"], strict=True)
    assert second.wait() == 1
    assert "strict: " in second.text.splitlines()[-1]
    assert room.owner() == first.pid and who(room)["version"] == 1
    deploy(room, {"version": 2}, strict=True)
    wait_for_version(room, 2)


def test_a_service_of_another_name_is_not_taken_over(room: Room) -> None:
    first = deploy(room, {"version": 1}, service="shop")
    second = supervise(room, {"version": 2})
    assert second.wait() == 1
    assert "the service here is 'shop', not 'run'" in second.text
    assert "started pid" not in second.text
    assert room.owner() == first.pid and who(room)["version"] == 1


def test_detached_it_returns_when_the_command_serves_and_goes_on_in_the_background(room: Room) -> None:
    with open(os.path.join(room.folder, "log"), "wb") as log:
        output = {"stdout": log, "stderr": log}
        front = supervise(room, {"version": 1}, detach=True, process=output)
        assert front.wait() == 0
        pid = room.status()["pid"]
        assert pid != front.pid and os.getsid(pid) == pid
        assert who(room)["version"] == 1
        assert supervise(room, {"exit": 3}, detach=True, process=output, ready="delay:30").wait() == 1
        assert who(room)["version"] == 1
        assert supervise(room, {"version": 2}, detach=True, process=output).wait() == 0
        wait_for_version(room, 2)
        assert room.cli("stop", "--control", room.control).wait() == 0


def test_a_command_that_ends_in_the_probation_gives_the_service_back(room: Room) -> None:
    first = deploy(room, {"version": 1}, probation=30.0)
    second = supervise(room, {"version": 2})
    second.wait_for("took over 1 listener")
    for process in processes_of(room):
        os.kill(process["pid"], signal.SIGKILL)
    assert second.wait() == 1
    assert "ended in the probation with SIGKILL" in second.text.splitlines()[-1]
    eventually(lambda: room.owner() == first.pid, "the first owns the service again")
    assert who(room)["version"] == 1
    third = supervise(room, {"version": 3})
    third.wait_for("took over 1 listener")


def test_term_before_the_command_is_ready_ends_with_status_1_and_the_old_one_serves_on(room: Room) -> None:
    first = deploy(room, {"version": 1})
    second = supervise(room, {"version": 2}, ready="delay:30")
    second.wait_for("started pid")
    second.signal(signal.SIGTERM)
    assert second.wait() == 1
    assert room.owner() == first.pid and who(room)["version"] == 1


def test_term_while_nothing_comes_from_an_incumbent_ends_with_status_1_at_once(room: Room) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as silent:
        silent.bind(room.control)
        silent.listen()
        silent.settimeout(LIMIT)
        second = supervise(room)
        with silent.accept()[0]:
            second.signal(signal.SIGTERM)
            assert second.wait() == 1
    assert "SIGTERM before the service was ready" in second.lines[-1]


def test_a_port_that_the_new_version_does_not_use_refuses_once_the_old_one_has_drained_it(room: Room) -> None:
    host, port = free_address()
    first = deploy(room, {"version": 1}, listen=[room.url, f"more=tcp://{host}:{port}"])
    socket.create_connection((host, port), LIMIT).close()
    deploy(room, {"version": 2})
    assert first.wait() == 0
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((host, port), LIMIT)
    assert who(room)["version"] == 2


def test_a_listener_that_the_new_version_does_not_use_is_drained_by_the_old_one(room: Room) -> None:
    second_address = os.path.join(room.folder, "second")
    deploy(room, {"version": 1}, listen=[room.url, f"unix:{second_address}"])
    second = deploy(room, {"version": 2})
    second.wait_for("not used by this version")
    eventually(lambda: "second" not in room.left_behind(), "its path is gone")
    wait_for_version(room, 2)


def test_a_supervisor_that_is_killed_in_its_probation_leaves_the_service_to_the_old_one(room: Room) -> None:
    first = deploy(room, {"version": 1}, probation=30.0)
    second = supervise(room, {"version": 2})
    second.wait_for("took over 1 listener")
    second.signal(signal.SIGKILL)
    second.wait()
    eventually(lambda: room.owner() == first.pid, "the first owns the service again")
    wait_for_version(room, 1)


def test_a_stop_while_a_successor_gets_ready_hands_the_service_on(room: Room) -> None:
    gate = os.path.join(room.folder, "gate")
    first = deploy(room, {"version": 1})
    second = supervise(room, {"version": 2, "waits_for": gate})
    second.wait_for("started pid")
    first.signal(signal.SIGTERM)
    assert first.wait() == 0
    with room.connect() as waiting:
        waiting.sendall(b"x")
        pathlib.Path(gate).touch()
        assert waiting.recv(1) == b"x"
    room.wait_for_owner(second)
    assert who(room)["version"] == 2


def test_a_hup_while_the_command_is_being_started_replaces_it_afterwards(room: Room) -> None:
    gate = os.path.join(room.folder, "gate")
    supervisor = supervise(room, {"waits_for": gate})
    supervisor.wait_for("started pid")
    supervisor.signal(signal.SIGHUP)
    supervisor.wait_for("once more when that is over")
    pathlib.Path(gate).touch()
    supervisor.wait_for("the new command serves")


def test_a_hup_that_comes_when_the_command_is_being_stopped_is_too_late(room: Room) -> None:
    supervisor = deploy(room, {"ignores": True})
    supervisor.signal(signal.SIGTERM)
    supervisor.wait_for("stopping the command")
    supervisor.signal(signal.SIGHUP)
    supervisor.wait_for("SIGHUP: too late")
    supervisor.signal(signal.SIGTERM)
    assert supervisor.wait() == 0
    assert supervisor.text.count("started pid") == 1


def test_a_stop_during_a_hup_stops_both_commands(room: Room) -> None:
    gate = os.path.join(room.folder, "gate")
    pathlib.Path(gate).touch()
    supervisor = deploy(room, {"waits_for": gate}, stop_timeout=0.5)
    old = who(room)["pid"]
    os.unlink(gate)
    supervisor.signal(signal.SIGHUP)
    eventually(lambda: supervisor.text.count("started pid") == 2, "the new one is started")
    eventually(lambda: room.status()["command"]["reloading"], "it is known to be")
    new = int(supervisor.lines[-1].partition("started pid ")[2].partition(":")[0])
    supervisor.signal(signal.SIGTERM)
    assert supervisor.wait() == 0
    assert is_gone(old) and is_gone(new)


def test_deploys_replacements_and_restarts_leak_no_descriptor_and_status_counts_connections(room: Room) -> None:
    wishes = os.path.join(room.folder, "wishes")
    first = deploy(room)
    second = deploy(room, {"file": wishes})
    assert first.wait() == 0
    before = eventually(lambda: descriptors_at_rest(second.pid), "nothing changes")
    for number in (1, 2):
        (old,) = [process["pid"] for process in processes_of(room)]
        second.signal(signal.SIGHUP)
        eventually(lambda: second.text.count("the new command serves") == number, "replaced")  # noqa: B023
        wait_until_gone(old)
    do(room, "kill 9")
    assert who(room)["pid"]
    eventually(lambda: processes_of(room)[0]["ready_since"], "it is ready")
    pathlib.Path(wishes).write_text('{"exit": 5}')
    second.signal(signal.SIGHUP)
    second.wait_for("the command was not replaced")
    eventually(lambda: descriptors_at_rest(second.pid) == before, f"it holds what it held: {before}")
    with room.connect(), room.connect():
        eventually(lambda: room.status()["connections"]["open"] == 2, "two connections are counted")
    eventually(lambda: room.status()["connections"]["open"] == 0, "they are gone")


def test_with_a_keeper_a_crash_of_everything_refuses_nobody_and_a_deploy_keeps_it(room: Room) -> None:
    first = deploy(room, {"version": 1, "children": 1}, keep=True)
    keeper = eventually(lambda: room.status()["keeper"]["pid"], "there is a keeper")
    second = deploy(room, {"version": 2, "children": 1}, keep=True)
    assert first.wait() == 0
    eventually(lambda: room.status()["keeper"]["pid"] == keeper, "the keeper has stayed")
    second.signal(signal.SIGKILL)
    second.wait()
    with room.connect() as waiting:
        waiting.sendall(b"x")
        third = deploy(room, {"version": 3}, keep=True)
        wait_for_version(room, 3)
        eventually(lambda: room.status()["keeper"]["pid"] == keeper, "the keeper has stayed")
        with contextlib.suppress(ConnectionResetError):  # a worker that was left may have accepted it
            assert waiting.recv(1) in (b"x", b"")
    third.signal(signal.SIGTERM)
    assert third.wait() == 0
    assert room.left_behind() == []
    eventually(lambda: is_gone(keeper) or state_of(keeper) == "Z", "the keeper has ended")
