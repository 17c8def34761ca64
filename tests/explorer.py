"""Walks every interleaving of the protocol's tables, with a death or a stop of a process put in at every step.

A world is a few processes and the links between them, as plain tuples of strings and numbers, so that it can be hashed.
Time does not pass in it: whatever may happen next is tried, and each of the worlds that come of it is walked from once.

The driver's rules are modelled here. One thing that others can see happens at a time, since a process may die or stop
before any of them:
- the actions of a step are executed in order, then the events that they brought about, before anything else;
- what was sent survives its sender; the end of a link is seen behind it, or (a pidfd tells so) in front of it and the
  rest is thrown away; a link that is lost stays lost, and LOST comes again in every state that has a row for it;
- after a final state nothing is processed;
- a JOIN is denied while another exchange of the process is undecided, or the service is not its own;
- descriptors that were read or are on their way in a socket are held, and with them the lock.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from takeover.exchange import HEARTBEATS
from takeover.incumbent import UNDECIDED
from takeover.protocol import FINAL, INCUMBENT, SUCCESSOR, Table
from takeover.wire import Type

Rows = Mapping[str, Mapping[str, tuple[str, tuple[str, ...]]]]

FINAL_NAMES = frozenset(state.name for state in FINAL)
RESTING = FINAL_NAMES | {"OWNER", "DRAINING", "STOPPING"}
HEARTBEAT_NAMES = frozenset(state.name for state in HEARTBEATS)
UNDECIDED_NAMES = frozenset(state.name for state in UNDECIDED)
MESSAGES = frozenset(kind.name for kind in Type)
CHOICES = frozenset({"says", "kill", "stop", "continue", "decides", "fails"})
"""What nobody may wait for: a world in which nothing else can happen is an end."""


class Process(NamedTuple):
    """`estate` is whether it holds lock and listeners; `told`, whether its own user or server made it give up."""

    mode: str  # running, stopped, dead (killed) or ended (by itself)
    accepting: bool
    estate: bool
    word: str  # what status would show
    told: bool = False
    leaving: tuple[tuple[int, int], ...] | None = None  # the sides that have not been told yet
    may_start_cold: bool = False


class Side(NamedTuple):
    """One end of a link: its machine, what the machine's last steps still ask for, and how it sees the link."""

    process: int
    state: str
    inbox: tuple[str, ...] = ()
    actions: tuple[str, ...] = ()
    events: tuple[str, ...] = ()
    lost: bool = False
    closed: bool = False
    batches: int = 0
    before: str = ""  # the state before the present one
    cause: str = ""  # the event that led to the present state
    changed: bool = False  # whether the present state is yet to be reported


class Link(NamedTuple):
    """An exchange: `token` is what nobody has read yet, `readers` who read which byte."""

    incumbent: Side
    successor: Side
    token: str = "cs"
    readers: str = ""


class World(NamedTuple):
    processes: tuple[Process, ...]
    links: tuple[Link, ...]
    faults: int
    path_removed_by: int = -1


class Rules(NamedTuple):
    """What may happen in a walk. With `spurious`, SILENT and OVERTIME fire although the peer is well."""

    incumbent: Table = INCUMBENT
    successor: Table = SUCCESSOR
    batches: int = 1
    faults: int = 1
    kinds: tuple[str, ...] = ("kill", "stop")
    spurious: bool = False
    heartbeats: bool = False
    decisions: bool = True
    successors: int = 1
    denies: bool = True


class Violation(AssertionError):
    """A predicate does not hold; the shortest way there."""

    def __init__(self, name: str, trace: list[str], world: object) -> None:
        super().__init__(f"{name}, after: " + "; ".join(trace) + f"\n{world}")
        self.name = name
        self.trace = trace


class Walk(NamedTuple):
    worlds: int
    ends: int
    rows: frozenset[tuple[str, str, str]]
    """Role, state and event of each row that fired."""
    outcomes: frozenset[tuple[tuple[int, int, str, str], ...]]
    """For each kind of end, each link's processes, and its successor's last state and what led to it."""


Check = Callable[[World, bool, Rules], bool]


