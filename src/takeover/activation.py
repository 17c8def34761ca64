"""sd_listen_fds(3): the sockets that a service manager gives to a process that it starts, from descriptor 3 on.

They are those of a .socket unit, and those that the service has put into the manager's store before it crashed. What
each of them is, only the kernel says; LISTEN_FDNAMES has names for the log.
"""

from __future__ import annotations

import logging
import os
import socket
from typing import NamedTuple

from .borrowed import BorrowedSocket
from .descriptors import Description, describe
from .errors import ListenError
from .link import close_all
from .listeners import url_of

logger = logging.getLogger("takeover")

FIRST = 3
"""SD_LISTEN_FDS_START of sd-daemon.h."""

VARIABLES = ("LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES", "LISTEN_PIDFDID")


class Given(NamedTuple):
    """A socket from the service manager. What an older process has handed over has the same fields, and more.

    `identity` is never that of a file: the path of a UNIX socket is the manager's, or has outlived a crash for it.
    """

    name: str
    url: str
    descriptor: int
    identity: tuple[int, int] = (0, 0)


def take() -> list[Given]:
    """The sockets that were given to this process, which are the caller's and close-on-exec; none if called again.

    What is no socket to accept on or to receive from stays open, and is somebody else's business. The environment is
    cleared, so that no child takes them for its own.
    """
    asked = {name: os.environ.pop(name, "") for name in VARIABLES}
    if not asked["LISTEN_FDS"]:
        return []
    if asked["LISTEN_PID"] != str(os.getpid()):
        logger.warning(
            "LISTEN_FDS is for pid %s, this is pid %d: its sockets are not used; start the server with exec",
            asked["LISTEN_PID"] or "?",
            os.getpid(),
        )
        return []
    if not (asked["LISTEN_FDS"].isascii() and asked["LISTEN_FDS"].isdigit()):
        logger.warning("LISTEN_FDS=%s is not a number: ignored", asked["LISTEN_FDS"])
        return []
    names = asked["LISTEN_FDNAMES"].split(":") if asked["LISTEN_FDNAMES"] else []
    given: list[Given] = []
    for index in range(min(int(asked["LISTEN_FDS"]), os.sysconf("SC_OPEN_MAX"))):
        descriptor = FIRST + index
        name = names[index] if index < len(names) else "unknown"
        try:
            os.set_inheritable(descriptor, False)
            found = describe(descriptor)
        except OSError as error:
            logger.warning("descriptor %d (%s) of LISTEN_FDS: %s", descriptor, name, error.strerror)
            continue
        if not _is_listener(found):
            logger.warning(
                "descriptor %d (%s) of LISTEN_FDS is not a socket to listen on: left alone", descriptor, name
            )
            continue
        with BorrowedSocket(descriptor) as sock:
            url = url_of(sock)
        if found.family == socket.AF_INET6 and not found.v6only:
            url += "?v6only=0"
        if found.family == socket.AF_UNIX and not os.path.exists(found.address):
            logger.warning("nobody can reach %s (%s of LISTEN_FDS) any more, its file is gone: closed", url, name)
            close_all([descriptor])
        else:
            given.append(Given(name, url, descriptor))
    return without_duplicates(given, [])


def without_duplicates(given: list[Given], descriptors: list[int]) -> list[Given]:
    """Closes what is the same socket as one of the descriptors or as an earlier one given; returns the rest.

    A socket may come twice, from its .socket unit and from the store, or from the incumbent as well.
    """
    known = {_file(descriptor) for descriptor in descriptors}
    rest = []
    for each in given:
        file = _file(each.descriptor)
        if file in known:
            close_all([each.descriptor])
        else:
            known.add(file)
            rest.append(each)
    return rest


def in_words(given: list[Given]) -> str:
    """What the service manager has given, for a message."""
    return "the service manager has given " + ", ".join(f"{each.url} ({each.name})" for each in given)


def explain(error: ListenError, given: list[Given]) -> ListenError:
    """What could not be bound may be what was given, and asked for in other words."""
    return ListenError(f"{error}; {in_words(given)}: ask for what it has") if given else error


def close_unused(given: list[Given]) -> None:
    """Closes what nobody has asked for, and says so: clients that the manager has let in there would wait in vain."""
    if given:
        logger.warning("%s, which nobody has asked for here: closed", in_words(given))
        close_all([each.descriptor for each in given])
        given.clear()


def _is_listener(found: Description) -> bool:
    """Whether it could be asked for: a stream socket that listens, a datagram socket that is bound."""
    if found.family == socket.AF_UNIX:
        return found.listening and found.type == socket.SOCK_STREAM and bool(found.address)
    if found.family not in (socket.AF_INET, socket.AF_INET6):
        return False
    return found.listening or (found.type == socket.SOCK_DGRAM and found.address[1] != 0)


def _file(descriptor: int) -> tuple[int, int]:
    status = os.fstat(descriptor)
    return status.st_dev, status.st_ino
