"""The example units are right in systemd's own eyes, and their lines do what docs/systemd.md says of them."""

from __future__ import annotations

import os
import pathlib
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest

from clients import LIMIT, eventually, receive_exactly
from processes import Program, Room
from service_manager import ServiceManager
from supervised import SERVED, wait_for_version, who

EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"
UNITS = EXAMPLES / "systemd"
SUPERVISORS = EXAMPLES / "supervisors"
ANALYZE = shutil.which("systemd-analyze")


def script(path: pathlib.Path, *lines: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(("#!/bin/sh", *lines, "")))
    path.chmod(0o755)


class Site:
    """What the examples find on the machine: /srv/app with its releases, in a room."""

    def __init__(self, room: Room) -> None:
        self.room = room
        self.folder = pathlib.Path(room.folder) / "app"
        for version in (1, 2, 3):
            release = self.folder / "releases" / str(version)
            script(release / "venv/bin/takeover", f'exec {sys.executable} -m takeover "$@"')
            script(release / "venv/bin/python", f'exec {sys.executable} "$@"')
            script(release / "venv/bin/uvicorn", f"exec {sys.executable} {SERVED} '{{\"version\": {version}}}'")
            for file in (EXAMPLES / "chat.py", UNITS / "take-over.sh"):
                shutil.copy(file, release)
        script(self.folder / "venv/bin/takeover", f'exec {sys.executable} -m takeover "$@"')
        self.release(1)

    def release(self, version: int) -> None:
        """What a deploy tool does: /srv/app/current leads to another release, in one step."""
        new = self.folder / "new"
        new.symlink_to(self.folder / "releases" / str(version))
        new.rename(self.folder / "current")

    def here(self, text: str) -> str:
        """The text of an example for this room."""
        for theirs, ours in (
            ("/srv/app/takeover.sock", self.room.control),
            ("/run/app/takeover.sock", self.room.control),
            ("/srv/app", str(self.folder)),
            ("0.0.0.0:8000", "{}:{}".format(*self.room.address)),
        ):
            text = text.replace(theirs, ours)
        return text

    def line(self, unit: str, name: str, **variables: object) -> list[str]:
        """The words of ExecStart= or the like of a unit, with the variables put in."""
        text = (UNITS / unit).read_text().replace("\\\n", " ")
        (found,) = (line for line in text.splitlines() if line.startswith(f"{name}="))
        words = shlex.split(self.here(found.partition("=")[2]))
        return [str(variables.get(word[1:], word)) if word.startswith("$") else word for word in words]

    @property
    def place(self) -> str:
        """WorkingDirectory=, as it is resolved when a process is started."""
        return os.path.realpath(self.folder / "current")


@pytest.fixture
def site() -> Iterator[Site]:
    with Room("auto") as room:
        yield Site(room)


@pytest.fixture
def manager(site: Site) -> Iterator[ServiceManager]:
    with ServiceManager(site.room) as manager:
        yield manager
        if manager.main_pid:
            os.kill(manager.main_pid, signal.SIGKILL)  # one in the background is no program of the room


@pytest.mark.skipif(ANALYZE is None, reason="systemd-analyze is not installed")
@pytest.mark.parametrize(
    "unit", sorted(path.name for path in UNITS.iterdir() if path.suffix in (".service", ".socket"))
)
def test_systemd_has_nothing_to_say_about_a_unit(site: Site, unit: str) -> None:
    assert ANALYZE is not None
    folder = pathlib.Path(site.room.folder) / "units"
    folder.mkdir()
    for path in UNITS.glob(f"{unit.partition('.')[0]}.*"):
        (folder / path.name).write_text(path.read_text().replace("/srv/app", str(site.folder)))
    told = subprocess.run(
        [ANALYZE, "verify", "--man=no", str(folder / unit)], capture_output=True, text=True, check=False
    )
    lines = (told.stdout + told.stderr).splitlines()
    if unit == "notify-reload.service":  # which systemd knows since 253
        lines = [line for line in lines if not line.endswith("Failed to parse service type, ignoring: notify-reload")]
    assert lines == [] and told.returncode == 0


def reload(site: Site, manager: ServiceManager, unit: str, old: int) -> None:
    """`systemctl reload`, until it is over."""
    process = manager.reload(*site.line(unit, "ExecReload"), cwd=site.place)
    assert process.wait() == 0, process.text
    manager.wait_until(lambda: manager.main_pid not in (0, old), "there is a new main process")
    manager.wait_until(lambda: manager.state == "active", "the reload is over")
    assert manager.deaths == 0 and not manager.unbelieved


@pytest.mark.parametrize("unit", ["deploy.service", "activated.service"])
def test_a_reload_deploys_what_is_current_and_rolls_it_back(site: Site, manager: ServiceManager, unit: str) -> None:
    if unit == "activated.service":
        manager.activated = [("web", socket.create_server(site.room.address))]
    first = manager.start(*site.line(unit, "ExecStart"), cwd=site.place)
    manager.wait_for_main(first)
    assert who(site.room)["version"] == 1
    for version in (2, 1):
        site.release(version)
        reload(site, manager, unit, manager.main_pid)
        wait_for_version(site.room, version)
        eventually(lambda: who(site.room)["folder"].endswith(f"releases/{version}"), "it runs in its own folder")  # noqa: B023
    assert first.wait() == 0


def test_a_reload_of_the_plain_unit_replaces_the_command_in_place(site: Site, manager: ServiceManager) -> None:
    first = manager.start(*site.line("plain.service", "ExecStart"))
    manager.wait_for_main(first)
    site.release(2)
    assert manager.reload(*site.line("plain.service", "ExecReload", MAINPID=first.pid)).wait() == 0
    manager.wait_until(lambda: manager.heard("RELOADING") and manager.state == "active", "the reload is over")
    wait_for_version(site.room, 2)
    assert manager.main_pid == first.pid and manager.deaths == 0


