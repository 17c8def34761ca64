"""The takeover as two tables of states, without I/O. docs/protocol.md tells it in prose, its diagram drawn from here.

Who owns the service is never a matter of opinion, nor of which message was the last to arrive. Among the descriptors
that the incumbent hands over is the *token*: the reading end of a pipe that holds two bytes, COMMIT_BYTE and then
SETTLE_BYTE, and whose writing end is closed. Both processes hold it, the kernel gives each byte to one reader only, and
a reader never waits. Every step that passes ownership is the reading of one byte:

- the successor commits by reading COMMIT_BYTE: whoever reads it owns the service;
- the incumbent takes back by reading whatever is next. COMMIT_BYTE: there was no commit, and there will be none.
  SETTLE_BYTE: there was one, and it is undone (probation), be it that the successor is gone or that it gives the
  service back (ABORT). Nothing: too late, the successor has settled;
- the successor settles by reading SETTLE_BYTE, when the incumbent does not end the probation itself.

So a lost message, a death or a stop between any two steps leaves one owner, and the messages only say what happened.
In particular the incumbent never needs to know whether COMMIT arrived, and a successor whose incumbent is silent (dead,
stopped, hanging) may claim the service: should the incumbent wake up, the token is gone, and it learns so.

A link that is lost stays lost: LOST is delivered again in each new state whose table has a row for it.

Established connections move when the service is settled, from the loop of the one process straight to the loop of the
other, on a *channel*: a socket pair that the successor makes (TAKE). Its two ends are tables of their own, the *giver*
and the *taker*. A batch stands still from CONNECTIONS to RELEASED, and then it is the taker's. Who serves what stands
still when the other is dead, stopped or hangs is again no matter of opinion: with the channel goes a token with one
byte, which nobody reads without trouble.

- The giver reads it: every batch that was not released is served on by the giver. The taker, which finds the token
  empty, serves what was released before, and closes its copies of the rest.
- The taker reads it: it serves every batch that it adopts without waiting for RELEASED, and says ADOPTED of each before
  it touches it, with what it has refused. So the giver, which finds the token empty, has only to read on: what was
  adopted is the taker's, and what was refused, or not yet adopted when the taker's end is closed, is the giver's.

A connection that its handler has ended while it stood still is not released, but stays the giver's, if the taker says
so (DROPPED): for a taker that has read the token serves it already.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import NamedTuple, TypeAlias

from .errors import LocalProtocolError, RemoteProtocolError
from .wire import Type

COMMIT_BYTE = b"c"
SETTLE_BYTE = b"s"
CHANNEL_BYTE = b"m"


class Limits(NamedTuple):
    """Seconds, counted in ticks of this process while it runs: one that was stopped blames nobody else for it."""

    heartbeat: float = 0.1
    silence: float = 0.8
    """How long a peer may say nothing while the service stands still or is on probation."""
    warming_silence: float = 5.0
    """The same while the incumbent serves: an import that holds the GIL delays heartbeats and hurts nobody."""
    greeting: float = 5.0
    """From the connection to the first whole frame of the peer."""
    offering: float = 10.0
    warming: float = 600.0
    starting: float = 0.8
    """From COMMIT to ALIVE."""


class State(enum.Enum):
    GREETING = "greeting"
    CLOSED = "closed"
    # of the incumbent
    OFFERING = "offering"
    WARMING = "warming"
    COMMITTED = "committed"
    PROBATION = "probation"
    TAKING_BACK = "taking back"
    DRAINING = "draining"
    STOPPING = "stopping"
    # of the successor, which has WARMING and PROBATION too
    JOINING = "joining"
    ORPHANED = "orphaned"
    READY = "ready"
    CLAIMING = "claiming"
    STARTING = "starting"
    RETURNING = "returning"
    SETTLING = "settling"
    OWNER = "owner"
    FAILED = "failed"
    UNDONE = "undone"
    # of the two ends of a channel
    GIVING = "giving"
    RECLAIMING = "reclaiming"
    TAKING = "taking"
    RESOLVING = "resolving"
    CLAIMED = "claimed"
    OUTRUN = "outrun"


class Local(enum.Enum):
    """What happens on this side; the other events are the messages that arrive (wire.Type)."""

    LOST = "the link or the peer is gone"
    SILENT = "the peer said nothing for its limit"
    OVERTIME = "the phase has used up its budget"
    DENIED = "this JOIN is refused"
    OFFERED = "every descriptor was taken"
    COMPLETE = "every descriptor has come"
    WARM = "the server is ready to serve"
    FAIL = "the server cannot or will not serve"
    ACCEPTING = "the server accepts"
    LEAVING = "this process was told to stop"
    PROBATION_OVER = "the probation has passed"
    GOT_COMMIT = "the token gave COMMIT_BYTE"
    GOT_SETTLE = "the token gave SETTLE_BYTE"
    GOT_NOTHING = "the token gave nothing that helps"
    GOT_CHANNEL = "the token gave CHANNEL_BYTE"
    BATCH = "a batch of connections was taken out of the loop"
    EMPTY = "nothing is left that could move"
    BEATEN = "the other end has read the channel's token"
    PARTLY = "a batch was released, but for some of it (RELEASED)"


class Do(enum.Enum):
    """What a step asks of the driver; the other actions are messages to send (wire.Type)."""

    OFFER = "send the next batch, or report OFFERED"
    KEEP = "check and keep the descriptors that came"
    STOP_ACCEPTING = "stop accepting"
    START_ACCEPTING = "accept"
    TAKE_BACK = "read the token, to take back"
    TAKE_COMMIT = "read the token, to commit"
    TAKE_SETTLE = "read the token, to settle"
    RELEASE = "close the listeners and drain"
    STOP = "end the service"
    COUNT = "note how many connections the older process still serves"
    ELDERS = "watch over the older processes that still drain"
    CLOSE = "close the link"
    BEQUEATH = "keep the blob that came"
    OPEN_CHANNEL = "ask for the live connections, on a new channel"
    MOVE = "move the live connections along the channel that came"
    ADOPT = "take the batch in, without reading or writing"
    START = "read and write on the batch"
    START_ALL = "read and write on everything that was adopted"
    DROP_ALL = "close everything that was adopted and not released"
    RELINQUISH = "close our copies of the batch, but for what was refused, which is served on, and what is to stay"
    RELINQUISH_ALL = "close our copies of everything that is on its way"
    PUT_BACK = "serve everything that is on its way on"
    SERVE_ON = "serve on what is to stay of the batch"
    FORGO = "close our copies of what is to stay"
    RECLAIM = "read the channel's token, to serve on"
    CLAIM = "read the channel's token, to own"


Event: TypeAlias = Type | Local
Action: TypeAlias = Type | Do
Table: TypeAlias = Mapping[tuple[State, Event], tuple[State, tuple[Action, ...]]]
Row: TypeAlias = tuple[State, tuple[Event, ...], State, tuple[Action, ...]]


def _table(*rows: Row) -> Table:
    table: dict[tuple[State, Event], tuple[State, tuple[Action, ...]]] = {}
    for state, events, after, actions in rows:
        for event in events:
            assert (state, event) not in table, (state, event)
            table[state, event] = (after, actions)
    return table


_GONE = (Local.LOST, Local.SILENT, Local.OVERTIME)
# What may still be on its way from a successor that settled by itself, when the token was the first to tell, or that
# wanted to give the service back when the probation was over.
_SETTLED_BY_ITSELF = (Type.HEARTBEAT, Type.TAKEN, Type.READY, Type.ALIVE, Type.ABORT, Type.SETTLED)

INCUMBENT = _table(
    (State.GREETING, (Type.JOIN,), State.OFFERING, (Do.OFFER,)),
    (State.GREETING, (Local.DENIED,), State.CLOSED, (Type.REFUSE, Do.CLOSE)),
    (State.GREETING, (Type.STATUS,), State.CLOSED, (Type.REPORT, Do.CLOSE)),
    (State.GREETING, (Type.STOP,), State.STOPPING, (Type.STOPPING, Do.STOP)),
    (State.GREETING, (Local.LOST, Local.OVERTIME, Local.LEAVING), State.CLOSED, (Do.CLOSE,)),
    (State.OFFERING, (Type.TAKEN,), State.OFFERING, (Do.OFFER,)),
    (State.OFFERING, (Local.OFFERED,), State.WARMING, ()),
    (State.OFFERING, (Type.HEARTBEAT,), State.OFFERING, ()),
    (State.OFFERING, (*_GONE, Local.FAIL, Type.ABORT), State.TAKING_BACK, (Do.TAKE_BACK,)),
    (State.OFFERING, (Local.LEAVING,), State.CLOSED, (Do.STOP_ACCEPTING, Do.RELEASE, Do.CLOSE)),
    (State.WARMING, (Type.HEARTBEAT,), State.WARMING, ()),
    (State.WARMING, (Type.READY,), State.COMMITTED, (Do.STOP_ACCEPTING, Type.COMMIT)),
    (State.WARMING, (*_GONE, Type.ABORT), State.TAKING_BACK, (Do.TAKE_BACK,)),
    (State.WARMING, (Local.LEAVING,), State.CLOSED, (Do.STOP_ACCEPTING, Do.RELEASE, Do.CLOSE)),
    (State.COMMITTED, (Type.HEARTBEAT,), State.COMMITTED, ()),
    (State.COMMITTED, (Type.ALIVE,), State.PROBATION, ()),
    (State.COMMITTED, (*_GONE, Type.ABORT), State.TAKING_BACK, (Do.TAKE_BACK,)),
    (State.COMMITTED, (Local.LEAVING,), State.CLOSED, (Do.RELEASE, Do.CLOSE)),
    (State.PROBATION, (Type.HEARTBEAT,), State.PROBATION, ()),
    (State.PROBATION, (Local.PROBATION_OVER, Type.SETTLED), State.DRAINING, (Do.RELEASE, Type.DONE)),
    (State.PROBATION, (Local.LOST, Local.SILENT, Type.ABORT), State.TAKING_BACK, (Do.TAKE_BACK,)),
    (State.PROBATION, (Local.LEAVING,), State.DRAINING, (Do.RELEASE, Type.DONE)),
    (State.TAKING_BACK, (Local.GOT_COMMIT,), State.CLOSED, (Do.START_ACCEPTING, Type.ABORT, Do.CLOSE)),
    (State.TAKING_BACK, (Local.GOT_SETTLE,), State.CLOSED, (Do.START_ACCEPTING, Type.UNDO, Do.CLOSE)),
    (State.TAKING_BACK, (Local.GOT_NOTHING,), State.DRAINING, (Do.RELEASE, Type.DONE)),
    (State.DRAINING, _SETTLED_BY_ITSELF, State.DRAINING, ()),
    (State.DRAINING, (Type.TAKE,), State.DRAINING, (Do.MOVE,)),
    (State.DRAINING, (Local.LOST, Local.LEAVING), State.CLOSED, (Do.CLOSE,)),
    (State.STOPPING, (Local.LOST,), State.CLOSED, (Do.CLOSE,)),
)

SUCCESSOR = _table(
    (State.GREETING, (Type.HELLO,), State.JOINING, (Type.JOIN,)),
    (State.GREETING, (Local.LOST, Local.OVERTIME, Local.FAIL, Type.REFUSE), State.FAILED, (Do.CLOSE,)),
    (State.JOINING, (Type.LISTENERS,), State.JOINING, (Do.KEEP, Type.TAKEN)),
    (State.JOINING, (Local.COMPLETE,), State.WARMING, ()),
    (State.JOINING, (Type.HEARTBEAT,), State.JOINING, ()),
    (State.JOINING, (*_GONE, Type.REFUSE, Type.ABORT), State.FAILED, (Do.CLOSE,)),
    (State.JOINING, (Local.FAIL,), State.FAILED, (Type.ABORT, Do.CLOSE)),
    (State.WARMING, (Type.HEARTBEAT,), State.WARMING, ()),
    (State.WARMING, (Local.WARM,), State.READY, (Type.READY,)),
    (State.WARMING, (Local.LOST,), State.ORPHANED, ()),
    (State.WARMING, (Type.ABORT,), State.FAILED, (Do.CLOSE,)),
    (State.WARMING, (Local.FAIL,), State.FAILED, (Type.ABORT, Do.CLOSE)),
    (State.ORPHANED, (Local.WARM,), State.CLAIMING, (Do.TAKE_COMMIT,)),
    (State.ORPHANED, (Local.FAIL,), State.FAILED, (Do.CLOSE,)),
    (State.READY, (Type.HEARTBEAT,), State.READY, ()),
    (State.READY, (Type.COMMIT, Local.LOST, Local.SILENT), State.CLAIMING, (Do.TAKE_COMMIT,)),
    (State.READY, (Type.ABORT,), State.FAILED, (Do.CLOSE,)),
    (State.READY, (Local.FAIL,), State.FAILED, (Type.ABORT, Do.CLOSE)),
    (State.CLAIMING, (Local.GOT_COMMIT,), State.STARTING, (Do.START_ACCEPTING,)),
    (State.CLAIMING, (Local.GOT_NOTHING,), State.FAILED, (Do.CLOSE,)),
    (State.STARTING, (Type.COMMIT, Type.HEARTBEAT), State.STARTING, ()),
    (State.STARTING, (Local.ACCEPTING,), State.PROBATION, (Type.ALIVE,)),
    (State.STARTING, (Local.FAIL,), State.FAILED, (Do.STOP_ACCEPTING, Type.ABORT, Do.CLOSE)),
    (State.STARTING, (Type.UNDO,), State.UNDONE, (Do.STOP_ACCEPTING, Do.CLOSE)),
    (State.PROBATION, (Type.COMMIT, Type.HEARTBEAT), State.PROBATION, ()),
    (State.PROBATION, (Type.DONE,), State.OWNER, (Do.ELDERS, Do.OPEN_CHANNEL)),
    (State.PROBATION, (Type.UNDO,), State.UNDONE, (Do.STOP_ACCEPTING, Do.CLOSE)),
    (State.PROBATION, (Local.LOST, Local.SILENT, Local.LEAVING), State.SETTLING, (Do.TAKE_SETTLE,)),
    (State.PROBATION, (Local.FAIL,), State.RETURNING, (Type.ABORT,)),
    (State.RETURNING, (Type.COMMIT, Type.HEARTBEAT), State.RETURNING, ()),
    (State.RETURNING, (Type.DONE,), State.OWNER, (Do.ELDERS, Do.OPEN_CHANNEL)),
    (State.RETURNING, (Type.UNDO,), State.UNDONE, (Do.STOP_ACCEPTING, Do.CLOSE)),
    (State.RETURNING, (Local.LOST, Local.SILENT, Local.LEAVING), State.SETTLING, (Do.TAKE_SETTLE,)),
    (State.SETTLING, (Local.GOT_SETTLE,), State.OWNER, (Type.SETTLED,)),
    (State.SETTLING, (Local.GOT_NOTHING,), State.UNDONE, (Do.STOP_ACCEPTING, Do.CLOSE)),
    (State.OWNER, (Type.HEARTBEAT, Type.COMMIT), State.OWNER, ()),
    (State.OWNER, (Type.DONE,), State.OWNER, (Do.ELDERS, Do.OPEN_CHANNEL)),
    (State.OWNER, (Type.DRAINING,), State.OWNER, (Do.COUNT,)),
    (State.OWNER, (Type.BLOB,), State.OWNER, (Do.BEQUEATH,)),
    (State.OWNER, (Local.LOST,), State.OWNER, (Do.CLOSE,)),
)

GIVER = _table(
    (State.GIVING, (Local.BATCH,), State.GIVING, (Type.CONNECTIONS,)),
    (State.GIVING, (Type.ADOPTED,), State.GIVING, (Do.RELINQUISH, Type.RELEASED)),
    (State.GIVING, (Type.DROPPED,), State.GIVING, (Do.SERVE_ON,)),
    (State.GIVING, (Local.EMPTY,), State.CLOSED, (Type.FINISHED, Do.CLOSE)),
    (State.GIVING, (Local.LOST, Local.SILENT, Local.LEAVING, Local.BEATEN), State.RECLAIMING, (Do.RECLAIM,)),
    (State.RECLAIMING, (Local.GOT_CHANNEL,), State.CLOSED, (Do.CLOSE, Do.PUT_BACK)),
    (State.RECLAIMING, (Local.GOT_NOTHING,), State.OUTRUN, ()),
    (State.OUTRUN, (Type.ADOPTED,), State.OUTRUN, (Do.RELINQUISH,)),
    (State.OUTRUN, (Type.DROPPED,), State.OUTRUN, (Do.SERVE_ON,)),
    (State.OUTRUN, (Local.EMPTY,), State.CLOSED, (Do.FORGO, Type.FINISHED, Do.CLOSE)),
    (State.OUTRUN, (Local.LOST,), State.CLOSED, (Do.FORGO, Do.PUT_BACK, Do.CLOSE)),
    (State.OUTRUN, (Local.FAIL, Local.LEAVING), State.CLOSED, (Do.RELINQUISH_ALL, Do.CLOSE)),
)

TAKER = _table(
    (State.TAKING, (Type.CONNECTIONS,), State.TAKING, (Do.ADOPT, Type.ADOPTED)),
    (State.TAKING, (Type.RELEASED,), State.TAKING, (Do.START,)),
    (State.TAKING, (Local.PARTLY,), State.TAKING, (Do.START, Type.DROPPED)),
    (State.TAKING, (Type.FINISHED,), State.CLOSED, (Do.CLOSE,)),
    (State.TAKING, (Local.LOST, Local.SILENT), State.RESOLVING, (Do.CLAIM,)),
    (State.RESOLVING, (Local.GOT_CHANNEL,), State.CLAIMED, (Do.START_ALL,)),
    (State.RESOLVING, (Local.GOT_NOTHING,), State.OUTRUN, ()),
    (State.CLAIMED, (Type.CONNECTIONS,), State.CLAIMED, (Do.ADOPT, Type.ADOPTED, Do.START_ALL)),
    (State.CLAIMED, (Type.RELEASED, Local.PARTLY), State.CLAIMED, ()),
    (State.CLAIMED, (Local.LOST, Type.FINISHED), State.CLOSED, (Do.CLOSE,)),
    (State.OUTRUN, (Type.RELEASED, Local.PARTLY), State.OUTRUN, (Do.START,)),
    (State.OUTRUN, (Type.CONNECTIONS,), State.OUTRUN, (Do.ADOPT,)),
    (State.OUTRUN, (Local.LOST,), State.CLOSED, (Do.DROP_ALL, Do.CLOSE)),
)

FINAL = frozenset({State.CLOSED, State.FAILED, State.UNDONE})


def silence_limit(state: State, limits: Limits) -> float | None:
    """Seconds without a word after which the peer counts as SILENT in this state, or None where it may be silent."""
    if state in (State.COMMITTED, State.PROBATION, State.RETURNING, State.READY, State.GIVING, State.TAKING):
        return limits.silence
    if state in (State.OFFERING, State.WARMING, State.JOINING):
        return limits.warming_silence
    return None


def budget(state: State, limits: Limits) -> float | None:
    """Seconds that the whole phase may last, however talkative the peer, or None without a limit."""
    return {
        State.GREETING: limits.greeting,
        State.OFFERING: limits.offering,
        State.JOINING: limits.offering,
        State.WARMING: limits.warming,
        State.COMMITTED: limits.starting,
    }.get(state)


class Machine:
    """One side of one exchange: the state it is in, and nothing else."""

    def __init__(self, table: Table, state: State = State.GREETING) -> None:
        self.table = table
        self.state = state

    def accepts(self, event: Event) -> bool:
        """Whether the present state has a row for the event."""
        return (self.state, event) in self.table

    def step(self, event: Event) -> tuple[Action, ...]:
        """Goes to the next state and returns what is to be done, in order.

        Raises RemoteProtocolError for a message that is out of turn, LocalProtocolError for an event of this side.
        """
        row = self.table.get((self.state, event))
        if row is None:
            error = RemoteProtocolError if isinstance(event, Type) else LocalProtocolError
            raise error(f"{event.name} is out of turn in the state {self.state.value!r}")
        self.state, actions = row
        return actions
