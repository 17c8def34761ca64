"""The threat model: docs/security.md names a test for each of its lines; what no other file tests is tested here."""

from __future__ import annotations

import ast
import errno
import os
import pathlib
import re
import socket
import stat
import sys
from typing import Any

import pytest

from clients import LIMIT
from kernel import failing
from processes import Room
from takeover.control import ControlPath, peer_of
from takeover.errors import ControlPathError, UsageError
from takeover.namespaces import is_process
from takeover.wire import Type
from test_blobs_and_hostile_peers import Bare, token
from test_control_path import ROOT_ONLY, unshared

ROOT = pathlib.Path(__file__).parent.parent
NOBODY = 65534
NAMED = re.compile(r"`(test_\w+\.py)::(test_\w+)`")


def claims(text: str) -> list[str]:
    """The items of the lists, each on one line."""
    return [
        re.sub(r"\s+", " ", item) for item in re.findall(r"^- (.+?)(?=\n- |\n\n|\Z)", text, re.MULTILINE | re.DOTALL)
    ]


def unproven(text: str) -> list[str]:
    """The claims that name no test, or one that does not exist."""
    wrong = []
    for claim in claims(text):
        named = NAMED.findall(claim)
        if not named or not all(
            (path := ROOT / "tests" / file).exists() and f"def {test}(" in path.read_text() for file, test in named
        ):
            wrong.append(claim)
    return wrong


@pytest.mark.once
def test_each_claim_of_the_threat_model_names_a_test_that_exists() -> None:
    text = (ROOT / "docs" / "security.md").read_text()
    assert len(claims(text)) > 20
    assert unproven(text) == []
    assert unproven("- a claim\n- another (`test_security.py::test_none`)\n") != []
    assert len(unproven("- a claim\n- another\n  on two lines\n\n- a third\n")) == 3


FORBIDDEN_MODULES = frozenset(
    {"pickle", "marshal", "shelve", "dill", "cloudpickle", "copyreg", "pydoc", "code", "runpy"}
)
FORBIDDEN_CALLS = frozenset({"eval", "exec", "compile", "__import__"})
IMPORTS_BY_NAME = {("__init__.py", "__getattr__")}
"""Its names are those of one table of the package, and come from whoever writes `takeover.NAME`."""


def makes_code(tree: ast.AST, file: str) -> list[str]:
    """Whatever in a module could turn bytes into code."""
    excused = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and (file, node.name) in IMPORTS_BY_NAME
        for inner in ast.walk(node)
    }
    found = []
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name.partition(".")[0] for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [(node.module or "").partition(".")[0]]
        found += [name for name in names if name in FORBIDDEN_MODULES]
        if isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name) and node.func.id in FORBIDDEN_CALLS:
                found.append(node.func.id)
            called = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if called in ("import_module", "load_source") and id(node) not in excused:
                found.append(called)
    return found


@pytest.mark.once
def test_nothing_in_the_package_makes_code_of_data() -> None:
    files = sorted((ROOT / "src").rglob("*.py"))
    assert len(files) > 50
    assert {file.name: found for file in files if (found := makes_code(ast.parse(file.read_text()), file.name))} == {}
    modules, calls = "|".join(FORBIDDEN_MODULES), "|".join([*FORBIDDEN_CALLS - {"compile"}, "import_module"])
    pattern = re.compile(rf"^\s*(?:c?import|from)\s+(?:{modules})\b|\b(?:{calls})\(", re.MULTILINE)
    for source in (ROOT / "ext").rglob("*.p[yx][xd]"):
        assert not pattern.search(source.read_text()), source
    for text in (
        "import pickle",
        "from marshal import loads",
        "eval(x)",
        "importlib.import_module(x)",
        "__import__(x)",
    ):
        assert makes_code(ast.parse(text), "wire.py"), text


@pytest.mark.once
@pytest.mark.parametrize("path", ["\0takeover", "", "a\0b"])
def test_an_abstract_control_socket_is_refused(path: str) -> None:
    with pytest.raises(UsageError):
        ControlPath(path)


