"""Frames: descriptors stay with theirs however the bytes are cut, and nothing that is wrong is believed."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import tracemalloc
from array import array
from collections.abc import Callable, Iterable, Iterator
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from takeover.errors import LocalProtocolError, RemoteProtocolError
from takeover.wire import (
    HEADER,
    LONGEST_TEXT,
    MAGIC,
    MAX_DESCRIPTORS,
    SCHEMA,
    Body,
    Decoder,
    Frame,
    Type,
    as_text,
    encode,
)

NUMBERS = range(3, 3 + MAX_DESCRIPTORS)
ITEM = {"role": "listener", "name": "web", "url": "tcp://127.0.0.1:80", "device": 0, "inode": 0}
ELDER = {"pid": 1, "generation": 1, "connections": 0}
EXAMPLES: dict[Type, dict[str, Any]] = {
    Type.HELLO: {"versions": [1], "generation": 1, "build": "1.0", "pid": 1, "service": ""},
    Type.JOIN: {
        "version": 1,
        "capabilities": ["moves"],
        "room": 1000,
        "dry_run": False,
        "build": "1.0",
        "pid": 1,
        "service": "",
    },
    Type.LISTENERS: {"items": [ITEM], "left": 0},
    Type.READY: {"adopted": ["web"], "bound": [], "unused": ["old"]},
    Type.DONE: {"left": 0, "elders": [ELDER]},
    Type.UNDO: {"reason": "silence"},
    Type.ABORT: {"reason": "dry run"},
    Type.REFUSE: {"code": "busy", "reason": "somebody else"},
    Type.REPORT: {"pid": 1, "generation": 1, "state": "serving", "listeners": [{"name": "web"}], "uptime": 1.5},
    Type.STOPPING: {"deadline": 30.0},
    Type.DRAINING: {"connections": 3},
    Type.BLOB: {"name": "sessions"},
    Type.TAKE: {"room": 1000, "pid": 1, "generation": 2},
    Type.ADOPTED: {"batch": 0, "room": 1000, "refused": [[3, "version"]]},
    Type.FINISHED: {"left": {"busy": 3}},
    Type.DROPPED: {"batch": 0},
}
BINARY = tuple(kind for kind, schema in SCHEMA.items() if schema.fields is None)
"""Their bodies are not JSON, and any bytes for all that wire.py knows; tests/test_records.py has what is in them."""

texts = st.text(st.characters(exclude_categories=("Cs", "Cc")), max_size=LONGEST_TEXT)
wide_texts = (
    st.sampled_from(("", "web", "\U0001f600" * LONGEST_TEXT, "\udcff" * LONGEST_TEXT, "\\" * LONGEST_TEXT)) | texts
)
integers = st.integers(0, (1 << 63) - 1)
words = st.text(st.characters(exclude_categories=("Cs", "Cc")), max_size=32)
items = st.fixed_dictionaries({"role": words, "name": words, "url": words, "device": integers, "inode": integers})
elders = st.fixed_dictionaries({"pid": integers, "generation": integers, "connections": integers})
refusals = st.tuples(integers, words).map(list)
names = st.lists(words, max_size=8)
FIELDS: dict[Type, dict[str, st.SearchStrategy[Any]]] = {
    Type.HELLO: {
        "versions": st.lists(integers, max_size=64),
        "generation": integers,
        "build": wide_texts,
        "pid": integers,
        "service": wide_texts,
    },
    Type.JOIN: {
        "version": integers,
        "capabilities": st.lists(words, max_size=64),
        "room": integers,
        "dry_run": st.booleans(),
        "build": wide_texts,
        "pid": integers,
        "service": wide_texts,
    },
    Type.LISTENERS: {"items": st.lists(items, max_size=MAX_DESCRIPTORS), "left": integers},
    Type.READY: {"adopted": names, "bound": names, "unused": names},
    Type.DONE: {"left": integers, "elders": st.lists(elders, max_size=MAX_DESCRIPTORS)},
    Type.UNDO: {"reason": wide_texts},
    Type.ABORT: {"reason": wide_texts},
    Type.REFUSE: {"code": wide_texts, "reason": wide_texts},
    Type.REPORT: {
        "pid": integers,
        "generation": integers,
        "state": wide_texts,
        "listeners": st.lists(items, max_size=8),
    },
    Type.STOPPING: {"deadline": st.floats(0, 1e11) | integers.filter(lambda value: value < 10**12)},
    Type.DRAINING: {"connections": integers},
    Type.BLOB: {"name": wide_texts},
    Type.TAKE: {"room": integers, "pid": integers, "generation": integers},
    Type.ADOPTED: {"batch": integers, "room": integers, "refused": st.lists(refusals, max_size=MAX_DESCRIPTORS)},
    Type.FINISHED: {"left": st.dictionaries(words, integers, max_size=64)},
    Type.DROPPED: {"batch": integers},
}
messages: st.SearchStrategy[tuple[Type, Body | bytes]] = st.sampled_from(Type).flatmap(
    lambda kind: st.tuples(
        st.just(kind), st.binary(max_size=4096) if kind in BINARY else st.fixed_dictionaries(FIELDS.get(kind, {}))
    )
)
numbers = st.integers(-(10**18), 10**19) | st.floats(allow_nan=False, allow_infinity=False)
anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**18), 10**19)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


def example(kind: Type) -> Body | bytes:
    return b"\0\xff" if kind in BINARY else EXAMPLES.get(kind, {})


def body_of(frame: Frame) -> Body | bytes:
    return frame.data if frame.type in BINARY else frame.body


def raw(kind: int, data: bytes, count: int = 0, magic: int = MAGIC) -> bytes:
    """A frame as nobody honest would write it."""
    return HEADER.pack(magic, kind, count, len(data)) + data


NONE = array("i")


def fds(*descriptors: int) -> array[int]:
    return array("i", descriptors)


def feed(decoder: Decoder, data: bytes, descriptors: array[int] = NONE, step: int = 1 << 20) -> list[Frame]:
    """Feeds the decoder in reads of at most `step` bytes and of what it wants; descriptors come with the first."""
    frames = []
    while data:
        size = min(step, decoder.wants()[0])
        frame = decoder.feed(data[:size], descriptors)
        data, descriptors = data[size:], NONE
        if frame is not None:
            frames.append(frame)
    return frames


# Round trips.


def test_every_message_has_an_example_and_a_strategy() -> None:
    with_fields = {kind for kind, schema in SCHEMA.items() if schema.fields}
    assert set(SCHEMA) == set(Type)
    assert set(EXAMPLES) == set(FIELDS) == with_fields
    for kind in with_fields:
        assert set(SCHEMA[kind].fields or ()) <= set(FIELDS[kind]) & set(EXAMPLES[kind])


@given(messages, st.integers(0, MAX_DESCRIPTORS), st.integers(1, 4096))
@settings(deadline=None)
def test_what_was_encoded_is_decoded(message: tuple[Type, Body | bytes], count: int, step: int) -> None:
    kind, body = message
    count = count if SCHEMA[kind].descriptors else 0
    decoder = Decoder()
    (frame,) = feed(decoder, encode(kind, body, count), fds(*NUMBERS[:count]), step)
    assert (frame.type, body_of(frame), frame.descriptors) == (kind, body, fds(*NUMBERS[:count]))
    assert frame.body == {} if kind in BINARY else frame.data == b""
    assert decoder.descriptors == NONE and decoder.wants() == Decoder().wants()


@given(st.lists(messages, min_size=2, max_size=6), st.data())
@settings(deadline=None)
def test_frames_in_a_row_are_found_wherever_the_reads_end(
    several: list[tuple[Type, Body | bytes]], data: st.DataObject
) -> None:
    stream = b"".join(encode(kind, body) for kind, body in several)
    decoder, frames = Decoder(), []
    while stream:
        size = data.draw(st.integers(1, decoder.wants()[0]), "size")
        frame = decoder.feed(stream[:size], NONE)
        stream = stream[size:]
        if frame is not None:
            frames.append((frame.type, body_of(frame)))
    assert frames == several


@pytest.mark.parametrize("kind", sorted(set(Type) - set(BINARY)), ids=lambda kind: kind.name)
def test_a_newer_peer_may_say_more(kind: Type) -> None:
    body = {**EXAMPLES.get(kind, {}), "mood": {"good": [True, None, 1.5, "yes"]}}
    (frame,) = feed(Decoder(), encode(kind, body))
    assert frame.body == body


def test_what_is_not_for_this_side_costs_no_memory_for_its_body() -> None:
    decoder = Decoder(expected={Type.HELLO})
    with pytest.raises(RemoteProtocolError, match="READY is not for this side to receive"):
        decoder.feed(HEADER.pack(MAGIC, Type.READY, 0, SCHEMA[Type.READY].limit), NONE)


def test_a_reader_never_asks_for_more_than_a_frame() -> None:
    decoder = Decoder()
    data = encode(Type.HELLO, EXAMPLES[Type.HELLO])
    assert decoder.wants() == (HEADER.size, MAX_DESCRIPTORS)
    for read in range(1, len(data)):
        decoder.feed(data[read - 1 : read], NONE)
        size, room = decoder.wants()
        assert 1 <= size <= len(data) - read
        assert room == (MAX_DESCRIPTORS if read < HEADER.size else 0)


# Real sockets.


@contextlib.contextmanager
def pipes(count: int) -> Iterator[list[int]]:
    """Reading ends of pipes, each of which holds its own number."""
    reading = []
    try:
        for number in range(count):
            reader, writer = os.pipe()
            reading.append(reader)
            os.write(writer, number.to_bytes(2, "big"))
            os.close(writer)
        yield reading
    finally:
        for descriptor in reading:
            os.close(descriptor)


def numbers_in(descriptors: Iterable[int]) -> list[int]:
    """What the pipes hold; closes them."""
    numbers = []
    for descriptor in descriptors:
        numbers.append(int.from_bytes(os.read(descriptor, 2), "big"))
        os.close(descriptor)
    return numbers


def receive_all(fdpass: ModuleType, sock: socket.socket, decoder: Decoder) -> list[Frame]:
    """Reads all that is there."""
    frames = []
    with contextlib.suppress(BlockingIOError):
        while True:
            data, descriptors = fdpass.receive_descriptors(sock.fileno(), *decoder.wants())
            if not data:
                break
            frame = decoder.feed(data, descriptors)
            if frame is not None:
                frames.append(frame)
    return frames


def stream_of_frames(counts: list[int]) -> list[tuple[bytes, int]]:
    """Frames with and without descriptors, of different lengths."""
    frames = []
    for number, count in enumerate(counts):
        frames.append((encode(Type.LISTENERS, {"items": [ITEM] * count, "left": number}, count), count))
        frames.append((encode(Type.HEARTBEAT), 0))
    return frames


COUNTS = [1, 0, 2, 0, 3]


def test_descriptors_stay_with_their_frame_wherever_the_sender_is_cut(fdpass: ModuleType) -> None:
    frames = stream_of_frames(COUNTS)
    longest = max(len(data) for data, _ in frames)
    for cut in range(1, longest + 1):
        sender, receiver = socket.socketpair()
        with sender, receiver, pipes(sum(COUNTS)) as originals:
            receiver.setblocking(False)
            decoder, received, sent = Decoder(), [], 0
            for data, count in frames:
                fdpass.send_descriptors(sender.fileno(), data[:cut], originals[sent : sent + count])
                received += receive_all(fdpass, receiver, decoder)
                if data[cut:]:
                    sender.sendall(data[cut:])
                    received += receive_all(fdpass, receiver, decoder)
                sent += count
            expected = list(range(sum(COUNTS)))
            for frame in received:
                count = len(frame.body.get("items", ()))
                assert numbers_in(frame.descriptors) == expected[:count]
                del expected[:count]
            assert len(received) == len(frames) and not expected


def test_descriptors_stay_with_their_frame_when_everything_has_come_at_once(fdpass: ModuleType) -> None:
    frames = stream_of_frames(COUNTS)
    sender, receiver = socket.socketpair()
    with sender, receiver, pipes(sum(COUNTS)) as originals:
        receiver.setblocking(False)
        sent = 0
        for data, count in frames:
            fdpass.send_descriptors(sender.fileno(), data, originals[sent : sent + count])
            sent += count
        received = receive_all(fdpass, receiver, Decoder())
        assert [len(frame.descriptors) for frame in received] == [count for _, count in frames]
        assert [number for frame in received for number in numbers_in(frame.descriptors)] == list(range(sum(COUNTS)))


def test_descriptors_stay_with_their_frame_when_it_is_sent_one_byte_at_a_time(fdpass: ModuleType) -> None:
    sender, receiver = socket.socketpair()
    with sender, receiver, pipes(2) as originals:
        receiver.setblocking(False)
        data = encode(Type.LISTENERS, {"items": [ITEM, ITEM], "left": 0}, 2) + encode(Type.HEARTBEAT)
        fdpass.send_descriptors(sender.fileno(), data[:1], originals)
        decoder = Decoder()
        received = receive_all(fdpass, receiver, decoder)
        for byte in range(1, len(data)):
            sender.send(data[byte : byte + 1])
            received += receive_all(fdpass, receiver, decoder)
        assert [frame.type for frame in received] == [Type.LISTENERS, Type.HEARTBEAT]
        assert numbers_in(received[0].descriptors) == [0, 1]


@pytest.mark.parametrize("length", [2, 3, 4095, 65_535, 65_536, 65_537, 4 << 20])
def test_bodies_of_any_length_come_through_a_socket(fdpass: ModuleType, length: int) -> None:
    data = raw(Type.READY, b'{"adopted":[],"bound":[],"unused":[]}'.ljust(length)) if length > 40 else b""
    data = data or raw(Type.HEARTBEAT, b"{}".ljust(length))
    sender, receiver = socket.socketpair()
    with sender, receiver, pipes(1) as originals:
        sender.setblocking(False)
        receiver.setblocking(False)
        tail = encode(Type.LISTENERS, {"items": [ITEM], "left": 0}, 1)
        decoder, received, rest = Decoder(), [], memoryview(data)
        while rest:
            with contextlib.suppress(BlockingIOError):
                rest = rest[sender.send(rest) :]
            received += receive_all(fdpass, receiver, decoder)
        fdpass.send_descriptors(sender.fileno(), tail, originals)
        received += receive_all(fdpass, receiver, decoder)
        assert [frame.type for frame in received][1:] == [Type.LISTENERS]
        assert received[0].descriptors == NONE and numbers_in(received[1].descriptors) == [0]


@pytest.mark.parametrize("announced", [0, 1])
def test_descriptors_in_the_middle_of_a_frame_never_count_for_another(fdpass: ModuleType, announced: int) -> None:
    """A read of the header takes what was sent in two halves as one: there they are the frame's own, later never."""
    data = encode(Type.LISTENERS, {"items": [ITEM], "left": 0}, announced)
    for place in range(1, len(data)):
        sender, receiver = socket.socketpair()
        with sender, receiver, pipes(1) as originals:
            receiver.setblocking(False)
            decoder = Decoder()
            before = len(os.listdir("/proc/self/fd"))
            sender.send(data[:place])
            fdpass.send_descriptors(sender.fileno(), data[place:] + encode(Type.HEARTBEAT), originals)
            if announced and place < HEADER.size:
                frame, heartbeat = receive_all(fdpass, receiver, decoder)
                assert numbers_in(frame.descriptors) == [0] and heartbeat.descriptors == NONE
            else:
                with pytest.raises(RemoteProtocolError):
                    receive_all(fdpass, receiver, decoder)
            for descriptor in decoder.descriptors:
                os.close(descriptor)
            assert len(os.listdir("/proc/self/fd")) == before, f"after {place} bytes"


