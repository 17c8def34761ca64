"""Descriptors over a UNIX socket, none lost, none leaked, none inherited, and the same errors on both backends."""

from __future__ import annotations

import array
import contextlib
import errno
import importlib
import os
import resource
import signal
import socket
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import FrameType, ModuleType

import pytest

from conftest import CYTHON_IS_BUILT
from kernel import open_descriptors
from takeover.errors import DescriptorsLost

MOST = 252
Pair = tuple[socket.socket, socket.socket]


@pytest.fixture
def pair() -> Iterator[Pair]:
    left, right = socket.socketpair()
    with left, right:
        yield left, right


@pytest.fixture
def some() -> Iterator[int]:
    """A descriptor to send."""
    reader, writer = os.pipe()
    yield reader
    os.close(reader)
    os.close(writer)


@pytest.fixture
def many_descriptors() -> Iterator[None]:
    """Room for 10,000 descriptors and more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 11_000
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), max(hard, wanted)))
    except (ValueError, OSError):
        pytest.skip(f"this user may not have {wanted} descriptors (RLIMIT_NOFILE {hard})")
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, max(hard, wanted)))


@contextlib.contextmanager
def no_leak() -> Iterator[None]:
    """What is open at the end was open at the beginning, and the other way round."""
    before = open_descriptors()
    yield
    assert open_descriptors() == before


def close_all(descriptors: Iterable[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


def is_same(one: int, other: int) -> bool:
    return os.path.sameopenfile(one, other)


def run(backend: str, code: str) -> str:
    """What a fresh interpreter prints that has the backend as `fdpass`, a pair of sockets, and `opened()`."""
    preamble = f"""
        import errno, os, resource, signal, socket
        from takeover import {"_fdpass" if backend == "cython" else "_fdpass_py"} as fdpass
        from takeover.errors import DescriptorsLost
        left, right = socket.socketpair()
        def opened():
            return len(os.listdir("/proc/self/fd"))
    """
    program = textwrap.dedent(preamble) + textwrap.dedent(code)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("count", [0, 1, 2, 251, MOST])
def test_what_is_sent_arrives_once_and_stays_the_senders_too(
    fdpass: ModuleType, pair: Pair, some: int, count: int
) -> None:
    left, right = pair
    assert fdpass.send_descriptors(left.fileno(), b"hello", [some] * count) == 5
    data, arrived = fdpass.receive_descriptors(right.fileno(), 100, MOST)
    assert data == b"hello"
    assert type(arrived) is array.array and arrived.typecode == "i"
    assert len(set(arrived)) == count
    assert some not in arrived
    assert all(is_same(some, descriptor) for descriptor in arrived)
    close_all(arrived)
    os.fstat(some)


@pytest.mark.parametrize(
    "make", [list, tuple, lambda numbers: array.array("i", numbers), lambda numbers: array.array("l", numbers)]
)
def test_descriptors_may_be_given_as_any_sequence(
    fdpass: ModuleType, pair: Pair, some: int, make: Callable[[list[int]], Sequence[int]]
) -> None:
    left, right = pair
    assert fdpass.send_descriptors(left.fileno(), b"x", make([some, left.fileno()])) == 1
    _, arrived = fdpass.receive_descriptors(right.fileno(), 1, MOST)
    assert is_same(some, arrived[0]) and is_same(left.fileno(), arrived[1])
    fdpass.close_descriptors(make([-1, *arrived, -1]))
    for descriptor in arrived:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(descriptor)


@pytest.mark.parametrize("count", [253, 254, 1000])
def test_more_than_252_in_one_call_are_refused_before_anything_is_sent(
    fdpass: ModuleType, pair: Pair, some: int, count: int
) -> None:
    left, right = pair
    with pytest.raises(ValueError, match=f"{count} descriptors in one sendmsg, at most 252"):
        fdpass.send_descriptors(left.fileno(), b"x", [some] * count)
    right.setblocking(False)
    with pytest.raises(BlockingIOError):
        fdpass.receive_descriptors(right.fileno(), 1, MOST)


@pytest.mark.parametrize("count", [1000, 10_000])
@pytest.mark.usefixtures("many_descriptors")
def test_any_number_goes_in_batches_and_numbers_above_1023_are_like_others(
    fdpass: ModuleType, pair: Pair, some: int, count: int
) -> None:
    left, right = pair
    held: list[int] = []
    with no_leak():
        try:
            while len(held) < count:
                size = min(MOST, count - len(held))
                assert fdpass.send_descriptors(left.fileno(), b"x", held[-1:] + [some] * (size - len(held[-1:]))) == 1
                data, arrived = fdpass.receive_descriptors(right.fileno(), 1, MOST)
                held += arrived
                assert (data, len(arrived)) == (b"x", size)
            assert len(set(held)) == count
            assert is_same(some, held[-1]) and is_same(some, held[0])
        finally:
            close_all(held)


@pytest.mark.usefixtures("many_descriptors")
def test_sockets_above_1023_can_be_sent_over(fdpass: ModuleType, pair: Pair, some: int) -> None:
    import fcntl

    high = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 5000) for end in (*pair, some)]
    try:
        assert fdpass.send_descriptors(high[0], b"x", [high[2]]) == 1
        _, arrived = fdpass.receive_descriptors(high[1], 1, 1)
        assert is_same(arrived[0], some)
        close_all(arrived)
    finally:
        close_all(high)


@pytest.mark.parametrize("room", [0, 1, 2, 3, 4, 63, 64, 251])
@pytest.mark.parametrize("extra", [1, 2])
def test_more_than_there_is_room_for_closes_what_arrived(
    fdpass: ModuleType, pair: Pair, some: int, room: int, extra: int
) -> None:
    left, right = pair
    count = min(room + extra, MOST)
    with no_leak():
        fdpass.send_descriptors(left.fileno(), b"x", [some] * count)
        with pytest.raises(DescriptorsLost, match="MSG_CTRUNC"):
            fdpass.receive_descriptors(right.fileno(), 1, room)
    fdpass.send_descriptors(left.fileno(), b"y", [some])
    data, arrived = fdpass.receive_descriptors(right.fileno(), 1, 1)
    assert (data, len(arrived)) == (b"y", 1)
    close_all(arrived)


def test_too_small_an_rlimit_nofile_closes_what_arrived_and_the_socket_goes_on(backend: str) -> None:
    said = run(
        backend,
        """
        fdpass.send_descriptors(left.fileno(), b"x", [left.fileno()] * 20)
        fdpass.send_descriptors(left.fileno(), b"y", [left.fileno()] * 3)
        before = opened()
        resource.setrlimit(resource.RLIMIT_NOFILE, (before + 4, before + 4))
        try:
            fdpass.receive_descriptors(right.fileno(), 1, 252)
        except DescriptorsLost as error:
            print("lost:", error)
        assert opened() == before
        data, arrived = fdpass.receive_descriptors(right.fileno(), 1, 252)
        print(data, len(arrived), opened() - before)
        """,
    )
    assert said.startswith("lost: recvmsg: more descriptors came than")
    assert said.endswith("b'y' 3 3\n")


def test_descriptors_that_nobody_reads_are_too_many_references_until_somebody_does(backend: str) -> None:
    # Root is exempt (CAP_SYS_RESOURCE, unix(7)); the limit counts all that a user has in flight.
    said = run(
        backend,
        """
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
        if os.getuid() == 0:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
        left.setblocking(False)
        sent = 0
        try:
            while sent < 1000:
                fdpass.send_descriptors(left.fileno(), b"x", [0] * 10)
                sent += 10
        except OSError as error:
            print(errno.errorcode[error.errno], type(error).__name__, 0 < sent <= 80)
        while sent:
            data, arrived = fdpass.receive_descriptors(right.fileno(), 1, 10)
            for descriptor in arrived:
                os.close(descriptor)
            sent -= len(arrived)
        print(fdpass.send_descriptors(left.fileno(), b"x", [0] * 10))
        """,
    )
    assert said == "ETOOMANYREFS OSError True\n1\n"


def test_a_child_that_is_forked_and_execed_meanwhile_holds_none(
    fdpass: ModuleType, pair: Pair, tmp_path: os.PathLike[str]
) -> None:
    left, right = pair
    ended = threading.Event()
    marker = os.open(tmp_path, os.O_RDONLY)

    def pass_around() -> None:
        while not ended.is_set():
            fdpass.send_descriptors(left.fileno(), b"x", [marker] * 100)
            _, arrived = fdpass.receive_descriptors(right.fileno(), 1, 100)
            assert not any(os.get_inheritable(descriptor) for descriptor in arrived)
            close_all(arrived)

    with ThreadPoolExecutor() as pool:
        passing = pool.submit(pass_around)
        try:
            for _ in range(40):
                listing = subprocess.run(
                    ["ls", "-l", "/proc/self/fd"], close_fds=False, capture_output=True, text=True, check=False
                )
                assert " -> " in listing.stdout
                assert str(tmp_path) not in listing.stdout
        finally:
            ended.set()
        passing.result()
    os.close(marker)


def test_reads_of_any_size_get_the_descriptors_with_the_first_byte(fdpass: ModuleType, pair: Pair, some: int) -> None:
    left, right = pair
    message = b"0123456789"
    for size in range(1, len(message) + 2):
        for _ in range(2):
            fdpass.send_descriptors(left.fileno(), message, [some, some])
        for _ in range(2):
            left_over, counts = len(message), []
            while left_over:
                data, arrived = fdpass.receive_descriptors(right.fileno(), min(size, left_over), 4)
                left_over -= len(data)
                counts.append(len(arrived))
                close_all(arrived)
            assert counts == [2] + [0] * (len(counts) - 1)


def test_bytes_before_and_behind_a_message_do_not_take_its_descriptors(
    fdpass: ModuleType, pair: Pair, some: int
) -> None:
    left, right = pair
    left.send(b"before")
    fdpass.send_descriptors(left.fileno(), b"with", [some])
    left.send(b"behind")
    seen = []
    for size in (6, 4, 6):
        data, arrived = fdpass.receive_descriptors(right.fileno(), size, MOST)
        seen.append((data, len(arrived)))
        close_all(arrived)
    assert seen == [(b"before", 0), (b"with", 1), (b"behind", 0)]


def test_a_short_write_took_all_descriptors_along(fdpass: ModuleType, pair: Pair, some: int) -> None:
    left, right = pair
    left.setblocking(False)
    data = os.urandom(1 << 20)
    sent = fdpass.send_descriptors(left.fileno(), data, [some] * 3)
    assert 0 < sent < len(data)
    with pytest.raises(BlockingIOError):
        fdpass.send_descriptors(left.fileno(), data[sent:], [some])
    read, counts = b"", []
    while len(read) < sent:
        part, arrived = fdpass.receive_descriptors(right.fileno(), 1 << 20, MOST)
        read += part
        counts.append(len(arrived))
        close_all(arrived)
    assert counts[0] == 3 and not any(counts[1:])
    assert read == data[:sent]


def test_ten_megabytes_behind_the_descriptors_arrive_whole(fdpass: ModuleType, pair: Pair, some: int) -> None:
    left, right = pair
    data = os.urandom(10 << 20)
    received: list[bytes] = []
    counts: list[int] = []

    def receive() -> None:
        while sum(map(len, received)) < len(data):
            part, arrived = fdpass.receive_descriptors(right.fileno(), len(data), MOST)
            received.append(part)
            counts.append(len(arrived))
            close_all(arrived)
            if not part:
                break

    receiving = threading.Thread(target=receive)
    receiving.start()
    sent = fdpass.send_descriptors(left.fileno(), data, [some] * MOST)
    left.sendall(data[sent:])
    receiving.join()
    assert sum(counts) == counts[0] == MOST
    assert b"".join(received) == data


def test_the_interpreter_goes_on_while_a_call_waits(fdpass: ModuleType, pair: Pair, some: int) -> None:
    left, right = pair
    arrived: list[int] = []
    waiting = threading.Thread(target=lambda: arrived.extend(fdpass.receive_descriptors(right.fileno(), 1, 1)[1]))
    waiting.start()
    assert fdpass.send_descriptors(left.fileno(), b"x", [some]) == 1
    waiting.join()
    assert len(arrived) == 1
    close_all(arrived)


@contextlib.contextmanager
def interrupted(handler: Callable[[int], None]) -> Iterator[None]:
    """Signals this thread again and again; the handler is told how many have come."""
    came = 0
    ended = threading.Event()

    def handle(_: int, __: FrameType | None) -> None:
        nonlocal came
        came += 1
        handler(came)

    def keep_signalling() -> None:
        while not ended.wait(0.01):
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)

    previous = signal.signal(signal.SIGUSR1, handle)
    signalling = threading.Thread(target=keep_signalling)
    signalling.start()
    try:
        yield
    finally:
        ended.set()
        signalling.join()
        signal.signal(signal.SIGUSR1, previous)


def test_an_interrupted_receive_runs_the_handler_and_goes_on(fdpass: ModuleType, pair: Pair, some: int) -> None:
    left, right = pair

    def handler(came: int) -> None:
        if came == 3:
            fdpass.send_descriptors(left.fileno(), b"x", [some])

    with interrupted(handler):
        data, arrived = fdpass.receive_descriptors(right.fileno(), 1, 1)
    assert (data, len(arrived)) == (b"x", 1)
    close_all(arrived)


def fill(sock: socket.socket) -> int:
    """Sends until there is no room; returns how many bytes that were."""
    sent = 0
    sock.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            sent += sock.send(bytes(4096))
    sock.setblocking(True)
    return sent


def test_an_interrupted_send_runs_the_handler_and_goes_on(fdpass: ModuleType, pair: Pair, some: int) -> None:
    left, right = pair
    filled = fill(left)

    def handler(came: int) -> None:
        if came == 3:
            assert len(right.recv(filled, socket.MSG_WAITALL)) == filled

    with interrupted(handler):
        assert fdpass.send_descriptors(left.fileno(), b"x", [some]) == 1
    data, arrived = fdpass.receive_descriptors(right.fileno(), 1, 1)
    assert (data, len(arrived)) == (b"x", 1)
    close_all(arrived)


class Enough(Exception):
    pass


def stop_at_the_third(came: int) -> None:
    if came == 3:
        raise Enough


def test_a_handler_that_raises_ends_a_call_and_nothing_is_lost(fdpass: ModuleType, pair: Pair, some: int) -> None:
    left, right = pair
    with no_leak():
        with pytest.raises(Enough), interrupted(stop_at_the_third):
            fdpass.receive_descriptors(right.fileno(), 1, 1)
        filled = fill(left)
        with pytest.raises(Enough), interrupted(stop_at_the_third):
            fdpass.send_descriptors(left.fileno(), b"x", [some])
        assert len(right.recv(filled, socket.MSG_WAITALL)) == filled
    right.setblocking(False)
    with pytest.raises(BlockingIOError):
        fdpass.receive_descriptors(right.fileno(), 1, 1)
    fdpass.send_descriptors(left.fileno(), b"x", [some])
    _, arrived = fdpass.receive_descriptors(right.fileno(), 1, 1)
    close_all(arrived)


def test_no_room_sends_no_descriptor(fdpass: ModuleType, pair: Pair, some: int) -> None:
    left, right = pair
    filled = fill(left)
    left.setblocking(False)
    with pytest.raises(BlockingIOError):
        fdpass.send_descriptors(left.fileno(), b"x", [some])
    assert len(right.recv(filled, socket.MSG_WAITALL)) == filled
    left.close()
    assert fdpass.receive_descriptors(right.fileno(), 1, MOST) == (b"", array.array("i"))


def test_a_peer_that_is_gone_is_the_end_or_a_broken_pipe_but_no_signal(backend: str) -> None:
    said = run(
        backend,
        """
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        left.close()
        print(*map(len, fdpass.receive_descriptors(right.fileno(), 10, 10)))
        try:
            fdpass.send_descriptors(right.fileno(), b"x", [0])
        except BrokenPipeError:
            print("broken")
        """,
    )
    assert said == "0 0\nbroken\n"


def test_what_went_down_with_unread_bytes_is_a_reset(fdpass: ModuleType, pair: Pair) -> None:
    left, right = pair
    right.send(b"unread")
    left.close()
    with pytest.raises(ConnectionResetError):
        fdpass.receive_descriptors(right.fileno(), 1, 1)


def test_other_control_messages_are_ignored(fdpass: ModuleType, pair: Pair, some: int) -> None:
    left, right = pair
    right.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    fdpass.send_descriptors(left.fileno(), b"x", [some, some])
    data, arrived = fdpass.receive_descriptors(right.fileno(), 1, 20)
    assert data == b"x"
    assert [is_same(some, descriptor) for descriptor in arrived] == [True, True]
    close_all(arrived)


def test_no_memory_for_the_bytes_takes_nothing_off_the_socket(fdpass: ModuleType, pair: Pair, some: int) -> None:
    left, right = pair
    fdpass.send_descriptors(left.fileno(), b"x", [some])
    with no_leak(), pytest.raises(MemoryError):
        fdpass.receive_descriptors(right.fileno(), 1 << 62, 1)
    data, arrived = fdpass.receive_descriptors(right.fileno(), 1, 1)
    assert (data, len(arrived)) == (b"x", 1)
    close_all(arrived)


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="this interpreter itself does not survive it")
@pytest.mark.skipif(not CYTHON_IS_BUILT, reason="the compiled modules are not built")
def test_whichever_allocation_of_a_receive_fails_what_came_is_closed(pair: Pair, some: int) -> None:
    testcapi = pytest.importorskip("_testcapi", reason="this Python cannot fail allocations")
    receive = importlib.import_module("takeover._fdpass").receive_descriptors
    left, right = pair
    right.setblocking(False)
    taken = failures = 0
    with no_leak():
        for number in range(1, 40):
            socket.send_fds(left, [b"x"], [some] * 3)
            received: tuple[bytes, Sequence[int]] = b"", ()
            arguments = right.fileno(), 100, 10
            testcapi.set_nomemory(number, number + 1)
            try:
                received = receive(*arguments)
            except MemoryError:
                failures += 1
            finally:
                testcapi.remove_mem_hooks()
            if not received[1]:
                try:
                    received = receive(*arguments)
                except BlockingIOError:
                    taken += 1
            close_all(received[1])
    assert 0 < taken <= failures < 39, "some fail behind what takes the descriptors off the socket"


@pytest.mark.parametrize("data", [b"xy", bytearray(b"xy"), memoryview(b"xy"), array.array("h", [7])])
def test_any_buffer_and_any_sequence_will_do(fdpass: ModuleType, pair: Pair, some: int, data: bytes) -> None:
    left, right = pair
    assert fdpass.send_descriptors(left.fileno(), data, (some,)) == 2
    received, arrived = fdpass.receive_descriptors(right.fileno(), 2, 1)
    assert received == bytes(data)
    close_all(arrived)


@pytest.mark.parametrize(
    ("data", "descriptors", "error"),
    [
        (b"", [], ValueError),
        (b"", [0], ValueError),
        ("x", [0], TypeError),
        (memoryview(b"abcd")[::2], [0], BufferError),
        (b"x", [1.5], TypeError),
        (b"x", ["0"], TypeError),
        (b"x", None, TypeError),
        (b"x", [1 << 40], OverflowError),
    ],
)
def test_what_cannot_be_sent_is_refused_before_the_system_call(
    fdpass: ModuleType, pair: Pair, data: bytes, descriptors: list[int], error: type[Exception]
) -> None:
    left, right = pair
    with pytest.raises(error):
        fdpass.send_descriptors(left.fileno(), data, descriptors)
    right.setblocking(False)
    with pytest.raises(BlockingIOError):
        fdpass.receive_descriptors(right.fileno(), 1, MOST)


@pytest.mark.parametrize(("size", "room"), [(0, 1), (-1, 1), (1, -1), (1, 253)])
def test_a_size_or_a_room_out_of_range_is_refused(fdpass: ModuleType, pair: Pair, size: int, room: int) -> None:
    with pytest.raises(ValueError, match=f"recvmsg of {size} bytes and {room} descriptors"):
        fdpass.receive_descriptors(pair[1].fileno(), size, room)


def test_the_kernels_refusals_are_the_same_os_errors(fdpass: ModuleType, pair: Pair, some: int) -> None:
    left, _ = pair
    gone = os.dup(some)
    os.close(gone)
    calls: list[tuple[Callable[[], object], int]] = [
        (lambda: fdpass.send_descriptors(left.fileno(), b"x", [gone]), errno.EBADF),
        (lambda: fdpass.send_descriptors(left.fileno(), b"x", [-1]), errno.EBADF),
        (lambda: fdpass.send_descriptors(gone, b"x", [some]), errno.EBADF),
        (lambda: fdpass.send_descriptors(-1, b"x", [some]), errno.EBADF),
        (lambda: fdpass.send_descriptors(some, b"x", [some]), errno.ENOTSOCK),
        (lambda: fdpass.receive_descriptors(gone, 1, 1), errno.EBADF),
        (lambda: fdpass.receive_descriptors(-1, 1, 1), errno.EBADF),
        (lambda: fdpass.receive_descriptors(some, 1, 1), errno.ENOTSOCK),
    ]
    with no_leak():
        for call, expected in calls:
            with pytest.raises(OSError, match=rf"^\[Errno {expected}\] {os.strerror(expected)}$"):
                call()


@pytest.mark.parametrize("blocking", [True, False])
def test_a_default_timeout_changes_nothing(fdpass: ModuleType, pair: Pair, some: int, blocking: bool) -> None:
    left, right = pair
    for end in pair:
        end.setblocking(blocking)
    socket.setdefaulttimeout(60)
    try:
        fdpass.send_descriptors(left.fileno(), b"x", [some])
        _, arrived = fdpass.receive_descriptors(right.fileno(), 1, 1)
        close_all(arrived)
        if not blocking:
            with pytest.raises(BlockingIOError):
                fdpass.receive_descriptors(right.fileno(), 1, 1)
        assert [os.get_blocking(end.fileno()) for end in pair] == [blocking, blocking]
    finally:
        socket.setdefaulttimeout(None)


def test_descriptors_are_closed_whatever_else_is_among_them(fdpass: ModuleType) -> None:
    held = [os.open(os.devnull, os.O_RDONLY) for _ in range(600)]
    fdpass.close_descriptors([-1, 1 << 20, *held, -1])
    for descriptor in held:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(descriptor)
    fdpass.close_descriptors([])
