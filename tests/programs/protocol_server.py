"""A server of protocol classes on serve(), whose connections behave as the test says, all of them or one at a time."""

import json
import os
import sys
import time
import zlib
from collections.abc import Callable
from typing import Any

from wishes import prepare

import takeover
from takeover import server
from takeover.exchange import Exchange
from takeover.records import NOT_NOW

WISHES: dict[str, Any] = json.loads(sys.argv[1])
open_protocols: set["Base"] = set()
in_flight: list[Callable[[], object]] = []
"""What handlers do the moment that their connections have been sent off."""


class Base:
    """What both kinds share: the state that travels, and the ways in which it may fail to.

    `poison`, set by a line of the client or for all by the test, says how this one fails: see export_state().
    """

    loop: Any
    transport: Any

    def __init__(self) -> None:
        self.kept: dict[str, Any] = {"count": 0, "checksum": 0, "partial": "", "poison": WISHES.get("poison", "")}
        self.full = False
        self.told = 0

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.was_paused = not transport.is_reading()
        open_protocols.add(self)
        if self.was_paused:
            self.loop.call_later(0.05, transport.resume_reading)

    def connection_lost(self, error: Exception | None) -> None:
        open_protocols.discard(self)
        if "losses" in WISHES:
            print(f"lost {type(error).__name__} {self.kept['count']}", flush=True)
        self.say_farewell("lost")

    def connection_moved(self) -> None:
        open_protocols.discard(self)
        self.say_farewell("moved")

    def say_farewell(self, how: str) -> None:
        if "farewells" in WISHES:
            print(f"farewell {self.kept['count']} {how}", flush=True)
            if WISHES["farewells"] == "raise":
                raise ValueError("it does not want to go")

    def pause_writing(self) -> None:
        self.full = True
        self.told += 1

    def resume_writing(self) -> None:
        self.full = False

    def tick(self) -> None:
        """The timer: something is written to every connection, also to those that are on their way."""


class Movable(Base):
    """With state."""

    state_version = WISHES.get("version", 1)
    if "readable" in WISHES:
        readable_state_versions = WISHES["readable"]

    def export_state(self) -> Any:
        poison, _, number = self.kept["poison"].partition(" ")
        state = json.dumps(self.kept).encode()
        if poison == "raise":
            raise ValueError("the state cannot be exported")
        if poison == "memory":
            raise MemoryError
        if poison == "exit":
            raise SystemExit(7)
        if poison == "wrong":
            return "not bytes"
        if poison == "busy":
            left = int(number)
            self.kept["poison"] = f"busy {left - 1}" if left > 1 else ""
            return NOT_NOW
        if poison == "huge":
            return state + b"\0" + bytes(int(number))
        if poison in ("write", "close", "abort", "write_eof", "writes_and_closes"):
            in_flight.append(getattr(self, f"{poison}_in_flight"))
        return bytearray(state)

    def write_in_flight(self) -> None:
        _, _, number = self.kept["poison"].partition(" ")
        padding = ', "padding": "%s"' % ("x" * int(number)) if number else ""
        self.transport.write(b'{"in flight": %d%s}\n' % (os.getpid(), padding.encode()))

    def close_in_flight(self) -> None:
        self.transport.close()

    def abort_in_flight(self) -> None:
        self.transport.abort()

    def write_eof_in_flight(self) -> None:
        self.kept["mute"] = True
        self.transport.write_eof()

    def writes_and_closes_in_flight(self) -> None:
        self.write_in_flight()
        self.transport.close()

    def import_state(self, state: Any) -> None:
        time.sleep(WISHES.get("import", 0))
        text, _, ballast = bytes(state).partition(b"\0")
        self.kept = json.loads(text)
        self.kept["ballast"] = len(ballast)
        self.ballast = ballast if "keep" in WISHES else b""
        if self.kept["poison"] == "leave":
            raise SystemExit(7)
        if self.kept["poison"] == "refuse memory":
            raise MemoryError
        if self.kept["poison"] == "refuse":
            raise ValueError("the state cannot be imported")
        if self.kept["poison"].partition(" ")[0] == "huge":
            self.kept["poison"] = ""