# What is wrong.


@pytest.mark.parametrize("magic", [0x00, 0x53, 0x7B, 0xFF])
def test_what_is_no_frame_is_refused_at_its_first_byte(magic: int) -> None:
    with pytest.raises(RemoteProtocolError, match="begins with byte"):
        Decoder().feed(bytes([magic]), NONE)
    with pytest.raises(RemoteProtocolError, match="begins with byte"):
        Decoder().feed(HEADER.pack(magic, Type.HEARTBEAT, 0, 2), NONE)


@given(st.integers(0, 255).filter(lambda kind: kind not in set(Type)))
def test_an_unknown_type_is_refused(kind: int) -> None:
    with pytest.raises(RemoteProtocolError, match=f"unknown type {kind}"):
        feed(Decoder(), raw(kind, b"{}"))


@pytest.mark.parametrize("kind", Type, ids=lambda kind: kind.name)
def test_a_length_above_the_limit_is_refused_before_any_of_it_is_read(kind: Type) -> None:
    for length in (SCHEMA[kind].limit + 1, 0xFFFFFFFF):
        with pytest.raises(RemoteProtocolError, match="the limit is"):
            Decoder().feed(HEADER.pack(MAGIC, kind, 0, length), NONE)


def test_memory_is_spent_on_what_came_and_not_on_what_was_announced() -> None:
    decoder = Decoder()
    tracemalloc.start()
    try:
        decoder.feed(HEADER.pack(MAGIC, Type.REPORT, 0, SCHEMA[Type.REPORT].limit), NONE)
        for _ in range(1000):
            decoder.feed(b"[", NONE)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1 << 16, f"{peak:,} bytes for 1,000"