def start(rules: Rules) -> World:
    """An incumbent that serves, and successors that have just connected; of several, the first is one step ahead."""
    incumbent = Process("running", True, True, "serving")
    links = tuple(
        Link(Side(0, "GREETING", batches=rules.batches), Side(index + 1, "GREETING", inbox=("HELLO",)))
        for index in range(rules.successors)
    )
    if rules.successors > 1:
        incumbent_side = links[0].incumbent._replace(
            state="OFFERING", actions=("OFFER",), before="GREETING", cause="JOIN"
        )
        ahead = Side(1, "JOINING", before="GREETING", cause="HELLO")
        links = (links[0]._replace(incumbent=incumbent_side, successor=ahead), *links[1:])
    successors = (Process("running", False, False, "joining"),) * rules.successors
    return World((incumbent, *successors), links, rules.faults)


class Explorer:
    """Knows what may happen next in a world."""

    def __init__(self, rules: Rules) -> None:
        self.rules = rules
        self.tables: tuple[Rows, Rows] = (by_name(rules.incumbent), by_name(rules.successor))
        self.rows: set[tuple[str, str, str]] = set()

    def next(self, world: World) -> Iterator[tuple[str, World]]:
        """Each thing that may happen, with the world after it. Raises OutOfTurn."""
        for number, process in enumerate(world.processes):
            yield from self._faults(world, number, process)
            if process.mode == "running":
                yield from self._work(world, number, process)

    def _faults(self, world: World, number: int, process: Process) -> Iterator[tuple[str, World]]:
        if process.mode == "stopped":
            yield f"continue {number}", _process(world, number, process._replace(mode="running"))
        if world.faults and process.mode in ("running", "stopped"):
            fewer = world._replace(faults=world.faults - 1)
            if "kill" in self.rules.kinds:
                yield f"kill {number}", _end(fewer, number, "dead")
            if "stop" in self.rules.kinds and process.mode == "running":
                yield f"stop {number}", _process(fewer, number, process._replace(mode="stopped"))

    def _work(self, world: World, number: int, process: Process) -> Iterator[tuple[str, World]]:
        sides = [
            (index, role)
            for index, link in enumerate(world.links)
            for role in (0, 1)
            if link[role].process == number  # type: ignore[union-attr]
        ]
        for index, role in sides:
            side: Side = world.links[index][role]  # type: ignore[assignment]
            if side.actions:
                for text, after in self._act(world, index, role, side):
                    yield text, self._go_on(after, index, role)
                return
        if process.leaving is not None:
            yield self._leave(world, number, process.leaving)
            return
        for index, role in sides:
            yield from self._outside(world, index, role, process)
        yield from self._process_events(world, number, process, sides)

    def _outside(self, world: World, index: int, role: int, process: Process) -> Iterator[tuple[str, World]]:
        """What may come to an idle side from elsewhere."""
        side: Side = world.links[index][role]  # type: ignore[assignment]
        peer: Side = world.links[index][1 - role]  # type: ignore[assignment]
        number, state = side.process, side.state
        if state in FINAL_NAMES:
            return
        rows = self.tables[role].get(state, {})
        peer_mode = world.processes[peer.process].mode
        if not side.lost and not side.closed:
            gone = peer.closed or peer_mode in ("dead", "ended")
            if side.inbox:
                event = side.inbox[0]
                after = _side(world, index, role, side._replace(inbox=side.inbox[1:]))
                if event == "JOIN" and self._denies(world, index, number):
                    event = "DENIED"
                elif event == "LISTENERS":
                    after = _process(after, number, process._replace(estate=True))
                yield f"{number} reads {event}", self._step(after, index, role, event)
            if gone and (not side.inbox or peer_mode in ("dead", "ended")):
                after = _side(world, index, role, side._replace(lost=True, inbox=()))
                if "LOST" in rows:
                    after = self._step(after, index, role, "LOST")
                yield f"{number} LOST", after
        for event in ("SILENT", "OVERTIME"):
            if event in rows and rows[event][0] != state and (self.rules.spurious or peer_mode == "stopped"):
                yield f"{number} {event}", self._step(world, index, role, event)
        for event in ("WARM", "ACCEPTING", "PROBATION_OVER"):
            if event in rows:
                yield f"{number} {event}", self._step(world, index, role, event)
        if self.rules.decisions and role == 1 and "FAIL" in rows:
            after = _process(world, number, process._replace(told=True))
            yield f"{number} decides FAIL", self._step(after, index, role, "FAIL")
        said = "HEARTBEAT" if state in HEARTBEAT_NAMES else "DRAINING" if (role, state) == (0, "DRAINING") else ""
        if (
            self.rules.heartbeats
            and said
            and said not in peer.inbox
            and not (side.lost or side.closed or peer.closed)
            and peer_mode in ("running", "stopped")
        ):
            yield f"{number} says {said}", self._send(world, index, role, said)

    def _leave(self, world: World, number: int, sides: tuple[tuple[int, int], ...]) -> tuple[str, World]:
        """Tells the next of its exchanges; at the end, who still has the lock takes the path away."""
        process = world.processes[number]
        if sides:
            index, role = sides[0]
            world = _process(world, number, process._replace(leaving=sides[1:]))
            if self._leaves(world, index, role):
                world = self._step(world, index, role, "LEAVING")
            return f"{number} LEAVING", world
        if process.estate:
            world = world._replace(path_removed_by=number)
        word = process.word if process.word in ("undone", "failed") else "stopped"
        return f"{number} gives up", _process(
            world, number, process._replace(accepting=False, estate=False, leaving=None, word=word)
        )

    def _leaves(self, world: World, index: int, role: int) -> bool:
        side: Side = world.links[index][role]  # type: ignore[assignment]
        return "LEAVING" in self.tables[role].get(side.state, {})

    def _process_events(
        self, world: World, number: int, process: Process, sides: list[tuple[int, int]]
    ) -> Iterator[tuple[str, World]]:
        free = not process.told or any(world.links[index][role].state == "RETURNING" for index, role in sides)  # type: ignore[union-attr]
        if self.rules.decisions and free and any(self._leaves(world, *side) for side in sides):
            yield (
                f"{number} decides LEAVING",
                _process(world, number, process._replace(told=True, leaving=tuple(sides))),
            )
        if process.word in ("draining", "stopped", "undone", "failed") and not process.may_start_cold:
            yield f"{number} ends", _end(world, number, "ended")
        if process.may_start_cold and not process.told:
            owner = next((n for n, each in enumerate(world.processes) if each.accepting and _lives(each)), None)
            if not is_locked(world):
                cold = process._replace(accepting=True, estate=True, word="serving", may_start_cold=False)
                yield f"{number} starts cold", _process(world, number, cold)
            elif owner is not None and self.rules.successors > 1 and world.processes[owner].mode == "running":
                yield f"{number} connects to {owner}", self._connect(world, number, owner)

    def _connect(self, world: World, number: int, owner: int) -> World:
        process = world.processes[number]._replace(may_start_cold=False, word="joining")
        link = Link(Side(owner, "GREETING", batches=self.rules.batches), Side(number, "GREETING", inbox=("HELLO",)))
        return _process(world, number, process)._replace(links=(*world.links, link))

    def _denies(self, world: World, index: int, number: int) -> bool:
        if not self.rules.denies:
            return False
        others = (link.incumbent for place, link in enumerate(world.links) if place != index)
        undecided = any(side.process == number and side.state in UNDECIDED_NAMES for side in others)
        return undecided or world.processes[number].word != "serving"

    def _step(self, world: World, index: int, role: int, event: str) -> World:
        return self._go_on(self._transit(world, index, role, event), index, role)

    def _go_on(self, world: World, index: int, role: int) -> World:
        """Does what nobody else can see: reports the new state, and goes through events up to the next action."""
        while True:
            side: Side = world.links[index][role]  # type: ignore[assignment]
            if side.actions:
                return world
            if side.changed:
                world = self._changed(world, index, role, side._replace(changed=False))
            elif side.events and side.state in FINAL_NAMES:
                return _side(world, index, role, side._replace(events=()))
            elif side.events:
                after = _side(world, index, role, side._replace(events=side.events[1:]))
                world = self._transit(after, index, role, side.events[0])
            else:
                return world

    def _transit(self, world: World, index: int, role: int, event: str) -> World:
        side: Side = world.links[index][role]  # type: ignore[assignment]
        row = self.tables[role].get(side.state, {}).get(event)
        if row is None:
            raise OutOfTurn(f"process {side.process}: {event} is out of turn in the state {side.state}")
        self.rows.add((("incumbent", "successor")[role], side.state, event))
        after, actions = row
        if after == side.state:
            return _side(world, index, role, side._replace(actions=actions))
        moved = side._replace(state=after, actions=actions, before=side.state, cause=event, changed=True)
        return _side(world, index, role, moved)

    def _act(self, world: World, index: int, role: int, side: Side) -> Iterator[tuple[str, World]]:
        action, number = side.actions[0], side.process
        side = side._replace(actions=side.actions[1:])
        world = _side(world, index, role, side)
        process = world.processes[number]
        link = world.links[index]
        text = f"{number} does {action}"
        if action in MESSAGES:
            world = self._send(world, index, role, action)
            if action == "TAKEN" and side.batches == 0:
                world = _event(world, index, role, "COMPLETE")
            yield text, world
        elif action == "OFFER":
            if side.batches:
                sent = _side(world, index, role, side._replace(batches=side.batches - 1))
                yield text, self._send(sent, index, role, f"LISTENERS {side.batches - 1}")
            else:
                yield text, _event(world, index, role, "OFFERED")
            if world.faults:
                failed = world._replace(faults=world.faults - 1)
                yield f"{text}, which fails", _event(failed, index, role, "FAIL")
        elif action == "KEEP":
            yield text, world
            if self.rules.decisions:
                told = _process(world, number, process._replace(told=True))
                yield f"{text}, which fails", _event(told, index, role, "FAIL")
        elif action in ("TAKE_BACK", "TAKE_COMMIT", "TAKE_SETTLE"):
            byte = link.token[:1]
            taken = link._replace(token=link.token[1:], readers=link.readers + ("is"[role] if byte else ""))
            event = {"c": "GOT_COMMIT", "s": "GOT_SETTLE", "": "GOT_NOTHING"}[byte]
            if (action, byte) in (("TAKE_COMMIT", "s"), ("TAKE_SETTLE", "c")):
                event = "GOT_NOTHING"
            links = (*world.links[:index], taken, *world.links[index + 1 :])
            yield f"{text}: {event}", _event(world._replace(links=links), index, role, event)
        elif action == "OPEN_CHANNEL":
            yield text, self._send(world, index, role, "TAKE")
        elif action == "CLOSE":
            yield text, _side(world, index, role, side._replace(closed=True, inbox=()))
        else:
            yield text, _process(world, number, _perform(process, action, role))

    def _changed(self, world: World, index: int, role: int, side: Side) -> World:
        number = side.process
        if side.lost and "LOST" in self.tables[role].get(side.state, {}):
            side = side._replace(events=(*side.events, "LOST"))
        world = _side(world, index, role, side)
        if side.state in FINAL_NAMES and role == 1:
            return self._failed(world, number, side)
        if side.state == "OWNER":
            return _process(world, number, world.processes[number]._replace(word="serving"))
        return world

    def _failed(self, world: World, number: int, side: Side) -> World:
        process = world.processes[number]
        again = side.cause in ("LOST", "REFUSE") and side.before in ("GREETING", "JOINING")
        if side.cause == "REFUSE" and sum(link.successor.process == number for link in world.links) > 1:
            again = False
        word = "undone" if side.state == "UNDONE" else "failed"
        return _process(world, number, process._replace(estate=False, word=word, may_start_cold=again))

    def _send(self, world: World, index: int, role: int, message: str) -> World:
        side: Side = world.links[index][role]  # type: ignore[assignment]
        peer: Side = world.links[index][1 - role]  # type: ignore[assignment]
        alive = world.processes[peer.process].mode in ("running", "stopped")
        if side.lost or side.closed or peer.closed or peer.lost or not alive:
            return world
        if message.startswith("LISTENERS"):
            peer = peer._replace(batches=int(message[-1]))
            message = "LISTENERS"
        return _side(world, index, 1 - role, peer._replace(inbox=(*peer.inbox, message)))


