"""The state of protocol classes moves with their connections, or they stay where they are, said plainly and counted."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from clients import Talker, eventually
from processes import Program, Room

MIB = 1 << 20


def take_over(room: Room, old: Program, new: Program) -> None:
    """Returns when the new one owns the service and the old one has ended well."""
    room.wait_for_owner(new)
    assert old.wait() == 0, old.text


def serving(room: Room, argument: dict[str, Any] | None = None, **options: Any) -> Program:
    program = room.protocols(argument, **options)
    program.wait_for("serving")
    return program


def stays(room: Room, old: Program, new: Program, staying: Talker, others: list[Talker], word: str) -> None:
    """One connection stays with the old process and is served there, the others move; both processes say so."""
    room.wait_for_owner(new)
    line = old.wait_for(f"moved {len(others)} connections to pid {new.pid}")
    assert f"the rest drains (1 {word})" in line
    assert f"the rest drains there (1 {word})" in new.wait_for(f"moved {len(others)} connections from pid {old.pid}")
    assert [talker.pid() for talker in others] == [new.pid] * len(others)
    assert staying.pid() == old.pid
    moved = room.status()["moved"]
    assert (moved["in"], moved["drained"]) == (len(others), {word: 1})
    staying.close()
    assert old.wait() == 0, old.text


def test_the_state_moves_and_the_handler_may_know_from_where_and_how_often(room: Room) -> None:
    old = serving(room)
    talker = room.talker()
    first = talker.say("one")
    assert (first["pid"], first["moved"], first["count"]) == (old.pid, None, 1)
    for generation in (1, 2, 3):
        new = room.protocols()
        take_over(room, old, new)
        answer = talker.say("again")
        assert (answer["pid"], answer["moved"], answer["count"]) == (new.pid, [generation, generation], generation + 1)
        assert (answer["peer"], answer["local"]) == (first["peer"], first["local"])
        old = new


def test_half_a_message_in_the_handler_is_made_whole_in_the_next_process(room: Room) -> None:
    """L1."""
    old = serving(room)
    talker = room.talker()
    talker.say()
    talker.send("half a mess")
    witness = room.talker()
    assert witness.say("it has been read")["count"] == 1
    new = room.protocols()
    take_over(room, old, new)
    assert talker.say("age")["line"] == "half a message"
    assert witness.pid() == new.pid


def test_a_paused_connection_moves_with_what_is_unread_in_the_kernel_and_stays_paused(room: Room) -> None:
    """L1: half a line is in the handler, the rest of it and another one in the kernel."""
    old = serving(room)
    talker = room.talker()
    talker.send("pause\nhalf ")
    assert talker.hear()["line"] == "pause"
    talker.send("a line\nanother\n")
    new = room.protocols()
    take_over(room, old, new)
    answers = [talker.hear(), talker.hear()]
    assert [answer["line"] for answer in answers] == ["half a line", "another"]
    assert [answer["pid"] for answer in answers] == [new.pid] * 2
    assert answers[0]["was_paused"]


def test_the_next_process_writes_nothing_before_what_the_old_one_left_unsent(room: Room) -> None:
    """L2, D6: a peer that does not read, megabytes in the old process, which ends before the peer reads on."""
    old = serving(room)
    talker = room.talker()
    size = 9 * MIB
    talker.send(f"limits 5000000 1000\nbig {size}\n")
    assert talker.hear()["line"] == "limits 5000000 1000"
    talker.send("more\n")
    new = room.protocols({"timer": 0.02})
    take_over(room, old, new)
    assert talker.read(size) == b"x" * size
    answers = []
    while len(answers) < 2:
        answer = talker.hear()
        if "tick" in answer:
            assert answers, "a tick of the new process came before the answer of the old one"
        else:
            answers.append(answer)
    assert [answer["line"] for answer in answers] == [f"big {size}", "more"]
    assert answers[0]["pid"] == old.pid


def test_a_handler_that_was_told_to_pause_writing_is_told_so_again_where_it_has_moved_to(room: Room) -> None:
    old = serving(room)
    talker = room.talker()
    size = 9 * MIB
    talker.send(f"limits 50000 1000\nbig {size}\n")
    assert talker.hear()["limits"] == [1000, 50000]
    witness = room.talker()
    witness.say()
    new = room.protocols()
    take_over(room, old, new)
    talker.send("hello\n")
    eventually(lambda: witness.say()["pid"] == new.pid, "the new process serves")
    assert talker.read(size) == b"x" * size
    assert talker.hear()["pid"] == old.pid
    answer = talker.hear()
    assert (answer["pid"], answer["full"], answer["told"], answer["limits"]) == (new.pid, True, 1, [1000, 50000])
    assert not talker.say()["full"]


def test_a_handler_that_says_not_now_moves_when_it_is_asked_again(room: Room) -> None:
    """L4."""
    old = serving(room)
    busy, others = room.talker(), [room.talker() for _ in range(3)]
    for talker in others:
        talker.say()
    busy.say("poison busy 4")
    new = room.protocols()
    take_over(room, old, new)
    assert [talker.pid() for talker in (busy, *others)] == [new.pid] * 4
    moved = room.status()["moved"]
    assert (moved["in"], moved["drained"], moved["refused"]) == (4, {}, {})


def test_a_handler_that_never_comes_to_a_quiet_point_is_closed_at_the_deadline_and_counted_once(room: Room) -> None:
    """L4."""
    old = serving(room, drain_timeout=0.5)
    busy, other = room.talker(), room.talker()
    busy.say("poison busy 1000000")
    other.say()
    new = room.protocols()
    room.wait_for_owner(new)
    eventually(lambda: other.pid() == new.pid, "the other one has moved")
    assert old.wait() == 0
    old.wait_for("drain deadline of 0.5 s: closed 1 connections")
    assert "the rest drains (1 busy)" in old.wait_for("moved 1 connections to")
    assert busy.rest() == b""


def test_idle_connections_move_too(room: Room) -> None:
    """L5: from whom nothing has ever come, and who has nothing to say for long."""
    old = serving(room)
    silent, quiet = [room.talker() for _ in range(70)], room.talker()
    quiet.say()
    new = room.protocols()
    take_over(room, old, new)
    assert [talker.pid() for talker in (*silent, quiet)] == [new.pid] * 71


@pytest.mark.parametrize(
    ("poison", "said"),
    [
        ("raise", "ValueError: the state cannot be exported"),
        ("wrong", "returned str, not bytes"),
        ("version", "TypeError: state_version must be an int of 32 bits, not 'one'"),
        ("refuse", "ValueError: the state cannot be imported"),
    ],
)
def test_one_whose_state_cannot_be_moved_stays_and_is_served_where_it_is(room: Room, poison: str, said: str) -> None:
    """L6."""
    room.tracebacks_allowed = True
    old = serving(room)
    talkers = [room.talker() for _ in range(5)]
    for talker in talkers:
        talker.say()
    staying = talkers.pop(2)
    staying.say(f"poison {poison}")
    new = room.protocols()
    stays(room, old, new, staying, talkers, "state")
    assert said in (new if poison == "refuse" else old).text


def test_a_program_that_is_ended_by_an_export_ends(room: Room) -> None:
    old = serving(room)
    talkers = [room.talker() for _ in range(3)]
    for talker in talkers:
        talker.say()
    talkers[1].say("poison exit")
    new = room.protocols()
    room.wait_for_owner(new)
    assert old.wait() == 7
    new.wait_for("took over")


def test_one_that_was_refused_is_offered_to_the_process_after_the_next_again(room: Room) -> None:
    room.tracebacks_allowed = True
    old = serving(room)
    talker = room.talker()
    talker.say("poison refuse")
    middle = room.protocols()
    room.wait_for_owner(middle)
    assert talker.pid() == old.pid
    talker.say("poison")
    new = room.protocols()
    take_over(room, middle, new)
    talker.close()
    assert old.wait() == 0


@pytest.mark.parametrize(("first", "second"), [(1, 2), (2, 1)], ids=["older to newer", "newer to older"])
def test_state_of_another_version_moves_where_the_class_reads_it(room: Room, first: int, second: int) -> None:
    """L8."""
    old = serving(room, {"version": first, "readable": [first]})
    talker = room.talker()
    talker.say()
    new = room.protocols({"version": second, "readable": [1, 2]})
    take_over(room, old, new)
    assert (talker.say()["pid"], talker.say()["count"]) == (new.pid, 3)


@pytest.mark.parametrize(("first", "second"), [(1, 2), (2, 1)], ids=["older to newer", "newer to older"])
def test_state_of_a_version_that_the_class_does_not_read_stays_where_it_is(room: Room, first: int, second: int) -> None:
    """L8."""
    old = serving(room, {"version": first})
    talker = room.talker()
    talker.say()
    stays(room, old, room.protocols({"version": second}), talker, [], "version")


@pytest.mark.parametrize("side", ["old", "new"])
def test_a_class_without_the_methods_drains(room: Room, side: str) -> None:
    old = serving(room, {"unmovable": side == "old"})
    talker = room.talker()
    talker.say()
    word = "unmovable" if side == "old" else "handler"
    stays(room, old, room.protocols({"unmovable": side == "new"}), talker, [], word)


def test_a_hundred_mebibytes_of_state_on_one_connection_move(room: Room) -> None:
    old = serving(room)
    others = [room.talker() for _ in range(3)]
    for talker in others:
        talker.say()
    large = room.talker()
    large.say(f"poison huge {100 * MIB}")
    new = room.protocols()
    take_over(room, old, new)
    answer = large.say()
    assert (answer["pid"], answer["ballast"], answer["count"]) == (new.pid, 100 * MIB, 2)
    assert [talker.pid() for talker in others] == [new.pid] * 3
    moved = room.status()["moved"]
    assert moved["in"] == 4
    assert moved["state_bytes"] > 100 * MIB


@pytest.mark.parametrize("memory", [60, 240])
def test_a_state_that_the_next_process_has_no_memory_for_stays_where_it_is(room: Room, memory: int) -> None:
    """Whether it cannot be mapped, together with what came along with it, or not be copied."""
    room.tracebacks_allowed = True
    old = serving(room)
    others = [room.talker() for _ in range(3)]
    for talker in others:
        talker.say()
    large = room.talker()
    large.say(f"poison huge {100 * MIB}")
    new = room.protocols({"memory": memory})
    room.wait_for_owner(new)
    old.wait_for("connections to pid")
    assert large.say()["pid"] == old.pid
    pids = [talker.pid() for talker in others]
    assert pids in ([old.pid] * 3, [new.pid] * 3)
    report = room.status()["moved"]
    assert (report["in"], sum(report["refused"].values())) == (pids.count(new.pid), 1 + pids.count(old.pid))


def test_an_import_that_takes_long_for_each_moves_all(room: Room) -> None:
    old = serving(room)
    talkers = [room.talker() for _ in range(100)]
    new = room.protocols({"import": 0.005})
    take_over(room, old, new)
    assert {talker.pid() for talker in talkers} == {new.pid}


@pytest.mark.parametrize(
    ("poison", "rest"),
    [("close", b""), ("abort", b""), ("write_eof", b""), ("writes_and_closes", b'{"in flight": %d}\n')],
)
def test_one_whose_handler_ends_it_on_its_way_ends_where_it_was(room: Room, poison: str, rest: bytes) -> None:
    old = serving(room)
    others = [room.talker() for _ in range(2)]
    for talker in others:
        talker.say()
    talker = room.talker()
    talker.say(f"poison {poison}")
    new = room.protocols()
    room.wait_for_owner(new)
    assert talker.rest() == (rest % old.pid if rest else b"")
    talker.close()
    assert old.wait() == 0, old.text
    assert "the rest drains (1 closing)" in old.wait_for("moved 2 connections")
    assert [other.pid() for other in others] == [new.pid] * 2


def test_what_a_handler_writes_on_the_way_goes_out_before_all_that_the_next_one_writes(room: Room) -> None:
    old = serving(room)
    talkers = [room.talker() for _ in range(70)]
    for talker in talkers[::2]:
        talker.say("poison write")
    new = room.protocols()
    take_over(room, old, new)
    for talker in talkers[::2]:
        talker.send("hello\n")
        assert talker.hear() == {"in flight": old.pid}
        assert talker.hear()["pid"] == new.pid
    assert {talker.pid() for talker in talkers[1::2]} == {new.pid}


def test_a_timer_that_writes_to_all_connections_all_the_time_loses_and_breaks_no_line(room: Room) -> None:
    """Each process writes its own numbers in a row, and all of the old one's come before all of the new one's."""
    old = serving(room, {"timer": 0.001})
    talkers = [room.talker() for _ in range(100)]
    for talker in talkers:
        talker.hear()
    new = room.protocols({"timer": 0.001})
    take_over(room, old, new)
    for talker in talkers:
        ticks = [talker.hear()]
        while len([tick for tick in ticks if tick["pid"] == new.pid]) < 5:
            ticks.append(talker.hear())
        for before, after in itertools.pairwise(ticks):
            if before["pid"] == after["pid"]:
                assert after["tick"] == before["tick"] + 1
            else:
                assert (before["pid"], after["pid"]) == (old.pid, new.pid)
                assert after["tick"] <= before["tick"] + 1


def test_each_connections_bytes_are_counted_and_summed_through_every_process_that_serves_it(room: Room) -> None:
    old = serving(room, {"kind": "Sums"})
    streams = room.streams(20, idle=5, slow=2, largest=100_000)
    streams.goes_on()
    for _ in range(3):
        new = room.protocols({"kind": "Sums"})
        take_over(room, old, new)
        streams.goes_on()
        old = new
    streams.stop()
    assert streams.failures == []
    for stream in streams.streams:
        assert stream.trailer == b"%d %d 3" % (stream.back, stream.checksum)