@pytest.mark.parametrize("kind", Type, ids=lambda kind: kind.name)
def test_descriptors_nobody_asked_for_are_refused_and_stay_with_the_caller(kind: Type) -> None:
    announced = 0 if SCHEMA[kind].descriptors else 1
    decoder = Decoder()
    data = raw(kind, encode(kind, example(kind))[HEADER.size :], announced)
    with pytest.raises(RemoteProtocolError, match="announces"):
        feed(decoder, data, fds(77))
    assert decoder.descriptors == fds(77)


@pytest.mark.parametrize(("announced", "came"), [(1, []), (2, [7]), (0, [7]), (255, []), (253, list(NUMBERS))])
def test_another_number_of_descriptors_than_announced_is_refused(announced: int, came: list[int]) -> None:
    with pytest.raises(RemoteProtocolError, match=f"announces {announced} descriptors and came with {len(came)}"):
        feed(Decoder(), raw(Type.LISTENERS, b'{"items":[],"left":0}', announced), fds(*came))


def test_descriptors_after_the_first_byte_are_refused_and_stay_with_the_caller() -> None:
    data = encode(Type.LISTENERS, {"items": [ITEM], "left": 0}, 1)
    for place in range(1, len(data)):
        decoder = Decoder()
        with contextlib.suppress(RemoteProtocolError):  # a body without its descriptor is refused already
            feed(decoder, data[:place])
            with pytest.raises(RemoteProtocolError, match="in the middle of a frame"):
                decoder.feed(data[place : place + 1], fds(77))
            assert decoder.descriptors == fds(77)