class OutOfTurn(Exception):
    """An honest peer, or this side, did something that the tables have no row for."""


def by_name(table: Table) -> Rows:
    rows: dict[str, dict[str, tuple[str, tuple[str, ...]]]] = {}
    for (state, event), (after, actions) in table.items():
        rows.setdefault(state.name, {})[event.name] = (after.name, tuple(action.name for action in actions))
    return rows


def _perform(process: Process, action: str, role: int) -> Process:
    if action == "STOP_ACCEPTING":
        return process._replace(accepting=False) if role == 0 else process._replace(accepting=False, estate=False)
    if action == "START_ACCEPTING":
        return process._replace(accepting=True, word="serving" if role == 0 else "probation")
    if action == "RELEASE":
        return process._replace(accepting=False, estate=False, word="draining")
    return process


def is_locked(world: World) -> bool:
    """Whether anybody holds the lock; what is on its way in a socket is held as well."""
    in_flight = any("LISTENERS" in link.successor.inbox for link in world.links)
    return in_flight or any(process.estate and _lives(process) for process in world.processes)


def _lives(process: Process) -> bool:
    return process.mode in ("running", "stopped")


def _process(world: World, number: int, process: Process) -> World:
    processes = (*world.processes[:number], process, *world.processes[number + 1 :])
    return world._replace(processes=processes)


