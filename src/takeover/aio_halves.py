"""Which halves of a connection are over: the kernel tells, transports do not."""

from __future__ import annotations

import socket

OURS_ENDED = frozenset({4, 5, 6, 9, 11})
"""FIN_WAIT1, FIN_WAIT2, TIME_WAIT, LAST_ACK and CLOSING of tcp_states.h."""

THEIRS_ENDED = frozenset({6, 8, 9, 11})
"""TIME_WAIT, CLOSE_WAIT, LAST_ACK and CLOSING."""

FLAGS = socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT


def end_is_sent(sock: socket.SocketType, family: int) -> bool:
    """Whether we have sent our end of file."""
    try:
        if family != socket.AF_UNIX:
            return _state(sock) in OURS_ENDED
        sock.send(b"", FLAGS)
    except OSError as error:
        return isinstance(error, BrokenPipeError)
    return False


def end_is_next(sock: socket.SocketType, family: int) -> bool:
    """Whether the peer's end of file has come, and everything before it has been read."""
    try:
        if family != socket.AF_UNIX and _state(sock) not in THEIRS_ENDED:
            return False
        return not sock.recv(1, socket.MSG_PEEK | FLAGS)
    except OSError:  # nothing has come, or the peer has reset the connection
        return False


def _state(sock: socket.SocketType) -> int:
    return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0]
