"""docs/model: the Promela model has the tables of the package, and spin finds nothing wrong in any of its states."""

from __future__ import annotations

import pathlib
import re
import shutil
import subprocess
import sys

import pytest

from processes import sampled
from takeover.protocol import INCUMBENT, SUCCESSOR
from takeover.wire import Type

MODEL = pathlib.Path(__file__).parent.parent / "docs" / "model"
DRAW = MODEL / "draw_tables.py"

pytestmark = pytest.mark.skipif(not DRAW.exists(), reason="the model is not beside the tests")

needs_spin = pytest.mark.skipif(
    not (shutil.which("spin") and shutil.which("gcc")), reason="spin or gcc is not installed"
)


def draw(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(DRAW), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def verify(folder: pathlib.Path, *, mode: str = "-DSAFETY", without: str = "", **defines: int) -> tuple[int, int, str]:
    """How many errors and states spin finds, and all that it prints."""
    for path in MODEL.glob("*.pml"):
        shutil.copy(path, folder)
    if without:
        assert draw("--without", without, "--output", str(folder / "tables.pml")).returncode == 0
    options = [f"-D{name}={value}" for name, value in defines.items()]
    subprocess.run(["spin", "-a", *options, "takeover.pml"], cwd=folder, check=True, capture_output=True)
    subprocess.run(["gcc", "-O1", mode, "-DNOREDUCE", "-DCOLLAPSE", "-w", "-o", "pan", "pan.c"], cwd=folder, check=True)
    command = ["./pan", "-m500000", *(["-l"] if mode == "-DNP" else [])]
    text = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False).stdout
    found = re.search(r"errors: (\d+)\s+(\d+) states, stored", text)
    assert found is not None and "out of memory" not in text and "max search depth too small" not in text, text
    return int(found[1]), int(found[2]), text


def test_the_tables_of_the_model_are_those_of_the_package() -> None:
    assert draw("--check").returncode == 0


def test_the_model_knows_each_state_and_each_message_of_both_roles() -> None:
    text = (MODEL / "tables.pml").read_text()
    names = set(text[text.index("mtype = {") + 9 : text.index("}")].replace(",", " ").split())
    for table, letter in ((INCUMBENT, "I"), (SUCCESSOR, "S")):
        assert {f"{letter}_{state.name}" for state, _ in table} <= names
        assert {event.name for _, event in table if isinstance(event, Type)} <= names
        assert len(re.findall(rf":: \w+\[link\] == {letter}_\w+ && event == ", text)) == len(table)


@needs_spin
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "defines",
    [{"FAULTS": 2}, {"FAULTS": 1, "SPURIOUS": 1}, {"FAULTS": 1, "LINKS": 2}],
    ids=["two faults", "limits that strike for no reason", "a third process"],
)
def test_no_state_of_the_model_breaks_a_rule(tmp_path: pathlib.Path, defines: dict[str, int]) -> None:
    errors, states, text = verify(tmp_path, **defines)
    assert errors == 0, text
    assert states > 50_000
    for line in re.findall(r"tables\.pml:\d+.*todo.*", text):  # an action that is never asked for
        print(line)
    print(f"{states:,} states")


@needs_spin
def test_nothing_in_the_model_goes_round_in_a_circle(tmp_path: pathlib.Path) -> None:
    errors, _, text = verify(tmp_path, mode="-DNP", FAULTS=2)
    assert errors == 0, text


@needs_spin
@pytest.mark.parametrize(
    "row",
    sampled(
        (
            "successor.CLAIMING.GOT_NOTHING",
            "incumbent.TAKING_BACK.GOT_NOTHING",
            "successor.READY.LOST",
            "incumbent.COMMITTED.LOST",
            "successor.PROBATION.UNDO",
        )
    ),
)
def test_a_row_that_is_missing_is_noticed(tmp_path: pathlib.Path, row: str) -> None:
    errors, _, text = verify(tmp_path, without=row, FAULTS=1)
    assert errors == 1, text