NOT_JSON = {
    "nothing": b"",
    "half": b'{"reason":',
    "no object": b'["reason"]',
    "a string": b'"reason"',
    "two": b"{}{}",
    "NaN": b'{"reason":"x","more":NaN}',
    "Infinity": b'{"reason":"x","more":-Infinity}',
    "a name twice": b'{"reason":"x","reason":"y"}',
    "a name twice, deeper": b'{"reason":"x","more":[{"a":1,"a":1}]}',
    "UTF-16": '{"reason":"x"}'.encode("utf-16"),
    "a byte order mark": b'\xef\xbb\xbf{"reason":"x"}',
    "invalid UTF-8": b'{"reason":"\xff\xfe"}',
    "an overlong form": b'{"reason":"\xc0\xaf"}',
    "a surrogate in UTF-8": b'{"reason":"\xed\xa0\x80"}',
    "a NUL": b'{"reason":"x"}\0',
    "deep nesting": b'{"reason":' + b"[" * 30_000,
    "deep objects": b'{"a":' * 5_000,
    "a very long integer": b'{"reason":"x","more":' + b"9" * 60_000 + b"}",
    "a comment": b'{"reason":"x"/**/}',
}


@pytest.mark.parametrize("data", NOT_JSON.values(), ids=NOT_JSON)
def test_a_body_that_is_not_strict_json_is_refused(data: bytes) -> None:
    with pytest.raises(RemoteProtocolError, match=r"is not JSON|is not a JSON object"):
        feed(Decoder(), raw(Type.ABORT, data))


