"""Live connections as bytes: whatever they hold comes back, and nothing that is wrong is believed."""

from __future__ import annotations

import contextlib
import os
import socket
import struct

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from takeover.errors import RemoteProtocolError
from takeover.records import (
    LARGEST_PART,
    RECORD,
    Record,
    pack_peer,
    pack_release,
    seal,
    unpack,
    unpack_peer,
    unpack_release,
    unseal,
)

sizes = st.integers(0, (1 << 32) - 1)
parts = st.binary(max_size=300)
some_records = st.builds(
    Record,
    listener=st.integers(0, (1 << 64) - 1),
    flags=st.integers(0, 255),
    times=st.integers(0, 255),
    peer=parts,
    version=st.integers(-(1 << 31), (1 << 31) - 1),
    high=sizes,
    low=sizes,
    unread=parts,
    unsent=parts,
    state=parts,
)
indices = st.integers(0, (1 << 16) - 1)
SIMPLE = Record(1, 0, 0, b"", 0, 65536, 16384, b"", b"unsent", b"state")


@given(st.lists(some_records, max_size=5))
def test_what_was_packed_is_unpacked(several: list[Record]) -> None:
    packed = b"".join(record.pack() for record in several)
    assert unpack(packed, len(several)) == several
    assert len(packed) == sum(RECORD.size + sum(map(len, (r.peer, r.unread, r.unsent, r.state))) for r in several)


@given(some_records, st.integers(256, 10_000))
def test_more_moves_than_can_be_counted_stay_at_the_most(record: Record, times: int) -> None:
    (found,) = unpack(record._replace(times=times).pack(), 1)
    assert found == record._replace(times=255)


@given(st.lists(some_records, min_size=1, max_size=3), st.data())
def test_records_that_are_cut_or_too_long_or_too_many_are_refused(several: list[Record], data: st.DataObject) -> None:
    packed = b"".join(record.pack() for record in several)
    cut = packed[: data.draw(st.integers(0, len(packed) - 1), "size")]
    for wrong, count in ((cut, len(several)), (packed + b"\0", len(several)), (packed, len(several) + 1), (packed, 0)):
        with pytest.raises(RemoteProtocolError):
            unpack(wrong, count)


@pytest.mark.parametrize("field", [0, *range(28, 40, 4)])
@pytest.mark.parametrize("by", [-1, 1, 1 << 31])
def test_a_record_whose_parts_do_not_fill_it_is_refused(field: int, by: int) -> None:
    packed = bytearray(SIMPLE.pack())
    (value,) = struct.unpack_from("!I", packed, field)
    struct.pack_into("!I", packed, field, (value + by) % (1 << 32))
    with pytest.raises(RemoteProtocolError):
        unpack(packed, 1)


@given(st.binary(max_size=200), st.integers(0, 3))
@example(SIMPLE.pack()[:-1], 1)
def test_garbage_raises_nothing_but_a_protocol_error(data: bytes, count: int) -> None:
    with contextlib.suppress(RemoteProtocolError):
        unpack(data, count)
    with contextlib.suppress(RemoteProtocolError):
        unpack_release(data)
    unpack_peer(data)


def test_a_connection_that_no_record_can_hold_is_not_packed() -> None:
    class Huge(bytes):
        def __len__(self) -> int:
            return LARGEST_PART

    with pytest.raises(OverflowError, match="a connection with"):
        SIMPLE._replace(state=Huge()).pack()


@pytest.mark.parametrize(
    ("family", "name"),
    [
        (socket.AF_INET, ("127.0.0.1", 65535)),
        (socket.AF_INET6, ("fe80::1", 80, 7, 3)),
        (socket.AF_UNIX, "/run/a.sock"),
        (socket.AF_UNIX, os.fsdecode(b"/run/\xff.sock")),
        (socket.AF_UNIX, b"\0abstract"),
        (socket.AF_UNIX, ""),
    ],
)
def test_names_of_peers_come_back(family: int, name: object) -> None:
    assert unpack_peer(pack_peer(family, name)) == name


@pytest.mark.parametrize("peer", [b"", b"\4", b"\4abcde", b"\4abcdefg", b"\6" + b"x" * 25, b"\7abc"])
def test_a_garbled_name_is_no_name(peer: bytes) -> None:
    assert unpack_peer(peer) is None


@given(sizes, st.lists(indices, max_size=5, unique=True), st.dictionaries(indices, st.binary(max_size=100), max_size=5))
def test_a_release_comes_back(batch: int, kept: list[int], tails: dict[int, bytes]) -> None:
    packed = pack_release(batch, kept, tails)
    assert unpack_release(packed) == (batch, kept, tails)
    for wrong in (packed[:5], packed + b"\0", packed + struct.pack("!HI", 1, 2) + b"x"):
        with pytest.raises(RemoteProtocolError, match="the body of a RELEASED is garbled"):
            unpack_release(wrong)


@given(st.binary(max_size=10_000))
def test_what_was_sealed_is_read_without_the_descriptor(data: bytes) -> None:
    file = seal("test", data)
    try:
        view = unseal(file)
        for size in {0, len(data) + 1} - {len(data)}:
            with pytest.raises(OSError, match="not permitted"):
                os.ftruncate(file, size)
        with pytest.raises(OSError, match="not permitted"):
            os.pwrite(file, b"x", 0)
        assert not os.get_inheritable(file)
    finally:
        os.close(file)
    assert view == data and view.readonly


def test_a_file_that_can_still_shrink_is_not_mapped() -> None:
    file = os.memfd_create("test", os.MFD_ALLOW_SEALING)
    reading, writing = os.pipe()
    try:
        with pytest.raises(RemoteProtocolError, match="a memfd that is not sealed"):
            unseal(file)
        with pytest.raises(RemoteProtocolError, match="is not a memfd"):
            unseal(reading)
    finally:
        for descriptor in (file, reading, writing):
            os.close(descriptor)
