"""A small service manager that does what systemd does with a service of Type=notify: it supervises one main process,
hears NOTIFY_SOCKET, believes whom NotifyAccess= lets it believe, and keeps descriptors in a store.

Nothing here comes from the package under test; service_notify_message() in src/core/service.c of systemd is the model.
"""

from __future__ import annotations

import array
import json
import os
import pathlib
import selectors
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from clients import LIMIT
from processes import PROGRAMS, Program, Room

CREDENTIALS = struct.Struct("3i")
"""struct ucred of unix(7): pid, uid, gid."""


class Message:
    """One datagram: who sent it, its fields in order, and whether it was believed."""

    def __init__(self, pid: int, text: str, descriptors: int) -> None:
        self.pid = pid
        self.fields = [(name, value) for name, _, value in (line.partition("=") for line in text.splitlines())]
        self.descriptors = descriptors
        self.believed = False
        self.at = time.monotonic_ns() // 1000

    def __getitem__(self, name: str) -> str:
        return dict(self.fields).get(name, "")

    def __repr__(self) -> str:
        what = " ".join(f"{name}={value}" for name, value in self.fields)
        return f"{'' if self.believed else '(not believed) '}{self.pid}: {what}"


class ServiceManager:
    """One unit. `access` is NotifyAccess=, `watchdog` WatchdogSec= in seconds, `limit` FileDescriptorStoreMax=.

    `state` is that of the unit: inactive, activating, active, reloading, deactivating. `deaths` counts how often the
    process that was believed to be the main one has ended.
    """

    def __init__(
        self, room: Room, access: str = "main", *, watchdog: float = 0.0, limit: int = 16, abstract: bool = False
    ) -> None:
        self.room = room
        self.access = access
        self.watchdog = watchdog
        self.limit = limit
        self.state = "inactive"
        self.status = ""
        self.main_pid = self.control_pid = self.deaths = 0
        self.said: list[Message] = []
        self.store: list[tuple[str, int]] = []
        self.activated: list[tuple[str, socket.socket]] = []
        self._changed = threading.Condition()
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        name = f"tko-{os.getpid()}-{os.urandom(6).hex()}"
        self.address = f"@{name}" if abstract else os.path.join(room.folder, "notify")
        self._sock.bind(f"\0{name}" if abstract else self.address)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._sock, selectors.EVENT_READ, self._hear)
        self._ending, self._end = os.pipe()
        self._selector.register(self._ending, selectors.EVENT_READ, None)
        self._pidfd = -1
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    # What systemctl does.

    def start(self, *command: str, **options: Any) -> Program:
        """The main process: ExecStart=, with the sockets of the unit's .socket and those of the store."""
        sockets = [(name, sock.fileno()) for name, sock in self.activated] + self.store
        plan = {
            "descriptors": [descriptor for _, descriptor in sockets],
            "names": [name for name, _ in sockets],
            "watchdog": round(self.watchdog * 1e6),
        }
        environment = {**self.room.environment, "NOTIFY_SOCKET": self.address}
        with self._changed:
            shim = (sys.executable, "-S", str(PROGRAMS / "activated.py"), json.dumps(plan))
            options = {"env": environment, "pass_fds": plan["descriptors"], **options}
            program = self.room.run(*shim, *command, **options)
            self.state = "activating"
            self._supervise(program.pid)
        return program

    def reload(self, *command: str, **options: Any) -> Program:
        """A process of the unit that ExecReload= has started, and that is not waited for any more."""
        environment = {**self.room.environment, "MAINPID": str(self.main_pid)}
        if self.access in ("exec", "all"):
            environment["NOTIFY_SOCKET"] = self.address
        program = self.room.run(*command, **{"env": environment, **options})
        if self.access == "exec":
            self.control_pid = program.pid
        return program

    # What tests ask.

    def wait_until(self, condition: Callable[[], object], what: str, limit: float = LIMIT) -> None:
        with self._changed:
            assert self._changed.wait_for(condition, limit), f"not within {limit:g} s: {what}; heard:\n{self.text}"

    def wait_for_main(self, program: Program) -> None:
        """The unit is active, and this is its main process."""
        try:
            self.wait_until(
                lambda: not program.running or (self.state == "active" and self.main_pid == program.pid),
                f"pid {program.pid} is the main process of an active unit",
            )
            assert program.running, f"pid {program.pid} has ended with {program.wait()}"
        except AssertionError as error:
            raise AssertionError(f"{error}\nthe unit is {self.state}; it said:\n{program.text}") from None

    @property
    def text(self) -> str:
        return "\n".join(map(repr, self.said))

    @property
    def unbelieved(self) -> list[Message]:
        return [message for message in self.said if not message.believed]

    def heard(self, name: str, value: str = "1") -> list[Message]:
        return [message for message in self.said if message[name] == value and message.believed]

    # What it does by itself.

    def _run(self) -> None:
        while True:
            for key, _ in self._selector.select():
                if key.data is None:
                    return
                with self._changed:
                    key.data()
                    self._changed.notify_all()

    def _supervise(self, pid: int) -> None:
        if self._pidfd >= 0:
            self._selector.unregister(self._pidfd)
            os.close(self._pidfd)
        self.main_pid = pid
        self._pidfd = os.pidfd_open(pid)
        self._selector.register(self._pidfd, selectors.EVENT_READ, self._died)

    def _died(self) -> None:
        self._selector.unregister(self._pidfd)
        os.close(self._pidfd)
        self._pidfd, self.main_pid = -1, 0
        self.deaths += 1
        self.state = "inactive"

    def _hear(self) -> None:
        room = socket.CMSG_SPACE(CREDENTIALS.size) + socket.CMSG_SPACE(253 * 4)
        data, control, _, _ = self._sock.recvmsg(1 << 16, room, socket.MSG_CMSG_CLOEXEC)
        pid, descriptors = 0, array.array("i")
        for _, kind, value in control:
            if kind == socket.SCM_CREDENTIALS:
                pid = CREDENTIALS.unpack(value)[0]
            else:
                descriptors.frombytes(value[: len(value) - len(value) % 4])
        message = Message(pid, data.decode(), len(descriptors))
        if not message["BARRIER"]:
            self.said.append(message)
            if self._believes(pid):
                message.believed = True
                descriptors = self._obey(message, descriptors)
        for descriptor in descriptors:
            os.close(descriptor)

    def _believes(self, pid: int) -> bool:
        believed = {"main": {self.main_pid}, "exec": {self.main_pid, self.control_pid}}.get(self.access)
        return believed is None or pid in believed

    def _obey(self, message: Message, descriptors: array.array[int]) -> array.array[int]:
        if message["MAINPID"] and int(message["MAINPID"]) != self.main_pid:
            self._supervise(int(message["MAINPID"]))
        self.status = message["STATUS"] or self.status
        if message["READY"] and self.state in ("activating", "reloading"):
            self.state = "active"
        if message["RELOADING"] and self.state == "active":
            self.state = "reloading"
        if message["STOPPING"]:
            self.state = "deactivating"
        if message["FDSTOREREMOVE"]:
            for name, descriptor in self.store:
                if name == message["FDNAME"]:
                    os.close(descriptor)
            self.store = [each for each in self.store if each[0] != message["FDNAME"]]
        if message["FDSTORE"]:
            return self._keep(message["FDNAME"], descriptors)
        return descriptors

    def _keep(self, name: str, descriptors: array.array[int]) -> array.array[int]:
        """Returns what is not kept: what is there already, what there is no room for."""
        assert name and ":" not in name and name.isascii() and name.isprintable() and len(name) <= 255, name
        known = {os.fstat(descriptor).st_ino for _, descriptor in self.store}
        refused = array.array("i")
        for descriptor in descriptors:
            if os.fstat(descriptor).st_ino in known or len(self.store) >= self.limit:
                refused.append(descriptor)
            else:
                self.store.append((name, descriptor))
        return refused

    def drop_store(self) -> None:
        """What systemd does when the unit has stopped and is not to start again."""
        for _, descriptor in self.store:
            os.close(descriptor)
        self.store = []

    def __enter__(self) -> ServiceManager:  # noqa: PYI034 - typing.Self needs Python 3.11
        return self

    def __exit__(self, *_: object) -> None:
        os.write(self._end, b"x")
        self._thread.join(LIMIT)
        self.drop_store()
        for _, sock in self.activated:
            sock.close()
        for descriptor in (self._ending, self._end, *([self._pidfd] if self._pidfd >= 0 else [])):
            os.close(descriptor)
        self._selector.close()
        self._sock.close()


def parent_of(pid: int) -> int:
    """The pid of a process's parent (proc_pid_stat(5))."""
    return int(pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
