"""sd_notify(3): what a service says to its service manager, one datagram each, at the socket that NOTIFY_SOCKET names.

Nothing here fails the service: what cannot be said is logged once, and the service goes on without.
"""

from __future__ import annotations

import array
import contextlib
import logging
import os
import select
import socket
import struct
from collections.abc import Sequence

logger = logging.getLogger("takeover")

PATIENCE = 0.2
"""Seconds to wait for room in the service manager's queue; a control thread is not to be silent for longer."""

LONGEST_NAME = 255
"""FDNAME_MAX of systemd: characters of the name of a stored descriptor (sd_pid_notify_with_fds(3))."""


def one_line(text: str) -> str:
    """The text as the value of a field may hold it: a newline would begin the next field."""
    return "".join(character if character.isprintable() else " " for character in text)


def descriptor_name(text: str) -> str:
    """The text as FDNAME= may hold it: printable ASCII without colons; whatever else is there becomes %XX."""
    safe = "".join(
        chr(byte) if 0x20 <= byte < 0x7F and byte not in b":%" else f"%{byte:02X}" for byte in os.fsencode(text)
    )
    return safe[:LONGEST_NAME]


class Notifier:
    """Speaks to the service manager at one address: a path, or the name of an abstract socket behind an @.

    It may be used from any thread, and is mute in a forked child: that is another process, which has nothing to say.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        self._pid = os.getpid()
        self._complained = False

    def say(self, *fields: str, descriptors: Sequence[int] = ()) -> bool:
        """Sends the fields, "READY=1" for instance, in one datagram; whether the service manager was told.

        The descriptors stay the caller's; the receiver gets duplicates.
        """
        if os.getpid() != self._pid:
            return False
        message = "\n".join(one_line(field) for field in fields).encode()
        passed = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
        try:
            if not self.address.startswith(("/", "@")):
                raise OSError(0, "this is neither a path nor the name of an abstract socket")
            where = f"\0{self.address[1:]}" if self.address.startswith("@") else self.address
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
                seconds, rest = divmod(PATIENCE, 1)
                sock.setsockopt(
                    socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("@ll", int(seconds), int(rest * 1e6))
                )
                sock.sendmsg([message], passed, socket.MSG_NOSIGNAL, where)
        except (OSError, ValueError) as error:
            if not self._complained:
                self._complained = True
                reason = getattr(error, "strerror", None) or error
                logger.warning("cannot tell the service manager at %s: %s; going on without", self.address, reason)
            return False
        return True

    def wait_until_read(self, seconds: float) -> bool:
        """Returns when the service manager has read all that was said (BARRIER=1), or after so many seconds.

        To be called before a process ends: a message of one that is gone may be taken for nobody's. The manager closes
        the descriptor that comes with the barrier; one that does not know the word (systemd before 246) does so too.
        """
        reading = writing = -1
        try:
            reading, writing = os.pipe()
            said = self.say("BARRIER=1", descriptors=[writing])
            os.close(writing)
            writing = -1
            if not said:
                return False
            poll = select.poll()
            poll.register(reading, 0)
            return bool(poll.poll(seconds * 1000))
        except OSError:  # no descriptor is left for it
            return False
        finally:
            for descriptor in (reading, writing):
                if descriptor >= 0:
                    with contextlib.suppress(OSError):
                        os.close(descriptor)
