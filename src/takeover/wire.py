"""Messages to frames and back, without I/O. docs/protocol.md is the specification; this file is its implementation.

A frame is a header of eight bytes (magic, type, number of descriptors, length of the body) and a body of JSON, or of
bytes for the two messages that carry live connections (records.py knows what is in them). The descriptors ride on the
first byte of the header, and a reader takes exactly the header and then exactly the body: so a descriptor can never be
taken for another frame's, whatever the kernel splits or merges, and none is lost to a read that had no room for it. The
magic is never 0, since a lone 0 byte is how the original script hands over its listener.

Everything that arrives is checked here against SCHEMA before anybody acts on it: lengths before memory is spent,
then types and ranges of every field. Unknown fields are ignored, so that a newer peer may say more. What two readers of
JSON may take differently is refused: NaN and infinities, a name twice in an object, anything but UTF-8 (RFC 8259 leaves
the first two to the reader). What is sent is checked in the same way, so a mistake shows on the side that made it.
"""

from __future__ import annotations

import enum
import json
import re
import struct
from array import array
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

from .errors import LocalProtocolError, RemoteProtocolError

VERSIONS = (1,)
MAGIC = 0x54
LEGACY_BYTE = b"\0"
HEADER = struct.Struct("!BBHI")
MAX_DESCRIPTORS = 252

LONGEST_TEXT = 1024
"""Characters."""

_UNFIT = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udc7f\udd00-\udfff]")
"""Control characters, which break a log's lines, and lone surrogates, but not those of a path's odd bytes (PEP 383)."""

_MOST_DIGITS = 20

REFUSALS = ("busy", "version", "room", "generations", "service")


class Type(enum.IntEnum):
    """The messages; those from 32 to 47 are for live moves, all but TAKE on a channel of their own."""

    HELLO = 1
    JOIN = 2
    LISTENERS = 3
    TAKEN = 4
    HEARTBEAT = 5
    READY = 6
    COMMIT = 7
    ALIVE = 8
    SETTLED = 9
    DONE = 10
    UNDO = 11
    ABORT = 12
    REFUSE = 13
    STATUS = 14
    REPORT = 15
    STOP = 16
    STOPPING = 17
    DRAINING = 18
    BLOB = 19
    TAKE = 32
    CONNECTIONS = 33
    ADOPTED = 34
    RELEASED = 35
    FINISHED = 36
    DROPPED = 37


Check = Callable[[Any], bool]
Body = Mapping[str, Any]


class Frame(NamedTuple):
    """One message; `data` is the body of one that is not JSON. The descriptors belong to whoever holds the frame."""

    type: Type
    body: Body
    descriptors: array[int]
    data: bytes = b""


