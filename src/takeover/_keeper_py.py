"""`_keeper` in plain Python: the same process, the same messages, but not as small.

The keeper is a program of its own here: a fork would be dearer, since all pages of the owner become private when it
dies. An interpreter that imports nothing but four modules written in C takes some 4 MiB, the compiled keeper 40 KiB.

As a program its arguments are the uids that may talk to it; descriptor 0 is the listening socket, 1 the first
connection. It forks and the parent ends, so it is a child of init (or of the nearest subreaper).
"""

from __future__ import annotations

import _socket as socket
import posix as os
import resource
import select
import sys

TYPE_CHECKING = False  # typing's own is dear
if TYPE_CHECKING:
    from collections.abc import Collection

VERSION = 1
QUEUE = 4096
MOST_CONNECTIONS = 64
LONGEST = 32768
MOST_ENTRIES = 40960
BUSY = 100
"""Milliseconds until accepting is tried again where there is no descriptor for it."""


def start(listening: int, first: int, allowed: Collection[int]) -> None:
    """See _keeper.start(). Raises LocalError where the interpreter cannot be run."""
    import contextlib
    import fcntl
    import signal
    from os import environ

    from .errors import LocalError

    if not sys.executable:
        raise LocalError("start the keeper: sys.executable does not say which interpreter to run")
    copies = [fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 3) for descriptor in (listening, first)]
    try:
        child = os.posix_spawn(
            sys.executable,
            [sys.executable, "-I", "-S", "-B", __file__, *map(str, sorted(allowed))],
            environ,
            file_actions=[
                (os.POSIX_SPAWN_DUP2, copies[0], 0),
                (os.POSIX_SPAWN_DUP2, copies[1], 1),
                (os.POSIX_SPAWN_OPEN, 2, "/dev/null", os.O_WRONLY, 0),
            ],
            setsigmask=signal.valid_signals() - {signal.SIGTERM},
            setsigdef=[signal.SIGTERM],
        )
    except OSError as error:
        raise LocalError(f"start the keeper: {sys.executable}: {error.strerror}") from None
    finally:
        for descriptor in copies:
            os.close(descriptor)
    with contextlib.suppress(ChildProcessError):  # somebody else in this program waits for all children
        os.waitpid(child, 0)


class Keeper:
    """The loop and its state. `coming` are the listeners of the registration under way, which `registering` makes."""

    def __init__(self, allowed: frozenset[int]) -> None:
        self.allowed = allowed
        self.listening = socket.socket(fileno=0)
        self.listening.listen(QUEUE)
        self.connections: dict[int, socket.socket] = {1: socket.socket(fileno=1)}
        self.held: list[tuple[int, bytes]] = []
        self.coming: list[tuple[int, bytes]] = []
        self.registrant = self.registering = -1
        self.short_of_descriptors = False

    @property
    def full(self) -> bool:
        return len(self.held) + len(self.coming) == MOST_ENTRIES

    def run(self) -> None:
        while self.held or self.connections:
            poll = select.poll()
            for descriptor in self.connections:
                poll.register(descriptor, select.POLLIN)
            if not self.short_of_descriptors:
                poll.register(0, select.POLLIN)
            ready = poll.poll(BUSY if self.short_of_descriptors else None)
            self.short_of_descriptors = False
            for descriptor, _ in ready:
                if descriptor and not self.serve(descriptor):
                    self.hang_up(descriptor)
            if any(descriptor == 0 for descriptor, _ in ready):
                self.accept()

    def accept(self) -> None:
        try:
            descriptor, _ = self.listening._accept()  # type: ignore[attr-defined]
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError:
            self.short_of_descriptors = True
            return
        connection = socket.socket(fileno=descriptor)
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        if int.from_bytes(credentials[4:8], sys.byteorder) not in self.allowed:
            connection.close()
            return
        if len(self.connections) == MOST_CONNECTIONS:
            self.hang_up(next(each for each in self.connections if each != self.registrant))
        self.connections[descriptor] = connection

    def hang_up(self, descriptor: int) -> None:
        if descriptor == self.registrant:
            self.registrant = -1
        if descriptor == self.registering:
            self.forget_coming()
        self.connections.pop(descriptor).close()

    def serve(self, descriptor: int) -> bool:
        """Reads one message and answers it; False where the connection has ended, or is not worth more."""
        came: list[int] = []
        try:
            message = self.receive(descriptor, came)
            return bool(message) and self.answer(descriptor, message, came)
        except BlockingIOError:
            return True
        except OSError:
            return False
        finally:
            for each in came:
                os.close(each)

    def receive(self, descriptor: int, came: list[int]) -> bytes:
        """One message, b"" where the connection is to end; its descriptors go into the list."""
        message, blocks, flags, _ = self.connections[descriptor].recvmsg(
            LONGEST + 1, socket.CMSG_LEN(4), socket.MSG_CMSG_CLOEXEC | socket.MSG_DONTWAIT
        )
        for level, kind, data in blocks:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                came += memoryview(data[: len(data) // 4 * 4]).cast("i")
        fits = len(message) <= LONGEST and not flags & (socket.MSG_CTRUNC | socket.MSG_TRUNC)
        return message if fits and (len(came) == 1) == message.startswith(b"K") else b""

    def answer(self, descriptor: int, message: bytes, came: list[int]) -> bool:
        kind = message[:1]
        answer, sent = b"O", b""
        if kind == b"H":
            answer = b"H%c%b%b" % (VERSION, os.getpid().to_bytes(4, "big"), len(self.held).to_bytes(4, "big"))
        elif kind == b"B":
            self.forget_coming()
            self.registering = descriptor
        elif kind in (b"K", b"C") and (self.registering != descriptor or (kind == b"K" and self.full)):
            answer = b"R"
        elif kind == b"K":
            self.coming.append((came.pop(), message[1:]))
        elif kind == b"C":
            self.commit()
            self.registrant = descriptor
        elif kind == b"G" and len(message) == 5:
            index = int.from_bytes(message[1:], "big")
            answer = b"N"
            if index < len(self.held):
                fd, text = self.held[index]
                answer, sent = b"G" + text, fd.to_bytes(4, sys.byteorder)
        elif kind != b"E":
            return False
        control = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, sent)] if sent else []
        self.connections[descriptor].sendmsg([answer], control, socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT)
        if kind == b"E":
            os._exit(0)
        return True

    def commit(self) -> None:
        for descriptor, _ in self.held:
            os.close(descriptor)
        self.held, self.coming, self.registering = self.coming, [], -1

    def forget_coming(self) -> None:
        for descriptor, _ in self.coming:
            os.close(descriptor)
        self.coming, self.registering = [], -1


def main() -> None:
    """The program."""
    if os.fork():
        os._exit(0)
    os.setsid()
    os.closerange(2, 1 << 20)
    os.chdir("/")
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    try:
        name = os.open("/proc/self/comm", os.O_WRONLY)
        os.write(name, b"takeover-keeper")
        os.close(name)
    except OSError:
        pass
    Keeper(frozenset(map(int, sys.argv[1:]))).run()
    os._exit(0)


if __name__ == "__main__":
    main()
