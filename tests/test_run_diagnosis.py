"""Why a new command is not ready: one plain line for each way to go wrong."""

from __future__ import annotations

import ctypes
import os
import pathlib
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from clients import eventually
from newcomers import NEWCOMER, Trial, Trials, tcp, trials
from processes import Room
from supervised import supervise
from takeover.run import acceptance, diagnosis, proc

PR_SET_CHILD_SUBREAPER = 36
"""include/uapi/linux/prctl.h"""


@pytest.fixture
def stage() -> Iterator[Trials]:
    with trials() as made:
        yield made


def _tells(trial: Trial, *texts: str) -> None:
    """The diagnosis has all of these in one line, sooner or later."""
    eventually(
        lambda: trial.run(0.05) or all(text in trial.check.why_not() for text in texts),
        f"{texts} in the reason, which is {trial.check.why_not()!r}",
    )
    assert "\n" not in trial.check.why_not()


def test_a_port_of_its_own_is_named(stage: Trials) -> None:
    listening = stage.listen(tcp())
    trial = stage.newcomer("auto", [listening], "listen_on_its_own_port")
    _tells(trial, "it listens on tcp://127.0.0.1:", f"and not on the descriptor of {listening.url}", "--fd {fd}")


def test_descriptors_that_nobody_waits_on_are_told_with_what_is_done_instead(stage: Trials) -> None:
    listening = stage.listen(tcp())
    trial = stage.newcomer("auto", [listening], "hang")
    _tells(trial, f"it has {listening.url} open but never waits on it", f"pid {trial.pid} (python", "sleeps", "of CPU")


def test_an_epoll_set_on_which_nobody_waits_is_told(stage: Trials) -> None:
    _tells(stage.newcomer("auto", [stage.listen(tcp())], "register_and_hang"), "in its epoll set but does not come to")


def test_closed_descriptors_are_told(stage: Trials) -> None:
    _tells(stage.newcomer("auto", [stage.listen(tcp())], "close_them_and_hang"), "it has closed the descriptor of tcp:")


def test_what_forked_away_is_told_with_its_pid(stage: Trials) -> None:
    prctl = ctypes.CDLL(None).prctl
    assert prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0
    try:
        trial = stage.newcomer("notify", [stage.listen(tcp())], "fork_away")
        eventually(trial.has_ended, "it has ended")
        told = trial.check.why_not()
        assert "went on in the background with the listeners" in told
        os.kill(int(told.partition("pid ")[2].split()[0]), signal.SIGKILL)
        eventually(lambda: trial.has_ended() and trial.check._tree.members() == [], "what went away has ended")
    finally:
        prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


def test_a_port_that_the_command_was_to_bind_and_has_not_is_told(stage: Trials) -> None:
    words = [sys.executable, "-c", "import time; time.sleep(60)", "{port:probe}"]
    trial = stage.make("auto", [stage.listen(tcp())], *words)
    assert trial.check.probe is not None
    url = trial.check.probe[1]
    trial.start()
    _tells(trial, f"nothing of it accepts on {url} (connect {url}: Connection refused)")


def test_a_process_that_has_gone_meanwhile_is_left_out_of_what_they_do() -> None:
    with subprocess.Popen(["true"]) as process:
        process.wait()
    assert diagnosis.doing([process.pid, os.getpid()]) == diagnosis.doing([os.getpid()]) != ""
    assert diagnosis.doing([process.pid]) == ""


def test_the_last_status_and_a_ready_that_was_no_proof_are_told(stage: Trials) -> None:
    _tells(stage.newcomer("notify", [], "say_only_a_status"), "not sent READY=1", "its last STATUS: loading 7 of 9")
    _tells(
        stage.newcomer("auto", [stage.listen(tcp())], "say_ready_and_hang"), "READY=1 came from pid", "--ready notify"
    )


def test_what_has_died_needs_no_more_than_its_exit_status(stage: Trials) -> None:
    trial = stage.newcomer("auto", [stage.listen(tcp())], "crash")
    trial.run()
    assert trial.exited == 1 and trial.check.why_not() == ""


@pytest.mark.parametrize("words", [["granian"], ["-m", "granian"]])
def test_granian_is_known_by_its_name_and_what_works_instead_is_told(
    stage: Trials, tmp_path: pathlib.Path, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "granian.py").write_text("import time; time.sleep(60)")
    (tmp_path / "granian").write_text(f"#!{sys.executable}\nimport time; time.sleep(60)")
    (tmp_path / "granian").chmod(0o700)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    command = [str(tmp_path / "granian")] if words == ["granian"] else [sys.executable, *words]
    trial = stage.start("auto", [stage.listen(tcp())], *command)
    assert trial.run() == "" and trial.failure == diagnosis.GRANIAN