@pytest.mark.parametrize(
    "text",
    [r"\u0000", r"a\nb", r"\u001b[31m", r"\u007f", r"\u009b", r"\ud800", r"\udfff", r"\udc7f", "x" * 1025],
    ids=["NUL", "line", "escape", "DEL", "CSI", "high surrogate", "low surrogate", "ASCII surrogate", "too long"],
)
def test_a_text_that_would_spoil_a_log_is_refused(text: str) -> None:
    with pytest.raises(RemoteProtocolError, match="the field reason of a ABORT is missing or out of range"):
        feed(Decoder(), raw(Type.ABORT, f'{{"reason":"{text}"}}'.encode()))


def test_a_path_of_odd_bytes_survives() -> None:
    url = "unix:" + os.fsdecode(b"/run/\xff\xfe.sock")
    (frame,) = feed(Decoder(), encode(Type.LISTENERS, {"items": [{**ITEM, "url": url}], "left": 0}, 1), fds(7))
    assert os.fsencode(frame.body["items"][0]["url"]) == b"unix:/run/\xff\xfe.sock"


def check_of(kind: Type, name: str) -> Callable[[Any], bool]:
    fields = SCHEMA[kind].fields
    assert fields is not None
    return fields[name]


PLACES = [(kind, name) for kind, schema in SCHEMA.items() for name in schema.fields or ()]


