"""docs/model: the Promela model has the tables of the package, and spin finds nothing wrong in any of its states."""

from __future__ import annotations

import pathlib
import re
import shutil
import subprocess
import sys

import pytest

from processes import STEP, sampled
from takeover.protocol import GIVER, INCUMBENT, SUCCESSOR, TAKER
from takeover.wire import Type

FEW = min(STEP, 4)
MODEL = pathlib.Path(__file__).parent.parent / "docs" / "model"
DRAW = MODEL / "draw_tables.py"

pytestmark = pytest.mark.skipif(not DRAW.exists(), reason="the model is not beside the tests")

needs_spin = pytest.mark.skipif(
    not (shutil.which("spin") and shutil.which("gcc")), reason="spin or gcc is not installed"
)


def draw(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(DRAW), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def verify(
    folder: pathlib.Path, model: str, *, mode: str = "-DSAFETY", without: str = "", **defines: int
) -> tuple[int, int, str]:
    """How many errors and states spin finds, and all that it prints."""
    for path in MODEL.glob("*.pml"):
        shutil.copy(path, folder)
    if without:
        assert draw("--without", without, "--folder", str(folder)).returncode == 0
    options = [f"-D{name}={value}" for name, value in defines.items()]
    subprocess.run(["spin", "-a", *options, model], cwd=folder, check=True, capture_output=True)
    subprocess.run(["gcc", "-O1", mode, "-DNOREDUCE", "-DCOLLAPSE", "-w", "-o", "pan", "pan.c"], cwd=folder, check=True)
    command = ["./pan", "-m500000", *(["-l"] if mode == "-DNP" else [])]
    text = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False).stdout
    found = re.search(r"errors: (\d+)\s+(\d+) states, stored", text)
    assert found is not None and "out of memory" not in text and "max search depth too small" not in text, text
    return int(found[1]), int(found[2]), text


def test_the_tables_of_the_model_are_those_of_the_package() -> None:
    assert draw("--check").returncode == 0


def test_the_models_know_each_state_and_each_message_of_every_role() -> None:
    for file, table, letter in (
        ("tables.pml", INCUMBENT, "I"),
        ("tables.pml", SUCCESSOR, "S"),
        ("channel_tables.pml", GIVER, "G"),
        ("channel_tables.pml", TAKER, "T"),
    ):
        text = (MODEL / file).read_text()
        names = set(text[text.index("mtype = {") + 9 : text.index("}")].replace(",", " ").split())
        assert {f"{letter}_{state.name}" for state, _ in table} <= names
        assert {event.name for _, event in table if isinstance(event, Type)} <= names
        assert len(re.findall(rf":: \w+\[link\] == {letter}_\w+ && event == ", text)) == len(table)


TAKEOVERS: dict[str, dict[str, int]] = {
    "two faults": {"FAULTS": 2},
    "limits that strike for no reason": {"FAULTS": 1, "SPURIOUS": 1},
    "a third process": {"FAULTS": 1, "LINKS": 2},
}
CHANNELS: dict[str, dict[str, int]] = {
    "one fault": {"FAULTS": 1},
    "one fault, three batches at a time": {"FAULTS": 1, "BATCHES": 3, "WINDOW": 3},
    "a stop, and limits that strike for no reason": {"FAULTS": 1, "DEADLY": 0, "SPURIOUS": 1},
    "two faults, and limits that strike for no reason": {"FAULTS": 2, "SERVES": 0, "SPURIOUS": 1},
}
WALKS = [("takeover.pml", defines) for defines in TAKEOVERS.values()]
WALKS += [("channel.pml", defines) for defines in CHANNELS.values()]


@needs_spin
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("model", "defines"), sampled(WALKS, FEW), ids=sampled([*TAKEOVERS, *CHANNELS], FEW))
def test_no_state_of_a_model_breaks_a_rule(tmp_path: pathlib.Path, model: str, defines: dict[str, int]) -> None:
    errors, states, text = verify(tmp_path, model, **defines)
    assert errors == 0, text
    assert states > 50_000
    for line in re.findall(r"tables\.pml:\d+.*todo.*", text):  # an action that is never asked for
        print(line)
    print(f"{states:,} states")


@needs_spin
@pytest.mark.parametrize("model", sampled(("takeover.pml", "channel.pml"), min(STEP, 2)))
def test_nothing_in_a_model_goes_round_in_a_circle(tmp_path: pathlib.Path, model: str) -> None:
    errors, _, text = verify(tmp_path, model, mode="-DNP", FAULTS=2, SERVES=0)
    assert errors == 0, text


@needs_spin
def test_some_walk_comes_to_each_action_of_the_channel(tmp_path: pathlib.Path) -> None:
    _, _, text = verify(tmp_path, "channel.pml", **CHANNELS["two faults, and limits that strike for no reason"])
    assert "unreached in proctype Taker" in text
    assert not re.findall(r"tables\.pml:\d+.*todo.*", text), text


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
            "giver.GIVING.SILENT",
            "giver.RECLAIMING.GOT_NOTHING",
            "taker.TAKING.LOST",
            "taker.TAKING.PARTLY",
            "taker.CLAIMED.CONNECTIONS",
        ),
        FEW,
    ),
)
def test_a_row_that_is_missing_is_noticed(tmp_path: pathlib.Path, row: str) -> None:
    model = "channel.pml" if row.startswith(("giver", "taker")) else "takeover.pml"
    errors, _, text = verify(tmp_path, model, without=row, FAULTS=1)
    assert errors == 1, text
