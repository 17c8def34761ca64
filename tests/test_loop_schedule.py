"""Callbacks, timers, threads and signals."""

from __future__ import annotations

import contextlib
import gc
import itertools
import os
import signal
import socket
import threading
import weakref
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest

from loop_cases import LIMIT, OurCase


@pytest.fixture
def loop(loop_module: ModuleType) -> Iterator[Any]:
    loop = loop_module.Loop()
    yield loop
    loop.close()


def test_callbacks_run_in_order_with_their_arguments(loop: Any) -> None:
    seen: list[int] = []
    for number in range(5):
        loop.call_soon(seen.append, number)
    loop.call_soon(loop.stop)
    loop.call_soon(seen.append, 5)
    loop.run()
    assert seen == [0, 1, 2, 3, 4, 5]


def test_what_a_callback_adds_runs_in_the_next_turn(loop: Any) -> None:
    seen: list[str] = []

    def first() -> None:
        loop.call_soon(seen.append, "added")
        loop.stop()

    loop.call_soon(first)
    loop.run()
    assert seen == []
    loop.stop()
    loop.run()
    assert seen == ["added"]


def test_timers_run_in_the_order_of_their_times(loop: Any) -> None:
    seen: list[str] = []
    now = loop.time()
    late = loop.call_at(now + 0.03, seen.append, "late")
    loop.call_at(now + 0.03, seen.append, "later, same time")
    loop.call_later(0.01, seen.append, "early")
    loop.call_at(now - 1, seen.append, "overdue")
    loop.call_at(now + 0.04, loop.stop)
    assert late.when() == now + 0.03
    loop.run()
    assert seen == ["overdue", "early", "late", "later, same time"]
    assert loop.time() >= now + 0.04


def test_a_cancelled_callback_does_not_run_and_lets_go_of_its_arguments(loop: Any) -> None:
    class Argument:
        pass

    seen: list[Any] = []
    for make in (loop.call_soon, lambda *args: loop.call_later(3600, *args)):
        argument = Argument()
        reference = weakref.ref(argument)
        timer = make(seen.append, argument)
        assert not timer.cancelled()
        timer.cancel()
        timer.cancel()
        assert timer.cancelled()
        del argument
        gc.collect()
        assert reference() is None
    loop.call_soon(loop.stop)
    loop.run()
    assert seen == []


def test_cancelled_timers_do_not_pile_up(loop: Any, loop_module: ModuleType) -> None:
    kept = loop.call_later(3600, print)
    for _ in range(1000):
        loop.call_later(3600, print).cancel()
    gc.collect()
    assert sum(type(thing) is loop_module.Timer for thing in gc.get_objects()) < 200
    kept.cancel()


def test_a_stop_before_run_lets_one_turn_pass(loop: Any) -> None:
    seen: list[int] = []
    loop.call_soon(seen.append, 1)
    loop.stop()
    loop.run()
    assert seen == [1]


def test_run_within_run_and_close_within_run_are_refused(loop: Any) -> None:
    errors: list[str] = []

    def wrong() -> None:
        for method in (loop.run, loop.close):
            try:
                method()
            except RuntimeError as error:
                errors.append(str(error))
        loop.stop()

    loop.call_soon(wrong)
    loop.run()
    assert len(errors) == 2


def test_a_callback_must_be_callable(loop: Any) -> None:
    for method in (loop.call_soon, loop.call_soon_threadsafe, loop.when_empty):
        with pytest.raises(TypeError):
            method("no")
    with pytest.raises(TypeError):
        loop.call_later(1, None)


