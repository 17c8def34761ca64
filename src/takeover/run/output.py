"""What a process writes, passed on untouched, where somebody must read it; else a process simply inherits our output.

Each of our two outputs has a pty towards the process if it is a terminal, so that the process sees one, and a pipe if
it is anything else; one for both where they are the same file. A thread reads it and writes it on: both calls may
block, and no O_NONBLOCK may be set on a terminal or pipe that others have open too. So a reader that is slow slows the
process down, as it would without us, and no more is held than one piece.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import struct
import termios
import threading
import time
from collections.abc import Callable

from .events import Events

PIECE = 65536
"""Bytes that are read at once: what a pipe holds, pipe(7)."""

_passing: set[_Stream] = set()


def finish(seconds: float) -> None:
    """Waits until all that processes have written is written on, or the time is over: for the end of this process."""
    deadline = time.monotonic() + seconds
    for stream in list(_passing):
        stream.calm()
        stream.join(max(0.0, deadline - time.monotonic()))


class Relay:
    """Of one process. Give it `ends` as descriptors 1 and 2, then call started()."""

    def __init__(self, events: Events, on_output: Callable[[bytes], object], outputs: tuple[int, int] = (1, 2)) -> None:
        """on_output: called in the loop with each piece, until calm(). outputs: ours, which stay the caller's.

        Raises OSError if there are no descriptors left.
        """
        first = _Stream(events, on_output, outputs[0])
        try:
            self._streams = [first] if _same(*outputs) else [first, _Stream(events, on_output, outputs[1])]
        except BaseException:
            first.give_up()
            raise

    @property
    def ends(self) -> tuple[int, int]:
        """The descriptors for the process; they are closed by started()."""
        return self._streams[0].end, self._streams[-1].end

    def started(self) -> None:
        """The process has its copies, or was not started at all."""
        for stream in self._streams:
            stream.start()

    def resized(self) -> None:
        """Our terminal has another size: so has the process's, which learns of it by the SIGWINCH that it is sent."""
        for stream in self._streams:
            stream.resize()

    def calm(self) -> None:
        """Nobody needs the output any more; it only passes through, until the process and its children have ended."""
        for stream in self._streams:
            stream.calm()


class _Stream:
    def __init__(self, events: Events, on_output: Callable[[bytes], object], target: int) -> None:
        self._events = events
        self._on_output: Callable[[bytes], object] | None = on_output
        self._target = target
        self._taken = threading.Semaphore(1)
        self._open = threading.Lock()
        self._is_terminal = os.isatty(target)
        self._reading, self.end = os.openpty() if self._is_terminal else os.pipe()
        self._thread = threading.Thread(target=self._run, name="relay", daemon=True)
        if self._is_terminal:
            modes = termios.tcgetattr(self.end)
            modes[1] &= ~termios.OPOST  # our own terminal does that: the bytes come as they were written
            termios.tcsetattr(self.end, termios.TCSANOW, modes)
            self.resize()

    def give_up(self) -> None:
        os.close(self._reading)
        os.close(self.end)

    def start(self) -> None:
        os.close(self.end)
        _passing.add(self)
        self._thread.start()

    def resize(self) -> None:
        if self._is_terminal:
            with self._open, contextlib.suppress(OSError):
                size = fcntl.ioctl(self._target, termios.TIOCGWINSZ, struct.pack("HHHH", 0, 0, 0, 0))
                fcntl.ioctl(self._reading, termios.TIOCSWINSZ, size)

    def calm(self) -> None:
        self._on_output = None
        self._taken.release()

    def join(self, seconds: float) -> None:
        self._thread.join(seconds)

    def _run(self) -> None:
        try:
            while data := self._read():
                self._write(memoryview(data))  # first, so that what is logged upon it comes after it
                if self._on_output is not None:
                    self._taken.acquire()
                    self._events.post(lambda piece=data: self._deliver(piece))  # type: ignore[misc]
        except OSError:
            pass  # our reader has gone: the process is to see the same on its own output
        finally:
            with self._open:
                os.close(self._reading)
                self._reading = -1
            _passing.discard(self)

    def _read(self) -> bytes:
        try:
            return os.read(self._reading, PIECE)
        except OSError:
            return b""  # EIO of a pty: nobody has its other end open any more

    def _write(self, data: memoryview) -> None:
        while data:
            try:
                data = data[os.write(self._target, data) :]
            except BlockingIOError:  # somebody else has made our output non-blocking
                poll = select.poll()
                poll.register(self._target, select.POLLOUT)
                poll.poll()

    def _deliver(self, piece: bytes) -> None:
        if self._on_output is not None:
            self._on_output(piece)
            self._taken.release()


def _same(one: int, other: int) -> bool:
    first, second = os.fstat(one), os.fstat(other)
    return (first.st_dev, first.st_ino) == (second.st_dev, second.st_ino)
