"""A handler that somebody else has compiled against the package's .pxd serves on the native loop, and moves."""

from __future__ import annotations

import pathlib
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

import takeover
from clients import Talker, eventually
from conftest import CYTHON_IS_BUILT
from processes import FAST, PROGRAMS, Boundaries, Program, Room, stopping

BUILD = """
import sys
from Cython.Build import cythonize
from setuptools import Extension, setup

module = Extension("counting", ["counting.pyx"], extra_compile_args=["-O0"])
modules = cythonize([module], include_path=[sys.argv.pop()], quiet=True)
setup(name="counting", ext_modules=modules, script_args=["-q", "build_ext", "--inplace"])
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Where the module was built, with the interface as it is installed, or of the source tree where that is used."""
    if not CYTHON_IS_BUILT:
        pytest.skip("the compiled modules are not built")
    if shutil.which("cc") is None:
        pytest.skip("there is no C compiler")
    folder = tmp_path_factory.mktemp("counting")
    shutil.copy(PROGRAMS / "counting.pyx", folder)
    package = pathlib.Path(takeover.__file__).parent
    if not (package / "_loop.pxd").exists():
        package = PROGRAMS.parent.parent / "ext" / "takeover"
    done = subprocess.run(
        [sys.executable, "-c", BUILD, str(package.parent)], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return str(folder)


class Counting:
    """Servers in a room, and clients who know how many lines they have sent."""

    def __init__(self, room: Room, folder: str) -> None:
        self.room = room
        self.folder = folder
        self.lines: dict[Talker, int] = {}

    def start(self, handler: str = "MOVING", *, settled: bool = True, **wishes: Any) -> Program:
        options = {"listen": [self.room.url], "control": self.room.control, "probation": 0.0}
        argument = {"folder": self.folder, "handler": handler, "options": options, "limits": FAST, **wishes}
        program = self.room.program("counting_server.py", argument)
        if settled:
            self.room.wait_for_owner(program)
        return program

    def come(self, count: int) -> None:
        self.lines |= {self.room.talker(): 0 for _ in range(count)}

    def count(self) -> None:
        for talker, lines in self.lines.items():
            talker.send("line\nline\n")
            self.lines[talker] = lines + 2
            expected = b"%d\n%d\n" % (lines + 1, lines + 2)
            assert talker.read(len(expected)) == expected


@pytest.fixture
def counting(folder: str) -> Iterator[Counting]:
    with Room("cython") as room:
        yield Counting(room, folder)


def test_its_connections_move_with_their_state_and_it_frees_what_it_had_of_them(counting: Counting) -> None:
    old = counting.start()
    counting.come(300)
    for _ in range(3):
        counting.count()
        new = counting.start()
        assert old.wait() == 0, old.text
        assert "not freed: 0" in old.text
        old = new
    counting.count()
    assert counting.room.status()["moved"]["in"] == 300


def test_without_a_way_to_tell_its_state_its_connections_drain(counting: Counting) -> None:
    old = counting.start("STAYING")
    counting.come(5)
    counting.count()
    counting.start("STAYING")
    old.wait_for("the rest drains (5 unmovable)")
    counting.count()
    for talker in counting.lines:
        talker.close()
    assert old.wait() == 0
    assert "not freed: 0" in old.text


@pytest.mark.parametrize("handlers", [("MOVING", "STAYING"), ("STAYING", "MOVING")])
def test_between_one_that_moves_and_one_that_does_not_its_connections_drain(
    counting: Counting, handlers: tuple[str, str]
) -> None:
    old = counting.start(handlers[0])
    counting.come(5)
    counting.count()
    counting.start(handlers[1])
    old.wait_for("the rest drains (5 " + ("handler)" if handlers[0] == "MOVING" else "unmovable)"))
    counting.count()


def test_what_it_has_adopted_and_gives_back_it_frees(counting: Counting) -> None:
    """The successor is stopped before it can answer; the incumbent takes back, and moves all when it goes on."""
    programs: list[Program] = []

    boundaries = Boundaries({"taker before ADOPTED": stopping(programs, 1)})
    try:
        programs.append(counting.start())
        counting.come(100)
        counting.count()
        programs.append(counting.start(settled=False, boundaries=boundaries.name))
        programs[0].wait_for("moved 0 connections")
        counting.count()
        programs[1].signal(signal.SIGCONT)
        assert programs[0].wait() == 0
        counting.count()
        for talker in counting.lines:
            talker.close()
        eventually(lambda: counting.room.status()["connections"]["open"] == 0, "all have gone")
        programs[1].signal(signal.SIGTERM)
        assert programs[1].wait() == 0
        assert "not freed: 0" in programs[1].text
    finally:
        boundaries.close()
