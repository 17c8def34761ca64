"""The script that takeover comes from: it gives its one listener to whoever connects, with a single 0 byte."""

from __future__ import annotations

import os
import select
import socket

from ._backend import fdpass
from .control import ControlPath
from .descriptors import expect_listener
from .errors import ControlPathError, LocalError, RemoteProtocolError
from .exchange import logger
from .link import Link, close_all
from .listeners import url_of
from .namespaces import mapping_hint
from .successor import Inherited
from .wire import LEGACY_BYTE, MAGIC, MAX_DESCRIPTORS


def is_original(link: Link, path: str, patience: float) -> bool:
    """Whether the original script is at the other end, and not an incumbent; waits for its first byte, in seconds.

    Raises ControlPathError, and has closed the link, where it is neither.
    """
    poll = select.poll()
    poll.register(link.fileno(), select.POLLIN)
    poll.poll(patience * 1000)
    byte = link.first_byte()
    if byte not in (LEGACY_BYTE, bytes([MAGIC])):
        link.close()
        raise ControlPathError(f"control path {path}: who listens there does not speak takeover; choose another path")
    return byte == LEGACY_BYTE


def take_listener(link: Link, control: ControlPath) -> Inherited:
    """Its listener, which is the caller's from now on; the script serves on what it has accepted. Closes the link.

    Raises RemoteProtocolError where its byte comes with anything else than one listener, LocalError where the script is
    another user's.
    """
    try:
        uid = link.peer.uid
        if uid not in control.allowed:
            raise LocalError(f"the script at {control.path} belongs to uid {uid}, not to us{mapping_hint(uid)}")
        _, descriptors = fdpass.receive_descriptors(link.fileno(), 1, MAX_DESCRIPTORS)
        if len(descriptors) != 1:
            close_all(descriptors)
            raise RemoteProtocolError(
                f"a single 0 byte came with {len(descriptors)} descriptors instead of one listener"
            )
        pid = link.peer.pid
    finally:
        link.close()
    (descriptor,) = descriptors
    try:
        expect_listener(descriptor, "")
        with socket.socket(fileno=os.dup(descriptor)) as sock:
            url = url_of(sock)
    except BaseException:
        close_all(descriptors)
        raise
    logger.info("took %s over from the original script (pid %d)", url, pid)
    return Inherited("listener", url, url, descriptor, (0, 0))
