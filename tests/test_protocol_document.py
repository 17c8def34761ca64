"""docs/protocol.md says what the code does: its drawn parts are up to date, and nothing is left out of the others."""

from __future__ import annotations

import importlib.util
import pathlib
import re
import struct
from types import ModuleType

import pytest

from takeover import records
from takeover.protocol import CHANNEL_BYTE, GIVER, INCUMBENT, SUCCESSOR, TAKER, Do, Limits, Local
from takeover.wire import MAGIC, MAX_DESCRIPTORS, REFUSALS, SCHEMA, VERSIONS, Type

DOCS = pathlib.Path(__file__).parent.parent / "docs"


@pytest.fixture(scope="module")
def drawing() -> ModuleType:
    spec = importlib.util.spec_from_file_location("draw_protocol", DOCS / "draw_protocol.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def page() -> str:
    return (DOCS / "protocol.md").read_text(encoding="utf-8")


def test_the_drawn_parts_are_what_the_tables_say(drawing: ModuleType, page: str) -> None:
    assert drawing.draw(page) == page, "run: python docs/draw_protocol.py"
    assert drawing.main(["--check"]) is None


@pytest.mark.parametrize(
    "change", ["| 2 | JOIN |", "WARMING --> COMMITTED: READY", "| READY | **COMMIT**", "every descriptor was taken |"]
)
def test_a_page_that_has_drifted_is_noticed(drawing: ModuleType, page: str, change: str) -> None:
    changed = page.replace(change, change[::-1])
    assert changed != page
    assert drawing.draw(changed) == page


def test_a_part_that_is_missing_is_noticed(drawing: ModuleType, page: str) -> None:
    with pytest.raises(ValueError, match="has the parts"):
        drawing.draw(page.replace("<!-- drawn: events -->", ""))


def test_every_row_is_drawn(drawing: ModuleType, page: str) -> None:
    for table in (INCUMBENT, SUCCESSOR, GIVER, TAKER):
        for (state, event), (after, actions) in table.items():
            following = "(same)" if after is state else after.name
            done = ", ".join(f"**{action.name}**" if isinstance(action, Type) else action.name for action in actions)
            row = rf"^\| {state.name} \| [^|]*\b{event.name}\b[^|]* \| {re.escape(following)} \| {re.escape(done)} \|$"
            assert len(re.findall(row, page, re.MULTILINE)) >= 1, (state, event)


@pytest.mark.parametrize("kind", Type, ids=lambda kind: kind.name)
def test_every_field_is_described(page: str, kind: Type) -> None:
    named = rf"^\*\*[^.]*\b{kind.name}\*\*|\*\*{kind.name}\*\*[,:.]"
    described = [text for text in page.split("\n\n") if re.search(named, text)]
    assert described, kind
    for field in SCHEMA[kind].fields or ():
        assert any(f"`{field}`" in text for text in described), field


def test_every_refusal_event_action_and_role_is_named(page: str) -> None:
    for name in (*REFUSALS, "token", "lock", "control", "listener", "blob"):
        assert f"| `{name}` |" in page
    for each in (*Local, *Do):
        assert f"| {each.name} | {each.value} |" in page


def test_every_word_for_what_does_not_move_is_explained(page: str) -> None:
    for word in (*records.WORDS[1:], "room", "kernel"):
        assert re.search(rf"^\| `{word}` \| (giver|taker|both) \|", page, re.MULTILINE), word


@pytest.mark.parametrize(
    ("layout", "heading"), [(records.BATCH, "begins with 24 bytes"), (records.RECORD, "A record has 40 bytes")]
)
def test_each_field_of_a_record_has_its_place(page: str, layout: struct.Struct, heading: str) -> None:
    rows = page.split(heading)[1].split("\n\n")[1].splitlines()[2:]
    at = 0
    for row, code in zip(rows, layout.format[1:], strict=False):
        size = struct.calcsize("!" + code)
        place = {1: f"{at}", 2: f"{at}, {at + 1}"}.get(size, f"{at} to {at + size - 1}")
        assert row.startswith(f"| {place} |"), row
        at += size
    assert at == layout.size == int(heading.split()[-2])


def test_each_flag_and_limit_of_a_record_is_told(page: str) -> None:
    for flag in ("EOF_RECEIVED", "EOF_WRITTEN", "PAUSED", "FULL", "CLOSING", "HAS_STATE"):
        assert f"\n| {getattr(records, flag)} | " in page.split("| flag | what |")[1]
    assert f"connections, at most {records.MOST_CONNECTIONS} |" in page
    assert records.LARGEST_INLINE == 1 << 20 and "Where they have more than 1 MiB the body ends here" in page
    assert CHANNEL_BYTE == b"m" and "a pipe with the one byte `m`" in page


def test_the_numbers_in_the_prose_are_the_codes(page: str) -> None:
    limits = Limits()
    assert VERSIONS == (1,) and "protocol, version 1" in page
    assert f"magic, {MAGIC:#04x}" in page
    assert f"room for {MAX_DESCRIPTORS} descriptors" in page
    assert f"HEARTBEAT every {limits.heartbeat:g} s" in page
    assert f"claims after {limits.silence:g} s of silence" in page
    assert f"same after {limits.warming_silence:g} s" in page
    assert f"for {limits.greeting:g} s in all" in page
