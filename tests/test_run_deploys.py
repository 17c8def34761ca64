"""Deploys through `takeover run`: the same command line again takes over; a version that fails changes nothing."""

from __future__ import annotations

import pytest

from clients import eventually
from processes import Room
from supervised import deploy, supervise, wait_until_gone, who


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
        eventually(lambda: who(room)["version"] == 2, "newcomers come to the new command")
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