def test_a_file_that_only_has_granian_in_its_name_is_not_granian(stage: Trials) -> None:
    trial = stage.start("delay:0", [], sys.executable, "-c", "import time; time.sleep(60)", "granian-settings")
    assert not diagnosis.is_granian([trial.pid])


@pytest.fixture
def hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def hidden(pid: int) -> dict[int, str]:
        raise proc.Hidden(f"pid {pid}: Permission denied")

    monkeypatch.setattr(proc, "descriptors", hidden)


@pytest.mark.once
@pytest.mark.usefixtures("hidden")
def test_what_cannot_be_looked_into_counts_as_ready_when_it_wakes_up_for_probes(stage: Trials) -> None:
    listeners = [stage.listen(tcp())]
    first = stage.newcomer("auto", listeners, "wait_in_epoll")
    assert f"pid {first.pid} woke up for " in first.run() and "is not to be seen (pid " in first.proof
    second = stage.newcomer("auto", listeners, "serve_http")
    assert f"pid {second.pid} woke up for " in second.run()
    assert stage.newcomer("auto", listeners, "register_and_hang").run(3) == ""
    asked = stage.newcomer("http:/", [stage.listen(tcp())], "serve_http")
    assert asked.run().endswith("and answered GET / with 200")
    announced = stage.newcomer("auto", [stage.listen(tcp())], "say_ready_and_hang")
    assert announced.run() == f"READY=1 from pid {announced.pid}"
    silent = stage.newcomer("auto", [stage.listen(tcp())], "hang")
    assert silent.run(1) == "" and "is not to be seen from here (pid " in silent.check.why_not()


@pytest.mark.usefixtures("hidden")
def test_listeners_of_what_cannot_be_looked_into_are_probed_one_after_the_other(stage: Trials) -> None:
    listeners = [stage.listen(tcp()), stage.listen(tcp())]
    proof = stage.newcomer("auto", listeners, "wait_in_epoll").run()
    assert all(f"who has accepted them on {each.url} is not to be seen" in proof for each in listeners)


@pytest.mark.usefixtures("hidden")
def test_what_cannot_be_looked_into_and_never_sleeps_counts_when_it_has_lived_for_a_while(
    stage: Trials, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(acceptance, "BUSY", 0.0)
    trial = stage.newcomer("auto", [stage.listen(tcp())], "spin_without_waiting")
    assert trial.run().startswith(f"pid {trial.pid} is busy; who has accepted them on tcp://")


SETPRIV = ["setpriv", "--bounding-set", "-sys_ptrace", "--inh-caps", "-sys_ptrace"]
OTHER_USER = ["setpriv", "--reuid", "65534", "--clear-groups"]
HIDDEN = "mount -t proc -o hidepid=2 proc /proc && exec setpriv --regid 65533 --clear-groups "


@pytest.mark.skipif(os.getuid() != 0 or not shutil.which("setpriv"), reason="needs root and setpriv (util-linux)")
@pytest.mark.parametrize("backend", ["python"], indirect=True)
@pytest.mark.parametrize("hides", [False, True])
def test_a_command_under_another_user_is_judged_by_what_can_be_known(room: Room, hides: bool) -> None:
    hidden = ["unshare", "-m", "sh", "-c", HIDDEN + shlex.join(SETPRIV[1:]) + ' "$@"', "sh"]
    if hides and subprocess.run([*hidden, "true"], check=False, capture_output=True).returncode:
        pytest.skip("may not mount /proc with hidepid here")
    os.chmod(room.folder, 0o755)
    started = hidden if hides else SETPRIV
    program = pathlib.Path(room.folder, "newcomer.py")
    program.write_text(pathlib.Path(NEWCOMER).read_text())
    command = [*OTHER_USER, "/usr/bin/python3", str(program)]
    ways = {"ready": "auto", "ready_timeout": 3.0, "probation": 0.0, "started": started}
    announced = supervise(room, command=[*command, "say_ready_and_hang"], **ways)
    announced.wait_for("is ready after")
    assert "READY=1 from pid " in announced.text
    assert room.cli("stop", "--control", room.control).wait() == 0
    supervisor = supervise(
        room, command=[*command, "wait_in_epoll"], **{**ways, "ready_timeout": 3.0 if hides else 30.0}
    )
    if hides:
        broken = "is not to be seen from here"
        assert supervisor.wait() == 1 and broken in supervisor.lines[-1]
        return
    supervisor.wait_for("woke up for")
    room.wait_for_owner(supervisor)
    broken = supervise(room, command=[*command, "hang"], **ways)
    assert broken.wait() == 1
    assert "is not to be seen from here" in broken.lines[-1] and "--ready notify" in broken.lines[-1]
    assert room.owner() == supervisor.pid
    # A change of user takes PR_SET_PDEATHSIG away (prctl(2)): the command would outlive a supervisor that is killed.
    assert room.cli("stop", "--control", room.control).wait() == 0
    assert supervisor.wait() == 0
