"""What is not as it should be about a keeper, or listens in its place, is told of, and keeps nobody from serving."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import selectors
import socket
import subprocess
import threading
import warnings
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

import takeover
from clients import LIMIT, eventually
from processes import Room, descriptors
from takeover import keeper, keeping
from takeover.control import ControlPath, Peer
from takeover.errors import LocalError, PeerLost, RemoteProtocolError, TimedOut
from takeover.keeper import HELLO, VERSION, Keeper
from takeover.keeping import Keeping

GREETING = HELLO.pack(b"H", VERSION, 0, 0)
PIDFD = "anon_inode:[pidfd"


@pytest.fixture
def path(tmp_path: pathlib.Path) -> ControlPath:
    return keeper.path_of_keeper(ControlPath(str(tmp_path / "takeover.sock")))


@pytest.fixture
def held() -> Iterator[None]:
    """Nothing more is open in the process of the tests afterwards; what others left may go meanwhile."""
    before = descriptors(os.getpid())
    yield
    assert not descriptors(os.getpid()) - before


class Scene:
    """A conversation whose other end is the test's."""

    def __init__(self, path: ControlPath) -> None:
        ours, self.other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.keeper = Keeper(ours, path)

    def becomes(self, pid: int | None) -> None:
        """The process at the other end is that one, or nothing tells which."""
        if self.keeper.peer.pidfd is not None:
            os.close(self.keeper.peer.pidfd)
        self.keeper.peer = Peer(pid or 0, os.geteuid(), None if pid is None else os.pidfd_open(pid))

    def close(self) -> None:
        self.keeper.close()
        self.other.close()


@pytest.fixture
def scene(fdpass: ModuleType, path: ControlPath, held: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Scene]:
    monkeypatch.setattr(keeper, "fdpass", fdpass)
    monkeypatch.setattr(keeper, "PATIENCE", 0.01)
    scene = Scene(path)
    yield scene
    scene.close()


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (b"X", "is not a keeper; end it"),
        (b"H", "is not a keeper; end it"),
        (HELLO.pack(b"H", VERSION + 1, 0, 0), f"speaks version {VERSION + 1}, this process {VERSION}"),
    ],
)
def test_who_greets_in_another_way_is_no_keeper_of_ours(scene: Scene, answer: bytes, told: str) -> None:
    scene.other.send(answer)
    with pytest.raises(RemoteProtocolError, match=told):
        scene.keeper.greet()


