"""Follows the system calls of two processes with ptrace(2), and does something to one of them at one of its calls.

A program of its own, since a process that traces its children would have to wait for them in one place:

    tracer.py '{"mark": TEXT, "point": null or [ROLE, THREAD, CALL, NTH], "action": WHAT}'

WHAT is "kill", "stop", the name of an error, or "short". It writes "ready", reads a line with the pids of the incumbent
and of the successor, seizes both, and writes "seized". Counting begins when the successor's first call names the mark,
a part of a path, and ends with the end of either process. The last line that it writes is JSON: {"hit": BOOL, "calls":
[[ROLE, THREAD, CALL], …]} with every call counted.

A thread is known by its place: the order of the numbers for those that were there, of their creation for others.
Death comes before the call, a stop behind it: SIGSTOP is acted on as the process returns from the kernel.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import pathlib
import signal
import sys
from collections import Counter

from calls import NAMES, SHORT

GETREGS, SETREGS = 12, 13
SYSCALL, SEIZE, INTERRUPT, GET_SYSCALL_INFO = 24, 0x4206, 0x4207, 0x420E
TRACESYSGOOD, TRACECLONE = 1, 1 << 3
EVENT_STOP = 128
WALL = 0x40000000
ENTRY, EXIT = 1, 2
"""linux/ptrace.h and linux/wait.h."""

NAMES_A_PATH = {"connect": 1, "bind": 1, "openat": 1, "newfstatat": 1, "unlink": 0, "mkdir": 0, "access": 0}
"""Which argument leads to it."""

REGISTERS = (
    *("r15", "r14", "r13", "r12", "rbp", "rbx", "r11", "r10", "r9", "r8", "rax", "rcx", "rdx", "rsi", "rdi"),
    *("orig_rax", "rip", "cs", "eflags", "rsp", "ss", "fs_base", "gs_base", "ds", "es", "fs", "gs"),
)
"""arch/x86/include/asm/user_64.h."""

libc = ctypes.CDLL(None, use_errno=True)
libc.ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)
libc.ptrace.restype = ctypes.c_long


class SyscallInfo(ctypes.Structure):
    """struct ptrace_syscall_info of an entry."""

    _fields_ = (
        ("op", ctypes.c_uint8),
        ("pad", ctypes.c_uint8 * 3),
        ("arch", ctypes.c_uint32),
        ("instruction", ctypes.c_uint64),
        ("stack", ctypes.c_uint64),
        ("number", ctypes.c_uint64),
        ("arguments", ctypes.c_uint64 * 6),
        ("more", ctypes.c_uint64),
    )


class Registers(ctypes.Structure):
    """struct user_regs_struct of x86-64."""

    _fields_ = tuple((name, ctypes.c_uint64) for name in REGISTERS)


def ptrace(request: int, thread: int, address: int = 0, data: object = 0) -> None:
    if libc.ptrace(request, thread, address, data) < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"ptrace {request} of {thread}: {os.strerror(number)}")


class Process:
    """One of the two, and its threads in their order."""

    def __init__(self, role: str, pid: int) -> None:
        self.role = role
        self.pid = pid
        self.threads = [int(name) for name in sorted(os.listdir(f"/proc/{pid}/task"), key=int)]
        self.seen: Counter[tuple[int, str]] = Counter()

    def place_of(self, thread: int) -> int:
        if thread not in self.threads:
            self.threads.append(thread)
        return self.threads.index(thread)

    def read(self, address: int, size: int) -> bytes:
        with open(f"/proc/{self.pid}/mem", "rb", buffering=0) as memory:
            memory.seek(address)
            return memory.read(size)

    def write(self, address: int, data: bytes) -> None:
        with open(f"/proc/{self.pid}/mem", "r+b", buffering=0) as memory:
            memory.seek(address)
            memory.write(data)


class Tracer:
    """Runs until the plan has been carried out, or one of the two has ended."""

    def __init__(self, mark: str, point: list[object] | None, action: str) -> None:
        self.mark = mark.encode()
        self.point = tuple(point) if point else None
        self.action = action
        self.counting = False
        self.calls: list[tuple[str, int, str]] = []
        self.processes: dict[int, Process] = {}
        self._failing: dict[int, list[tuple[int, bytes]]] = {}

    def seize(self, role: str, pid: int) -> None:
        process = Process(role, pid)
        self.processes[pid] = process
        for thread in process.threads:
            ptrace(SEIZE, thread, 0, TRACESYSGOOD | TRACECLONE)
            ptrace(INTERRUPT, thread)

    def run(self) -> bool:
        """Whether the point was reached."""
        ended = False
        while True:
            thread, status = os.waitpid(-1, WALL)
            if os.WIFEXITED(status) or os.WIFSIGNALED(status):
                self._failing.pop(thread, None)
                ended = ended or thread in self.processes
                if ended and not self._failing:  # what is not done to its end leaves a call that was never made
                    return False
                continue
            number, event = os.WSTOPSIG(status), status >> 16
            forwarded = 0
            if number == signal.SIGTRAP | 0x80:
                with contextlib.suppress(ProcessLookupError):  # killed meanwhile
                    if self._at_a_call(self._process_of(thread), thread):
                        return True
            elif not event:
                forwarded = number
            with contextlib.suppress(ProcessLookupError):
                ptrace(SYSCALL, thread, 0, forwarded)

    def _process_of(self, thread: int) -> Process:
        for process in self.processes.values():
            if thread in process.threads:
                return process
        status = pathlib.Path(f"/proc/{thread}/status").read_text()
        return self.processes[int(status.partition("Tgid:")[2].split()[0])]

    def _at_a_call(self, process: Process, thread: int) -> bool:
        """True when there is no more to be done."""
        info = SyscallInfo()
        ptrace(GET_SYSCALL_INFO, thread, ctypes.sizeof(info), ctypes.addressof(info))
        if info.op == EXIT:
            return thread in self._failing and self._finish(process, thread)
        name = NAMES.get(info.number, f"call {info.number}")
        if not self.counting:
            if process.role != "successor" or not self._names_the_mark(process, name, info):
                return False
            self.counting = True
        place = process.place_of(thread)
        self.calls.append((process.role, place, name))
        process.seen[place, name] += 1
        if (process.role, place, name, process.seen[place, name]) != self.point:
            return False
        return self._act(process, thread, name, info)

    def _names_the_mark(self, process: Process, name: str, info: SyscallInfo) -> bool:
        if name not in NAMES_A_PATH:
            return False
        try:
            return self.mark in process.read(info.arguments[NAMES_A_PATH[name]], 160)
        except OSError:
            return False

    def _act(self, process: Process, thread: int, name: str, info: SyscallInfo) -> bool:
        if self.action in ("kill", "stop"):
            os.kill(process.pid, signal.SIGKILL if self.action == "kill" else signal.SIGSTOP)
            return True
        self._failing[thread] = []
        registers = self._registers(thread)
        if self.action != SHORT:
            registers.orig_rax = 2**64 - 1  # no such call: the kernel does nothing
        elif name in ("sendmsg", "recvmsg"):
            self._shorten_message(process, thread, info.arguments[1])
        else:
            registers.rdx = min(registers.rdx, 1)
        ptrace(SETREGS, thread, 0, ctypes.addressof(registers))
        return False

    def _shorten_message(self, process: Process, thread: int, message: int) -> None:
        """One part of one byte, until the call is over: struct msghdr has the parts at 16 and their number at 24."""
        parts, count = (int.from_bytes(process.read(message + at, 8), "little") for at in (16, 24))
        if not count or not int.from_bytes(process.read(parts + 8, 8), "little"):
            return
        for address in (message + 24, parts + 8):
            self._failing[thread].append((address, process.read(address, 8)))
            process.write(address, (1).to_bytes(8, "little"))

    def _finish(self, process: Process, thread: int) -> bool:
        """The call returns: with the error, or with what was changed for it as it was before."""
        for address, data in self._failing.pop(thread):
            process.write(address, data)
        if self.action != SHORT:
            registers = self._registers(thread)
            registers.rax = 2**64 - getattr(errno, self.action)
            ptrace(SETREGS, thread, 0, ctypes.addressof(registers))
        return True

    def _registers(self, thread: int) -> Registers:
        registers = Registers()
        ptrace(GETREGS, thread, 0, ctypes.addressof(registers))
        return registers


def main() -> None:
    wishes = json.loads(sys.argv[1])
    tracer = Tracer(wishes["mark"], wishes["point"], wishes["action"])
    print("ready", flush=True)
    incumbent, successor = map(int, sys.stdin.readline().split())
    tracer.seize("incumbent", incumbent)
    tracer.seize("successor", successor)
    print("seized", flush=True)
    hit = tracer.run()
    print(json.dumps({"hit": hit, "calls": tracer.calls}), flush=True)
    os._exit(0)  # the kernel lets go of all that it traced


main()