def test_a_lock_file_of_another_user_is_refused(room: Room) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give a file to another user")
    lock = pathlib.Path(room.control + ".lock")
    lock.touch(0o666)
    os.chown(lock, NOBODY, NOBODY)
    new = room.echo()
    assert new.wait() == 1
    assert f"belongs to uid {NOBODY}" in new.text
    assert lock.exists()


def test_a_lock_file_that_everybody_could_lock_is_closed_to_them(room: Room) -> None:
    lock = pathlib.Path(room.control + ".lock")
    lock.touch()
    lock.chmod(0o666)
    room.wait_for_owner(room.echo())
    assert stat.S_IMODE(lock.stat().st_mode) == 0o600


def test_the_modes_are_right_under_a_umask_that_takes_everything(room: Room) -> None:
    server = room.run("sh", "-c", f"umask 0777; exec {sys.executable} -B -m takeover echo --listen {room.url}")
    server.wait_for("serving")
    for path in (room.control, room.control + ".lock"):
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o600


class Replaced(socket.socket):
    """Somebody puts a link to a file of the server's user in the place of the socket, as soon as that is bound."""

    def bind(self, address: Any) -> None:
        super().bind(address)
        os.unlink(address)
        os.symlink(os.path.join(os.path.dirname(address), "secret"), address)