@pytest.mark.parametrize(("kind", "name"), PLACES, ids=[f"{kind.name}.{name}" for kind, name in PLACES])
def test_a_field_of_a_wrong_type_or_range_is_refused(kind: Type, name: str) -> None:
    right = check_of(kind, name)

    @given(anything.filter(lambda value: not right(value)))
    @settings(max_examples=30, deadline=None)
    def refused(wrong: Any) -> None:
        body = {**EXAMPLES[kind], name: wrong}
        with pytest.raises(RemoteProtocolError, match=f"the field {name} of a {kind.name} is missing or out of range"):
            feed(Decoder(), raw(kind, json.dumps(body).encode()))
        with pytest.raises(LocalProtocolError, match=f"the field {name} of a {kind.name}"):
            encode(kind, body)

    refused()
    missing = {other: value for other, value in EXAMPLES[kind].items() if other != name}
    with pytest.raises(RemoteProtocolError, match=f"the field {name} of a {kind.name}"):
        feed(Decoder(), raw(kind, json.dumps(missing).encode()))


@pytest.mark.parametrize("wrong", [True, -1, 1.0, 1 << 63, "1", None, [], 10**19], ids=str)
def test_an_integer_is_nothing_else(wrong: object) -> None:
    assert not check_of(Type.DRAINING, "connections")(wrong)


@pytest.mark.parametrize("wrong", [True, -0.1, 1e12, float("inf"), float("nan"), "1", None], ids=str)
def test_a_number_of_seconds_is_nothing_else(wrong: object) -> None:
    assert not check_of(Type.STOPPING, "deadline")(wrong)


@pytest.mark.parametrize("field", ["role", "name", "url", "device", "inode"])
def test_each_part_of_a_listener_is_checked(field: str) -> None:
    items_check = check_of(Type.LISTENERS, "items")
    assert items_check([ITEM]) and not items_check([{**ITEM, field: None}])
    assert not items_check([{name: value for name, value in ITEM.items() if name != field}])
    assert not items_check([ITEM] * (MAX_DESCRIPTORS + 1))


