"""The tables are in order, and two machines understand each other over a stream that is cut anywhere."""

from __future__ import annotations

import os
from array import array
from collections import deque
from collections.abc import Callable

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from takeover.errors import LocalProtocolError, RemoteProtocolError
from takeover.exchange import HEARTBEATS, IDLE, read_token
from takeover.incumbent import UNDECIDED
from takeover.protocol import (
    CHANNEL_BYTE,
    COMMIT_BYTE,
    FINAL,
    GIVER,
    INCUMBENT,
    SETTLE_BYTE,
    SUCCESSOR,
    TAKER,
    Do,
    Event,
    Limits,
    Local,
    Machine,
    State,
    Table,
    budget,
    silence_limit,
)
from takeover.wire import Decoder, Type, encode
from test_wire import EXAMPLES, ITEM

TABLES = {"incumbent": INCUMBENT, "successor": SUCCESSOR, "giver": GIVER, "taker": TAKER}
BEGIN = {"incumbent": State.GREETING, "successor": State.GREETING, "giver": State.GIVING, "taker": State.TAKING}
PAIRS = ((INCUMBENT, SUCCESSOR), (SUCCESSOR, INCUMBENT), (GIVER, TAKER), (TAKER, GIVER))
every_role = pytest.mark.parametrize("role", TABLES)


def _states(table: Table) -> set[State]:
    return {state for state, _ in table} | {after for after, _ in table.values()}


# The tables.


@every_role
def test_every_state_can_be_reached(role: str) -> None:
    table = TABLES[role]
    reached, before = {BEGIN[role]}, set[State]()
    while reached != before:
        before = set(reached)
        reached |= {after for (state, _), (after, _) in table.items() if state in reached}
    assert reached == _states(table)


@every_role
def test_every_state_has_a_way_to_an_end(role: str) -> None:
    table = TABLES[role]
    ending, before = set(FINAL) | {State.OWNER}, set[State]()
    while ending != before:
        before = set(ending)
        ending |= {state for (state, _), (after, _) in table.items() if after in ending}
    assert _states(table) <= ending


@every_role
def test_final_states_have_no_rows(role: str) -> None:
    assert not {state for state, _ in TABLES[role]} & FINAL


@every_role
def test_whoever_enters_a_final_state_closes_the_link(role: str) -> None:
    for row, (after, actions) in TABLES[role].items():
        assert (after in FINAL) == (Do.CLOSE in actions) or after is State.OWNER, row
        assert Do.CLOSE not in actions[:-1] or row == (State.RECLAIMING, Local.GOT_CHANNEL), row


def test_a_giver_serves_on_only_where_no_answer_can_come_any_more() -> None:
    _, actions = GIVER[State.RECLAIMING, Local.GOT_CHANNEL]
    assert actions.index(Do.CLOSE) < actions.index(Do.PUT_BACK)


def test_every_state_event_and_action_is_used() -> None:
    tables = TABLES.values()
    events = {event for table in tables for _, event in table}
    actions = {action for table in tables for _, actions in table.values() for action in actions}
    assert set(State) == set().union(*map(_states, tables))
    assert set(Local) <= events
    assert set(Do) <= actions


def test_what_one_side_sends_the_other_has_a_row_for() -> None:
    # first, timed, part of an action, or for the asking
    from_drivers = {Type.HELLO, Type.HEARTBEAT, Type.LISTENERS, Type.DRAINING, Type.TAKE, Type.BLOB}
    from_clients = {Type.STATUS, Type.STOP}
    to_clients = {Type.REPORT, Type.STOPPING}
    for sender, receiver in PAIRS:
        sent = {action for _, actions in sender.values() for action in actions if isinstance(action, Type)}
        understood = {event for _, event in receiver if isinstance(event, Type)}
        assert sent - to_clients <= understood
        assert understood - sent <= from_drivers | from_clients


