"""What /proc tells of processes: who is whose child, which sockets a process holds, and in which call a thread waits.

proc(5). What may not be read raises Hidden: another user's process, or one that /proc hides (hidepid).
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from typing import NamedTuple

EVENTPOLL = "anon_inode:[eventpoll]"
"""What a descriptor of an epoll set refers to."""

_SOCKET = re.compile(r"socket:\[(\d+)\]")
_TARGET = re.compile(rb"tfd:\s*(\d+)\s+events:\s*([0-9a-f]+)(?:.*?\bino:([0-9a-f]+))?")


class Hidden(Exception):
    """The process is there, but the kernel does not let this user look into it."""


class Process(NamedTuple):
    """One line of /proc/PID/stat.

    group: its process group. ticks: of CPU that it has used, sysconf(SC_CLK_TCK) a second. started: in those ticks
    since the machine came up; unique together with the pid.
    """

    pid: int
    name: str
    state: str
    parent: int
    group: int
    ticks: int
    started: int

    @property
    def has_ended(self) -> bool:
        return self.state in "ZX"


def look_at(pid: int) -> Process | None:
    """None for a process that has gone, or that /proc hides."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            line = file.read().decode(errors="replace")
    except OSError:
        return None
    head, _, tail = line.rpartition(")")
    fields = tail.split()
    parent, group, user, system, started = (int(fields[place]) for place in (1, 2, 11, 12, 19))
    return Process(pid, head.partition("(")[2], fields[0], parent, group, user + system, started)


def is_there(pid: int) -> bool:
    """Whether there is such a process (or a zombie), shown in /proc or not."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def all_processes() -> Iterator[Process]:
    """Every process that can be seen."""
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            process = look_at(int(entry))
            if process is not None:
                yield process


def threads(pid: int) -> list[int]:
    """The threads of a process; none if it has gone."""
    try:
        return [int(entry) for entry in os.listdir(f"/proc/{pid}/task")]
    except OSError:
        return []


def children(pid: int) -> list[int]:
    """The children of a process, those of all its threads."""
    found: list[int] = []
    for thread in threads(pid):
        try:
            with open(f"/proc/{pid}/task/{thread}/children", "rb") as file:
                found += map(int, file.read().split())
        except FileNotFoundError:
            if os.path.exists(f"/proc/{pid}/task/{thread}/stat"):  # a kernel without CONFIG_PROC_CHILDREN
                return [process.pid for process in all_processes() if process.parent == pid]
        except OSError:
            pass
    return found


def descriptors(pid: int) -> dict[int, str]:
    """What each descriptor of a process refers to: "socket:[4711]", "anon_inode:[eventpoll]", a path. Raises Hidden."""
    found: dict[int, str] = {}
    try:
        for entry in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(FileNotFoundError):
                found[int(entry)] = os.readlink(f"/proc/{pid}/fd/{entry}")
    except (FileNotFoundError, ProcessLookupError):
        return {}
    except PermissionError as error:
        raise Hidden(f"pid {pid}: {error.strerror}") from None
    return found


def inode_of(link: str) -> int | None:
    """The inode of a socket, from what a descriptor refers to."""
    match = _SOCKET.fullmatch(link)
    return int(match[1]) if match else None


class Target(NamedTuple):
    """What an epoll set watches: a descriptor's number, events, and the inode, which is None before Linux 4.13."""

    number: int
    events: int
    inode: int | None


def targets(pid: int, epoll: int) -> list[Target]:
    """What an epoll set of a process watches, from its fdinfo; nothing if that cannot be read."""
    try:
        with open(f"/proc/{pid}/fdinfo/{epoll}", "rb") as file:
            found = _TARGET.findall(file.read())
    except OSError:
        return []
    return [Target(int(number), int(events, 16), int(inode, 16) if inode else None) for number, events, inode in found]


def words(pid: int) -> list[str]:
    """The command line of a process; empty if it cannot be read."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return [os.fsdecode(word) for word in file.read().split(b"\0")[:-1]]
    except OSError:
        return []


def asleep_in(pid: int) -> str:
    """The function of the kernel in which a process's first thread sleeps; empty if it runs or that is not told."""
    try:
        with open(f"/proc/{pid}/wchan", "rb") as file:
            return file.read().decode(errors="replace").strip("0\0\n")
    except OSError:
        return ""