@pytest.mark.parametrize(
    "wrong",
    [
        [3],
        ["version", 3],
        [True, "version"],
        [-1, "version"],
        [3.0, "version"],
        [3, "version", 1],
        [3, "x" * 33],
        [3, "\n"],
    ],
    ids=str,
)
def test_a_refusal_is_an_index_and_a_word(wrong: object) -> None:
    check = check_of(Type.ADOPTED, "refused")
    assert check([]) and check([[0, ""], [251, "version"]])
    assert not check([[0, ""], wrong]) and not check([wrong])
    assert not check([[0, ""]] * (MAX_DESCRIPTORS + 1))


@pytest.mark.parametrize(
    "wrong", [[], [["busy", 3]], {"busy": -1}, {"busy": 1.0}, {"busy": True}, {"x" * 33: 1}, {"a\nb": 1}], ids=str
)
def test_counts_are_whole_numbers_by_words(wrong: object) -> None:
    check = check_of(Type.FINISHED, "left")
    assert check({}) and check({"busy": 0, "": (1 << 63) - 1})
    assert not check(wrong)
    assert check({str(number): number for number in range(64)})
    assert not check({str(number): number for number in range(65)})


@pytest.mark.parametrize("kind", BINARY, ids=lambda kind: kind.name)
def test_a_binary_body_may_be_empty_and_is_not_looked_into(kind: Type) -> None:
    for data in (b"", b"{", b"\0" * 70_000, bytes(range(256)) * 3):
        (frame,) = feed(Decoder(), encode(kind, data))
        assert (frame.data, frame.body) == (data, {}) and type(frame.data) is bytes


@given(st.binary(max_size=300), st.integers(1, 64))
def test_garbage_raises_nothing_but_a_protocol_error(data: bytes, step: int) -> None:
    with contextlib.suppress(RemoteProtocolError):
        feed(Decoder(), data, step=step)


@given(st.sampled_from(Type), st.binary(max_size=300))
def test_a_garbled_body_raises_nothing_but_a_protocol_error(kind: Type, data: bytes) -> None:
    with contextlib.suppress(RemoteProtocolError):
        feed(Decoder(), raw(kind, data))


@given(messages, st.data())
@settings(deadline=None)
def test_a_flipped_byte_raises_nothing_but_a_protocol_error(
    message: tuple[Type, Body | bytes], data: st.DataObject
) -> None:
    frame = bytearray(encode(*message))
    frame[data.draw(st.integers(0, len(frame) - 1), "place")] = data.draw(st.integers(0, 255), "byte")
    with contextlib.suppress(RemoteProtocolError):
        feed(Decoder(), bytes(frame))


# The sender's side.


def test_a_frame_that_cannot_be_read_is_not_written() -> None:
    with pytest.raises(LocalProtocolError, match="does not fit in one frame"):
        encode(Type.LISTENERS, {"items": [], "left": 0}, MAX_DESCRIPTORS + 1)
    with pytest.raises(LocalProtocolError, match="does not fit in one frame"):
        encode(Type.HEARTBEAT, descriptors=1)
    with pytest.raises(LocalProtocolError, match="does not fit in one frame"):
        encode(Type.HEARTBEAT, {"more": "x" * 4096})
    for kind in BINARY:
        with pytest.raises(LocalProtocolError, match="does not fit in one frame"):
            encode(kind, bytes(SCHEMA[kind].limit + 1))
    with pytest.raises(LocalProtocolError, match="cannot be written as JSON"):
        encode(Type.HEARTBEAT, {"more": float("nan")})
    with pytest.raises(LocalProtocolError, match="cannot be written as JSON"):
        encode(Type.HEARTBEAT, {"more": b"bytes"})


@given(st.text())
def test_any_text_can_be_made_to_fit_a_field(text: str) -> None:
    (frame,) = feed(Decoder(), encode(Type.ABORT, {"reason": as_text(text * 40)}))
    assert len(frame.body["reason"]) <= LONGEST_TEXT
    if text.isprintable():
        assert frame.body["reason"] == (text * 40)[:LONGEST_TEXT]
