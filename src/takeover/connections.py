"""What moves: the connections of one loop as both ends of a channel see them, whatever loop that is.

The native loop has these methods itself, compiled or plain; servers on other loops have an object that does
(aio_moving.Mover). All of it is called on the loop's thread. A batch is known by the array of its descriptors, none of
which can change hands while it is on its way.
"""

from __future__ import annotations

from array import array
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typing_extensions import Buffer


class Connections:
    """The giver calls the first six, the taker the first and the last three.

    The compiled loop is one in its stub only, as an extension type cannot inherit from a class of Python's.
    """

    @property
    def connections(self) -> int:
        """How many connections are open."""
        raise NotImplementedError

    def note_late_writes(self, ledger: int) -> None:
        """Note in this file (ledger.py) what is written to held connections from now on; -1 for nowhere."""
        raise NotImplementedError

    def export_connections(
        self, start: int, most: int, size: int, reasons: dict[str, int]
    ) -> tuple[bytes, array[int], int]:
        """Hold connections that can move: `(records, descriptors, where to go on)`, the last -1 when all were seen.

        At most `most` from place `start` on, until the records have `size` bytes. `reasons` counts by words
        (records.WORDS) who does not move. The descriptors stay the loop's.
        """
        raise NotImplementedError

    def relinquish_connections(
        self, descriptors: array[int], skip: Collection[int]
    ) -> tuple[list[int], dict[int, bytes]]:
        """Close held connections that another process has adopted; the indices in `skip` are served on here for good.

        Returns the indices that are to stay after all and are held still, and by index what handlers have written.
        Protocols learn of it by connection_moved(), in the loop's next turn.
        """
        raise NotImplementedError

    def put_back_connections(self, descriptors: array[int], stay: bool) -> None:
        """Serve held connections on, as if nothing had happened; with `stay` they are not exported again."""
        raise NotImplementedError

    def forgo_connections(self, descriptors: array[int]) -> None:
        """Close held connections that another process serves by now, whatever handlers have done to them since."""
        raise NotImplementedError

    def adopt_connections(self, records: Buffer, descriptors: array[int], generation: int) -> list[list[Any]]:
        """Take in connections that a process of that generation has exported, without reading or writing yet.

        The descriptors are the loop's when it returns; those that it has closed again are a list of [index, reason].
        Whatever it raises, RemoteProtocolError for garbled records or what a handler has raised to end the program, it
        has taken and closed none of them.
        """
        raise NotImplementedError

    def start_connections(self, descriptors: array[int], skip: Collection[int], tails: Mapping[int, bytes]) -> None:
        """Serve what was adopted, but for the indices in `skip`; `tails` are bytes by index to send behind all else.

        Each of them is served, or ended because there was no memory for it; what a handler has raised to end the
        program is raised after that.
        """
        raise NotImplementedError

    def drop_connections(self, descriptors: array[int], skip: Collection[int]) -> None:
        """Close what was adopted and not started, but for the indices in `skip`, without a word to protocols."""
        raise NotImplementedError
