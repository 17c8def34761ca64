"""Which socket is at the other end of a connection on this machine: its inode, asked of the kernel by sock_diag(7).

Requests and answers are those of include/uapi/linux/{sock_diag,inet_diag,unix_diag}.h. Where the kernel has none of it
(or a sandbox forbids it), /proc/net/tcp and tcp6 tell the same more slowly; for UNIX sockets nothing else does.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct

NETLINK_SOCK_DIAG = 4
SOCK_DIAG_BY_FAMILY = 20
NLM_F_REQUEST = 1
NLM_F_DUMP = 0x300
NLMSG_ERROR = 2
NLMSG_DONE = 3
UDIAG_SHOW_NAME = 1
UDIAG_SHOW_PEER = 4
UNIX_DIAG_NAME = 0
UNIX_DIAG_PEER = 2
TCP_LISTEN = 10
_ANY_STATE = 0xFFFFFFFF
_ANY_COOKIE = (0xFFFFFFFF, 0xFFFFFFFF)

IN_QUEUE = 0
"""The inode of a connection that nobody has accepted yet."""


class Unknown(Exception):
    """The kernel does not tell, or not any more: the other end may have closed."""


def server_end(sock: socket.socket) -> int:
    """The inode of the socket at the other end of a connected one, or IN_QUEUE. Raises Unknown."""
    try:
        if sock.family == socket.AF_UNIX:
            return _unix_peer(os.fstat(sock.fileno()).st_ino)
        local, peer = sock.getsockname(), sock.getpeername()
    except OSError as error:
        raise Unknown(str(error)) from None
    try:
        return _tcp_inode(sock.family, peer, local)
    except OSError as error:
        if error.errno == errno.ENOENT:
            raise Unknown("the connection has ended") from None
        return _tcp_inode_from_proc(sock.family, peer, local)


def _ask(request: bytes) -> bytes:
    """The body of the answer; raises OSError with what the kernel says."""
    message = struct.pack("=IHHII", 16 + len(request), SOCK_DIAG_BY_FAMILY, NLM_F_REQUEST, 1, 0) + request
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_SOCK_DIAG) as sock:
        sock.setblocking(False)  # the kernel has answered before send() returns
        sock.send(message)
        answer = sock.recv(8192)
    if struct.unpack_from("=H", answer, 4)[0] == NLMSG_ERROR:
        number = -struct.unpack_from("=i", answer, 16)[0]
        raise OSError(number, os.strerror(number))
    return answer[16:]


def _tcp_inode(family: int, source: tuple[str, int], destination: tuple[str, int]) -> int:
    addresses = (socket.inet_pton(family, end[0].partition("%")[0]).ljust(16, b"\0") for end in (source, destination))
    identity = struct.pack("!HH", source[1], destination[1]) + b"".join(addresses)
    identity += struct.pack("=III", 0, *_ANY_COOKIE)
    answer = _ask(struct.pack("=BBBBI", family, socket.IPPROTO_TCP, 0, 0, _ANY_STATE) + identity)
    return int(struct.unpack_from("=I", answer, 68)[0])


def _tcp_inode_from_proc(family: int, source: tuple[str, int], destination: tuple[str, int]) -> int:
    wanted = [_as_in_proc(family, *end[:2]) for end in (source, destination)]
    try:
        with open("/proc/net/tcp6" if family == socket.AF_INET6 else "/proc/net/tcp") as file:
            for line in file:
                fields = line.split()
                if fields[1:3] == wanted:
                    return int(fields[9])
    except OSError as error:
        raise Unknown(f"/proc/net/tcp: {error.strerror}") from None
    raise Unknown("the connection has ended")


def _as_in_proc(family: int, host: str, port: int) -> str:
    packed = socket.inet_pton(family, host.partition("%")[0])
    words = struct.unpack(f"={len(packed) // 4}I", packed)
    return "".join(f"{word:08X}" for word in words) + f":{port:04X}"


def _unix_peer(inode: int) -> int:
    request = struct.pack("=BBHIIIII", socket.AF_UNIX, 0, 0, _ANY_STATE, inode, UDIAG_SHOW_PEER, *_ANY_COOKIE)
    try:
        answer = _ask(request)
    except OSError as error:
        raise Unknown(f"sock_diag: {error.strerror}") from None
    peer = _attributes(answer, 16).get(UNIX_DIAG_PEER)
    if peer is not None:
        return int(struct.unpack("=I", peer)[0])
    raise Unknown("the connection has ended")


def _attributes(answer: bytes, position: int) -> dict[int, bytes]:
    """The attributes behind the fixed part of an answer: length and type of 16 bits each, padded to four bytes."""
    found: dict[int, bytes] = {}
    while position + 4 <= len(answer):
        length, kind = struct.unpack_from("=HH", answer, position)
        found[kind] = answer[position + 4 : position + length]
        position += max(4, (length + 3) & ~3)
    return found


def all_listeners() -> list[tuple[str, int]]:
    """The URL and the inode of every stream listener in this network namespace; none if the kernel does not tell.

    Only listeners are asked for: /proc/net/tcp would take seconds on a machine with many connections.
    """
    found: list[tuple[str, int]] = []
    for family in (socket.AF_INET, socket.AF_INET6):
        request = struct.pack("=BBBBI", family, socket.IPPROTO_TCP, 0, 0, 1 << TCP_LISTEN) + bytes(48)
        for answer in _dump(request):
            port = struct.unpack_from("!H", answer, 4)[0]
            host = socket.inet_ntop(family, answer[8 : 8 + (16 if family == socket.AF_INET6 else 4)])
            inode = struct.unpack_from("=I", answer, 68)[0]
            found.append((f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}", inode))
    request = struct.pack("=BBHIIIII", socket.AF_UNIX, 0, 0, 1 << TCP_LISTEN, 0, UDIAG_SHOW_NAME, *_ANY_COOKIE)
    for answer in _dump(request):
        name = _attributes(answer, 16).get(UNIX_DIAG_NAME, b"")
        shown = os.fsdecode(name[:1].replace(b"\0", b"@") + name[1:].rstrip(b"\0"))
        found.append((f"unix:{shown}", struct.unpack_from("=I", answer, 4)[0]))
    return found


def _dump(request: bytes) -> list[bytes]:
    """The bodies of all answers; none where the kernel refuses."""
    message = struct.pack("=IHHII", 16 + len(request), SOCK_DIAG_BY_FAMILY, NLM_F_REQUEST | NLM_F_DUMP, 1, 0) + request
    found: list[bytes] = []
    with (
        contextlib.suppress(OSError),
        socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_SOCK_DIAG) as sock,
    ):
        sock.setblocking(False)
        sock.send(message)
        while True:
            data = sock.recv(65536)
            while len(data) >= 16:
                length, kind = struct.unpack_from("=IH", data)
                if kind in (NLMSG_DONE, NLMSG_ERROR):
                    return found
                found.append(data[16:length])
                data = data[(length + 3) & ~3 :]
    return found