def test_a_keeper_of_another_user_is_not_asked_at_all(
    path: ControlPath, held: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    monkeypatch.setattr(keeper, "peer_of", lambda _: Peer(1, 12345, os.pidfd_open(os.getpid())))
    with other, pytest.raises(LocalError, match="belongs to uid 12345, not to us"):
        Keeper(ours, path)


def test_a_keeper_that_refuses_a_registration_has_no_room(scene: Scene) -> None:
    scene.other.send(b"R")
    with pytest.raises(LocalError, match="has no room for that, or somebody else registers with it"):
        scene.keeper.register([])


def test_a_keeper_that_has_hung_up_is_dead_and_one_that_does_not_read_is_stopped(scene: Scene) -> None:
    with contextlib.suppress(BlockingIOError):
        while True:
            scene.keeper.sock.send(b"H")
    with pytest.raises(TimedOut, match="does not read; is it stopped"):
        scene.keeper.greet()
    scene.other.close()
    with pytest.raises(PeerLost, match="has died"):
        scene.keeper.greet()


@pytest.mark.parametrize("text", [b"no JSON", b"[" * 20_000, b"{}", b'{"name": "n"}', None])
def test_a_listener_that_is_not_described_leaves_none_of_them_open(scene: Scene, text: bytes | None) -> None:
    """None is one that comes without its descriptor."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        item = {"name": "n", "url": "tcp://127.0.0.1:1", "device": 0, "inode": 0}
        good = b"G" + json.dumps(item).encode()
        socket.send_fds(scene.other, [good], [sock.fileno()])
        socket.send_fds(scene.other, [good if text is None else b"G" + text], [] if text is None else [sock.fileno()])
        with pytest.raises(RemoteProtocolError, match="a listener that it cannot describe"):
            scene.keeper.listeners()


def test_a_keeper_whose_answer_cannot_be_read_is_ended_by_force(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeper, "PATIENCE", LIMIT)
    with subprocess.Popen(["sleep", "1000"], pass_fds=[scene.other.fileno()]) as silent:
        socket.send_fds(scene.other, [b"O"], [scene.other.fileno()] * 3)
        scene.other.close()
        scene.becomes(silent.pid)
        scene.keeper.end()
        silent.wait(LIMIT)


def test_a_keeper_that_nothing_tells_the_process_of_is_ended_by_its_own_will_only(scene: Scene) -> None:
    scene.becomes(None)
    with pytest.raises(TimedOut, match="does not answer, nor can it be killed from here"):
        scene.keeper.end()
    scene.other.close()
    scene.keeper.end()


@pytest.mark.parametrize(
    ("greets", "error", "told"), [(False, PeerLost, "has died"), (True, LocalError, "somebody has removed")]
)
def test_a_keeper_that_could_not_be_started_leaves_nothing(
    path: ControlPath,
    held: None,
    monkeypatch: pytest.MonkeyPatch,
    greets: bool,
    error: type[Exception],
    told: str,
) -> None:
    others: list[socket.socket] = []

    def start(listening: int, first: int, allowed: object) -> None:
        if greets:
            others.append(socket.socket(fileno=os.dup(first)))
            others[0].send(GREETING)
            os.unlink(path.path)

    monkeypatch.setattr(keeper, "_process", lambda: SimpleNamespace(start=start))
    with pytest.raises(error, match=told):
        keeper.start(path)
    for other in others:
        other.close()
    assert not os.path.exists(path.path)


def test_nothing_is_told_of_the_memory_of_a_process_that_is_gone() -> None:
    with subprocess.Popen(["true"]) as gone:
        gone.wait()
    assert keeper.private_memory(gone.pid) is None


# In the place of a keeper.


class Puppet:
    """Listens where a keeper should, and answers what the test says."""

    def __init__(self, path: str, answer: Callable[[bytes], bytes]) -> None:
        self.asked: list[bytes] = []
        self.ended = 0
        self._answer = answer
        self._listening = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listening.bind(path)
        self._listening.listen()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listening, selectors.EVENT_READ)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._stopping.is_set():
            for key, _ in self._selector.select(0.01):
                if key.fileobj is self._listening:
                    self._selector.register(self._listening.accept()[0], selectors.EVENT_READ)
                else:
                    self._serve(key.fileobj)  # type: ignore[arg-type]

    def _serve(self, sock: socket.socket) -> None:
        message, came, _, _ = socket.recv_fds(sock, 1 << 16, 1)
        for descriptor in came:
            os.close(descriptor)
        if message:
            self.asked.append(message[:1])
            sock.send(self._answer(message))
        if not message or message == b"E":
            self.ended += 1
            self._selector.unregister(sock)
            sock.close()

    def close(self) -> None:
        self._stopping.set()
        self._thread.join(LIMIT)
        for key in list(self._selector.get_map().values()):
            key.fileobj.close()  # type: ignore[union-attr]
        self._selector.close()


@pytest.fixture
def puppets(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Puppet]]:
    """None of them is to be killed, nor waited for: the process is the test's."""
    monkeypatch.setattr(Keeper, "reap", lambda _: None)
    monkeypatch.setattr(keeper, "PATIENCE", LIMIT)
    monkeypatch.setattr(Keeper, "kill", lambda _: pytest.fail("a puppet was not in time"))
    made: list[Puppet] = []

    def make(path: str, answer: Callable[[bytes], bytes]) -> Puppet:
        made.append(Puppet(path, answer))
        return made[-1]

    yield make
    for puppet in made:
        puppet.close()


def friendly(message: bytes) -> bytes:
    """A keeper that holds nothing, and takes everything."""
    return {b"H": GREETING, b"G": b"N"}.get(message[:1], b"O")


def test_what_is_no_keeper_keeps_nobody_from_serving_who_wants_one(
    room: Room, puppets: Callable[..., Puppet], caplog: pytest.LogCaptureFixture
) -> None:
    puppet = puppets(f"{room.control}.keeper", lambda _: b"X")
    with takeover.join(room.control, keeper=True) as service:
        sock, other = service.listen(room.url), service.listen("tcp://127.0.0.1:0")
        service.ready()
        assert "is of no use" in caplog.text and "no keeper holds the listeners" in caplog.text
        assert service.status()["keeper"]["failure"]
        asked = len(puppet.asked)
        other.close()
        eventually(lambda: service.status()["listeners"][1:] == [], "it is seen to be closed")
        eventually(lambda: len(puppet.asked) > asked, "it is tried again")
        with room.connect() as client:
            sock.settimeout(LIMIT)
            accepted, _ = sock.accept()
            with accepted:
                client.sendall(b"hello")
                accepted.settimeout(LIMIT)
                assert accepted.recv(5) == b"hello"
    assert "the keeper could not be ended" in caplog.text


def test_what_is_no_keeper_keeps_nobody_from_serving_who_wants_none(
    room: Room, puppets: Callable[..., Puppet], caplog: pytest.LogCaptureFixture
) -> None:
    puppet = puppets(f"{room.control}.keeper", lambda _: b"X")
    with takeover.join(room.control) as service:
        service.ready()
        assert "the keeper that was there could not be ended" in caplog.text
        assert puppet.asked == [b"H", b"E"]
        assert service.status()["keeper"] is None


def test_a_keeper_that_takes_no_listener_is_asked_again_and_told_of(room: Room, puppets: Callable[..., Puppet]) -> None:
    puppet = puppets(f"{room.control}.keeper", lambda message: b"R" if message == b"B" else friendly(message))
    with takeover.join(room.control, keeper=True) as service:
        service.ready()
        assert "has no room for that" in service.status()["keeper"]["failure"]
        eventually(lambda: puppet.asked.count(b"B") > 1, "it is asked again")
        eventually(lambda: puppet.ended > 1, "each connection is closed")


class Owner(SimpleNamespace):
    """What Keeping asks of a controller; what is posted to it is done at once."""

    def __init__(self, room: Room) -> None:
        super().__init__(control=ControlPath(room.control), ended=threading.Event())
        self.selector = selectors.DefaultSelector()

    def listener_items(self) -> list[Any]:
        return []

    def post(self, callback: Callable[[], object]) -> None:
        callback()


def test_who_has_given_the_service_up_while_it_registered_hangs_up(room: Room, puppets: Callable[..., Puppet]) -> None:
    puppet = puppets(f"{room.control}.keeper", friendly)
    owner: Any = Owner(room)
    kept = Keeping(owner, wanted=True)

    def give_up_first(callback: Callable[[], object]) -> None:
        kept.release()
        callback()

    owner.post = give_up_first
    kept.own()
    eventually(lambda: puppet.ended == 1, "the connection is closed")
    assert not owner.selector.get_map() and kept.status() == {
        "pid": 0,
        "listeners": 0,
        "private_kib": None,
        "failure": None,
    }
    owner.selector.close()


def test_who_ends_while_it_registers_hangs_up(room: Room, puppets: Callable[..., Puppet]) -> None:
    puppet = puppets(f"{room.control}.keeper", friendly)
    owner: Any = Owner(room)
    owner.ended.set()
    owner.post = lambda _: None
    Keeping(owner, wanted=True).own()
    eventually(lambda: puppet.ended == 1, "the connection is closed")
    owner.selector.close()


def test_who_has_given_the_service_up_before_it_came_to_register_starts_no_keeper(room: Room) -> None:
    owner: Any = Owner(room)
    kept = Keeping(owner, wanted=True)
    with kept._busy:
        kept.own_soon()
        eventually(lambda: not kept._stale, "the thread has begun")
        kept.release()
    eventually(lambda: kept._worker is None, "the thread has ended")
    assert not os.path.exists(f"{room.control}.keeper")
    owner.selector.close()


def test_a_forked_child_has_no_connection_to_the_keeper(room: Room, puppets: Callable[..., Puppet]) -> None:
    puppets(f"{room.control}.keeper", friendly)
    with takeover.join(room.control, keeper=True) as service:
        service.ready()
        eventually(lambda: service.status()["keeper"]["pid"], "the keeper is known")
        held = descriptors(os.getpid())[PIDFD]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # there are other threads
            child = os.fork()
        if child == 0:
            os._exit(descriptors(os.getpid())[PIDFD])
        assert os.waitpid(child, 0)[1] == 0 and held == 1


# Where only the keeper is left.


@pytest.fixture
def alone(room: Room, monkeypatch: pytest.MonkeyPatch) -> Iterator[Keeper]:
    """A keeper without an owner, which holds a UNIX listener."""
    monkeypatch.setattr(keeper, "backend", room.backend)
    file = os.path.join(room.folder, "listener")
    started = keeper.start(keeper.path_of_keeper(ControlPath(room.control)))
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(file)
        sock.listen()
        status = os.stat(file)
        item = {"name": "n", "url": f"unix:{file}", "device": status.st_dev, "inode": status.st_ino}
        started.register([(item, sock.fileno())])
    yield started
    started.close()
    keeping.end_orphan(ControlPath(room.control))


def test_a_keeper_that_is_ended_takes_the_files_of_its_listeners_along(room: Room, alone: Keeper) -> None:
    assert keeping.end_orphan(ControlPath(room.control)) == alone.pid
    assert room.left_behind() == []


def test_a_keeper_is_nobodys_to_end_when_somebody_has_just_started(room: Room, alone: Keeper) -> None:
    control = ControlPath(room.control)
    lock = control.lock()
    assert lock is not None
    assert keeping.end_orphan(control) is None
    assert alone.greet() == 1
    control.unlock(lock)
