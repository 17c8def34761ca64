# cython: language_level=3
"""Why a connection does not move; WORDS in records.py has the word for each."""

cdef enum Reason:
    FINE, BUSY, UNMOVABLE, CLOSED, BROKEN, NO_MEMORY, NO_LISTENER, OTHER_HANDLER, OTHER_VERSION, NO_SOCKET, UNREAD

cdef enum:
    REASONS = 11