class Sums(Movable if not WISHES.get("unmovable") else Base):  # type: ignore[misc]
    """Echoes; at the end it says how many bytes it has seen, their checksum, and how often it has moved."""

    def data_received(self, data: bytes) -> None:
        self.kept["count"] += len(data)
        self.kept["checksum"] = zlib.crc32(data, self.kept["checksum"])
        self.transport.write(data)

    def pause_writing(self) -> None:
        super().pause_writing()
        self.transport.pause_reading()

    def resume_writing(self) -> None:
        super().resume_writing()
        self.transport.resume_reading()

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        open_protocols.add(self)

    def eof_received(self) -> None:
        moved = self.transport.get_extra_info("takeover")
        times = moved.times if moved else 0
        self.transport.write(b"%d %d %d" % (self.kept["count"], self.kept["checksum"], times))


class Lines(Movable if not WISHES.get("unmovable") else Base):  # type: ignore[misc]
    """Answers each line, once it is whole, with what it knows; some lines are commands."""

    def data_received(self, data: bytes) -> None:
        *lines, self.kept["partial"] = (self.kept["partial"] + data.decode()).split("\n")
        for line in lines:
            self.kept["count"] += 1
            self.line(line)

    def eof_received(self) -> bool:
        if "mute" in self.kept:
            print("end of file", flush=True)
        else:
            self.transport.write(b'{"eof": %d}\n' % os.getpid())
        return "stay" in self.kept

    def line(self, line: str) -> None:
        command, _, argument = line.partition(" ")
        if "mute" in self.kept:
            print(f"line {line}", flush=True)
            return
        if command == "poison":
            self.kept["poison"] = argument
            if argument == "version":
                self.state_version = "one"
        elif command == "stay":
            self.kept["stay"] = True
        elif command == "big":
            self.transport.write(b"x" * int(argument))
        elif command == "limits":
            self.transport.set_write_buffer_limits(*map(int, argument.split()))
        elif command == "pause":
            self.transport.pause_reading()
        self.answer(line)
        if command == "close":
            self.transport.close()
        elif command == "write_eof":
            self.kept["mute"] = True
            self.transport.write_eof()

    def answer(self, line: str) -> None:
        moved = self.transport.get_extra_info("takeover")
        answer = {
            "line": line,
            "pid": os.getpid(),
            "moved": list(moved) if moved else None,
            "was_paused": self.was_paused,
            "full": self.full,
            "told": self.told,
            "limits": self.transport.get_write_buffer_limits(),
            "peer": self.transport.get_extra_info("peername"),
            "local": self.transport.get_extra_info("sockname"),
            **self.kept,
        }
        self.transport.write(json.dumps(answer, default=repr).encode() + b"\n")

    def tick(self) -> None:
        self.kept["ticks"] = self.kept.get("ticks", 0) + 1
        if "mute" not in self.kept:
            self.transport.write(b'{"tick": %d, "pid": %d}\n' % (self.kept["ticks"], os.getpid()))


def act_in_flight() -> None:
    """Has what is in flight acted on in the very turn of the loop in which it was sent."""
    before = Exchange.boundary

    def boundary(step: str) -> None:
        if before is not None:
            before(step)
        while step == "giver after CONNECTIONS" and in_flight:
            in_flight.pop()()

    Exchange.boundary = boundary


def tick() -> None:
    for protocol in list(open_protocols):
        protocol.tick()
    Base.loop.call_later(WISHES["timer"], tick)


class Server(server.NativeServer):
    """Lets the protocols have the loop."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        Base.loop = self.loop
        if "timer" in WISHES:
            self.loop.call_later(WISHES["timer"], tick)


def main() -> None:
    """Its argument: {"options" of serve(), "kind": "Lines" or "Sums", what prepare() grants, and more}."""
    prepare(WISHES)
    act_in_flight()
    server.NativeServer = Server  # type: ignore[misc]
    try:
        server.serve({"Lines": Lines, "Sums": Sums}[WISHES.get("kind", "Lines")], **WISHES["options"])
    except takeover.errors.TakeoverError as error:
        print(f"takeover: {type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(error.exit_status)


main()
