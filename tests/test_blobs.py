"""Named blobs go from one process to the next: newest, whole, without a copy, and with nothing left behind."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pathlib
import signal
import sys
from array import array
from concurrent import futures
from typing import Any

import pytest

import takeover
from clients import LIMIT, eventually
from heirs import MEMFD, ask, end, start
from processes import FAST, PROGRAMS, Program, Room, descriptors, descriptors_at_rest, stopped
from takeover.blobs import Blobs
from takeover.errors import LocalError, LocalProtocolError, RemoteProtocolError, UsageError
from takeover.records import seal


@pytest.fixture
def old(room: Room) -> Program:
    program = start(room)
    assert ask(program, "ready") == 1
    return program


def test_what_was_handed_over_before_is_there_when_the_successor_has_joined(room: Room, old: Program) -> None:
    ask(old, "hand_over", "sessions", "alice, bob")
    ask(old, "hand_over", "empty", "")
    new = start(room)
    assert ask(new, "inherited", "sessions") == "alice, bob"
    assert ask(new, "inherited", "empty") == ""
    assert ask(new, "inherited", "other") is None
    assert ask(new, "ready") == 2


def test_each_is_given_once(room: Room, old: Program) -> None:
    ask(old, "hand_over", "sessions", "alice")
    new = start(room)
    assert ask(new, "inherited", "sessions") == "alice"
    assert ask(new, "inherited", "sessions") is None


def test_what_is_handed_over_after_the_takeover_comes_at_once(room: Room, old: Program) -> None:
    new = start(room)
    ask(new, "ready")
    assert ask(old, "wait")
    ask(old, "hand_over", "late", "one")
    assert ask(new, "inherited", "late", 20) == "one"
    ask(old, "hand_over", "late", "two")
    assert ask(new, "inherited", "late", 20) == "two"
    assert not descriptors(old.pid)[MEMFD]


def test_the_newest_of_a_name_counts(room: Room, old: Program) -> None:
    for text in ("one", "two", "three"):
        ask(old, "hand_over", "count", text)
    assert descriptors(old.pid)[MEMFD] == 1
    new = start(room)
    ask(new, "ready")
    assert ask(new, "inherited", "count") == "three"


def test_what_is_handed_over_while_the_successor_warms_up_comes_when_it_is_settled(room: Room, old: Program) -> None:
    ask(old, "hand_over", "count", "one")
    ask(old, "hand_over", "same", "same")
    new = start(room)
    ask(old, "hand_over", "count", "two")
    ask(old, "hand_over", "more", "more")
    assert ask(new, "inherited", "count") == "one"
    ask(new, "ready")
    assert ask(new, "inherited", "more", 20) == "more"
    assert ask(new, "inherited", "count", 20) == "two"
    assert ask(new, "inherited", "same") == "same"
    eventually(lambda: not descriptors(old.pid)[MEMFD], "the incumbent keeps none")


def test_what_is_handed_over_in_the_probation_comes_when_the_incumbent_leaves(room: Room) -> None:
    old = start(room, probation=600.0)
    ask(old, "ready")
    new = start(room)
    ask(new, "ready")
    eventually(lambda: room.status()["state"] == "probation", "the probation")
    ask(old, "hand_over_last", 5)
    end(old)
    assert ask(new, "inherited_many", 5) == 5


def test_after_a_takeover_that_failed_the_next_successor_gets_everything(room: Room, old: Program) -> None:
    ask(old, "hand_over", "count", "one")
    ask(old, "hand_over", "same", "same")
    new = start(room)
    ask(old, "hand_over", "count", "two")
    new.signal(signal.SIGKILL)
    new.wait()
    eventually(lambda: room.status()["last_takeover"], "the incumbent has noticed")
    assert descriptors(old.pid)[MEMFD] == 2
    last = start(room)
    assert ask(last, "inherited", "count") == "two"
    assert ask(last, "inherited", "same") == "same"
    assert ask(last, "ready") == 2
    eventually(lambda: not descriptors(old.pid)[MEMFD], "the incumbent keeps none")


def test_after_a_takeover_that_was_undone_the_next_successor_gets_everything(room: Room) -> None:
    old = start(room, probation=600.0, limits=FAST)
    ask(old, "ready")
    ask(old, "hand_over", "count", "one")
    ask(old, "hand_over", "same", "same")
    new = start(room, limits=FAST)
    ask(new, "ready")
    ask(old, "hand_over", "count", "two")
    with stopped(new):
        eventually(lambda: room.owner() == old.pid, "the incumbent takes back")
    eventually(lambda: ask(new, "state") == "undone", "the successor knows")
    ask(new, "hand_over", "useless", "useless")
    assert not descriptors(new.pid)[MEMFD]
    last = start(room, limits=FAST)
    assert ask(last, "inherited", "count") == "two"
    assert ask(last, "inherited", "same") == "same"
    assert ask(last, "inherited", "useless") is None


def test_a_dry_run_sees_the_blobs_and_leaves_no_trace(room: Room, old: Program) -> None:
    ask(old, "hand_over", "sessions", "alice")
    held = eventually(lambda: descriptors_at_rest(old.pid), "the incumbent is at rest")
    dry = start(room, dry_run=True)
    assert ask(dry, "inherited", "sessions") == "alice"
    ask(dry, "ready")
    ask(dry, "hand_over", "useless", "useless")
    end(dry)
    eventually(lambda: descriptors_at_rest(old.pid) == held, "the incumbent holds what it held")
    assert ask(start(room), "inherited", "sessions") == "alice"


def test_what_was_inherited_goes_no_further_by_itself(room: Room, old: Program) -> None:
    ask(old, "hand_over", "asked for", "1")
    ask(old, "hand_over", "not asked for", "2")
    new = start(room)
    ask(new, "inherited", "asked for")
    ask(new, "ready")
    last = start(room)
    ask(last, "ready")
    assert ask(last, "inherited", "asked for") is None
    assert ask(last, "inherited", "not asked for") is None
    assert descriptors(new.pid)[MEMFD] == 1
    ask(new, "close")
    assert not descriptors(new.pid)[MEMFD]


def test_blobs_of_an_older_process_that_still_drains_come_after_those_of_the_younger(room: Room, old: Program) -> None:
    new = start(room)
    ask(new, "ready")
    ask(new, "hand_over", "who", "the younger")
    eventually(lambda: room.owner() == new.pid, "it is settled")
    last = start(room)
    ask(last, "ready")
    eventually(lambda: room.owner() == last.pid, "it is settled")
    ask(old, "hand_over", "who", "the older")
    ask(old, "hand_over", "late", "late")
    assert ask(last, "inherited", "late", 20) == "late"
    assert ask(last, "inherited", "who", 20) == "the younger"
    assert ask(last, "inherited", "who", 20) == "the older"


def test_nobody_waits_for_what_cannot_come(room: Room, old: Program) -> None:
    assert ask(old, "inherited", "never", 600) is None
    new = start(room)
    ask(new, "ready")
    ask(old, "wait")
    new.tell(json.dumps(["inherited", "never", 600]))
    end(old)
    assert json.loads(new.wait_for("answer: null").removeprefix("answer: ")) is None
    last = start(room)
    ask(last, "ready")
    assert ask(last, "inherited_while_closing") == "[None]"


def test_the_view_is_read_only_and_outlives_its_descriptor_and_the_older_process(room: Room, old: Program) -> None:
    text = "state " * 100_000
    ask(old, "hand_over", "state", text)
    new = start(room)
    ask(new, "ready")
    end(old)
    seen = ask(new, "look", "state")
    assert seen == {"size": 600_000, "read-only": True, "digest": hashlib.sha256(text.encode()).hexdigest()}


def test_descriptors_are_as_many_after_ten_takeovers_with_blobs(room: Room, old: Program) -> None:
    held = []
    for generation in range(2, 12):
        ask(old, "hand_over_many", 20)
        new = start(room)
        ask(old, "hand_over", "blob 3", "3")
        ask(old, "hand_over", "warm", "warm")
        assert ask(new, "inherited_many", 20) == 20
        assert ask(new, "ready") == generation
        ask(old, "hand_over", "late", "late")
        assert ask(new, "inherited", "late", 20) == "late"
        assert ask(new, "inherited", "warm") == "warm"
        assert ask(new, "inherited", "blob 3") == "3"
        end(old)
        held.append(eventually(lambda: descriptors_at_rest(new.pid), "it is at rest"))  # noqa: B023
        old = new
    assert held == held[:1] * 10
    assert MEMFD not in held[0]


def test_many_blobs_with_long_names_come_in_as_many_frames_as_they_need(room: Room, old: Program) -> None:
    names = [f"{number} " + "\N{MUSICAL SYMBOL G CLEF}" * 990 for number in range(100)]
    for name in names:
        ask(old, "hand_over", name, "tune")
    ask(old, "hand_over_many", 300)
    new = start(room)
    assert [ask(new, "inherited", name) for name in names] == ["tune"] * 100
    assert ask(new, "inherited_many", 300) == 300
    assert ask(new, "ready") == 2


def test_blobs_that_the_link_has_no_room_for_go_before_the_older_process_ends(room: Room) -> None:
    old = start(room, limits={"silence": LIMIT})
    ask(old, "ready")
    new = start(room)
    ask(new, "ready")
    ask(old, "wait")
    with stopped(new):
        ask(old, "hand_over_many", 600)
        assert descriptors(old.pid)[MEMFD] > 100
        old.tell('["close"]')
    assert ask(new, "inherited_many", 600) == 600
    end(old)


def test_blobs_count_for_the_room_that_a_successor_must_have(room: Room, old: Program) -> None:
    ask(old, "hand_over_many", 50)
    settings = json.dumps({"control": room.control, "listen": room.url})
    command = f"ulimit -n 60; exec {sys.executable} {PROGRAMS / 'heir.py'} '{settings}'"
    poor = room.run("sh", "-c", command)
    assert poor.wait() == 1
    assert "descriptors to hand over, room for" in poor.text and "Refused" in poor.text
    assert room.owner() == old.pid


def test_a_forked_child_holds_no_blobs(room: Room, old: Program) -> None:
    ask(old, "hand_over", "kept", "kept")
    assert len(ask(old, "held")) == 1 and ask(old, "fork") == []
    new = start(room)
    assert len(ask(new, "held")) == 1 and ask(new, "fork") == []
    assert ask(new, "inherited", "kept") == "kept"


def test_hand_over_without_descriptors_left_says_so_and_keeps_what_there_was(room: Room, old: Program) -> None:
    ask(old, "hand_over", "count", "one")
    ask(old, "limit_descriptors")
    assert ask(old, "hand_over", "count", "two").startswith("LocalError: hand_over('count'): Too many open files")
    ask(old, "unlimit_descriptors")
    assert ask(start(room), "inherited", "count") == "one"


@pytest.mark.once
def test_one_gibibyte_goes_over_without_a_copy(room: Room, old: Program) -> None:
    available = int(pathlib.Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()[0]) >> 20
    if available < 4:
        pytest.skip(f"{available} GiB of memory are available, and 4 are needed")
    size = 1 << 30
    ask(old, "hand_over_marked", size)
    new = start(room)
    ask(new, "ready")
    end(old)
    seen = ask(new, "look_at_marked")
    assert seen.pop("grown") < 32 << 20
    assert seen == {"size": size, "good": 1024, "rest": True}


def test_a_name_that_no_message_could_carry_and_a_call_too_early_are_mistakes_of_the_caller(room: Room) -> None:
    with takeover.join(room.control) as service:
        with pytest.raises(LocalProtocolError, match="before ready"):
            service.hand_over("early", b"")
        service.ready()
        for name in ("x" * 1001, "two\nlines"):
            with pytest.raises(UsageError, match="blob"):
                service.hand_over(name, b"")
        for data in ("text", 7):
            with pytest.raises(TypeError):
                service.hand_over("name", data)  # type: ignore[arg-type]
        service.hand_over("an array", array("i", range(100))[:0])
    for late in (lambda: service.hand_over("late", b""), lambda: service.inherited("late", 600)):
        with pytest.raises(LocalError, match="has been closed"):
            late()


def test_more_names_than_there_may_be_are_refused_and_the_others_kept(
    room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("takeover.blobs.MOST_BLOBS", 3)
    with takeover.join(room.control) as service:
        service.ready()
        for name in ("one", "two", "three", "one"):
            service.hand_over(name, b"data")
        with pytest.raises(LocalError, match="3 other names"):
            service.hand_over("four", b"data")
        assert descriptors(os.getpid())[MEMFD] == 3
    assert not descriptors(os.getpid())[MEMFD]


def test_who_waits_for_one_name_goes_on_waiting_when_another_comes(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    with takeover.join(room.control, probation=0) as old:
        old.ready()
        with takeover.join(room.control) as new:
            new.ready()
            assert old.wait(LIMIT)
            wait, names = futures.wait, iter(("other", "wanted"))

            def wait_for_more(*arguments: Any) -> Any:
                old.hand_over(name := next(names), name.encode())
                return wait(*arguments)

            monkeypatch.setattr("takeover.blobs.futures.wait", wait_for_more)
            view = new.inherited("wanted", LIMIT)
            assert view is not None and bytes(view) == b"wanted"
            assert next(names, None) is None


def test_one_that_cannot_be_mapped_stays_until_it_can(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: int) -> memoryview:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    with takeover.join(room.control, probation=0) as old:
        old.ready()
        old.hand_over("state", b"data")
        with takeover.join(room.control) as new:
            with monkeypatch.context() as patch:
                patch.setattr("takeover.blobs.unseal", fail)
                with pytest.raises(LocalError, match=r"inherited\('state'\): Cannot allocate memory"):
                    new.inherited("state")
            view = new.inherited("state")
            assert view is not None and bytes(view) == b"data"


def test_more_than_anybody_may_send_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("takeover.blobs.MOST_BLOBS", 2)
    kept = Blobs()
    for name, generation in (("one", 1), ("two", 1), ("two", 1), ("three", 2)):
        kept.inherit(name, generation, seal("blob", b"data"))
    over = seal("blob", b"data")
    with pytest.raises(RemoteProtocolError, match="more than 2 blobs"):
        kept.inherit("three", 1, over)
    os.close(over)
    assert descriptors(os.getpid())[MEMFD.replace("takeover-blob", "blob")] == 3
    kept.close()
    assert not descriptors(os.getpid())[MEMFD.replace("takeover-blob", "blob")]
