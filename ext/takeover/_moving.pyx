# cython: language_level=3, boundscheck=False, wraparound=False
"""The part of the loop that connections move through: what takeover.connections.Connections specifies."""

from takeover._giving cimport export_batch, forgo_batch, put_back_batch, relinquish_batch
from takeover._taking cimport adopt_batch, drop_batch, start_batch


cdef class Mover:
    """A loop as connections move out of it and into it; `_loop` makes the rest."""

    def note_late_writes(self, ledger):
        """Note in this file what is written to held connections from now on; -1 for nowhere."""
        self.core.ledger = ledger

    def export_connections(self, start, most, size, reasons):
        """Hold connections that can move: `(records, descriptors, where to go on)`, the last -1 when all were seen."""
        self.check_open()
        return export_batch(self.core, start, most, size, reasons)

    def relinquish_connections(self, descriptors, skip):
        """Close held connections that another process has adopted: `(who is to stay after all, what was written)`."""
        return relinquish_batch(self.core, self.schedule, descriptors, skip)

    def put_back_connections(self, descriptors, stay):
        """Serve held connections on, as if nothing had happened; with `stay` they are not exported again."""
        put_back_batch(self.core, descriptors, stay)

    def forgo_connections(self, descriptors):
        """Close held connections that another process serves by now, whatever handlers have done to them since."""
        forgo_batch(self.core, self.schedule, descriptors)

    def adopt_connections(self, records, descriptors, generation):
        """Take in connections that another process has exported, held: a list of [index, reason] of those closed."""
        cdef const unsigned char[::1] view = records
        self.check_open()
        return adopt_batch(self.core, self.schedule, <const char *>&view[0] if len(view) else NULL, len(view),
                           descriptors, generation)

    def start_connections(self, descriptors, skip, tails):
        """Serve what was adopted, but for the indices in `skip`; `tails` are bytes by index to send behind all else."""
        start_batch(self.core, descriptors, skip, tails)

    def drop_connections(self, descriptors, skip):
        """Close what was adopted and not started, but for the indices in `skip`, without a word to protocols."""
        drop_batch(self.core, descriptors, skip)

    cdef int check_open(self) except -1:
        if self.core.epoll < 0:
            raise RuntimeError("the loop is closed")
        return 0
