"""Walks every interleaving of the two ends of a channel, with trouble at every step; explorer.py's little sister.

A world is the two ends, the token and the connections, as plain tuples that can be hashed. Time does not pass in it:
whatever may happen next is tried, and each of the worlds that come of it is walked from once.

The driver's rules are modelled here. One thing that the other process can see happens at a time:
- the giver looks whether the token is there, then takes a batch out of its loop, then sends it;
- what was sent survives its sender, and the end of the stream is seen behind it. A link that is lost stays lost;
- an end that cannot read what has come loses the link with all that is behind it ("garbles");
- an answer counts for nothing while the other end is gone and has not read the token;
- the taker refuses what it likes, and handlers end connections that stand still as they like;
- an end may be silent for too long when it is stopped, or has nothing to say; with `spurious`, always;
- at the deadline the giver leaves, and closes what it serves. (A taker that leaves is like one that is killed.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import chain, combinations
from typing import NamedTuple

from explorer import (
    FINAL_NAMES,
    OutOfTurn,
    Rows,
    Violation,
    Walk,
    by_name,
    trace_to,
    without_collecting,
    world_on_a_circle,
)
from takeover.protocol import GIVER, TAKER, Table

Message = tuple[str, int, tuple[int, ...]]
"""Type, batch, and the connections that are refused, or that stay."""

GIVER_END, TAKER_END = 0, 1
NAMES = ("giver", "taker")
CHOICES = frozenset({"kill", "stop", "continue", "garbles", "decides"})


class Connection(NamedTuple):
    """Who has a copy, `s` serves it, `h` has it stand still, `-` has closed it; the rest only ever turns true."""

    giver: str = "s"
    taker: str = "."
    sent: bool = False
    adopted: bool = False  # ADOPTED said so
    refused: bool = False  # ADOPTED said the opposite
    stays: bool = False  # RELEASED said so
    resumed: bool = False  # the giver has served it after it was sent
    started: bool = False  # the taker has served it


class End(NamedTuple):
    mode: str = "running"  # stopped, dead or ended
    state: str = ""
    inbox: tuple[Message, ...] = ()
    frame: Message = ("", -1, ())
    actions: tuple[str, ...] = ()
    events: tuple[str, ...] = ()
    batches: tuple[int, ...] = ()
    staying: tuple[tuple[int, ...], ...] = ()
    lost: bool = False
    broken: bool = False
    closed: bool = False
    leaving: bool = False

    @property
    def gone(self) -> bool:
        return self.mode in ("dead", "ended")

    @property
    def idle(self) -> bool:
        return not (self.actions or self.events or self.inbox)


class World(NamedTuple):
    giver: End
    taker: End
    connections: tuple[Connection, ...]
    faults: int
    next_batch: int = 0
    token: str = ""  # who has read it

    def end(self, which: int) -> End:
        return self.taker if which else self.giver


class Rules(NamedTuple):
    """What may happen in a walk: `refusable` and `endable` are connections that the taker may refuse, handlers end."""

    giver: Table = GIVER
    taker: Table = TAKER
    batches: tuple[tuple[int, ...], ...] = ((0,), (1, 2))
    refusable: tuple[int, ...] = ()
    endable: tuple[int, ...] = ()
    window: int = 2
    faults: int = 1
    kinds: tuple[str, ...] = ("kill", "stop", "garble")
    spurious: bool = False
    leaves: bool = True


class Explorer:
    """Knows what may happen next in a world."""

    def __init__(self, rules: Rules) -> None:
        self.rules = rules
        self.tables: tuple[Rows, Rows] = (by_name(rules.giver), by_name(rules.taker))
        self.rows: set[tuple[str, str, str]] = set()

    def start(self) -> World:
        connections = (Connection(),) * sum(map(len, self.rules.batches))
        return World(End(state="GIVING"), End(state="TAKING"), connections, self.rules.faults)

    def next(self, world: World) -> Iterator[tuple[str, World]]:
        for which in (GIVER_END, TAKER_END):
            end = world.end(which)
            yield from self._faults(world, which, end)
            if end.mode == "running":
                yield from self._work(world, which, end)

    def _faults(self, world: World, which: int, end: End) -> Iterator[tuple[str, World]]:
        name = NAMES[which]
        if end.mode == "stopped":
            yield f"continue {name}", _with(world, which, end._replace(mode="running"))
        if not world.faults or end.gone:
            return
        fewer = world._replace(faults=world.faults - 1)
        if "kill" in self.rules.kinds:
            yield f"kill {name}", _gone(fewer, which, "dead")
        if "stop" in self.rules.kinds and end.mode == "running":
            yield f"stop {name}", _with(fewer, which, end._replace(mode="stopped"))
        reads = end.mode == "running" and end.inbox and not (end.actions or end.lost or end.state in FINAL_NAMES)
        if "garble" in self.rules.kinds and reads and not end.leaving:
            broken = end._replace(inbox=(), lost=True, broken=True)
            yield f"{name} garbles {end.inbox[0]}", self._lose(_with(fewer, which, broken), which)

    def _work(self, world: World, which: int, end: End) -> Iterator[tuple[str, World]]:
        if end.actions:
            for text, after in self._act(world, which, end._replace(actions=end.actions[1:]), end.actions[0]):
                yield f"{NAMES[which]} {text}", self._go_on(after, which)
        elif end.leaving:
            if end.state in FINAL_NAMES:
                yield f"{NAMES[which]} ends", _gone(world, which, "ended")
            else:
                yield f"{NAMES[which]} LEAVING", self._step(world, which, "LEAVING")
        elif end.state not in FINAL_NAMES:
            for event, after in self._events(world, which, end):
                yield f"{NAMES[which]} {event}", self._step(after, which, event.split()[0])
            yield from self._others(world, which, end)

    def _others(self, world: World, which: int, end: End) -> Iterator[tuple[str, World]]:
        """What is no event of the table."""
        peer = world.end(1 - which)
        if which == GIVER_END and self.rules.leaves:
            yield "giver decides LEAVING", _with(world, which, end._replace(leaving=True))
        if end.inbox and end.inbox[0][0] == "ADOPTED" and (peer.gone or peer.closed) and not world.token:
            yield "giver ignores ADOPTED", _with(world, which, end._replace(inbox=end.inbox[1:]))
        if not end.inbox and not end.lost and (peer.gone or peer.closed):
            after = self._lose(_with(world, which, end._replace(lost=True)), which)
            yield f"{NAMES[which]} {self._loss(which, end)}", after

    def _events(self, world: World, which: int, end: End) -> Iterator[tuple[str, World]]:
        peer = world.end(1 - which)
        rows = self.tables[which].get(end.state, {})
        ignored = which == GIVER_END and (peer.gone or peer.closed) and not world.token
        if end.inbox and not end.lost and not (ignored and end.inbox[0][0] == "ADOPTED"):
            kind, batch, which_ones = end.inbox[0]
            event = "PARTLY" if kind == "RELEASED" and which_ones else kind
            read = end._replace(inbox=end.inbox[1:], frame=end.inbox[0])
            yield f"{event} of batch {batch}", _with(world, which, read)
        waits = end.batches or end.staying
        quiet = peer.mode == "stopped" or (peer.mode == "running" and peer.idle and end.idle)
        if "SILENT" in rows and waits and (self.rules.spurious or quiet):
            yield "SILENT", world
        if which == GIVER_END:
            yield from self._pumps(world, end)

    def _pumps(self, world: World, end: End) -> Iterator[tuple[str, World]]:
        left = world.next_batch < len(self.rules.batches)
        if end.state == "GIVING" and left and len(end.batches) < self.rules.window:
            if world.token:
                yield "BEATEN", world
            else:
                batch = self.rules.batches[world.next_batch]
                yield f"BATCH {world.next_batch}", _copies(world, batch, giver="h")
        nothing_left = not (end.batches or end.inbox or end.lost)
        if nothing_left and (end.state == "OUTRUN" or (end.state == "GIVING" and not (left or end.staying))):
            yield "EMPTY", world

    def _loss(self, which: int, end: End) -> str:
        return "FAIL" if which == GIVER_END and end.broken and end.state == "OUTRUN" else "LOST"

    def _lose(self, world: World, which: int) -> World:
        end = world.end(which)
        event = self._loss(which, end)
        return self._step(world, which, event) if event in self.tables[which].get(end.state, {}) else world

    def _step(self, world: World, which: int, event: str) -> World:
        return self._go_on(self._transit(world, which, event), which)

    def _go_on(self, world: World, which: int) -> World:
        """Goes through the events that actions brought about, up to the next action."""
        while True:
            end = world.end(which)
            if end.actions or not end.events:
                return world
            if end.state in FINAL_NAMES:
                return _with(world, which, end._replace(events=()))
            after = _with(world, which, end._replace(events=end.events[1:]))
            world = self._transit(after, which, end.events[0])

    def _transit(self, world: World, which: int, event: str) -> World:
        end = world.end(which)
        row = self.tables[which].get(end.state, {}).get(event)
        if row is None:
            raise OutOfTurn(f"{event} is out of turn for the {NAMES[which]} in the state {end.state}")
        self.rows.add((NAMES[which], end.state, event))
        after, actions = row
        moved = end._replace(state=after, actions=actions)
        loss = self._loss(which, moved)
        if after != end.state and end.lost and loss in self.tables[which].get(after, {}):
            moved = moved._replace(events=(*moved.events, loss))
        return _with(world, which, moved)

    def _act(self, world: World, which: int, end: End, action: str) -> Iterator[tuple[str, World]]:
        world = _with(world, which, end)
        text = f"does {action}"
        if action in ("RECLAIM", "CLAIM"):
            got = "GOT_NOTHING" if world.token else "GOT_CHANNEL"
            read = _with(world, which, end._replace(events=(*end.events, got)))
            yield f"{text}: {got}", read._replace(token=world.token or NAMES[which])
        elif action == "CLOSE":
            yield text, _with(world, which, end._replace(closed=True, inbox=()))
        elif which == GIVER_END:
            yield from self._give(world, end, action, text)
        else:
            yield from self._take(world, end, action, text)

    def _give(self, world: World, end: End, action: str, text: str) -> Iterator[tuple[str, World]]:
        if action == "CONNECTIONS":
            number = world.next_batch
            sent = _send(world, GIVER_END, ("CONNECTIONS", number, ()))._replace(next_batch=number + 1)
            sent = _with(sent, GIVER_END, end._replace(batches=(*end.batches, number)))
            yield text, _copies(sent, self.rules.batches[number], sent=True)
        elif action == "RELINQUISH":
            yield from self._relinquish(world, end, text)
        elif action == "RELEASED":
            _, number, _ = end.frame
            kept = end.staying[-1] if end.staying and end.staying[-1][0] in self.rules.batches[number] else ()
            yield text, _copies(_send(world, GIVER_END, ("RELEASED", number, kept)), kept, stays=True)
        elif action == "FINISHED":
            yield text, _send(world, GIVER_END, ("FINISHED", -1, ()))
        elif action == "SERVE_ON":
            if not end.staying and end.frame[0] == "DROPPED":
                raise OutOfTurn("DROPPED came for nothing")
            served = _with(world, GIVER_END, end._replace(staying=end.staying[1:]))
            yield text, _copies(served, end.staying[0] if end.staying else (), giver="s", resumed=True)
        else:
            staying = tuple(chain.from_iterable(end.staying))
            batches = tuple(chain.from_iterable(self.rules.batches[number] for number in end.batches))
            if action == "FORGO":
                yield text, _copies(_with(world, GIVER_END, end._replace(staying=())), staying, giver="-")
                return
            after = _with(world, GIVER_END, end._replace(staying=(), batches=()))
            if action == "PUT_BACK":
                yield text, _copies(after, staying + batches, giver="s", resumed=True)
            else:
                assert action == "RELINQUISH_ALL", action
                yield text, _copies(after, staying + batches, giver="-")

    def _relinquish(self, world: World, end: End, text: str) -> Iterator[tuple[str, World]]:
        _, number, refused = end.frame
        if end.batches[:1] != (number,):
            raise OutOfTurn(f"batch {number} was adopted, {end.batches} are on their way")
        for kept in _subsets(c for c in self.rules.batches[number] if c in self.rules.endable and c not in refused):
            staying = (*end.staying, kept) if kept else end.staying
            after = _with(world, GIVER_END, end._replace(batches=end.batches[1:], staying=staying))
            after = _copies(after, refused, giver="s", resumed=True)
            gone = [c for c in self.rules.batches[number] if c not in kept and c not in refused]
            yield text + (f" but for {kept}" if kept else ""), _copies(after, gone, giver="-")

    def _take(self, world: World, end: End, action: str, text: str) -> Iterator[tuple[str, World]]:
        _, number, told = end.frame
        if action == "ADOPT":
            batch = self.rules.batches[number]
            for refused in _subsets(c for c in batch if c in self.rules.refusable):
                after = _with(world, TAKER_END, end._replace(batches=(*end.batches, number), staying=(refused,)))
                after = _copies(after, batch, taker="h")
                yield text + (f" but for {refused}" if refused else ""), _copies(after, refused, taker="-")
        elif action == "ADOPTED":
            refused = end.staying[0]
            after = _with(world, TAKER_END, end._replace(staying=()))
            after = _copies(_send(after, TAKER_END, ("ADOPTED", number, refused)), refused, refused=True)
            yield text, _copies(after, [c for c in self.rules.batches[number] if c not in refused], adopted=True)
        elif action == "DROPPED":
            yield text, _send(world, TAKER_END, ("DROPPED", number, ()))
        elif action == "START":
            if end.batches[:1] != (number,):
                raise OutOfTurn(f"batch {number} was released, {end.batches} are held")
            after = _copies(_with(world, TAKER_END, end._replace(batches=end.batches[1:])), told, taker="-")
            yield text, _copies(after, _held(after, self.rules.batches[number]), taker="s", started=True)
        else:
            held = [c for number in end.batches for c in _held(world, self.rules.batches[number])]
            after = _with(world, TAKER_END, end._replace(batches=()))
            if action == "START_ALL":
                yield text, _copies(after, held, taker="s", started=True)
            else:
                assert action == "DROP_ALL", action
                yield text, _copies(after, held, taker="-")


def _subsets(several: Iterator[int]) -> Iterator[tuple[int, ...]]:
    known = tuple(several)
    return chain.from_iterable(combinations(known, size) for size in range(len(known) + 1))


def _held(world: World, batch: tuple[int, ...]) -> list[int]:
    return [c for c in batch if world.connections[c].taker == "h"]


def _with(world: World, which: int, end: End) -> World:
    return world._replace(taker=end) if which else world._replace(giver=end)


def _copies(world: World, which: tuple[int, ...] | list[int], **what: object) -> World:
    if not which:
        return world
    several = enumerate(world.connections)
    return world._replace(
        connections=tuple(each._replace(**what) if c in which else each for c, each in several)  # type: ignore[arg-type]
    )


def _send(world: World, which: int, message: Message) -> World:
    end, peer = world.end(which), world.end(1 - which)
    if end.lost or end.closed or peer.lost or peer.closed or peer.gone:
        return world
    return _with(world, 1 - which, peer._replace(inbox=(*peer.inbox, message)))


def _gone(world: World, which: int, mode: str) -> World:
    """A process is no more, and nothing of it is left but what it had sent."""
    end = world.end(which)
    world = _with(world, which, End(mode, end.state, leaving=end.leaving))
    everything = tuple(range(len(world.connections)))
    return _copies(world, everything, taker="-") if which else _copies(world, everything, giver="-")


Check = Callable[[World, bool], bool]


def walk(rules: Rules, checks: Mapping[str, Check]) -> Walk:
    """Walks every world that can come up; `checks` get each world, and whether nothing can happen in it any more.

    Raises Violation, with the shortest way to the first world in which a check is false, a message or an event comes
    out of turn, or something happens again and again without end.
    """
    with without_collecting():
        return _walk(rules, checks)


def _walk(rules: Rules, checks: Mapping[str, Check]) -> Walk:
    explorer = Explorer(rules)
    worlds = [explorer.start()]
    numbers = {worlds[0]: 0}
    came_from: list[tuple[int, str]] = [(0, "")]
    after: list[list[int]] = []
    ends = 0
    for number, world in enumerate(worlds):  # the list grows meanwhile
        try:
            following = list(explorer.next(world))
        except OutOfTurn as error:
            raise Violation(f"nothing comes out of turn ({error})", trace_to(came_from, number), world) from None
        end = all(CHOICES & set(text.split()) for text, _ in following)
        ends += end
        for name, check in checks.items():
            if not check(world, end):
                raise Violation(name, trace_to(came_from, number), world)
        after.append([])
        for text, new in following:
            if new not in numbers:
                numbers[new] = len(worlds)
                worlds.append(new)
                came_from.append((number, text))
            after[number].append(numbers[new])
    circle = world_on_a_circle(after)
    if circle is not None:
        raise Violation("everything comes to an end", trace_to(came_from, circle), worlds[circle])
    return Walk(len(worlds), ends, frozenset(explorer.rows), frozenset())