def _side(world: World, index: int, role: int, side: Side) -> World:
    link = world.links[index]
    link = link._replace(successor=side) if role else link._replace(incumbent=side)
    return world._replace(links=(*world.links[:index], link, *world.links[index + 1 :]))


def _event(world: World, index: int, role: int, event: str) -> World:
    side: Side = world.links[index][role]  # type: ignore[assignment]
    return _side(world, index, role, side._replace(events=(*side.events, event)))


def _end(world: World, number: int, mode: str) -> World:
    """A process is no more: nothing of it is left to distinguish worlds by but what it had sent."""
    process = world.processes[number]._replace(
        mode=mode, accepting=False, estate=False, leaving=None, may_start_cold=False
    )
    world = _process(world, number, process)
    for index, link in enumerate(world.links):
        for role in (0, 1):
            side: Side = link[role]  # type: ignore[assignment]
            if side.process == number:
                side = side._replace(inbox=(), actions=(), events=())
                world = _side(world, index, role, side)
    return world


def walk(rules: Rules, checks: Mapping[str, Check]) -> Walk:
    """Walks every world that can come up; `checks` get each world, and whether nothing can happen in it any more.

    Raises Violation, with the shortest way to the first world in which a check is false, an event out of turn comes
    up, or something happens again and again without end.
    """
    with without_collecting():
        return _walk(rules, checks)