def sleeps(pid: int) -> int | None:
    """How often the threads of a process have gone to sleep so far; None if that is not told."""
    total = 0
    for thread in threads(pid):
        try:
            with open(f"/proc/{pid}/task/{thread}/status", "rb") as file:
                total += int(file.read().partition(b"\nvoluntary_ctxt_switches:")[2].split()[0])
        except (OSError, IndexError):
            return None
    return total or None


def environment(pid: int) -> dict[str, str]:
    """The environment that a process was started with; empty if it cannot be read."""
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            words = file.read().split(b"\0")
    except OSError:
        return {}
    pairs = (os.fsdecode(word).partition("=") for word in words if word)
    return {name: value for name, _, value in pairs}


def belongs_to(orphan: int, group: int, root: int) -> bool:
    """Whether an orphan, of this process group, comes from the command of this pid: it leads the group, or has given it
    its LISTEN_PID.
    """
    return group == root or environment(orphan).get("LISTEN_PID") == str(root)


def waiting_call(pid: int, thread: int) -> tuple[int, list[int]] | None:
    """The number and the arguments of the system call in which a thread sleeps; None while it runs. Raises Hidden."""
    try:
        with open(f"/proc/{pid}/task/{thread}/syscall", "rb") as file:
            words = file.read().split()
    except (FileNotFoundError, ProcessLookupError):
        if os.path.exists(f"/proc/{pid}/task/{thread}/stat"):
            raise Hidden("this kernel does not tell system calls") from None
        return None
    except OSError as error:
        raise Hidden(f"pid {pid}: {error.strerror}") from None
    if len(words) < 7 or words[0].startswith(b"-"):
        return None
    return int(words[0]), [int(word, 16) for word in words[1:7]]


def memory(pid: int, address: int, size: int) -> bytes:
    """Bytes of a process's memory; fewer, or none, where there is none or it may not be read."""
    try:
        with open(f"/proc/{pid}/mem", "rb", buffering=0) as file:
            return os.pread(file.fileno(), size, address)
    except (OSError, OverflowError):
        return b""


class Tree:
    """The processes that a command consists of: the one that was started, and its descendants.

    A process whose parent ends becomes a child of the nearest subreaper, which is this process. It still belongs to the
    tree if it was seen there before, is in the process group that the command leads, or was started with its
    LISTEN_PID.
    """

    def __init__(self, root: int) -> None:
        self.root = root
        self._known: dict[int, int] = {}

    def members(self) -> list[int]:
        """The processes that live, the command's own first."""
        found: dict[int, None] = {}
        waiting = [self.root, *self._strays()]
        while waiting:
            pid = waiting.pop(0)
            process = look_at(pid)
            if pid in found or (process.has_ended if process is not None else not is_there(pid)):
                continue
            found[pid] = None
            if process is not None:
                self._known[pid] = process.started
            waiting += children(pid)
        self._known = {pid: started for pid, started in self._known.items() if pid in found or pid == self.root}
        return list(found)

    def has(self, pid: int) -> bool:
        """Whether a process belongs to the tree; False for one that has gone without a trace."""
        seen: set[int] = set()
        while pid > 1 and pid not in seen:
            if pid == self.root or self._is_stray(pid):
                return True
            seen.add(pid)
            process = look_at(pid)
            if process is None:
                return False
            pid = process.parent
        return False

    def _strays(self) -> list[int]:
        candidates = {*self._known, *children(os.getpid())}
        return [pid for pid in candidates if pid != self.root and self._is_stray(pid)]

    def _is_stray(self, pid: int) -> bool:
        if pid == os.getpid():
            return False
        if pid in self._known:
            process = look_at(pid)
            return process is not None and process.started == self._known[pid]
        process = look_at(pid)
        if process is None or process.parent != os.getpid():
            return False
        return belongs_to(pid, process.group, self.root)
