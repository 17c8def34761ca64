"""What the connections of a command are at, seen from outside: asked and not answered yet, or between two requests.

The kernel knows of each TCP connection how much arrived and left, what nobody has read yet, and when the last data went
which way: sock_diag(7) tells it to anybody, TCP_INFO of tcp(7). Which of them a process has, /proc/PID/fd tells. Of
connections at UNIX sockets only the unread bytes are known, and they are left out.

Requests and answers are those of include/uapi/linux/{netlink,sock_diag,inet_diag,tcp}.h.
"""

from __future__ import annotations

import ctypes
import fcntl
import socket
import struct
import termios
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, TypedDict

from takeover.listeners import SO_ATTACH_FILTER

from . import proc

NETLINK_SOCK_DIAG = 4
SOCK_DIAG_BY_FAMILY = 20
NLM_F_REQUEST_DUMP = 0x301
NLMSG_ERROR = 2
NLMSG_DONE = 3
INET_DIAG_INFO = 2
TCP_ESTABLISHED = 1
TCP_CLOSE_WAIT = 8
SO_DETACH_FILTER = 27
"""include/uapi/asm-generic/socket.h"""

_DROP = (0x06, 0, 0, 0)
"""struct sock_filter, include/uapi/linux/filter.h: return 0, of each segment keep nothing."""

_STATES = 1 << TCP_ESTABLISHED | 1 << TCP_CLOSE_WAIT
_HEADER = struct.Struct("=IHHII")
_REQUEST = struct.Struct("=BBBBI")
_IDENTITY = struct.Struct("!HH32s")
_SHORTEST_INFO = 160
"""Bytes of struct tcp_info up to tcpi_data_segs_out, Linux 4.6."""


class Conversation(NamedTuple):
    """One TCP connection of a process, of which `descriptor` is its number there.

    unread, unsent: bytes that the process has not read, that the client has not acknowledged. received, sent: segments
    with data so far. The rest are milliseconds since data came, data went, and anything came, an acknowledgement for
    one, in steps of the kernel's clock (10 ms or less). client_is_done: its end of file has come; some servers take a
    while until they close then.
    """

    pid: int
    descriptor: int
    inode: int
    unread: int
    unsent: int
    received: int
    sent: int
    since_received: int
    since_sent: int
    since_heard: int
    client_is_done: bool

    @property
    def awaits_its_first_answer(self) -> bool:
        """Whether the client has got nothing yet, whether it has asked already or is about to."""
        if self.client_is_done and not self.received:
            return False
        return self.sent == 0 or self.unread > 0

    @property
    def may_be_idle(self) -> bool:
        """Whether something was answered, and nothing that the client sent is unread."""
        return not self.unread and self.sent > 0

    @property
    def is_idle(self) -> bool:
        """Whether the last data was an answer, for sure.

        Where request and answer fall into one step of the clock, the acknowledgement of the answer tells: it is still
        missing, or came later than the last data. A next request would have brought it.
        """
        return self.may_be_idle and (self.unsent > 0 or min(self.since_sent, self.since_heard) < self.since_received)


Holders = dict[int, tuple[int, int]]
"""The process that has a socket, and its descriptor there, by the socket's inode."""


def holders(pids: Iterable[int]) -> Holders:
    """Who has which socket. Raises Hidden where /proc does not tell."""
    found: Holders = {}
    for pid in pids:
        for descriptor, link in proc.descriptors(pid).items():
            inode = proc.inode_of(link)
            if inode is not None:
                found.setdefault(inode, (pid, descriptor))
    return found


def of(holders: Holders, listeners: Sequence[socket.socket]) -> list[Conversation]:
    """The connections from these TCP listeners that somebody among the holders has, as they are at this moment.

    Raises OSError where the kernel does not tell.
    """
    found = []
    addresses = {(sock.family, sock.getsockname()[1]) for sock in listeners if sock.family in _INTERNET}
    for family, port in addresses:
        for state, unread, unsent, inode, info in _dump(family, port):
            if inode in holders and len(info) >= _SHORTEST_INFO:
                done = state == TCP_CLOSE_WAIT
                pid, descriptor = holders[inode]
                found.append(Conversation(pid, descriptor, inode, unread, unsent, client_is_done=done, **_told(info)))
    return found


