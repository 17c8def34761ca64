"""The DaemonSet of the examples: its words are ours, its times fit, and its script hands over from pod to pod."""

import os
import pathlib
import shlex
import signal
import sys
from typing import Any

import pytest

from clients import LIMIT, eventually
from processes import Program, Room
from supervised import served, who
from takeover import cli
from test_namespaces import PID, in_pid_namespaces

yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
TEXT = (pathlib.Path(__file__).parent.parent / "examples" / "kubernetes" / "daemonset.yaml").read_text()


@pytest.fixture(scope="module")
def pod() -> dict[str, Any]:
    return dict(yaml.safe_load(TEXT)["spec"]["template"]["spec"])


@pytest.fixture
def app(pod: dict[str, Any]) -> dict[str, Any]:
    (app,) = pod["containers"]
    return dict(app)


def run_of(app: dict[str, Any]) -> dict[str, Any]:
    """The options of `takeover run` in the script, as the command itself reads them."""
    (line,) = [line for line in app["args"][0].replace("\\\n", " ").splitlines() if line.startswith("takeover run")]
    words = shlex.split(line)
    assert words.pop() == "&"
    return dict(cli.main.commands["run"].make_context("run", words[2:]).params)


def test_the_new_pod_starts_beside_the_old_one(pod: dict[str, Any], app: dict[str, Any]) -> None:
    daemons = yaml.safe_load(TEXT)
    assert (daemons["apiVersion"], daemons["kind"]) == ("apps/v1", "DaemonSet")
    assert daemons["spec"]["selector"]["matchLabels"] == daemons["spec"]["template"]["metadata"]["labels"]
    assert daemons["spec"]["updateStrategy"]["rollingUpdate"] == {"maxSurge": 1, "maxUnavailable": 0}
    # One queue for both, and nothing that keeps the scheduler from putting both on one node.
    assert pod["hostNetwork"] is True
    assert all("ports" not in each for each in [*pod["containers"], *pod["initContainers"]])


def test_the_control_socket_is_in_a_folder_of_the_node_that_is_the_users_own(
    pod: dict[str, Any], app: dict[str, Any]
) -> None:
    control = run_of(app)["control"]
    (volume,) = pod["volumes"]
    (mount,) = app["volumeMounts"]
    assert "hostPath" in volume and volume["name"] == mount["name"]
    assert control.startswith(f"{mount['mountPath']}/")
    (init,) = pod["initContainers"]
    assert init["volumeMounts"] == app["volumeMounts"] and init["securityContext"]["runAsUser"] == 0
    *_, owner, _, _, _, mode, folder = init["command"]
    assert folder == os.path.dirname(control)
    assert mode == "0700" and owner == str(pod["securityContext"]["runAsUser"])


def test_the_probe_is_a_command_of_ours_and_asks_the_same_service(app: dict[str, Any]) -> None:
    command, word, *options = app["readinessProbe"]["exec"]["command"]
    assert command == "takeover"
    asked = cli.main.commands[word].make_context(word, options).params
    assert asked["control"] == run_of(app)["control"] and asked["here"] is True


def test_the_grace_period_has_room_for_the_drain(pod: dict[str, Any], app: dict[str, Any]) -> None:
    sleep, seconds = app["lifecycle"]["preStop"]["exec"]["command"]
    assert sleep == "sleep"
    assert pod["terminationGracePeriodSeconds"] > int(seconds) + run_of(app)["stop_timeout"]


@in_pid_namespaces
def test_the_script_hands_over_from_pod_to_pod_and_the_old_one_waits_to_be_deleted(app: dict[str, Any]) -> None:
    with Room("auto") as room:
        command = os.path.join(room.folder, "takeover")
        with open(command, "w") as file:
            file.write(f'#!/bin/sh\nexec {sys.executable} -m takeover "$@"\n')
        os.chmod(command, 0o755)
        room.environment["PATH"] = f"{room.folder}:{os.environ['PATH']}"

        def start(version: int) -> Program:
            script = app["args"][0]
            for theirs, ours in (
                ("/run/takeover/app/takeover.sock", room.control),
                ("tcp://0.0.0.0:8000", room.url),
                ("uvicorn app:app --fd '{fd}'", shlex.join(served({"version": version}))),
            ):
                assert theirs in script
                script = script.replace(theirs, ours)
            return room.run("unshare", *PID, *app["command"], script)

        def probe(pod: Program) -> int:
            """The exit status of the readiness probe, run in the container of the pod's PID 1."""
            asked = app["readinessProbe"]["exec"]["command"]
            words = [room.control if word.startswith("/run/") else word for word in asked]
            return room.run("nsenter", "--target", str(first_of(pod)), "--pid", "--mount", *words).wait()

        old = start(1)
        eventually(lambda: old.running and probe(old) == 0, "the old pod is ready")
        new = start(2)
        eventually(lambda: new.running and probe(new) == 0, "the new pod is ready")
        assert who(room)["version"] == 2
        assert probe(old) == 3
        # kubectl deletes the old pod: what the kubelet sends to its PID 1 ends it at once.
        old.wait_for("has taken over")
        eventually(lambda: "sleep" in commands_below(first_of(old)), "the old pod has nothing left to do")
        os.kill(first_of(old), signal.SIGTERM)
        assert old.wait(LIMIT) == 0
        assert who(room)["version"] == 2
        os.kill(first_of(new), signal.SIGTERM)
        assert new.wait(LIMIT) == 0
        assert not os.path.exists(room.control)


def children_of(pid: int) -> list[int]:
    return list(map(int, pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


def first_of(pod: Program) -> int:
    """PID 1 of the pod, as it is seen here: the only child of unshare."""
    return int(eventually(lambda: children_of(pod.pid), "the container has a first process")[0])


def commands_below(pid: int) -> list[str]:
    return [pathlib.Path(f"/proc/{child}/comm").read_text().strip() for child in children_of(pid)]