@every_role
def test_a_read_of_the_token_is_answered_in_the_state_after_it(role: str) -> None:
    table = TABLES[role]
    answers = {
        Do.TAKE_BACK: {Local.GOT_COMMIT, Local.GOT_SETTLE, Local.GOT_NOTHING},
        Do.TAKE_COMMIT: {Local.GOT_COMMIT, Local.GOT_NOTHING},
        Do.TAKE_SETTLE: {Local.GOT_SETTLE, Local.GOT_NOTHING},
        Do.RECLAIM: {Local.GOT_CHANNEL, Local.GOT_NOTHING},
        Do.CLAIM: {Local.GOT_CHANNEL, Local.GOT_NOTHING},
    }
    asked: dict[State, set[Local]] = {}
    for row, (after, actions) in table.items():
        for action in set(actions) & set(answers):
            assert actions == (action,), row
            asked.setdefault(after, set()).update(answers[action])  # type: ignore[index]
    answered = {state: {event for where, event in table if where is state} for state in asked}
    assert asked and asked == answered


@pytest.mark.parametrize(("event", "limit"), [(Local.SILENT, silence_limit), (Local.OVERTIME, budget)])
def test_a_limit_is_where_a_row_is_and_a_row_where_a_limit_is(
    event: Local, limit: Callable[[State, Limits], float | None]
) -> None:
    limited = {state for state in State if limit(state, Limits()) is not None}
    assert limited == {state for table in TABLES.values() for state, happens in table if happens is event}


def test_whoever_must_not_be_silent_sends_heartbeats() -> None:
    limited = {state for state in State if silence_limit(state, Limits()) is not None}
    assert limited <= HEARTBEATS | {State.GIVING, State.TAKING}, "on a channel a batch is the sign of life"
    assert UNDECIDED <= HEARTBEATS
    assert not HEARTBEATS & IDLE
    for table, other in ((INCUMBENT, SUCCESSOR), (SUCCESSOR, INCUMBENT)):
        beats = any(state in HEARTBEATS for state, _ in table)
        assert beats and any(event is Type.HEARTBEAT for _, event in other)


def test_limits_leave_room_for_lost_ticks() -> None:
    limits = Limits()
    assert limits.silence >= 5 * limits.heartbeat
    assert limits.silence < 1.0 and limits.starting < 1.0, "one owner within a second"
    assert limits.silence < limits.warming_silence < limits.offering < limits.warming


def test_a_message_out_of_turn_is_the_peers_mistake_and_an_event_is_ours() -> None:
    machine = Machine(INCUMBENT)
    with pytest.raises(RemoteProtocolError, match="READY is out of turn in the state 'greeting'"):
        machine.step(Type.READY)
    with pytest.raises(LocalProtocolError, match="WARM is out of turn in the state 'greeting'"):
        machine.step(Local.WARM)
    assert machine.state is State.GREETING


@pytest.mark.parametrize("writing_end_survives", [False, True])
def test_the_token_gives_its_bytes_once_and_then_nothing(writing_end_survives: bool) -> None:
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    os.write(writing, COMMIT_BYTE + SETTLE_BYTE)
    if not writing_end_survives:
        os.close(writing)
    try:
        assert [read_token(reading) for _ in range(4)] == [COMMIT_BYTE, SETTLE_BYTE, b"", b""]
        assert CHANNEL_BYTE not in (COMMIT_BYTE, SETTLE_BYTE)
    finally:
        os.close(reading)
        if writing_end_survives:
            os.close(writing)


# Both machines on one stream.


