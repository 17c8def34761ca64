"""Send and receive descriptors over an AF_UNIX stream socket; `_fdpass_py` is the same interface in plain Python."""

from array import array
from collections.abc import Sequence
from typing import Final

from typing_extensions import Buffer

MAX_DESCRIPTORS: Final = 252

def send_descriptors(sock: int, data: Buffer, descriptors: Sequence[int]) -> int: ...
def receive_descriptors(sock: int, size: int, max_descriptors: int) -> tuple[bytes, array[int]]: ...
def close_descriptors(descriptors: Sequence[int]) -> None: ...
