"""Callbacks that raise: said once, their connection ends, everybody else is served on."""

from __future__ import annotations

import logging
import socket
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest

from loop_cases import OurCase, Recorder, read_to_the_end


@pytest.fixture
def case(loop_module: ModuleType) -> Iterator[OurCase]:
    running = OurCase(loop_module)
    yield running
    running.close()


class Faulty(Recorder):
    fault = ""

    def __getattribute__(self, name: str) -> Any:
        if name == object.__getattribute__(self, "fault"):
            raise ZeroDivisionError(name)
        return super().__getattribute__(name)


@pytest.mark.parametrize(
    "callback", ["connection_made", "data_received", "eof_received", "pause_writing", "resume_writing"]
)
def test_a_callback_that_raises_ends_its_connection_only(
    case: OurCase, callback: str, caplog: pytest.LogCaptureFixture
) -> None:
    healthy, faulty = Recorder(), Faulty()
    faulty.fault = callback
    other = case.pair(healthy)
    listener = case.bind()
    case.serve(listener, lambda: faulty)
    client = case.connect(listener)
    if callback != "connection_made":
        assert faulty.next() == ("made",)
    if callback in ("pause_writing", "resume_writing"):
        case.call(faulty.transport.write, b"x" * 20_000_000)
    if callback == "data_received":
        client.sendall(b"x")
    elif callback == "eof_received":
        client.shutdown(socket.SHUT_WR)
    elif callback != "connection_made":
        read_to_the_end(client)
    assert type(faulty.until("lost")[1]) is ZeroDivisionError
    other.sendall(b"on")
    assert healthy.next() == ("data", b"on")
    case.call(lambda: None)
    (record,) = caplog.records
    assert callback in record.getMessage()
    assert record.exc_info is not None


def test_a_connection_lost_that_raises_is_said_and_the_descriptor_is_closed(
    case: OurCase, caplog: pytest.LogCaptureFixture
) -> None:
    faulty = Faulty()
    faulty.fault = "connection_lost"
    client = case.pair(faulty)
    case.call(faulty.transport.close)
    assert client.recv(1) == b""
    case.call(lambda: None)
    assert case.call(lambda: case.loop.connections) == 0
    assert ["connection_lost" in record.getMessage() for record in caplog.records] == [True]


def test_a_factory_that_raises_costs_its_connection_only(case: OurCase, caplog: pytest.LogCaptureFixture) -> None:
    recorder = Recorder()
    answers = iter([None, recorder])

    def factory() -> Recorder:
        answer = next(answers)
        if answer is None:
            raise ZeroDivisionError
        return answer

    listener = case.bind()
    case.serve(listener, factory)
    assert case.connect(listener).recv(1) == b""
    case.connect(listener)
    assert recorder.next() == ("made",)
    assert ["factory" in record.getMessage() for record in caplog.records] == [True]


def test_a_plain_callback_that_raises_is_said_and_the_loop_goes_on(
    case: OurCase, caplog: pytest.LogCaptureFixture
) -> None:
    case.post(lambda: 1 // 0)
    assert case.call(lambda: "on") == "on"
    assert [record.exc_info[0] for record in caplog.records if record.exc_info] == [ZeroDivisionError]
    assert caplog.records[0].levelno == logging.ERROR


@pytest.mark.parametrize("end", [KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("where", ["call_soon", "factory", "data_received", "connection_lost"])
def test_what_is_to_end_the_program_leaves_run_which_can_be_called_again(
    loop_module: ModuleType, end: type[BaseException], where: str
) -> None:
    loop = loop_module.Loop()

    class Ender(Recorder):
        def __init__(self) -> None:
            super().__init__()
            if where == "factory":
                raise end

        def data_received(self, _data: bytes) -> None:
            raise end

        def connection_lost(self, _error: Exception | None) -> None:
            if where == "connection_lost":
                raise end

    def raise_it() -> None:
        raise end

    with socket.create_server(("127.0.0.1", 0)) as listener:
        loop.listen(listener, Ender)
        with socket.create_connection(listener.getsockname()) as client:
            if where == "call_soon":
                loop.call_soon(raise_it)
            elif where == "connection_lost":
                client.shutdown(socket.SHUT_WR)
            elif where == "data_received":
                client.sendall(b"x")
            with pytest.raises(end):
                loop.run()
            if where in ("factory", "connection_lost"):
                assert client.recv(1) == b""
                assert loop.connections == 0
            loop.call_soon(loop.stop)
            loop.run()
            loop.close()


def test_closing_the_loop_ends_every_connection_in_order(loop_module: ModuleType) -> None:
    case = OurCase(loop_module)
    recorders = [Recorder() for _ in range(5)]
    clients = [case.pair(recorder) for recorder in recorders]
    case.stop()
    case.loop.close()
    assert [recorder.next() for recorder in recorders] == [("lost", None)] * 5
    assert [client.recv(1) for client in clients] == [b""] * 5
    assert all(recorder.transport.is_closing() for recorder in recorders)
    assert [recorder.transport.get_extra_info("socket").fileno() for recorder in recorders] == [-1] * 5
    recorders[0].transport.write(b"ignored")
    recorders[0].transport.abort()
    recorders[0].transport.resume_reading()
    with pytest.raises(RuntimeError, match="closed"):
        case.loop.call_soon(print)
    with pytest.raises(RuntimeError, match="closed"):
        case.loop.run()
    with pytest.raises(RuntimeError, match="closed"):
        case.loop.listen(case.bind(), Recorder)
    case.sockets[-1].close()
    for sock in case.sockets:
        sock.close()
