"""Asks the owner of a control socket for its status, or to stop."""

from __future__ import annotations

import select
import time
from typing import Any

from .control import ControlPath
from .errors import LocalError, NotRunning, PeerLost, Refused, RemoteProtocolError, TimedOut
from .link import Link, close_all, link_at
from .namespaces import in_words, is_process
from .wire import Frame, Type

TIME_LIMIT = 5.0
"""Seconds for an answer."""


def _connect(control: ControlPath, deadline: float) -> Link:
    """A link to the owner. First a look at the lock, for merely to connect would end the original script's service."""
    while True:
        if not control.is_locked():
            raise NotRunning(f"nothing is running at {control.path}{_kept(control)}")
        sock = control.connect()
        if sock is not None:
            link = link_at(control.path, sock)
            link.expect({Type.HELLO, Type.REPORT, Type.STOPPING, Type.REFUSE})
            if link.peer.uid not in control.allowed:
                uid = link.peer.uid
                link.close()
                raise LocalError(f"the process at {control.path} belongs to uid {uid}; ask as that user")
            return link
        if time.monotonic() > deadline:
            raise TimedOut(f"somebody holds {control.lock_path}, but nobody listens at {control.path}")
        time.sleep(0.02)


def _kept(control: ControlPath) -> str:
    from .keeping import orphan

    found = orphan(control)
    if found is None:
        return ""
    pid, held = found
    return f"; its keeper ({in_words(pid)}) holds {held} listeners, and clients wait: start it again, or stop that too"


def _next(link: Link, deadline: float) -> Frame | None:
    """The next frame, or None at the end of the link."""
    poll = select.poll()
    poll.register(link.fileno(), select.POLLIN)
    while not link.lost:
        if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            raise TimedOut(f"{link.name} does not answer; is it stopped?")
        for frame in link.receive():
            return frame
    return None


def _ask(path: str, kind: Type, time_limit: float) -> tuple[Link, Frame]:
    """Sends one request and returns the link with the answer; asks the next owner if this one is just handing over."""
    control = ControlPath(path)
    deadline = time.monotonic() + time_limit
    while True:
        link = _connect(control, deadline)
        try:
            greeting = _next(link, deadline)
            if greeting is not None:
                close_all(greeting.descriptors)
                if greeting.type is not Type.HELLO:
                    raise RemoteProtocolError(f"{link.name} began with {greeting.type.name}")
                link.told = greeting.body["pid"]
                link.send(kind)
                answer = _next(link, deadline)
                if answer is not None:
                    return link, answer
        except BaseException:
            link.close()
            raise
        link.close()
        if time.monotonic() > deadline:
            raise PeerLost(f"whoever listens at {control.path} hangs up without an answer")


def status(path: str, *, time_limit: float = TIME_LIMIT) -> dict[str, Any]:
    """What the owner says of itself: REPORT in docs/protocol.md. Raises NotRunning, TimedOut, other TakeoverErrors.

    An owner in another pid namespace: `pid` is its pid as seen here, and `pid_there` what it says; where it cannot be
    seen from here, `pid` is what it says, and `elsewhere` is true.
    """
    link, answer = _ask(path, Type.STATUS, time_limit)
    seen, told = link.peer.pid, link.told
    as_seen = bool(seen) and seen != told and is_process(seen, link.peer.pidfd, told)
    link.close()
    if answer.type is not Type.REPORT:
        raise RemoteProtocolError(f"{link.name} answered STATUS with {answer.type.name}")
    report = dict(answer.body)
    if as_seen:
        report.update(pid=seen, pid_there=told)
    elif not seen:
        report["elsewhere"] = True
    return report


def expect_here(report: dict[str, Any]) -> None:
    """Raises NotRunning unless the owner that a status tells of is settled, and in our own pid namespace."""
    if report.get("elsewhere") or "pid_there" in report:
        raise NotRunning("it serves, but in another pid namespace")
    if report["state"] != "serving":
        raise NotRunning(f"pid {report['pid']} is {report['state']}")


def stop(path: str, *, time_limit: float | None = None) -> int:
    """Asks the owner to stop, waits until it has ended, and returns its pid, 0 where that is in another namespace.

    The time limit is its drain time and 5 s more, by default.

    One that is just being taken over refuses; it is asked again for a while. Where only a keeper is left, ends that.
    Raises NotRunning, TimedOut or other TakeoverErrors.
    """
    patience = time.monotonic() + TIME_LIMIT
    while True:
        try:
            link, answer = _ask(path, Type.STOP, TIME_LIMIT)
        except NotRunning:
            from .keeping import end_orphan

            pid = end_orphan(ControlPath(path))
            if pid is None:
                raise
            return pid
        if answer.type is not Type.REFUSE or time.monotonic() > patience:
            break
        link.close()
        time.sleep(0.1)
    try:
        if answer.type is Type.REFUSE:
            raise Refused(answer.body["reason"], answer.body["code"])
        if answer.type is not Type.STOPPING:
            raise RemoteProtocolError(f"{link.name} answered STOP with {answer.type.name}")
        limit = answer.body["deadline"] + TIME_LIMIT if time_limit is None else time_limit
        deadline = time.monotonic() + limit
        heard: Frame | None = answer
        try:
            while heard is not None:
                heard = _next(link, deadline)
        except TimedOut:
            raise TimedOut(f"{link.name} has not ended within {limit:g} s") from None
        return link.peer.pid
    finally:
        link.close()