def test_a_reload_of_a_program_that_takes_over_by_itself_moves_its_clients(site: Site, manager: ServiceManager) -> None:
    site.room.environment["TAKEOVER"] = f"{sys.executable} -m takeover"
    first = manager.start(*site.line("library.service", "ExecStart"), cwd=site.place)
    manager.wait_for_main(first)
    with site.room.connect() as client:
        client.sendall(b"hello\n")
        assert receive_exactly(client, 6) == b"hello\n"
        site.release(2)
        reload(site, manager, "library.service", first.pid)
        assert first.wait() == 0
        client.sendall(b"again\n")
        assert receive_exactly(client, 6) == b"again\n"


def test_a_program_that_cannot_take_over_makes_the_reload_fail(site: Site, manager: ServiceManager) -> None:
    site.room.environment["TAKEOVER"] = f"{sys.executable} -m takeover"
    first = manager.start(*site.line("library.service", "ExecStart"), cwd=site.place)
    manager.wait_for_main(first)
    (site.folder / "releases" / "2" / "chat.py").write_text("raise SystemExit(7)\n")
    site.release(2)
    assert manager.reload(*site.line("library.service", "ExecReload"), cwd=site.place).wait() == 7
    assert manager.main_pid == first.pid and manager.state == "active"


# The same without systemd.


def deploys_by_a_hangup(site: Site, hang_up: Program) -> None:
    wait_for_version(site.room, 1)
    site.release(2)
    hang_up.signal(signal.SIGHUP)
    wait_for_version(site.room, 2)
    eventually(lambda: not site.room.status()["command"]["reloading"], "the reload is over")


def test_what_is_started_beside_the_shell_loop_serves_until_the_loop_takes_it_back(site: Site) -> None:
    path = site.folder / "loop.sh"
    path.write_text(site.here((SUPERVISORS / "loop.sh").read_text()))
    loop = site.room.run("sh", str(path))
    eventually(site.room.owner, "it serves")
    site.release(2)
    where = ("--control", site.room.control, "--listen", site.room.url)
    words = ("--", "venv/bin/uvicorn", "app:app", "--fd", "{fd}")
    beside = site.room.run("venv/bin/takeover", "run", "--detach", "--probation", "0.2", *where, *words, cwd=site.place)
    assert beside.wait() == 0, beside.text
    eventually(lambda: site.room.status()["generation"] == 3 and site.room.owner(), "the loop has it back")
    wait_for_version(site.room, 2)
    loop.signal(signal.SIGTERM)
    assert loop.wait() == 0
    eventually(site.room.refuses, "what was started beside the loop has ended, too")


@pytest.mark.parametrize("file", ["s6/run", "runit/run"])
def test_a_run_file_becomes_the_server_and_a_hangup_deploys(site: Site, file: str) -> None:
    path = site.folder / "run"
    path.write_text(site.here((SUPERVISORS / file).read_text()))
    program = site.room.run("sh", str(path))
    eventually(site.room.owner, "it serves")
    deploys_by_a_hangup(site, program)
    program.signal(signal.SIGTERM)
    assert program.wait() == 0


def test_the_shell_loop_deploys_starts_again_what_was_killed_and_ends_when_told(site: Site) -> None:
    path = site.folder / "loop.sh"
    path.write_text(site.here((SUPERVISORS / "loop.sh").read_text()))
    loop = site.room.run("sh", str(path))
    eventually(site.room.owner, "it serves")
    deploys_by_a_hangup(site, loop)
    before = site.room.owner()
    assert before is not None
    os.kill(before, signal.SIGKILL)
    try:
        eventually(lambda: site.room.owner() not in (None, before), "another one serves")
    except AssertionError as error:
        raise AssertionError(f"{error}; the loop said:\n{loop.text}") from None
    assert who(site.room)["version"] == 2
    loop.signal(signal.SIGTERM)
    assert loop.wait() == 0
    assert site.room.refuses()


def test_supervisord_starts_deploys_and_stops_it(site: Site) -> None:
    pytest.importorskip("supervisor", reason="supervisor is not installed")
    folder = pathlib.Path(site.room.folder)
    configuration = folder / "supervisord.conf"
    head = (
        f"[supervisord]\nnodaemon=true\nlogfile={folder}/log\npidfile={folder}/pid\nchildlogdir={folder}\n"
        f"[unix_http_server]\nfile={folder}/rpc\n[supervisorctl]\nserverurl=unix://{folder}/rpc\n"
        "[rpcinterface:supervisor]\n"
        "supervisor.rpcinterface_factory=supervisor.rpcinterface:make_main_rpcinterface\n"
    )
    if os.geteuid() == 0:
        head = head.replace("[unix_http_server]", "user=root\n[unix_http_server]")
    configuration.write_text(head + site.here((SUPERVISORS / "supervisord.conf").read_text()))
    python = (sys.executable, "-W", "ignore", "-m")
    daemon = site.room.run(*python, "supervisor.supervisord", "-c", str(configuration))
    eventually(site.room.owner, "it serves")
    before = site.room.owner()
    site.release(2)
    told = site.room.run(*python, "supervisor.supervisorctl", "-c", str(configuration), "signal", "HUP", "app")
    assert told.wait() == 0, told.text
    wait_for_version(site.room, 2)
    assert site.room.owner() == before
    daemon.signal(signal.SIGTERM)
    daemon.process.wait(LIMIT)
    assert site.room.refuses()
