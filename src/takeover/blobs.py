"""Named blobs: what a service hands over to the next process besides its sockets, and what it inherits so.

A blob is a sealed memfd: nobody can change it any more, and who gets its descriptor maps it without a copy. Those that
are there when a successor asks are offered among the listeners; later ones go as BLOB when the successor is settled.
"""

from __future__ import annotations

import time
from concurrent import futures
from typing import TYPE_CHECKING, Any

from .descriptors import expect
from .errors import LocalError, RemoteProtocolError
from .link import Link, close_all
from .records import seal, unseal
from .wire import Type

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from .controller import Controller

MOST_BLOBS = 1024
"""Names that one process may hand over in its life, and blobs of one older process that nobody has asked for yet."""


class Blobs:
    """The blobs of one process, for its control thread only; owns their descriptors until they are sent or taken.

    `arrival` is replaced whenever it is done: True means that a blob has come, False that no more can come.
    """

    def __init__(self) -> None:
        self.arrival: futures.Future[bool] = futures.Future()
        self._may_come = False
        self._inherited: dict[tuple[str, int], int] = {}
        self._kept: dict[str, int] = {}
        self._names: set[str] = set()
        self._offered: dict[str, int] = {}
        self._replaced: list[int] = []
        self._heir: Link | None = None
        self._is_over = False

    # What the incumbent's side calls.

    def hand_over(self, name: str, descriptor: int) -> list[int]:
        """Sends a blob to the successor, if that is settled, else keeps it for the next one; owns the descriptor.

        Returns descriptors that nobody needs any more, for the caller to close: to free a large one takes time. Raises
        LocalError where there are too many names, OSError where the kernel takes no more descriptors for sending.
        """
        if self._is_over:
            return [descriptor]
        if name not in self._names and len(self._names) >= MOST_BLOBS:
            close_all([descriptor])
            raise LocalError(f"hand_over({name!r}): {MOST_BLOBS:,} other names have been handed over, that is the most")
        self._names.add(name)
        if self._heir is not None:
            self._heir.send(Type.BLOB, {"name": name}, [descriptor], given=[descriptor])
            return []
        before = self._kept.get(name, -1)
        self._kept[name] = descriptor
        if before >= 0 and before == self._offered.get(name):
            # An offer that is still being made may yet send this number.
            self._replaced.append(before)
            return []
        return [before]

    def count(self) -> int:
        """How many would be offered now."""
        return len(self._kept)

    def offer(self) -> list[tuple[dict[str, Any], int]]:
        """The items for LISTENERS, with descriptors that stay open until decided() or pass_on() is called."""
        self._offered = dict(self._kept)
        item = {"role": "blob", "url": "", "device": 0, "inode": 0}
        return [({**item, "name": name}, descriptor) for name, descriptor in self._kept.items()]

    def decided(self) -> None:
        """The takeover for which offer() was called has come to its end, one way or the other."""
        self._offered.clear()
        close_all(self._replaced)
        self._replaced.clear()

    def pass_on(self, link: Link) -> None:
        """The successor is settled: sends it what it was not offered, and at once whatever is handed over from now on.

        Raises OSError where the kernel takes no more descriptors for sending.
        """
        self._heir = link
        while self._kept:
            name, descriptor = self._kept.popitem()
            if self._offered.get(name) == descriptor:
                close_all([descriptor])
            else:
                link.send(Type.BLOB, {"name": name}, [descriptor], given=[descriptor])

    def give_up(self) -> None:
        """The service is not ours any more, and nobody is left to hand anything over to."""
        self._is_over = True
        close_all([*self._kept.values(), *self._replaced])
        self._kept.clear()
        self._replaced.clear()

    # What the successor's side calls.

    def expect(self) -> None:
        """There is an older process from which blobs may come."""
        self._may_come = True

    def inherit(self, name: str, generation: int, descriptor: int) -> None:
        """Keeps a blob that has come from the process of a generation; owns the descriptor from its return on.

        Raises RemoteProtocolError for one that is not sealed, or for one too many.
        """
        check(descriptor)
        key = (name, generation)
        if key not in self._inherited and sum(each == generation for _, each in self._inherited) >= MOST_BLOBS:
            raise RemoteProtocolError(f"more than {MOST_BLOBS:,} blobs have come that nobody has asked for")
        close_all([self._inherited.pop(key, -1)])
        self._inherited[key] = descriptor
        self._tell(more=True)

    def take(self, name: str) -> tuple[memoryview | None, futures.Future[bool] | None]:
        """The blob of a name, given once, the one of the youngest process first; else what to wait for, if anything.

        Raises OSError where it cannot be mapped; it stays here then.
        """
        generation = max((each for found, each in self._inherited if found == name), default=None)
        if generation is None:
            return None, self.arrival if self._may_come else None
        view = unseal(self._inherited[name, generation])
        close_all([self._inherited.pop((name, generation))])
        return view, None

    def no_more(self) -> None:
        """Nobody is left from whom a blob could come."""
        self._may_come = False
        self._tell(more=False)

    def forget(self) -> None:
        """Closes what was inherited and not asked for."""
        close_all(list(self._inherited.values()))
        self._inherited.clear()

    def _tell(self, *, more: bool) -> None:
        arrival, self.arrival = self.arrival, futures.Future()
        arrival.set_result(more)

    def close(self) -> None:
        """Closes everything, and touches no lock: also for a forked child, in which another thread may have had it."""
        self.give_up()
        self.forget()
        self._may_come = False


def check(descriptor: int) -> None:
    """Raises RemoteProtocolError unless a received descriptor, which stays the caller's, is a sealed memfd to read."""
    expect(descriptor, kind="file")
    try:
        unseal(descriptor).release()
    except PermissionError:
        raise RemoteProtocolError(f"descriptor {descriptor} of the peer is a memfd that may not be read") from None


def hand_over(controller: Controller, name: str, data: Buffer) -> None:
    """Service.hand_over(), in whichever thread; the copying is done there too."""
    mine: list[int] = []
    try:
        mine.append(seal("takeover-blob", data))
        mine += controller.ask(lambda: controller.hand_over(name, mine.pop()))
    except OSError as error:
        raise LocalError(f"hand_over({name!r}): {error.strerror}; {memoryview(data).nbytes:,} bytes") from None
    finally:
        while mine:
            # Taken out one by one: who was interrupted while it asked has no answer, and must not close what went on.
            close_all([mine.pop()])


def inherited(controller: Controller, name: str, timeout: float) -> memoryview | None:
    """Service.inherited(), in whichever thread."""
    deadline = time.monotonic() + timeout
    while True:
        try:
            view, arrival = controller.ask(lambda: controller.blobs.take(name))
        except OSError as error:
            raise LocalError(f"inherited({name!r}): {error.strerror}") from None
        if arrival is None:
            return view
        if not futures.wait([arrival], max(0.0, deadline - time.monotonic())).done or not arrival.result():
            return None