@pytest.mark.once
def test_a_link_in_the_place_of_the_new_socket_opens_no_other_file(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = tmp_path / "secret"
    secret.touch(0o600)
    control = ControlPath(str(tmp_path / "takeover.sock"), allow_uids=(NOBODY,))
    monkeypatch.setattr(control, "_new_socket", lambda: Replaced(socket.AF_UNIX))
    with pytest.raises(ControlPathError):
        control.bind()
    assert stat.S_IMODE(secret.stat().st_mode) == 0o600


class Moved(socket.socket):
    """Somebody puts another folder in the place of the control folder, just before the socket is bound."""

    def bind(self, address: Any) -> None:
        folder = os.path.dirname(address)
        os.rename(folder, f"{folder}.old")
        os.mkdir(folder)
        super().bind(address)


@pytest.mark.once
def test_a_folder_that_is_replaced_while_the_socket_is_bound_is_noticed(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "control").mkdir()
    control = ControlPath(str(tmp_path / "control" / "takeover.sock"))
    monkeypatch.setattr(control, "_new_socket", lambda: Moved(socket.AF_UNIX))
    with pytest.raises(ControlPathError, match="replaced the socket or its folder"):
        control.bind()


@pytest.mark.once
@ROOT_ONLY
@pytest.mark.parametrize("by", ["a stranger's", "one that everybody may write to"])
@pytest.mark.parametrize("call", ["lock", "bind"])
def test_a_folder_that_is_replaced_after_it_was_checked_is_checked_again(
    tmp_path: pathlib.Path, by: str, call: str
) -> None:
    folder = tmp_path / "control"
    folder.mkdir()
    control = ControlPath(str(folder / "takeover.sock"))
    folder.rmdir()
    folder.mkdir()
    if by == "a stranger's":
        os.chown(folder, NOBODY, NOBODY)
    else:
        folder.chmod(0o777)
    with pytest.raises(ControlPathError, match=r"belongs to uid|everybody may write"):
        getattr(control, call)()
    assert list(folder.iterdir()) == []


PRETENDS = """
import os, socket, sys
control, address, uid, what = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]
if uid:
    os.setgid(uid); os.setuid(uid)
with socket.socket(socket.AF_UNIX) as listening, socket.socket() as tcp:
    listening.bind(control)
    os.chmod(control, 0o777)
    listening.listen()
    given = {"not listening": tcp.fileno(), "no socket": os.open("/", os.O_RDONLY)}.get(what)
    if given is None:
        tcp.bind(("127.0.0.1", 0)); tcp.listen(); given = tcp.fileno()
    print("ready", flush=True)
    with listening.accept()[0] as sock:
        try:
            socket.send_fds(sock, [bytes(1)], [given])
            sock.recv(1)
        except OSError:
            pass
"""


@pytest.mark.parametrize("what", ["not listening", "no socket", "another user's"])
def test_what_only_looks_like_the_original_script_is_not_believed(room: Room, what: str) -> None:
    stranger = what == "another user's"
    if stranger and os.geteuid() != 0:
        pytest.skip("only root can become another user")
    if stranger:
        os.chmod(room.folder, 0o1777)
    words = [sys.executable, "-c", PRETENDS, room.control, room.url, str(NOBODY if stranger else 0), what]
    room.run(*words).wait_for("ready")
    new = room.echo()
    assert new.wait() == 1
    assert (f"belongs to uid {NOBODY}" if stranger else "RemoteProtocolError: descriptor") in new.text


def tcp(*, listening: bool) -> int:
    sock = socket.socket()
    if listening:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
    return sock.detach()


def unix(*, kind: int = socket.SOCK_STREAM) -> int:
    return socket.socket(socket.AF_UNIX, kind).detach()


FALSE = {
    "a token that is a file": ("token", lambda: os.open(__file__, os.O_RDONLY)),
    "a lock that is a folder": ("lock", lambda: os.open("/", os.O_RDONLY)),
    "a lock that is a pipe": ("lock", token),
    "a control socket of TCP": ("control", lambda: tcp(listening=True)),
    "a control socket that does not listen": ("control", unix),
    "a control socket of datagrams": ("control", lambda: unix(kind=socket.SOCK_DGRAM)),
    "a listener that does not listen": ("listener", lambda: tcp(listening=False)),
    "a listener of datagrams": ("listener", lambda: socket.socket(type=socket.SOCK_DGRAM).detach()),
    "a listener that is a pipe": ("listener", token),
    "an unknown role": ("key", token),
}


@pytest.mark.parametrize("name", FALSE)
def test_a_successor_takes_nothing_that_is_not_what_it_is_said_to_be(room: Room, name: str) -> None:
    role, make = FALSE[name]
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(room.control)
        listening.listen()
        listening.settimeout(LIMIT)
        new = room.echo()
        bare = Bare(listening.accept()[0])
        with bare.sock:
            bare.send(Type.HELLO, {"versions": [1], "generation": 1, "build": "0", "pid": os.getpid(), "service": ""})
            bare.receive(Type.JOIN)
            number = make()
            item = {"role": role, "name": "x", "url": "tcp://127.0.0.1:1", "device": 0, "inode": 0}
            bare.send(Type.LISTENERS, {"items": [item], "left": 1}, [number])
            os.close(number)
            bare.receive(Type.TAKEN)
            bare.receive(Type.ABORT)
    assert new.wait() == 1
    assert "RemoteProtocolError: " in new.text
    assert "the unknown role" in new.text if role == "key" else "instead of" in new.text


@ROOT_ONLY
def test_a_takeover_works_with_a_seccomp_filter_no_new_privileges_and_no_capability(room: Room) -> None:
    """What SystemCallFilter=~ptrace mount … , NoNewPrivileges= and CapabilityBoundingSet= make of a unit."""
    serve = [sys.executable, "-c", CONFINED, room.url]
    old = room.run(*serve)
    old.wait_for("serving")
    assert re.search(r"^Seccomp:\s+2$", pathlib.Path(f"/proc/{old.pid}/status").read_text(), re.MULTILINE)
    new = room.run(*serve)
    new.wait_for("took over")
    assert old.wait() == 0
    room.round_trip()


CONFINED = """
import ctypes, os, struct, sys
libc = ctypes.CDLL(None, use_errno=True)
denied = {
    "x86_64": [101, 165, 166, 246, 272, 310, 311, 321],
    "aarch64": [117, 40, 39, 104, 97, 270, 271, 280],
}[os.uname().machine]
lines = [(0x20, 0, 0, 0)]
lines += [(0x15, len(denied) - index, 0, number) for index, number in enumerate(denied)]
lines += [(0x06, 0, 0, 0x7FFF0000), (0x06, 0, 0, 0x00050001)]
code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in lines))
program = ctypes.create_string_buffer(struct.pack("HP", len(lines), ctypes.addressof(code)))
for capability in range(41):
    libc.prctl(24, capability, 0, 0, 0)
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, program, 0, 0) == 0
assert libc.unshare(0x20000) == -1 and ctypes.get_errno() == 1
os.execv(sys.executable, [sys.executable, "-m", "takeover", "echo", "--listen", sys.argv[1], "--probation", "0"])
"""


def test_a_takeover_works_where_all_but_the_control_folder_is_read_only(room: Room) -> None:
    """What ProtectSystem=strict with RuntimeDirectory= makes of a unit."""
    enter = unshared("--mount")
    script = f"""
        mount --bind {room.folder} {room.folder} && mount -o remount,bind,ro / && cd {room.folder} || exit 9
        touch /takeover-may-not-write 2>/dev/null && exit 8
        exec {sys.executable} -B -m takeover echo --listen {room.url} --probation 0"""
    old = room.run(*enter, "sh", "-c", script)
    old.wait_for("serving")
    new = room.run(*enter, "sh", "-c", script)
    new.wait_for("took over")
    assert old.wait() == 0
    room.round_trip()


@ROOT_ONLY
def test_after_a_privilege_drop_the_same_user_takes_over_and_root_refuses_to(room: Room) -> None:
    """Root is not to run on descriptors that a lesser user holds; that user's own next version is welcome."""
    os.chown(room.folder, NOBODY, NOBODY)
    old = room.echo({"uid": NOBODY})
    old.wait_for("serving")
    new = room.echo({"uid": NOBODY})
    new.wait_for("took over")
    assert old.wait() == 0
    root = room.echo()
    assert root.wait() == 1
    assert f"uid {NOBODY}" in root.text
    room.round_trip()
    assert new.running


@ROOT_ONLY
def test_what_root_serves_is_not_taken_over_by_a_lesser_user_that_nobody_has_allowed(room: Room) -> None:
    """Also where somebody has opened the files of the socket and the lock to everybody."""
    os.chmod(room.folder, 0o755)
    old = room.echo()
    room.wait_for_owner(old)
    for path in (room.control, room.control + ".lock"):
        os.chmod(path, 0o666)
    refused = room.echo({"uid": NOBODY})
    assert refused.wait() == 1
    old.wait_for(f"uid {NOBODY}")
    assert room.owner() == old.pid
    room.round_trip()


@pytest.mark.once
def test_the_pid_of_a_peer_that_is_dead_names_nobody() -> None:
    """Its pidfd says who the peer was, whoever has got the number since."""
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("")
        listening.listen()
        child = os.fork()
        if not child:
            with socket.socket(socket.AF_UNIX) as sock:
                sock.connect(listening.getsockname())
                sock.recv(1)
            os._exit(0)
        with listening.accept()[0] as sock:
            peer = peer_of(sock)
            assert peer.pid == child and peer.pidfd is not None
            try:
                assert is_process(peer.pid, peer.pidfd, child)
                sock.sendall(b"g")
                os.waitpid(child, 0)
                assert not is_process(peer.pid, peer.pidfd, child)
            finally:
                os.close(peer.pidfd)


@pytest.mark.once
def test_a_kernel_without_pidfds_of_sockets_is_asked_for_one_by_the_pid(monkeypatch: pytest.MonkeyPatch) -> None:
    """SO_PEERPIDFD came with Linux 6.5."""
    monkeypatch.setattr("takeover.control.SO_PEERPIDFD", 9999)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        peer = peer_of(ours)
        assert (peer.pid, peer.uid) == (os.getpid(), os.geteuid()) and peer.pidfd is not None
        try:
            assert is_process(peer.pid, peer.pidfd, os.getpid())
        finally:
            os.close(peer.pidfd)
        monkeypatch.setattr(os, "pidfd_open", failing(errno.ESRCH))
        assert peer_of(ours).pidfd is None
