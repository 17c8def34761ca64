"""`_fdpass` in plain Python: the same two functions, the same errors. Their full contract is told there."""

from __future__ import annotations

import contextlib
import os
import socket
from array import array
from typing import TYPE_CHECKING, Final

from .borrowed import BorrowedSocket
from .errors import DescriptorsLost

if TYPE_CHECKING:
    from collections.abc import Sequence

    from typing_extensions import Buffer

MAX_DESCRIPTORS: Final = 252
"""SCM_MAX_FD is 253 (include/net/scm.h); musl's sendmsg takes 252."""


def send_descriptors(sock: int, data: Buffer, descriptors: Sequence[int]) -> int:
    """Sends bytes with descriptors on the first of them, in one sendmsg(2); returns how many bytes went out."""
    batch = array("i", tuple(descriptors))
    if len(batch) > MAX_DESCRIPTORS:
        raise ValueError(f"{len(batch)} descriptors in one sendmsg, at most {MAX_DESCRIPTORS}; send them in batches")
    with memoryview(data) as view:
        if not view.nbytes:
            raise ValueError("descriptors ride on the first byte of the data; send at least one byte")
        control = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, batch)] if batch else []
        with BorrowedSocket(sock, socket.AF_UNIX, socket.SOCK_STREAM, 0) as borrowed:
            return borrowed.sendmsg((view,), control, socket.MSG_NOSIGNAL)


def receive_descriptors(sock: int, size: int, max_descriptors: int) -> tuple[bytes, array[int]]:
    """Receives bytes and the descriptors that ride on them, in one recvmsg(2); the array of those is the caller's."""
    if size < 1 or not 0 <= max_descriptors <= MAX_DESCRIPTORS:
        raise ValueError(
            f"recvmsg of {size} bytes and {max_descriptors} descriptors; "
            f"from 1 byte, from 0 to {MAX_DESCRIPTORS} descriptors"
        )
    descriptors = array("i")
    # CMSG_LEN and not CMSG_SPACE: the padding that the latter adds is room enough for one descriptor too many.
    room = socket.CMSG_LEN(max_descriptors * descriptors.itemsize) if max_descriptors else 0
    with BorrowedSocket(sock, socket.AF_UNIX, socket.SOCK_STREAM, 0) as borrowed:
        data, blocks, flags, _ = borrowed.recvmsg(size, room, socket.MSG_CMSG_CLOEXEC)
    try:
        for level, kind, payload in blocks:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                descriptors.frombytes(payload[: len(payload) - len(payload) % descriptors.itemsize])
        if flags & socket.MSG_CTRUNC or len(descriptors) > max_descriptors:
            raise DescriptorsLost(
                f"recvmsg: more descriptors came than the {max_descriptors} expected or than RLIMIT_NOFILE leaves room "
                "for (MSG_CTRUNC), all were closed; raise ulimit -n if the peer is to be trusted"
            )
        return data, descriptors
    except BaseException:
        for descriptor in descriptors:
            os.close(descriptor)
        raise


def close_descriptors(descriptors: Sequence[int]) -> None:
    """Closes descriptors that nobody is going to use; negative numbers stand for none."""
    for descriptor in tuple(descriptors):
        with contextlib.suppress(OSError):
            os.close(descriptor)
