"""One process of the command: started with its descriptors from 3 on, in a process group of its own.

Why fork() and execve() by hand, and not subprocess: LISTEN_PID has to be the child's own pid, and the child is to die
with this process (PR_SET_PDEATHSIG), whoever kills it. The process has a second thread, the control thread, so the
child does nothing but system calls that were prepared before: whatever could wait for a lock is done by the parent.
Signals are blocked from before the fork until the child has put their handlers away, lest it runs ours.

The child tells an execve() that failed by its errno on a pipe, which a successful one closes.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import signal
import warnings
from collections.abc import Mapping, Sequence

from takeover.errors import CommandError

from .command import FIRST

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
"""include/uapi/linux/prctl.h"""

_ALL = signal.valid_signals()
_prctl = ctypes.CDLL(None, use_errno=True).prctl
_prctl.argtypes = (ctypes.c_int, *[ctypes.c_ulong] * 4)
_KILL = int(signal.SIGKILL)


def become_subreaper() -> None:
    """Makes this process the parent of whatever its descendants leave behind, prctl(2)."""
    if _prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise CommandError(f"prctl PR_SET_CHILD_SUBREAPER: {os.strerror(ctypes.get_errno())}")


def start(
    executable: str,
    words: Sequence[str],
    environment: Mapping[str, str],
    descriptors: Sequence[int],
    ignored: frozenset[int] = frozenset(),
    outputs: tuple[int, int] | None = None,
) -> int:
    """Starts the command and returns its pid, which is also its process group; execve() has succeeded then.

    The descriptors stay the caller's; the child has copies of them at 3, 4, …, and what else is not close-on-exec.
    `ignored` are the signals that the child is to ignore, as this process was told to when it was started; it gets all
    others as they were before there was any program. `outputs`, the caller's too, become its standard output and error.
    Standard input is /dev/null where it would be a terminal, which belongs to this process. Call it in the main thread:
    the child dies when the thread that started it does. Raises CommandError.
    """
    above = FIRST + len(descriptors)
    own: list[int] = []
    try:
        reading, writing = os.pipe()
        own += [reading, writing]
        telling = _copy(writing, above, own)
        given = [(_copy(descriptor, above, own), FIRST + place) for place, descriptor in enumerate(descriptors)]
        given += [(_copy(output, above, own), number) for number, output in enumerate(outputs or (), 1)]
        if os.isatty(0):
            given.append((_copy(os.open(os.devnull, os.O_RDONLY), above, own, close=True), 0))
        pid = _fork(executable, list(words), dict(environment), given, telling, ignored)
        for each in (writing, telling):
            os.close(each)
            own.remove(each)
        failure = os.read(reading, 16)
    except OSError as error:
        raise CommandError(f"start {executable}: {error.strerror}") from None
    finally:
        for each in own:
            os.close(each)
    if failure:
        os.waitpid(pid, 0)
        raise CommandError(_explain(executable, int(failure)))
    return pid


def _copy(descriptor: int, above: int, own: list[int], *, close: bool = False) -> int:
    """A copy that no dup2() to the numbers below can overwrite."""
    try:
        own.append(fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, above))
    finally:
        if close:
            os.close(descriptor)
    return own[-1]


def _fork(
    executable: str,
    words: list[str],
    environment: dict[str, str],
    given: list[tuple[int, int]],
    telling: int,
    ignored: frozenset[int],
) -> int:
    parent = os.getpid()
    handled = [signum for signum in _ALL - {_KILL, signal.SIGSTOP} if signal.getsignal(signum) is not None]
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _ALL)
    try:
        with warnings.catch_warnings():
            # Python 3.12 and newer warn of fork() in a process with threads; the head of this file says why it is safe.
            warnings.simplefilter("ignore", DeprecationWarning)
            pid = os.fork()
        if not pid:
            try:
                _prctl(PR_SET_PDEATHSIG, _KILL, 0, 0, 0)
                if os.getppid() != parent:
                    os._exit(127)
                os.setpgid(0, 0)
                for signum in handled:
                    signal.signal(signum, signal.SIG_IGN if signum in ignored else signal.SIG_DFL)
                for copy, number in given:
                    os.dup2(copy, number)
                if "LISTEN_FDS" in environment:
                    environment["LISTEN_PID"] = str(os.getpid())
                signal.pthread_sigmask(signal.SIG_SETMASK, mask)
                os.execve(executable, words, environment)
            except OSError as error:
                os.write(telling, b"%d" % (error.errno or errno.EINVAL))
            finally:
                os._exit(127)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    return pid


def _explain(executable: str, number: int) -> str:
    reason = {
        errno.ENOEXEC: "it is no program that this machine can run; does a script begin with #! and its interpreter?",
        errno.ENOENT: "it is gone, or its interpreter (see the line that begins with #!) is not there",
        errno.EACCES: "not allowed; is it executable, and may its folder be entered?",
        errno.E2BIG: "its words and its environment are too long",
    }.get(number, os.strerror(number))
    return f"execve {executable}: {reason}"
