# cython: language_level=3
"""The C-level interface of the loop: what a compiled module cimports to serve connections without the GIL.

A handler is a `Handler` whose `callbacks` are set; each may be NULL but `received`:

    opened(core, connection)                  a connection was accepted; `connection.state` is NULL, the handler's own
    received(core, connection, data, size)    bytes, valid for the time of the call
    ended(core, connection) -> bint           the peer's FIN; true keeps our half open (NULL, false: flush and close)
    filled(core, connection)                  the backlog rose above `high` bytes (NULL: reading pauses until `low`)
    drained(core, connection)                 it fell to `low` bytes again
    closed(core, connection, error)           the last call; error is an errno, 0 for an orderly end; frees `state`

A connection moves to another process if its `state` is NULL, or with the first two of these:

    exported(core, connection, room, size) -> ssize_t
        writes the state, if it fits, and returns its size: it is asked again with more room; -1 for "not now", less
        than that if it cannot be told
    imported(core, connection, state, size) -> bint
        in the other process, in place of `opened`: sets `connection.state`, and neither reads nor writes yet; false,
        having freed what it made, if it cannot read it
    moved(core, connection)
        the last call, in place of `closed`: another process serves the connection; frees `state`

`version` is that of the state that `exported` writes, and `oldest` the oldest one that `imported` reads.
They are called on the loop's thread, without the GIL, and must neither block nor keep it for long. The functions below
are for callbacks on the same thread. What a write finds wrong ends the connection after the callback has returned.
"""

from takeover._connections cimport Callbacks, Connection, Core
from takeover._native cimport (
    Handler, connection_abort, connection_close, connection_pause_reading, connection_resume_reading, connection_write,
    connection_write_eof,
)
