"""What ready() returns: where the listeners have come from."""

from __future__ import annotations

from typing import NamedTuple


class Report(NamedTuple):
    """What became of the listeners: `adopted` from the incumbent, `bound` anew, `unused` by this version; by name.

    `incumbent` is the pid that was taken over from (0 at a cold start), `milliseconds` run from READY to the commit.
    `elsewhere`: the incumbent is in another pid namespace, and its pid what it says of itself. `from_keeper`: a cold
    start found a keeper, and adopted from that; what is unused there is closed.
    """

    generation: int
    incumbent: int
    adopted: tuple[str, ...]
    bound: tuple[str, ...]
    unused: tuple[str, ...]
    milliseconds: float
    from_keeper: bool = False
    elsewhere: bool = False