def _integer(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def _number(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < 1e12


def _flag(value: Any) -> bool:
    return type(value) is bool


def _text(value: Any) -> bool:
    return type(value) is str and len(value) <= LONGEST_TEXT and not _UNFIT.search(value)


def _word(value: Any) -> bool:
    return _text(value) and len(value) <= 32


def _counts(value: Any) -> bool:
    return type(value) is dict and len(value) <= 64 and all(_word(name) and _integer(value[name]) for name in value)


def _refusal(value: Any) -> bool:
    return type(value) is list and len(value) == 2 and _integer(value[0]) and _word(value[1])


def _list_of(check: Check, most: int) -> Check:
    return lambda value: type(value) is list and len(value) <= most and all(map(check, value))


def _record(fields: Mapping[str, Check]) -> Check:
    return lambda value: type(value) is dict and all(name in value and fields[name](value[name]) for name in fields)


_names = _list_of(_text, 20_000)
_LISTENER = {"name": _text, "url": _text, "device": _integer, "inode": _integer}
is_listener = _record(_LISTENER)
_item = _record({"role": _text, **_LISTENER})
_elder = _record({"pid": _integer, "generation": _integer, "connections": _integer})


class Schema(NamedTuple):
    """What a message may hold: the largest body in bytes, whether descriptors may ride on it, and its fields.

    Without `fields` the body is not JSON.
    """

    limit: int
    descriptors: bool
    fields: Mapping[str, Check] | None


SCHEMA: Mapping[Type, Schema] = {
    Type.HELLO: Schema(
        1 << 16,
        False,
        {
            "versions": _list_of(_integer, 64),
            "generation": _integer,
            "build": _text,
            "pid": _integer,
            "service": _text,
        },
    ),
    Type.JOIN: Schema(
        1 << 16,
        False,
        {
            "version": _integer,
            "capabilities": _list_of(_word, 64),
            "room": _integer,
            "dry_run": _flag,
            "build": _text,
            "pid": _integer,
            "service": _text,
        },
    ),
    Type.LISTENERS: Schema(1 << 20, True, {"items": _list_of(_item, MAX_DESCRIPTORS), "left": _integer}),
    Type.TAKEN: Schema(4096, False, {}),
    Type.HEARTBEAT: Schema(4096, False, {}),
    Type.READY: Schema(4 << 20, False, {"adopted": _names, "bound": _names, "unused": _names}),
    Type.COMMIT: Schema(4096, False, {}),
    Type.ALIVE: Schema(4096, False, {}),
    Type.SETTLED: Schema(4096, False, {}),
    Type.DONE: Schema(1 << 16, True, {"left": _integer, "elders": _list_of(_elder, MAX_DESCRIPTORS)}),
    Type.UNDO: Schema(1 << 16, False, {"reason": _text}),
    Type.ABORT: Schema(1 << 16, False, {"reason": _text}),
    Type.REFUSE: Schema(1 << 16, False, {"code": _text, "reason": _text}),
    Type.STATUS: Schema(4096, False, {}),
    Type.REPORT: Schema(16 << 20, False, {"pid": _integer, "generation": _integer, "state": _text}),
    Type.STOP: Schema(4096, False, {}),
    Type.STOPPING: Schema(4096, False, {"deadline": _number}),
    Type.DRAINING: Schema(4096, False, {"connections": _integer}),
    Type.BLOB: Schema(1 << 16, True, {"name": _text}),
    Type.TAKE: Schema(4096, True, {"room": _integer, "pid": _integer, "generation": _integer}),
    Type.CONNECTIONS: Schema(4 << 20, True, None),
    Type.ADOPTED: Schema(
        1 << 16, False, {"batch": _integer, "room": _integer, "refused": _list_of(_refusal, MAX_DESCRIPTORS)}
    ),
    Type.RELEASED: Schema(64 << 20, False, None),
    Type.FINISHED: Schema(1 << 16, False, {"left": _counts}),
    Type.DROPPED: Schema(4096, False, {"batch": _integer}),
}


def as_text(value: str) -> str:
    """The text as a field may hold it: cut to its length, with a blank for each character that does not fit."""
    return _UNFIT.sub(" ", value)[:LONGEST_TEXT]


def encode(kind: Type, body: Body | bytes | None = None, descriptors: int = 0) -> bytes:
    """The bytes of one frame that `descriptors` descriptors are going to ride on. Raises LocalProtocolError."""
    schema = SCHEMA[kind]
    data = body if isinstance(body, bytes) else _encode_fields(kind, schema, body or {})
    if len(data) > schema.limit or descriptors > (MAX_DESCRIPTORS if schema.descriptors else 0):
        raise LocalProtocolError(
            f"a {kind.name} of {len(data):,} bytes with {descriptors} descriptors does not fit in one frame"
        )
    return HEADER.pack(MAGIC, kind, descriptors, len(data)) + data


def _encode_fields(kind: Type, schema: Schema, body: Body) -> bytes:
    wrong = _first_wrong(schema, body)
    if wrong is not None:
        raise LocalProtocolError(f"the field {wrong} of a {kind.name} is missing or out of range")
    try:
        return json.dumps(body, separators=(",", ":"), allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise LocalProtocolError(f"the body of a {kind.name} cannot be written as JSON: {error}") from None


def _first_wrong(schema: Schema, body: Body) -> str | None:
    fields = schema.fields or {}
    return next((name for name, check in fields.items() if name not in body or not check(body[name])), None)


def _decode(data: bytearray) -> Any:
    """JSON of one meaning only; raises ValueError or RecursionError."""
    return _decoder.decode(data.decode())


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("a name comes twice in an object")
    return fields


def _whole(digits: str) -> int:
    if len(digits) > _MOST_DIGITS:
        raise ValueError(f"a number of {len(digits):,} digits")
    return int(digits)


def _constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number of JSON")


_decoder = json.JSONDecoder(object_pairs_hook=_object, parse_int=_whole, parse_constant=_constant)


class Decoder:
    """Puts frames together from reads of exactly the sizes that it asks for.

    `descriptors` are those of the frame that is still incomplete; they belong to whoever feeds the decoder, who closes
    them when the connection ends early. `expected` are the types that the other side may send at all: no memory is
    spent on the body of any other.
    """

    def __init__(self, expected: Collection[Type] = frozenset(Type)) -> None:
        self.expected = expected
        self.descriptors = array("i")
        self._header = b""
        self._body = bytearray()
        self._type = Type.HELLO
        self._length = 0

    def wants(self) -> tuple[int, int]:
        """How many bytes to read next at the most, and how many descriptors to have room for."""
        if len(self._header) < HEADER.size:
            return HEADER.size - len(self._header), MAX_DESCRIPTORS
        return min(self._length - len(self._body), 1 << 16), 0

    def feed(self, data: bytes, descriptors: array[int]) -> Frame | None:
        """Takes what one read returned; returns the frame that it completes, if any. Raises RemoteProtocolError."""
        if descriptors:
            self.descriptors.extend(descriptors)
            if self._header:
                raise RemoteProtocolError("descriptors came in the middle of a frame instead of on its first byte")
        if len(self._header) < HEADER.size:
            self._header += data
            if len(self._header) < HEADER.size:
                if self._header and self._header[0] != MAGIC:
                    raise RemoteProtocolError(f"a frame begins with byte {self._header[0]:#04x}, not {MAGIC:#04x}")
                return None
            self._begin()
        else:
            self._body += data
        return self._finish() if len(self._body) == self._length else None

    def _begin(self) -> None:
        magic, kind, count, self._length = HEADER.unpack(self._header)
        if magic != MAGIC:
            raise RemoteProtocolError(f"a frame begins with byte {magic:#04x}, not {MAGIC:#04x}")
        try:
            self._type = Type(kind)
        except ValueError:
            raise RemoteProtocolError(f"a frame has the unknown type {kind}") from None
        if self._type not in self.expected:
            raise RemoteProtocolError(f"{self._type.name} is not for this side to receive")
        schema = SCHEMA[self._type]
        if self._length > schema.limit:
            raise RemoteProtocolError(
                f"a {self._type.name} announces {self._length:,} bytes, the limit is {schema.limit:,}"
            )
        if count != len(self.descriptors) or (count and not schema.descriptors):
            raise RemoteProtocolError(
                f"a {self._type.name} announces {count} descriptors and came with {len(self.descriptors)}"
            )

    def _finish(self) -> Frame:
        if SCHEMA[self._type].fields is None:
            frame = Frame(self._type, {}, self.descriptors, bytes(self._body))
        else:
            frame = Frame(self._type, self._fields(), self.descriptors)
        self.descriptors, self._header, self._body, self._length = array("i"), b"", bytearray(), 0
        return frame

    def _fields(self) -> Body:
        try:
            body = _decode(self._body)
        except (ValueError, RecursionError) as error:
            raise RemoteProtocolError(f"the body of a {self._type.name} is not JSON: {error}") from None
        if type(body) is not dict:
            raise RemoteProtocolError(f"the body of a {self._type.name} is not a JSON object")
        wrong = _first_wrong(SCHEMA[self._type], body)
        if wrong is not None:
            raise RemoteProtocolError(f"the field {wrong} of a {self._type.name} is missing or out of range")
        return body
