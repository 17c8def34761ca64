"""Listener addresses: tcp://HOST:PORT, unix:PATH and udp://HOST:PORT to sockets, and which inherited socket is which.

What an inherited socket is, only the kernel says (its family, type and bound address), never its name: so a successor
adopts what it asks for under whatever name the older version knew it. Port 0 means "any", and there the URL decides.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import socket
import stat
import struct
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

from .control import Identity, remove_own
from .descriptors import describe
from .errors import AddressError, ListenError

BACKLOG = 4096
"""Connections that may wait to be accepted; the kernel caps it at net.core.somaxconn, 4096 since Linux 5.4.

A short queue costs two seconds: the SYN that finds it full is dropped, and sent again after 1 s and 2 s more.
"""

_INTERNET = re.compile(r"(tcp|udp)://(\[[^\]/?#]+\]|[^:/?#\[\]]+):(\d{1,5})(?:\?(.*))?\Z")
_UNIX = re.compile(r"unix:(?://)?([^?]+)\Z")
_SYNTAX = "write tcp://HOST:PORT, tcp://[::]:PORT, unix:PATH or udp://HOST:PORT"


class Address(NamedTuple):
    """One address to listen on. `members` is the size of its SO_REUSEPORT group, 0 for none."""

    url: str
    family: int
    type: int
    address: Any
    v6only: bool = True
    members: int = 0

    @property
    def any_port(self) -> bool:
        return self.family != socket.AF_UNIX and self.address[1] == 0

    def is_that_of(self, descriptor: int, url: str) -> bool:
        """Whether an inherited socket, which was once asked for as `url`, is what this address asks for."""
        found = describe(descriptor)
        if (found.family, found.type) != (self.family, self.type):
            return False
        if self.family == socket.AF_INET6 and found.v6only is not self.v6only:
            return False
        if self.any_port:
            return url == self.url
        if self.family == socket.AF_UNIX:
            return isinstance(found.address, str) and os.path.abspath(found.address) == self.address
        return tuple(found.address)[:2] == self.address[:2] if isinstance(found.address, tuple) else False


def resolve(url: str) -> list[Address]:
    """The addresses that a URL stands for: one, or one for each family of a name. Raises AddressError."""
    unix = _UNIX.match(url)
    if unix is not None:
        path = os.path.abspath(unix[1])
        if len(os.fsencode(path)) > 107:
            raise AddressError(
                f"{url}: the path has {len(os.fsencode(path))} bytes, a UNIX socket's at most 107 (unix(7))"
            )
        return [Address(url, socket.AF_UNIX, socket.SOCK_STREAM, path)]
    parts = _INTERNET.match(url)
    if parts is None:
        raise AddressError(f"{url!r} is not an address to listen on: {_SYNTAX}")
    scheme, host, port, query = parts.groups()
    v6only, members = _options(url, query or "")
    if int(port) > 65535:
        raise AddressError(f"{url}: there is no port above 65535")
    kind = socket.SOCK_STREAM if scheme == "tcp" else socket.SOCK_DGRAM
    name = host.strip("[]")
    try:
        # For a str the codec of names is imported, which takes a descriptor, and time.
        ascii_or_name = name.encode() if name.isascii() else name
        found = socket.getaddrinfo(ascii_or_name, int(port), type=kind, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise AddressError(f"{url}: getaddrinfo {host}: {getattr(error, 'strerror', error)}; {_SYNTAX}") from None
    unique = {(family, address): None for family, _, _, _, address in found}
    return [Address(url, family, kind, address, v6only, members) for family, address in unique]


def _options(url: str, query: str) -> tuple[bool, int]:
    v6only, members = True, 0
    for option in query.split("&") if query else ():
        name, _, value = option.partition("=")
        if name == "v6only" and value in ("0", "1"):
            v6only = value == "1"
        elif name == "reuseport" and value.isascii() and value.isdigit() and 1 <= int(value) <= 1024:
            members = int(value)
        else:
            raise AddressError(f"{url}: option {option!r}: there are v6only=0, v6only=1 and reuseport=1 to 1024")
    return v6only, members


def bind(address: Address) -> socket.socket:
    """A socket of the caller's, bound to the address and non-blocking, not yet listening. Raises ListenError."""
    sock = socket.socket(address.family, address.type)
    try:
        sock.setblocking(False)
        if address.family == socket.AF_UNIX:
            _remove_stale(address)
        else:
            if address.type == socket.SOCK_STREAM:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if address.members:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            if address.family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(address.v6only))
        sock.bind(address.address)
        return sock
    except OSError as error:
        sock.close()
        raise _explain("bind", address.url, error) from None
    except BaseException:
        sock.close()
        raise


