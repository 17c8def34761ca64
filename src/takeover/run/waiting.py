"""Which processes of a command wait on a listener now, seen from outside: by the call in which a thread sleeps.

proc(5): /proc/PID/task/TID/syscall tells the call and its arguments; /proc/PID/fdinfo tells what an epoll set holds,
with the inode of each socket; what poll(2) and select(2) wait for is in the process's own memory. Nothing is stopped,
and all of it only read. A busy process is seen waiting at one look and not at the next, so it takes several looks.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from . import proc

_DIRECT = "takes connections or datagrams from a descriptor"
_EPOLL = "epoll"
_POLL = "poll"
_SELECT = "select"

CALLS = {
    "x86_64": {  # arch/x86/entry/syscalls/syscall_64.tbl
        **dict.fromkeys((0, 43, 45, 47, 288, 299), _DIRECT),  # read accept recvfrom recvmsg accept4 recvmmsg
        **dict.fromkeys((232, 281, 441), _EPOLL),  # epoll_wait epoll_pwait epoll_pwait2
        **dict.fromkeys((7, 271), _POLL),  # poll ppoll
        **dict.fromkeys((23, 270), _SELECT),  # select pselect6
    },
    "generic": {  # scripts/syscall.tbl: aarch64, riscv64, loongarch64
        **dict.fromkeys((63, 202, 207, 212, 242, 243), _DIRECT),
        **dict.fromkeys((22, 441), _EPOLL),
        73: _POLL,
        72: _SELECT,
    },
}
"""The calls in which a server waits, by their number."""

_MACHINE = os.uname().machine
_CALLS = CALLS.get("generic" if _MACHINE in ("aarch64", "riscv64", "loongarch64") else _MACHINE, {})

CALLS_ARE_KNOWN = bool(_CALLS)
"""Whether the calls of this machine are in CALLS."""

_IN = 0x1
"""EPOLLIN and POLLIN"""

_POLLFD = struct.Struct("=ihh")
_MOST = 65536
"""Entries of a poll(2) that are looked at"""


class Waiter(NamedTuple):
    """A process that waits on a listener, and how that was seen."""

    pid: int
    how: str


class Seen(NamedTuple):
    """One look at a command.

    holding: the inodes that some process has a descriptor of. registered: those in an epoll set, whether somebody
    waits on it or not. waiting: those that somebody waits on. hidden: why a process could not be looked into.
    processes: how many there are.
    """

    processes: list[int]
    holding: dict[int, int]
    registered: dict[int, int]
    waiting: dict[int, Waiter]
    hidden: str


def look(pids: Iterable[int], inodes: Iterable[int]) -> Seen:
    """What these processes do with the sockets of these inodes, at this moment."""
    wanted = frozenset(inodes)
    seen = Seen(list(pids), {}, {}, {}, "")
    for pid in seen.processes:
        try:
            _look_into(pid, wanted, seen)
        except proc.Hidden as error:
            seen = seen._replace(hidden=seen.hidden or str(error))
    return seen


def holder_of(pids: Iterable[int], inode: int) -> int | None:
    """The process that has a descriptor of this socket. Raises Hidden if none has, but some cannot be looked into."""
    hidden: proc.Hidden | None = None
    link = f"socket:[{inode}]"
    for pid in pids:
        try:
            if link in proc.descriptors(pid).values():
                return pid
        except proc.Hidden as error:
            hidden = error
    if hidden is not None:
        raise hidden
    return None


def sleeps_on(pid: int, epoll: int) -> bool:
    """Whether a thread of this process sleeps in epoll_wait(2) on this descriptor of its own. Raises Hidden."""
    for thread in proc.threads(pid):
        call = proc.waiting_call(pid, thread)
        if call is not None and _CALLS.get(call[0]) == _EPOLL and call[1][0] == epoll:
            return True
    return False


def _look_into(pid: int, wanted: frozenset[int], seen: Seen) -> None:
    links = proc.descriptors(pid)
    if not links and proc.look_at(pid) is None and proc.is_there(pid):
        raise proc.Hidden(f"pid {pid} is not shown in /proc")
    sockets = {descriptor: inode for descriptor, link in links.items() if (inode := proc.inode_of(link)) in wanted}
    for inode in sockets.values():
        seen.holding.setdefault(inode, pid)
    epolls = [descriptor for descriptor, link in links.items() if link == proc.EVENTPOLL]
    sets = {descriptor: _targets(pid, descriptor, sockets) for descriptor in epolls}
    for inode in {inode for held, _ in sets.values() for inode in held & wanted}:
        seen.registered.setdefault(inode, pid)
    if not sockets and not sets:
        return
    for thread in proc.threads(pid):
        try:
            call = proc.waiting_call(pid, thread)
        except proc.Hidden:
            for inode, holder in seen.registered.items():
                if holder == pid:
                    seen.waiting.setdefault(inode, Waiter(pid, "its epoll set holds it"))
            raise
        if call is not None:
            for inode, how in _waited_for(pid, call, sockets, sets):
                if inode in wanted:
                    seen.waiting.setdefault(inode, Waiter(pid, how))


def _waited_for(
    pid: int, call: tuple[int, list[int]], sockets: dict[int, int], sets: dict[int, tuple[set[int], set[int]]]
) -> Iterator[tuple[int, str]]:
    number, arguments = call
    kind = _CALLS.get(number)
    if kind == _DIRECT:
        if arguments[0] in sockets:
            yield sockets[arguments[0]], "a thread waits in accept() or recv()"
    elif kind == _EPOLL:
        for inode in _in_set(arguments[0], sets):
            yield inode, "a thread waits on the epoll set that holds it"
    elif kind is not None:
        polled = _polled(pid, arguments) if kind == _POLL else _selected(pid, arguments)
        for descriptor in polled:
            if descriptor in sockets:
                yield sockets[descriptor], f"a thread waits on it in {kind}()"
            for inode in _in_set(descriptor, sets):
                yield inode, f"a thread waits on it in {kind}()"


def _targets(pid: int, descriptor: int, sockets: dict[int, int]) -> tuple[set[int], set[int]]:
    """The inodes that an epoll set waits to read from, and the descriptors (some may be epoll sets themselves).

    Before Linux 4.13 there is no inode; then the descriptor's number says which socket it is.
    """
    inodes: set[int] = set()
    descriptors: set[int] = set()
    for target in proc.targets(pid, descriptor):
        if target.events & _IN:
            descriptors.add(target.number)
            inode = sockets.get(target.number) if target.inode is None else target.inode
            if inode is not None:
                inodes.add(inode)
    return inodes, descriptors


def _in_set(descriptor: int, sets: dict[int, tuple[set[int], set[int]]]) -> set[int]:
    """The inodes in an epoll set, and in those that are in it."""
    found: set[int] = set()
    done: set[int] = set()
    waiting = [descriptor]
    while waiting:
        each = waiting.pop()
        if each in sets and each not in done:
            done.add(each)
            inodes, descriptors = sets[each]
            found |= inodes
            waiting += descriptors
    return found


def _polled(pid: int, arguments: list[int]) -> list[int]:
    data = proc.memory(pid, arguments[0], min(arguments[1], _MOST) * _POLLFD.size)
    data = data[: len(data) - len(data) % _POLLFD.size]
    return [descriptor for descriptor, events, _ in _POLLFD.iter_unpack(data) if descriptor >= 0 and events & _IN]


def _selected(pid: int, arguments: list[int]) -> list[int]:
    count = min(arguments[0], _MOST)
    data = proc.memory(pid, arguments[1], (count + 63) // 64 * 8) if arguments[1] else b""
    bits = int.from_bytes(data, "little")  # all machines in CALLS are little-endian
    return [descriptor for descriptor in range(count) if bits >> descriptor & 1]
