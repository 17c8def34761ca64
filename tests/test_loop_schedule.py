"""Callbacks, timers, threads and signals."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import importlib
import itertools
import os
import resource
import signal
import socket
import tempfile
import threading
import weakref
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest

from conftest import CYTHON_IS_BUILT
from kernel import open_descriptors
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


def test_a_signal_that_was_on_its_way_when_its_handler_was_removed_calls_nobody(loop: Any) -> None:
    """The interpreter may have begun to handle it then."""
    called: list[str] = []
    loop.add_signal_handler(signal.SIGUSR1, called.append, "called")
    handle: Any = signal.getsignal(signal.SIGUSR1)
    assert loop.remove_signal_handler(signal.SIGUSR1)
    handle(signal.SIGUSR1, None)
    loop.call_soon(loop.stop)
    loop.run()
    assert called == []


def test_the_callback_of_a_signal_must_be_callable(loop: Any) -> None:
    before = signal.getsignal(signal.SIGUSR1)
    with pytest.raises(TypeError, match="callable"):
        loop.add_signal_handler(signal.SIGUSR1, "no function")
    assert signal.getsignal(signal.SIGUSR1) is before


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
    before = open_descriptors()
    loop = loop_module.Loop()
    del loop
    gc.collect()
    assert open_descriptors() == before


def test_the_descriptors_of_a_loop_are_not_inherited(loop_module: ModuleType) -> None:
    before = set(os.listdir("/proc/self/fd"))
    loop = loop_module.Loop()
    ours = set(os.listdir("/proc/self/fd")) - before
    inheritable = [fd for fd in ours if os.path.exists(f"/proc/self/fd/{fd}") and os.get_inheritable(int(fd))]
    loop.close()
    assert len(ours) >= 3
    assert inheritable == []


def test_what_can_be_written_calls_back_until_the_writer_is_removed(loop: Any) -> None:
    left, right = socket.socketpair()
    heard: list[str] = []

    def write() -> None:
        heard.append("writer")
        assert loop.remove_writer(left)
        right.sendall(b"x")

    def read() -> None:
        heard.append("reader")
        assert loop.remove_reader(left)
        loop.stop()

    with left, right:
        loop.add_writer(left, write)
        loop.add_reader(left, read)
        loop.run()
        assert not loop.remove_writer(left)
        assert not loop.remove_reader(left)
    assert heard == ["writer", "reader"]


def test_a_reader_that_ends_the_watch_keeps_the_writer_from_its_turn(loop: Any) -> None:
    left, right = socket.socketpair()
    with left, right:
        right.sendall(b"x")
        loop.add_writer(left, pytest.fail, "the writer was called")
        loop.add_reader(left, lambda: (loop.remove_writer(left), loop.remove_reader(left), loop.stop()))
        loop.run()


def test_what_epoll_does_not_take_is_not_watched(loop: Any) -> None:
    """A file is always ready, says epoll_ctl(2); a socket under the same number can be watched."""
    left, right = socket.socketpair()
    with left, right, tempfile.TemporaryFile(buffering=0) as file:
        with pytest.raises(PermissionError):
            loop.add_reader(file, print)
        assert not loop.remove_reader(file)
        os.dup2(left.fileno(), file.fileno(), inheritable=False)
        loop.add_reader(file, loop.stop)
        right.sendall(b"x")
        loop.run()
        assert loop.remove_reader(file)


@pytest.mark.parametrize("room", [0, 1, 2])
def test_a_loop_that_there_are_no_descriptors_for_is_an_error_and_leaves_nothing_open(
    loop_module: ModuleType, room: int
) -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.ExitStack() as stack:
        lowest = stack.enter_context(open("/dev/null", "rb"))
        while (last := stack.enter_context(open("/dev/null", "rb"))).fileno() < lowest.fileno() + 100:
            pass
        before = sorted(open_descriptors())
        resource.setrlimit(resource.RLIMIT_NOFILE, (last.fileno() + 1 + room, limits[1]))
        try:
            with pytest.raises(OSError, match="Too many open files"):
                loop_module.Loop()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        gc.collect()
        assert sorted(open_descriptors()) == before


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("handler", ["echo", "protocol"])
def test_the_connections_of_a_loop_that_is_dropped_unclosed_end(loop_module: ModuleType, handler: str) -> None:
    gc.collect()
    before = sorted(open_descriptors())
    with socket.create_server(("127.0.0.1", 0)) as listener:
        loop = loop_module.Loop()
        loop.listen(listener, loop_module.ECHO if handler == "echo" else asyncio.Protocol)
        with socket.create_connection(listener.getsockname()) as client:
            client.settimeout(LIMIT)
            while not loop.connections:
                loop.call_soon(loop.stop)
                loop.run()
            del loop
            gc.collect()
            assert client.recv(1) == b""
    assert sorted(open_descriptors()) == before


@pytest.mark.skipif(not CYTHON_IS_BUILT, reason="the compiled modules are not built")
def test_a_compiled_loop_is_made_once() -> None:
    """Its connections point into what was made of it first."""
    loop = importlib.import_module("takeover._loop").Loop()
    with pytest.raises(RuntimeError, match="once"):
        loop.__init__()
    loop.close()


def replace_epoll() -> None:
    """Somebody has closed the descriptors that loops of this process wait with, and opened others instead."""
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/self/fd/{fd}") == "anon_inode:[eventpoll]":
                with open("/dev/null", "rb") as null:
                    os.dup2(null.fileno(), int(fd), inheritable=False)


def test_a_loop_that_cannot_wait_any_more_ends_run_and_can_be_closed(loop_module: ModuleType) -> None:
    loop = loop_module.Loop()
    loop.call_soon(replace_epoll)
    with pytest.raises(OSError, match="Invalid argument"):
        loop.run()
    loop.close()


def test_a_connection_that_cannot_be_waited_for_is_closed(loop_module: ModuleType) -> None:
    class Last(asyncio.Protocol):
        def __init__(self) -> None:
            replace_epoll()

    loop = loop_module.Loop()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        loop.listen(listener, Last)
        with socket.create_connection(listener.getsockname(), LIMIT) as client:
            with pytest.raises(OSError, match="Invalid argument"):
                loop.run()
            loop.close()
            assert client.recv(1) == b""
