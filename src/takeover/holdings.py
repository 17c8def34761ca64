"""The listeners that one process has asked for: which it adopted, which it bound, and under what names."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from . import listeners
from .control import Identity, identity
from .errors import AddressError
from .listeners import Held

if TYPE_CHECKING:
    from .activation import Given
    from .successor import Inherited


class WatchedSocket(socket.socket):
    """A socket that tells when it is closed."""

    on_close: Callable[[], object] | None = None

    def _real_close(self, *arguments: Any) -> None:
        """What close() comes to when no file object of the socket is left."""
        super()._real_close(*arguments)  # type: ignore[misc]
        if self.on_close is not None:
            self.on_close()


class Holdings:
    """`adopted` are the listeners that came from whoever held them before, `bound` those that were bound anew.

    The sockets are the server's too, who may close them: `on_close` is called then, in its thread.
    """

    def __init__(self, on_close: Callable[[], object] | None = None) -> None:
        self.adopted: list[Held] = []
        self.bound: list[Held] = []
        self._backlogs: dict[str, int] = {}
        self._asked: set[Any] = set()
        self._on_close = on_close

    def __iter__(self) -> Iterator[Held]:
        yield from self.adopted
        yield from self.bound

    def claim(
        self, url: str, name: str | None, backlog: int, unclaimed: list[Inherited], given: list[Given]
    ) -> list[socket.socket]:
        """All sockets of an address, as Service.listen_all() says; what is adopted leaves the list where it was."""
        socks = []
        for address in listeners.resolve(url):
            key = (address.family, address.type, address.address)
            if key in self._asked and not address.any_port:
                raise AddressError(f"{url}: this address was asked for already")
            self._asked.add(key)
            inherited = [kept for kept in unclaimed if address.is_that_of(kept.descriptor, kept.url)]
            activated = [kept for kept in given if address.is_that_of(kept.descriptor, kept.url)]
            adopted: list[Inherited | Given] = [*inherited, *activated]
            unclaimed[:] = [kept for kept in unclaimed if kept not in inherited]
            given[:] = [kept for kept in given if kept not in activated]
            for kept in adopted:
                sock = self._watched(socket.socket(fileno=kept.descriptor))
                sock.setblocking(False)
                socks.append(self._hold(self.adopted, sock, name, url, kept.identity, backlog))
            for _ in range(max(1, address.members) - len(adopted)):
                sock = self._watched(listeners.bind(address))
                own = identity(address.address) if sock.family == socket.AF_UNIX else None
                socks.append(self._hold(self.bound, sock, name, url, own, backlog))
        return socks

    def listen(self, *, all_of_them: bool) -> None:
        """Makes the stream sockets listen that were bound anew, and the queues of all as long as they asked for."""
        for held in self if all_of_them else self.bound:
            listeners.listen(held.sock, held.url, self._backlogs[held.name])

    def close(self) -> None:
        """Closes every socket."""
        for held in self:
            held.sock.close()

    def _watched(self, sock: socket.socket) -> socket.socket:
        if self._on_close is None:
            return sock
        watched = WatchedSocket(fileno=sock.detach())
        watched.on_close = self._on_close
        return watched

    def _hold(
        self,
        where: list[Held],
        sock: socket.socket,
        name: str | None,
        url: str,
        own: Identity | None,
        backlog: int,
    ) -> socket.socket:
        taken = {held.name for held in self}
        wanted = name or url
        unique, count = wanted, 1
        while unique in taken:
            count += 1
            unique = f"{wanted}#{count}"
        path = sock.getsockname() if sock.family == socket.AF_UNIX else ""
        where.append(Held(unique, url, sock, path, own if path else None))
        self._backlogs[unique] = backlog
        return sock
