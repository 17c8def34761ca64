"""The interpreter around the package: subinterpreters, the garbage collector, builds without the GIL."""

from __future__ import annotations

import pathlib
import subprocess
import sys
from types import ModuleType

import pytest

from clients import LIMIT
from processes import Room
from takeover.errors import UsageError
from takeover.interpreter import refuse_subinterpreters

LOWER_HALVES = ("_interpreters", "_xxsubinterpreters")
IN_A_SUBINTERPRETER = """
import sys
try:
    import _interpreters as interpreters
except ImportError:
    import _xxsubinterpreters as interpreters
code = '''
import takeover, takeover.errors
try:
    takeover.join({path!r})
except takeover.errors.UsageError as error:
    print("refused:", error, flush=True)
'''.format(path=sys.argv[1])
import takeover
interpreters.run_string(interpreters.create(), code)
takeover.join(sys.argv[1]).close()
print("the main interpreter has joined")
"""


def test_a_subinterpreter_is_refused_in_one_clear_line(room: Room) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", IN_A_SUBINTERPRETER, room.control],
        env=room.environment,
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )
    assert done.stdout.splitlines() == [
        "refused: takeover does not work in a subinterpreter: use it in the main one, or start a process",
        "the main interpreter has joined",
    ], done.stderr


@pytest.mark.parametrize("has", LOWER_HALVES)
def test_a_subinterpreter_is_known_by_either_name_of_the_module_that_tells(
    has: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Told(ModuleType):
        here = 0

        def get_current(self) -> tuple[int, int]:
            return self.here, 1

        def get_main(self) -> tuple[int, int]:
            return 0, 1

    module = Told(has)
    for name in LOWER_HALVES:
        monkeypatch.setitem(sys.modules, name, module if name == has else None)  # type: ignore[arg-type]
    refuse_subinterpreters()
    module.here = 1
    with pytest.raises(UsageError, match="does not work in a subinterpreter"):
        refuse_subinterpreters()


def test_where_python_was_built_without_subinterpreters_nothing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in LOWER_HALVES:
        monkeypatch.setitem(sys.modules, name, None)  # type: ignore[arg-type]
    refuse_subinterpreters()


def test_no_module_says_that_it_runs_without_the_gil_before_that_is_proven() -> None:
    sources = sorted((pathlib.Path(__file__).parent.parent / "ext" / "takeover").glob("*.p[yx][xd]"))
    assert sources
    for path in sources:
        assert "freethreading_compatible" not in path.read_text(), path


@pytest.mark.parametrize("collector", ["off", "always"])
def test_connections_move_whatever_the_garbage_collector_does(room: Room, collector: str) -> None:
    """`always`: a collection at every allocation of a container, also in the middle of each callback and each frame."""
    old = room.echo({"collector": collector})
    old.wait_for("serving")
    streams = room.streams(5, idle=20, largest=50_000, pause=0.005)
    streams.goes_on()
    for _ in range(3):
        new = room.echo({"collector": collector})
        new.wait_for("took over")
        assert old.wait() == 0
        streams.goes_on()
        old = new
    streams.stop()
    assert streams.failures == []