def listen(sock: socket.socket, url: str, backlog: int = BACKLOG) -> None:
    """Makes a stream socket listen, or a listener's queue as long as asked for. Raises ListenError."""
    if sock.type == socket.SOCK_STREAM:
        try:
            sock.listen(backlog)
        except OSError as error:
            raise _explain("listen", url, error) from None


def _explain(call: str, url: str, error: OSError) -> ListenError:
    reason = {
        errno.EADDRINUSE: "somebody else is listening there; see who: ss -ltnpx",
        errno.EADDRNOTAVAIL: "this host has no such address; see which it has: ip address",
        errno.EACCES: "not allowed; ports below 1024 need CAP_NET_BIND_SERVICE, a UNIX path a writable folder",
        errno.ENOENT: "no such folder; make it first",
        errno.EMFILE: "no descriptors left; raise ulimit -n",
    }.get(error.errno or 0, error.strerror)
    return ListenError(f"{call} {url}: {reason}")


def _remove_stale(address: Address) -> None:
    """Removes a socket file that nobody listens on; whatever else is in the way stays, and bind() reports it."""
    try:
        if not stat.S_ISSOCK(os.lstat(address.address).st_mode):
            raise ListenError(f"bind {address.url}: there is something in the way that is not a socket; remove it")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        if probe.connect_ex(address.address) == errno.ECONNREFUSED:
            with contextlib.suppress(OSError):
                os.unlink(address.address)


def url_of(sock: socket.socket) -> str:
    """The URL of a bound socket, for one that came without: its scheme and where the kernel says it is bound."""
    if sock.family == socket.AF_UNIX:
        return f"unix:{sock.getsockname()}"
    host, port = sock.getsockname()[:2]
    scheme = "udp" if sock.type == socket.SOCK_DGRAM else "tcp"
    return f"{scheme}://[{host}]:{port}" if sock.family == socket.AF_INET6 else f"{scheme}://{host}:{port}"


SO_ATTACH_FILTER = 26
"""include/uapi/asm-generic/socket.h"""

_NO_SYN: Sequence[tuple[int, int, int, int]] = (
    (0x30, 0, 0, 13),  # load the byte of the TCP header that has the flags
    (0x54, 0, 0, 0x12),  # keep SYN and ACK
    (0x15, 0, 1, 0x02),  # only SYN: a new connection
    (0x06, 0, 0, 0),  # drop it
    (0x06, 0, 0, 0xFFFFFFFF),  # let all else pass
)


def refuse_new(sock: socket.socket) -> bool:
    """Lets nobody new into a TCP listener's queue, while handshakes under way still end; True where the kernel can.

    A filter on the listener (socket(7), SO_ATTACH_FILTER) drops every SYN. So the queue can be emptied and the listener
    closed without resetting anybody who had got in. It works on every process that holds the listener.
    """
    if sock.family not in (socket.AF_INET, socket.AF_INET6) or not sys.platform.startswith("linux"):
        return False
    import ctypes  # only here: it takes longer to import than all else that a listener needs

    program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in _NO_SYN))
    filter_ = struct.pack("HP", len(_NO_SYN), ctypes.addressof(program))
    try:
        sock.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, filter_)
    except OSError:
        return False
    return True


class Held(NamedTuple):
    """A listener of the service; the socket is the server's too, who may have closed it."""

    name: str
    url: str
    sock: socket.socket
    path: str
    identity: Identity | None

    @property
    def is_open(self) -> bool:
        return self.sock.fileno() >= 0

    def remove_path(self) -> None:
        """Removes the file of a UNIX listener, if it is still its own."""
        remove_own(self.path, self.identity)