@contextlib.contextmanager
def without_collecting() -> Iterator[None]:
    """For millions of tuples, none of them in a circle."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def _walk(rules: Rules, checks: Mapping[str, Check]) -> Walk:
    explorer = Explorer(rules)
    worlds = [start(rules)]
    numbers = {worlds[0]: 0}
    came_from: list[tuple[int, str]] = [(0, "")]
    after: list[list[int]] = []
    ends = 0
    outcomes = set()
    for number, world in enumerate(worlds):  # the list grows meanwhile
        try:
            following = list(explorer.next(world))
        except OutOfTurn as error:
            raise Violation(f"nothing comes out of turn ({error})", trace_to(came_from, number), world) from None
        end = all(CHOICES & set(text.split()) for text, _ in following)
        if end:
            ends += 1
            outcomes.add(tuple((i.process, s.process, s.state, s.cause) for i, s, _, _ in world.links))
        for name, check in checks.items():
            if not check(world, end, rules):
                raise Violation(name, trace_to(came_from, number), world)
        after.append([])
        for text, new in following:
            if new not in numbers:
                numbers[new] = len(worlds)
                worlds.append(new)
                came_from.append((number, text))
            if " says " not in text:
                after[number].append(numbers[new])
    circle = world_on_a_circle(after)
    if circle is not None:
        raise Violation("everything comes to an end", trace_to(came_from, circle), worlds[circle])
    return Walk(len(worlds), ends, frozenset(explorer.rows), frozenset(outcomes))


def world_on_a_circle(after: list[list[int]]) -> int | None:
    """A world that comes up again and again, if any (Kahn's algorithm: what nothing leads into is taken away)."""
    leading_in = [0] * len(after)
    for following in after:
        for new in following:
            leading_in[new] += 1
    roots = [number for number, count in enumerate(leading_in) if not count]
    for root in roots:  # the list grows meanwhile
        for new in after[root]:
            leading_in[new] -= 1
            if not leading_in[new]:
                roots.append(new)
    return next((number for number, count in enumerate(leading_in) if count), None)


def trace_to(came_from: list[tuple[int, str]], number: int) -> list[str]:
    steps = []
    while number:
        number, text = came_from[number]
        steps.append(text)
    return steps[::-1]
