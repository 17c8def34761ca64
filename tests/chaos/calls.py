"""The system calls of x86-64 that a takeover makes: their numbers, and how each of them can fail."""

from __future__ import annotations

import errno
from collections.abc import Iterator

NUMBERS = {
    "read": 0, "write": 1, "close": 3, "fstat": 5, "poll": 7, "lseek": 8, "mmap": 9, "mprotect": 10, "munmap": 11,
    "brk": 12, "rt_sigaction": 13, "rt_sigprocmask": 14, "rt_sigreturn": 15, "ioctl": 16, "pread64": 17,
    "pwrite64": 18, "readv": 19, "writev": 20, "access": 21, "select": 23, "sched_yield": 24, "mremap": 25,
    "madvise": 28, "dup": 32, "dup2": 33, "nanosleep": 35, "getpid": 39, "socket": 41, "connect": 42, "accept": 43,
    "sendto": 44, "recvfrom": 45, "sendmsg": 46, "recvmsg": 47, "shutdown": 48, "bind": 49, "listen": 50,
    "getsockname": 51, "getpeername": 52, "socketpair": 53, "setsockopt": 54, "getsockopt": 55, "clone": 56,
    "vfork": 58, "execve": 59, "exit": 60, "wait4": 61, "kill": 62, "uname": 63, "fcntl": 72, "flock": 73,
    "ftruncate": 77, "getcwd": 79, "rename": 82, "mkdir": 83, "link": 86, "unlink": 87, "symlink": 88, "readlink": 89,
    "chmod": 90, "fchmod": 91, "umask": 95, "gettimeofday": 96, "getrlimit": 97, "getrusage": 98, "sysinfo": 99,
    "getuid": 102, "getgid": 104, "geteuid": 107, "getegid": 108, "getppid": 110, "sigaltstack": 131, "statfs": 137,
    "prctl": 157, "arch_prctl": 158, "gettid": 186, "futex": 202, "sched_getaffinity": 204, "getdents64": 217,
    "set_tid_address": 218, "restart_syscall": 219, "clock_gettime": 228, "clock_nanosleep": 230, "exit_group": 231,
    "epoll_wait": 232, "epoll_ctl": 233, "tgkill": 234, "openat": 257, "mkdirat": 258, "newfstatat": 262,
    "unlinkat": 263, "renameat": 264, "linkat": 265, "symlinkat": 266, "readlinkat": 267, "fchmodat": 268,
    "faccessat": 269, "ppoll": 271, "set_robust_list": 273, "epoll_pwait": 281, "timerfd_create": 283,
    "timerfd_settime": 286, "accept4": 288, "eventfd2": 290, "epoll_create1": 291, "dup3": 292, "pipe2": 293,
    "prlimit64": 302, "renameat2": 316, "getrandom": 318, "memfd_create": 319, "statx": 332, "rseq": 334,
    "pidfd_send_signal": 424, "clone3": 435, "close_range": 436, "pidfd_open": 434, "pidfd_getfd": 438,
}  # fmt: skip
"""arch/x86/entry/syscalls/syscall_64.tbl of the kernel."""

NAMES = {number: name for name, number in NUMBERS.items()}

SHORT = "short"
"""Not an error: the call is done with one byte."""

CAN_BE_SHORT = frozenset({"read", "write", "sendto", "recvfrom", "sendmsg", "recvmsg"})

_OPENS = (errno.EMFILE, errno.ENOMEM, errno.ENOBUFS)
_RECEIVES = (errno.EINTR, errno.EAGAIN, errno.ENOMEM, errno.ECONNRESET)
_SENDS = (*_RECEIVES, errno.EPIPE, errno.ENOBUFS)

ERRORS: dict[str, tuple[int, ...]] = {
    "socket": _OPENS,
    "socketpair": _OPENS,
    "accept4": (errno.EINTR, errno.EAGAIN, errno.ECONNABORTED, *_OPENS),
    "connect": (errno.EINTR, errno.EAGAIN, errno.ENOMEM, errno.ECONNRESET),
    "bind": (errno.ENOMEM, errno.ENOBUFS),
    "listen": (errno.ENOMEM, errno.ENOBUFS),
    "sendmsg": (*_SENDS, errno.ETOOMANYREFS),
    "recvmsg": _RECEIVES,
    "sendto": _SENDS,
    "recvfrom": _RECEIVES,
    "read": (errno.EINTR,),
    "write": (errno.EINTR,),
    "shutdown": (errno.ENOBUFS,),
    "getsockopt": (errno.ENOMEM, errno.ENOBUFS),
    "setsockopt": (errno.ENOMEM, errno.ENOBUFS),
    "getsockname": (errno.ENOBUFS,),
    "getpeername": (errno.ENOBUFS, errno.ENOTCONN),
    "epoll_create1": (errno.EMFILE, errno.ENOMEM),
    "epoll_ctl": (errno.ENOMEM, errno.ENOSPC),
    "epoll_wait": (errno.EINTR,),
    "eventfd2": (errno.EMFILE, errno.ENOMEM),
    "pipe2": (errno.EMFILE,),
    "pidfd_open": (errno.EMFILE, errno.ENOMEM),
    "memfd_create": (errno.EMFILE, errno.ENOMEM),
    "openat": (errno.EMFILE, errno.ENOMEM, errno.EINTR),
    "flock": (errno.EINTR, errno.ENOMEM),
    "fcntl": (errno.EMFILE, errno.ENOMEM),
    "dup": (errno.EMFILE,),
    "ftruncate": (errno.EINTR,),
    "unlink": (errno.ENOMEM,),
    "unlinkat": (errno.ENOMEM,),
    "rename": (errno.ENOMEM, errno.ENOSPC),
    "renameat": (errno.ENOMEM, errno.ENOSPC),
    "fchmod": (errno.ENOMEM,),
    "clone3": (errno.EAGAIN, errno.ENOMEM),
}
"""The errors that the call's manual page, or the network stack behind it, knows.

Left out: close(2), which frees the descriptor whatever it returns; poll(2), which allocates nothing for a few
descriptors, and fails with EINTR only with nothing to report; EPIPE and EAGAIN of write(2), which goes to pipes only of
which the process has both ends, to wake who reads them, and to its log: EAGAIN is true only of a full pipe, which wakes
him as well; futex(2), at whose errors the C library aborts; and what
only the interpreter and the C library call (memory, signal masks, clocks).
"""

_ANYWHERE = (
    *(errno.EMFILE, errno.ENOMEM, errno.EINTR, errno.EAGAIN),
    *(errno.ENOBUFS, errno.EPIPE, errno.ECONNRESET, errno.ETOOMANYREFS),
)
"""Errors that each fallible call is tried with, whether its manual page knows them or not."""


def faults(call: str) -> Iterator[str]:
    """The names of what can go wrong with a call: errors, and `short`."""
    yield from (errno.errorcode[number] for number in ERRORS.get(call, ()))
    if call in CAN_BE_SHORT:
        yield SHORT


def strange_faults(call: str) -> Iterator[str]:
    """Errors that no kernel has this call return, though a filter of system calls may (seccomp(2)).

    Not of those by which a process waits and wakes itself, without which no loop goes on.
    """
    if call in ERRORS and call not in ("epoll_wait", "read", "write"):
        yield from (errno.errorcode[number] for number in _ANYWHERE if number not in ERRORS[call])