def end(sock: socket.socket, seen: Conversation, is_due: Callable[[Conversation], bool]) -> bool:
    """Shuts a connection down, of which this is a copy, if it is due as it is now; `seen` is how it was before.

    Meanwhile a filter of our own on the socket (socket(7), SO_ATTACH_FILTER) drops what comes, so that no request can
    slip in between the look and the shutdown; its sender sends it again. Raises OSError.
    """
    instruction = ctypes.create_string_buffer(struct.pack("HBBI", *_DROP))
    sock.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, struct.pack("HP", 1, ctypes.addressof(instruction)))
    try:
        unread, unsent = (_count(sock, request) for request in (termios.FIONREAD, termios.TIOCOUTQ))
        info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _SHORTEST_INFO)
        if not is_due(seen._replace(unread=unread, unsent=unsent, **_told(info))):
            return False
        sock.shutdown(socket.SHUT_RDWR)
        return True
    finally:
        sock.setsockopt(socket.SOL_SOCKET, SO_DETACH_FILTER, 0)


def _count(sock: socket.socket, request: int) -> int:
    """Bytes in a queue of a socket: SIOCINQ and SIOCOUTQ of tcp(7), by the numbers that they share."""
    return int(struct.unpack("=i", fcntl.ioctl(sock.fileno(), request, bytes(4)))[0])


class _Told(TypedDict):
    """The fields of a Conversation that are in struct tcp_info."""

    received: int
    sent: int
    since_received: int
    since_sent: int
    since_heard: int


def _told(info: bytes) -> _Told:
    since_sent, _, since_received, since_heard = struct.unpack_from("=IIII", info, 44)
    received, sent = struct.unpack_from("=II", info, 152)
    return _Told(
        received=received, sent=sent, since_received=since_received, since_sent=since_sent, since_heard=since_heard
    )


_INTERNET = (socket.AF_INET, socket.AF_INET6)


def _dump(family: int, port: int) -> Iterator[tuple[int, int, int, int, bytes]]:
    """State, unread and unacknowledged bytes, inode and TCP_INFO of each connection with this local port."""
    request = _REQUEST.pack(family, socket.IPPROTO_TCP, 1 << (INET_DIAG_INFO - 1), 0, _STATES)
    request += _IDENTITY.pack(port, 0, bytes(32)) + struct.pack("=III", 0, 0, 0)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_SOCK_DIAG) as sock:
        sock.settimeout(1)
        sock.send(_HEADER.pack(_HEADER.size + len(request), SOCK_DIAG_BY_FAMILY, NLM_F_REQUEST_DUMP, 1, 0) + request)
        while True:
            answer = sock.recv(1 << 16)
            position = 0
            while position + _HEADER.size <= len(answer):
                length, kind, *_ = _HEADER.unpack_from(answer, position)
                if kind == NLMSG_DONE:
                    return
                if kind == NLMSG_ERROR:
                    raise OSError(-struct.unpack_from("=i", answer, position + 16)[0], "sock_diag")
                yield _one(answer[position + 16 : position + length])
                position += (length + 3) & ~3


def _one(message: bytes) -> tuple[int, int, int, int, bytes]:
    """From struct inet_diag_msg and the attributes behind it."""
    unread, unsent, _, inode = struct.unpack_from("=IIII", message, 56)
    position, info = 72, b""
    while position + 4 <= len(message):
        length, kind = struct.unpack_from("=HH", message, position)
        if kind == INET_DIAG_INFO:
            info = message[position + 4 : position + length]
        position += max(4, (length + 3) & ~3)
    return message[1], unread, unsent, inode, info