def test_a_sleeping_loop_is_woken_from_other_threads_and_loses_no_call(loop_module: ModuleType) -> None:
    case = OurCase(loop_module)
    seen: list[tuple[int, int]] = []

    def post(thread: int) -> None:
        for number in range(500):
            case.loop.call_soon_threadsafe(seen.append, (thread, number))

    threads = [threading.Thread(target=post, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT)
    case.call(lambda: None)
    case.close()
    assert len(seen) == 2000
    for number in range(4):
        assert [entry for entry in seen if entry[0] == number] == [(number, index) for index in range(500)]


def test_several_loops_serve_in_threads_of_their_own(loop_module: ModuleType) -> None:
    cases = [OurCase(loop_module) for _ in range(3)]
    listeners = [case.bind() for case in cases]
    for case, listener in zip(cases, listeners, strict=True):
        case.serve(listener, loop_module.ECHO)
    clients = [case.connect(listener) for case, listener in zip(cases, listeners, strict=True)]
    for number, client in enumerate(clients):
        client.sendall(b"%d" % number)
    assert [client.recv(16) for client in clients] == [b"0", b"1", b"2"]
    for case in cases:
        assert case.call(lambda case=case: case.loop.connections) == 1
        case.close()


def test_a_signal_is_handled_in_the_loop_and_everything_put_back(loop: Any) -> None:
    former = signal.getsignal(signal.SIGUSR1)
    seen: list[str] = []

    def handle(what: str) -> None:
        seen.append(what)
        loop.stop()

    loop.add_signal_handler(signal.SIGUSR1, print, "replaced")
    loop.add_signal_handler(signal.SIGUSR1, handle, "heard")
    os.kill(os.getpid(), signal.SIGUSR1)
    loop.run()
    assert seen == ["heard"]
    loop.call_later(0.01, os.kill, os.getpid(), signal.SIGUSR1)
    loop.run()
    assert seen == ["heard", "heard"]
    assert loop.remove_signal_handler(signal.SIGUSR1)
    assert not loop.remove_signal_handler(signal.SIGUSR1)
    assert signal.getsignal(signal.SIGUSR1) is former
    loop.add_signal_handler(signal.SIGUSR1, print)
    loop.close()
    assert signal.getsignal(signal.SIGUSR1) is former
    assert signal.set_wakeup_fd(-1) == -1


def test_a_signal_that_comes_while_its_handler_is_being_set_is_handled_once(
    loop: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_handler = signal.signal

    def set_and_raise(signum: int, handler: Any) -> Any:
        former = set_handler(signum, handler)
        signal.raise_signal(signum)
        return former

    heard: list[str] = []
    with monkeypatch.context() as patched:
        patched.setattr(signal, "signal", set_and_raise)
        loop.add_signal_handler(signal.SIGUSR1, heard.append, "heard")
    for _ in range(2):
        loop.call_soon(loop.stop)
        loop.run()
    assert heard == ["heard"]


def test_a_signal_that_cannot_be_handled_is_refused(loop: Any) -> None:
    with pytest.raises(OSError, match="Invalid argument"):
        loop.add_signal_handler(signal.SIGKILL, print)
    assert not loop.remove_signal_handler(signal.SIGKILL)


def test_a_signal_without_a_handler_raises_from_run_also_while_native_connections_are_busy(
    loop_module: ModuleType,
) -> None:
    loop = loop_module.Loop()

    def chatter(address: Any) -> None:
        """Talks until it is hung up on; in the plain twin an interrupt may come between reading and answering."""
        with socket.create_connection(address) as client, contextlib.suppress(ConnectionError):
            for turn in itertools.count():
                client.sendall(b"x")
                if not client.recv(1):
                    return
                if turn == 100:
                    os.kill(os.getpid(), signal.SIGINT)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        loop.listen(listener, loop_module.ECHO)
        thread = threading.Thread(target=chatter, args=(listener.getsockname(),))
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            loop.run()
        loop.close()
        thread.join(LIMIT)
        assert not thread.is_alive()


def test_signals_belong_to_the_main_thread(loop_module: ModuleType) -> None:
    case = OurCase(loop_module)
    with pytest.raises(RuntimeError, match="main thread"):
        case.call(case.loop.add_signal_handler, signal.SIGUSR1, print)
    case.close()


def test_a_loop_that_is_dropped_unclosed_gives_its_descriptors_back(loop_module: ModuleType) -> None:
    before = os.listdir("/proc/self/fd")
    loop = loop_module.Loop()
    del loop
    gc.collect()
    assert os.listdir("/proc/self/fd") == before


def test_the_descriptors_of_a_loop_are_not_inherited(loop_module: ModuleType) -> None:
    before = set(os.listdir("/proc/self/fd"))
    loop = loop_module.Loop()
    ours = set(os.listdir("/proc/self/fd")) - before
    inheritable = [fd for fd in ours if os.path.exists(f"/proc/self/fd/{fd}") and os.get_inheritable(int(fd))]
    loop.close()
    assert len(ours) >= 3
    assert inheritable == []