class Half:
    """One side as its driver runs it: a machine, the bytes that are on their way to it, and what it does."""

    def __init__(self, table: Table) -> None:
        self.machine = Machine(table)
        self.decoder = Decoder()
        self.stream = bytearray()
        self.marks: deque[tuple[int, int]] = deque()
        """How many bytes come before those on which descriptors ride, and how many descriptors."""
        self.taken = 0
        self.accepting = table is INCUMBENT
        self.lost = False
        self.peer: Half
        self.token: deque[bytes]
        self.events: deque[Event] = deque()
        self.batches: list[int] = []
        self.left = -1
        self.kept = 0

    @property
    def state(self) -> State:
        return self.machine.state

    def send(self, kind: Type, body: dict[str, object] | None = None, descriptors: int = 0) -> None:
        if self.lost or self.peer.state in FINAL:
            return
        if descriptors:
            self.peer.marks.append((self.peer.taken + len(self.peer.stream), descriptors))
        self.peer.stream += encode(kind, body or EXAMPLES.get(kind), descriptors)

    def step(self, event: Event) -> None:
        self.events.append(event)
        while self.events and self.state not in FINAL:
            before = self.state
            for action in self.machine.step(self.events.popleft()):
                self.act(action)
            if self.lost and self.state is not before and self.machine.accepts(Local.LOST):
                self.events.append(Local.LOST)
        self.events.clear()

    def act(self, action: Type | Do) -> None:
        if action is Do.OFFER:
            if self.batches:
                count = self.batches.pop(0)
                body = {"items": [ITEM] * count, "left": sum(self.batches)}
                self.send(Type.LISTENERS, body, count)
            else:
                self.events.append(Local.OFFERED)
        elif action in (Do.TAKE_BACK, Do.TAKE_COMMIT, Do.TAKE_SETTLE):
            byte = self.token.popleft() if self.token else b""
            right = {Do.TAKE_COMMIT: b"c", Do.TAKE_SETTLE: b"s"}.get(action, byte)
            got = {b"c": Local.GOT_COMMIT, b"s": Local.GOT_SETTLE}.get(byte, Local.GOT_NOTHING)
            self.events.append(got if byte == right else Local.GOT_NOTHING)
        elif action in (Do.START_ACCEPTING, Do.STOP_ACCEPTING, Do.RELEASE):
            self.accepting = action is Do.START_ACCEPTING
        elif isinstance(action, Type):
            self.send(action)
            if action is Type.TAKEN and self.left == 0:
                self.events.append(Local.COMPLETE)

    def read(self, size: int) -> None:
        """One read: not beyond what the decoder wants, and descriptors come with the first of their bytes."""
        wanted, room = self.decoder.wants()
        data = bytes(self.stream[: min(size, wanted)])
        del self.stream[: len(data)]
        came = array("i")
        if self.marks and self.marks[0][0] < self.taken + len(data):
            came = array("i", [1000]) * self.marks.popleft()[1]
            assert len(came) <= room, "descriptors came to a read that had no room for them"
        self.taken += len(data)
        frame = self.decoder.feed(data, came)
        if frame is not None and self.state not in FINAL:
            assert len(frame.descriptors) == len(frame.body.get("items", ()))
            self.kept += len(frame.descriptors)
            self.left = frame.body["left"] if frame.type is Type.LISTENERS else self.left
            self.step(frame.type)


