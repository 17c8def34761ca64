"""Takes listeners out of the epoll sets of other processes, so that they accept nothing more.

The old command and the new one share the listeners, and either may accept until the old one has been told to stop.
Many servers drop what they have accepted in their last turn: they close their listener, and each connection on which
they have not read a request yet. So the old one's listeners are taken out of its epoll sets before it is told. It does
not notice, and every newcomer goes to the new one.

An entry of an epoll set is known by the open file and by the descriptor's number at which it was added (epoll(7), Q6).
The open file is ours as well, since the listener was handed on. The number has to be the one in the other process, and
may be any one here, also that of a descriptor in use. So it is done in a thread that has made itself a table of
descriptors of its own, unshare(CLONE_FILES), which nobody else sees and which ends with it. The epoll set itself is
fetched with pidfd_getfd(2) (Linux 5.6), which an ancestor may do where the user may trace the process at all.

While the thread runs, no garbage collection may: what it closed would be closed in the thread's table, and stay open in
the process's. Whatever fails leaves the server as it is, which is how it would be without this. Processes that wait in
poll(2), select(2) or accept(2) are left alone: a call cannot be taken back.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import gc
import os
import select
import socket
import threading
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from takeover.exchange import logger

from . import proc

CLONE_FILES = 0x400
"""include/uapi/linux/sched.h"""

PIDFD_GETFD = 438
"""The system call's number, which all architectures have in common but Alpha; arch/*/syscalls/syscall.tbl."""

_libc = ctypes.CDLL(None, use_errno=True)


class Entry(NamedTuple):
    """A listener in an epoll set: the process, its descriptors of the two, and our own descriptor of the listener."""

    pid: int
    epoll: int
    number: int
    listener: int


def find(pids: Iterable[int], listeners: Sequence[socket.socket]) -> list[Entry]:
    """Where these processes have these listeners in epoll sets, fdinfo of proc(5); [] where that cannot be seen."""
    ours = {os.fstat(sock.fileno()).st_ino: sock.fileno() for sock in listeners if sock.fileno() >= 0}
    found = []
    for pid in pids:
        try:
            links = proc.descriptors(pid)
        except proc.Hidden as error:
            logger.debug("not hushed: %s", error)
            continue
        for epoll in (descriptor for descriptor, link in links.items() if link == proc.EVENTPOLL):
            for target in proc.targets(pid, epoll):
                listener = None if target.inode is None else ours.get(target.inode)
                if listener is not None:
                    found.append(Entry(pid, epoll, target.number, listener))
    return found


def hush(pids: Iterable[int], listeners: Sequence[socket.socket]) -> list[Entry]:
    """Takes the listeners out of all epoll sets of these processes; gives what it has taken out.

    The listeners stay the caller's and as they are. Raises nothing: what could not be done is logged for debugging.
    """
    entries = find(pids, listeners)
    hushed: list[Entry] = []
    if not entries:
        return hushed
    collecting = gc.isenabled()
    gc.disable()
    try:
        thread = threading.Thread(target=_take_out, args=(entries, hushed), name="hush")
        thread.start()
        thread.join()
    except RuntimeError as error:
        logger.debug("not hushed: %s", error)
    finally:
        if collecting:
            gc.enable()
    return hushed


def _take_out(entries: list[Entry], hushed: list[Entry]) -> None:
    if _libc.unshare(CLONE_FILES):
        logger.debug("not hushed: unshare CLONE_FILES: %s", os.strerror(ctypes.get_errno()))
        return
    above = 1 + max(entry.number for entry in entries)
    try:
        kept = {entry.listener: fcntl.fcntl(entry.listener, fcntl.F_DUPFD_CLOEXEC, above) for entry in entries}
    except OSError as error:
        logger.debug("not hushed: dup of a listener above %d: %s", above, error.strerror)
        return
    for entry in entries:
        try:
            # The fetched number itself does not matter: it goes with the thread's table.
            own = fcntl.fcntl(fetch(entry.pid, entry.epoll), fcntl.F_DUPFD_CLOEXEC, above)
            os.dup2(kept[entry.listener], entry.number, inheritable=False)
            with select.epoll.fromfd(own) as epoll:
                epoll.unregister(entry.number)
            hushed.append(entry)
        except OSError as error:
            if error.errno != errno.ENOENT:  # ENOENT: it has taken it out itself meanwhile
                logger.debug("pid %d: not hushed: %s", entry.pid, error)


def fetch(pid: int, descriptor: int) -> int:
    """A copy of another process's descriptor, the caller's to close; it is close-on-exec. Raises OSError."""
    pidfd = os.pidfd_open(pid)
    fetched = int(_libc.syscall(PIDFD_GETFD, pidfd, descriptor, 0))
    number = ctypes.get_errno()
    os.close(pidfd)
    if fetched < 0:
        raise OSError(number, f"pidfd_getfd: {os.strerror(number)}")
    return fetched