class Conversation(RuleBasedStateMachine):
    """Two machines, the bytes between them, and the token; each is told anything at any time that its table allows."""

    @initialize(batches=st.lists(st.integers(1, 252), min_size=1, max_size=3), calm=st.integers(0, 4))
    def connect(self, batches: list[int], calm: int) -> None:
        self.incumbent, self.successor = Half(INCUMBENT), Half(SUCCESSOR)
        self.incumbent.peer, self.successor.peer = self.successor, self.incumbent
        self.incumbent.token = self.successor.token = deque([COMMIT_BYTE, SETTLE_BYTE])
        self.incumbent.batches = list(batches)
        self.offered = sum(batches)
        self.told = False
        self.calm = calm
        """How many steps of the servers pass before there may be trouble."""
        self.incumbent.send(Type.HELLO)

    @property
    def halves(self) -> tuple[Half, Half]:
        return self.incumbent, self.successor

    @rule(to_successor=st.booleans(), size=st.integers(1, 65536), reads=st.integers(1, 9))
    def deliver(self, to_successor: bool, size: int, reads: int) -> None:
        half = self.halves[to_successor]
        for _ in range(reads):
            if half.stream and not half.lost:
                half.read(size)

    @rule(sizes=st.lists(st.integers(1, 65536), min_size=1, max_size=4))
    def deliver_all(self, sizes: list[int]) -> None:
        for number in range(100_000):
            half = self.halves[number % 2]
            if half.stream and not half.lost:
                half.read(sizes[number % len(sizes)])
            elif not half.peer.stream or half.peer.lost:
                break

    @rule(of_successor=st.booleans())
    def beat(self, of_successor: bool) -> None:
        half = self.halves[of_successor]
        if half.state in HEARTBEATS:
            half.send(Type.HEARTBEAT)

    @rule(event=st.sampled_from((Local.WARM, Local.ACCEPTING, Local.PROBATION_OVER)))
    def go_on(self, event: Local) -> None:
        for half in self.halves:
            if half.machine.accepts(event):
                self.calm -= 1
                half.step(event)

    @precondition(lambda self: self.calm <= 0)
    @rule(event=st.sampled_from((Local.SILENT, Local.OVERTIME)), of_successor=st.booleans())
    def time_passes(self, event: Local, of_successor: bool) -> None:
        half = self.halves[of_successor]
        if half.machine.accepts(event):
            half.step(event)

    @precondition(lambda self: self.calm <= 0)
    @rule(event=st.sampled_from((Local.FAIL, Local.LEAVING)), of_successor=st.booleans())
    def give_up(self, event: Local, of_successor: bool) -> None:
        half = self.halves[of_successor]
        if half.machine.accepts(event) and (event, of_successor) != (Local.FAIL, False):
            self.told = True
            half.step(event)

    @precondition(lambda self: any(half.state in FINAL for half in self.halves))
    @rule()
    def hang_up(self) -> None:
        for half in self.halves:
            if half.peer.state in FINAL and half.state not in FINAL and not half.stream and not half.lost:
                half.lost = True
                if half.machine.accepts(Local.LOST):
                    half.step(Local.LOST)

    @invariant()
    def nobody_accepts_without_the_token(self) -> None:
        if hasattr(self, "successor") and self.successor.accepting:
            assert len(self.successor.token) < 2

    @invariant()
    def who_is_undone_does_not_accept(self) -> None:
        if hasattr(self, "successor") and self.successor.state in (State.FAILED, State.UNDONE):
            assert not self.successor.accepting

    @invariant()
    def two_ends_make_one_owner(self) -> None:
        if not hasattr(self, "successor"):
            return
        ended = self.incumbent.state in (State.CLOSED, State.DRAINING)
        if ended and self.successor.state in FINAL | {State.OWNER} and not self.told:
            assert self.incumbent.accepting != self.successor.accepting

    @invariant()
    def every_descriptor_arrives_once(self) -> None:
        if hasattr(self, "successor") and self.successor.state in (State.WARMING, State.READY, State.OWNER):
            assert self.successor.kept == self.offered


TestConversation = Conversation.TestCase
TestConversation.settings = settings(max_examples=2 * settings().max_examples, stateful_step_count=40, deadline=None)


def test_a_takeover_without_trouble() -> None:
    talk = Conversation()
    talk.connect([252, 252, 3], 9)
    for event in (Local.WARM, Local.ACCEPTING, Local.PROBATION_OVER):
        talk.deliver_all([65536])
        talk.go_on(event)
    talk.deliver_all([65536])
    assert (talk.incumbent.state, talk.successor.state) == (State.DRAINING, State.OWNER)
    assert (talk.incumbent.accepting, talk.successor.accepting) == (False, True)
    assert talk.successor.kept == 507
