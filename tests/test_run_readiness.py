"""Whether a new command is ready: each way to tell, and that neither the old command nor a stranger can pass for it."""

from __future__ import annotations

import contextlib
import os
import pathlib
import select
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest

from clients import eventually
from newcomers import NEWCOMER, Trials, tcp, trials, udp, unix
from takeover.errors import UsageError
from takeover.run import acceptance, notices, proc, waiting
from takeover.run.events import Events
from takeover.run.notices import Notices
from takeover.run.probes import endpoint
from takeover.run.readiness import Way, parse, wanted_of_probe


@pytest.fixture
def stage() -> Iterator[Trials]:
    with trials() as made:
        yield made


@pytest.mark.parametrize(
    ("how", "way"),
    [
        ("auto", Way("auto")),
        ("notify", Way("notify")),
        ("tcp", Way("tcp")),
        ("http:/health", Way("http", "/health")),
        ("http:/health=204", Way("http", "/health", 204)),
        ("http:/health?deep=yes", Way("http", "/health?deep=yes")),
        ("http:/health?deep=yes=200", Way("http", "/health?deep=yes", 200)),
        ("exec:curl -f $TAKEOVER_URL", Way("exec", "curl -f $TAKEOVER_URL")),
        ("delay:1.5", Way("delay", "1.5", seconds=1.5)),
        ("line:Running on .*:", Way("line", "Running on .*:")),
    ],
)
def test_each_way_is_understood(how: str, way: Way) -> None:
    assert parse(how) == way


@pytest.mark.parametrize(
    "how",
    [
        "",
        "automatic",
        "tcp:8000",
        "http",
        "http:health",
        "http:/health=ok",
        "http:/health=999",
        "http:/a b",
        "exec:",
        "exec: ",
        "delay:",
        "delay:-1",
        "delay:soon",
        "delay:inf",
        "delay:nan",
        "line:",
        "line:(",
    ],
)
def test_what_cannot_be_meant_is_wrong_usage_and_says_what_can(how: str) -> None:
    with pytest.raises(UsageError, match="--ready"):
        parse(how)


def test_a_probe_that_nobody_accepts_is_given_up_for_another_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    listening = tcp()
    where = endpoint(listening.url, listening.sock, private=True)
    look = acceptance.Acceptance([where], strict=False)
    with contextlib.closing(look), listening.sock:
        look.look(proc.Tree(os.getpid()))
        (first,) = look.targets[0].probes
        look.look(proc.Tree(os.getpid()))
        assert look.targets[0].probes == [first]
        monkeypatch.setattr(acceptance, "ABANDONED", 0.0)
        look.look(proc.Tree(os.getpid()))
        (second,) = look.targets[0].probes
        assert second is not first and first.sock.fileno() == -1 and not look.proven


def test_only_the_way_that_reads_lines_asks_for_the_output() -> None:
    assert [how for how in ("auto", "tcp", "line:x", "delay:1", "notify") if parse(how).reads_output] == ["line:x"]


def test_the_words_of_a_command_tell_whether_it_takes_a_probe_listener() -> None:
    assert wanted_of_probe(["serve", "--fd", "{fd}"]) == ""
    assert wanted_of_probe(["serve", "--admin", "fd://{fd:probe}", "--port", "{port:probe}"]) == "fd"
    assert wanted_of_probe(["serve", "--admin={host:probe}:{port:probe}"]) == "port"


WAITS = [
    "block_in_accept",
    "wait_in_epoll",
    "wait_in_nested_epoll",
    "wait_in_poll",
    "wait_in_poll_for_an_epoll_set",
    "wait_in_select",
    "run_asyncio",
    "accept_in_a_child",
]


@pytest.mark.parametrize("what", WAITS)
@pytest.mark.parametrize("how", ["auto", "tcp"])
def test_a_command_is_ready_however_it_waits(stage: Trials, how: str, what: str) -> None:
    trial = stage.newcomer(how, [stage.listen(tcp())], what)
    proof = trial.run()
    # One that closes at once may have done so, each time, before anybody could look.
    assert "accepted a probe on tcp://" in proof or "probes were closed too soon" in proof


@pytest.mark.parametrize("what", ["block_in_accept", "wait_in_epoll", "wait_in_poll", "wait_in_select"])
def test_the_listener_on_which_a_process_waits_is_seen_from_outside(stage: Trials, what: str) -> None:
    listeners = [stage.listen(tcp()), stage.listen(tcp())]
    trial = stage.newcomer("delay:0", listeners, what)
    inodes = [os.fstat(each.sock.fileno()).st_ino for each in listeners]

    def waits() -> bool:
        seen = waiting.look(proc.Tree(trial.pid).members(), inodes)
        return set(seen.waiting) == set(inodes)

    eventually(waits, "the process is seen waiting on both")
    assert waiting.look(proc.Tree(os.getpid()).members()[:1], inodes).waiting == {}


def test_ipv6_and_unix_listeners_are_probed_too(stage: Trials, tmp_path: pathlib.Path) -> None:
    listeners = [stage.listen(tcp("::1", socket.AF_INET6)), stage.listen(unix(str(tmp_path / "s")))]
    trial = stage.newcomer("tcp", listeners, "wait_in_epoll")
    proof = trial.run()
    assert "accepted a probe on tcp://[::1]:" in proof and "accepted a probe on unix:" in proof


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_a_listener_on_every_address_is_probed_on_loopback(stage: Trials, host: str) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    trial = stage.newcomer("tcp", [stage.listen(tcp(host, family))], "wait_in_epoll")
    assert "accepted a probe" in trial.run()


@pytest.mark.parametrize("what", ["receive_datagrams", "wait_in_epoll"])
def test_a_udp_listener_counts_when_a_process_waits_on_it(stage: Trials, what: str) -> None:
    trial = stage.newcomer("auto", [stage.listen(udp())], what)
    assert "waits on udp://" in trial.run()


def test_a_command_that_accepts_without_being_seen_waiting_is_ready_too(stage: Trials) -> None:
    trial = stage.newcomer("auto", [stage.listen(tcp())], "spin_without_waiting")
    assert "accepted a probe" in trial.run()


@pytest.mark.parametrize("how", ["auto", "tcp"])
def test_a_command_that_closes_connections_at_once_is_ready_when_it_is_seen_waiting(
    stage: Trials, tmp_path: pathlib.Path, how: str
) -> None:
    for listeners in ([stage.listen(tcp())], [stage.listen(unix(str(tmp_path / "s")))]):
        proof = stage.newcomer(how, listeners, "close_at_once").run()
        assert "probes were closed too soon to tell" in proof or "accepted a probe" in proof  # a matter of luck
        assert stage.newcomer(how, listeners, "hang").run(0.7) == ""


@pytest.mark.parametrize("what", ["hang", "register_and_hang", "close_them_and_hang", "listen_on_its_own_port"])
@pytest.mark.parametrize("how", ["auto", "tcp"])
def test_a_command_that_does_not_accept_is_not_ready_though_the_old_one_answers(
    stage: Trials, how: str, what: str
) -> None:
    listeners = [stage.listen(tcp())]
    old = stage.newcomer("tcp", listeners, "wait_in_epoll")
    assert old.run()
    assert stage.newcomer(how, listeners, what).run(1.5) == ""


def test_all_listeners_count_not_only_the_first(stage: Trials) -> None:
    listeners = [stage.listen(tcp()), stage.listen(tcp())]
    assert stage.newcomer("auto", listeners, "take_only_the_first").run(1) == ""


@pytest.mark.parametrize("what", WAITS)
def test_the_new_command_is_found_beside_an_old_one_that_accepts_too(stage: Trials, what: str) -> None:
    listeners = [stage.listen(tcp())]
    old = [stage.newcomer("tcp", listeners, each) for each in ("wait_in_epoll", "wait_in_select")]
    assert all(each.run() for each in old)
    new = stage.newcomer("tcp", listeners, what)
    assert "accepted a probe" in new.run()
    accepted = int(new.proof.split()[1])
    assert accepted == new.pid or (what == "accept_in_a_child" and accepted not in [each.pid for each in old])


@pytest.mark.parametrize("strict", [False, True])
def test_a_command_that_waits_and_is_never_the_one_who_accepts_counts_unless_a_proof_was_asked_for(
    stage: Trials, monkeypatch: pytest.MonkeyPatch, strict: bool
) -> None:
    monkeypatch.setattr(acceptance, "PASSED_OVER", (3, 0.0))
    listeners = [stage.listen(tcp())]
    assert stage.newcomer("tcp", listeners, "wait_in_epoll").run()
    trial = stage.newcomer("tcp" if strict else "auto", listeners, "wait_and_leave_all_to_others")
    if strict:
        told = "probes were all taken by others"
        eventually(lambda: trial.run(0.05) or told in trial.check.why_not(), told)
        assert trial.proof == ""
    else:
        assert f"pid {trial.pid} waits on tcp://" in trial.run() and "; others took all " in trial.proof


@pytest.mark.parametrize("how", ["tcp", "http:/"])
def test_where_there_is_no_listener_to_probe_a_probe_fails_at_once(stage: Trials, how: str) -> None:
    trial = stage.newcomer(how, [stage.listen(udp())], "hang")
    trial.run()
    assert trial.failure == f"--ready {trial.check._way.kind} needs a listener to probe, and it was given none"


def test_before_linux_4_13_the_number_of_a_descriptor_tells_which_socket_an_epoll_set_holds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    held = [proc.Target(5, 0x4, 111), proc.Target(6, 0x1, None), proc.Target(7, 0x1, None), proc.Target(8, 0x19, 333)]
    monkeypatch.setattr(proc, "targets", lambda pid, epoll: held)
    assert waiting._targets(1, 3, {5: 111, 6: 222}) == ({222, 333}, {6, 7, 8})


def test_where_calls_are_hidden_an_epoll_set_that_holds_the_listener_counts_as_waiting(
    stage: Trials, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hidden(pid: int, thread: int) -> None:
        raise proc.Hidden("this kernel does not tell system calls")

    monkeypatch.setattr(proc, "waiting_call", hidden)
    listening = stage.listen(tcp())
    with select.epoll() as epoll:
        inode = os.fstat(listening.sock.fileno()).st_ino
        seen = waiting.look([os.getpid()], [inode])
        assert seen.waiting == {} and seen.hidden == "this kernel does not tell system calls"
        epoll.register(listening.sock, select.EPOLLIN)
        seen = waiting.look([os.getpid()], [inode])
        assert seen.waiting == {inode: waiting.Waiter(os.getpid(), "its epoll set holds it")}
        others = waiting.Seen([], {}, {4711: os.getppid()}, {}, "")
        with pytest.raises(proc.Hidden):
            waiting._look_into(os.getpid(), frozenset({inode, 4711}), others)
        assert list(others.waiting) == [inode]


def test_ready_is_believed_of_the_command_and_of_its_children(stage: Trials) -> None:
    assert stage.newcomer("notify", [], "say_ready_in_a_child").run().startswith("READY=1 from pid ")
    alone = stage.newcomer("notify", [], "say_ready_and_hang")
    assert alone.run() == f"READY=1 from pid {alone.pid}"
    assert alone.check.status == "warming up"


def _say_ready_to(address: str) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.sendto(b"READY=1\nSTATUS=a lie", "\0" + address[1:])


@pytest.mark.parametrize("how", ["notify", "auto"])
def test_a_command_that_says_ready_more_than_once_is_ready_once(stage: Trials, how: str) -> None:
    listening = stage.listen(tcp())
    trial = stage.newcomer(how, [listening], "say_ready_to_each_client")
    with socket.create_connection(listening.sock.getsockname()):
        assert trial.run()
        seen = trial.check.status
        with socket.create_connection(listening.sock.getsockname()):
            eventually(lambda: stage.events.run_once(0.05) or trial.check.status != seen, "it has said it once more")


def test_a_command_that_has_ended_is_not_ready_although_it_said_so_before(stage: Trials) -> None:
    trial = stage.newcomer("notify", [], "say_ready_and_die")
    eventually(trial.has_ended, "it has ended")
    told = trial.check.why_not(trial.exited)
    assert (trial.proof, told) == ("", "") and not trial.check.ready


def test_a_notify_socket_that_cannot_be_bound_leaves_no_descriptor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("secrets.token_hex", lambda size: "the same")
    events = Events()
    first = Notices(events, print)
    before = os.listdir("/proc/self/fd")
    with pytest.raises(OSError, match="in use"):
        Notices(events, print)
    assert os.listdir("/proc/self/fd") == before
    for each in (first, events):
        each.close()


def test_a_flood_of_notices_keeps_the_loop_from_nothing_else(stage: Trials, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notices, "_IN_ONE_TURN", 2)
    told = Notices(stage.events, print)
    told.started(proc.Tree(os.getpid()))
    seen = []
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        for number in range(3):
            sock.sendto(f"STATUS={number}".encode(), "\0" + told.address[1:])
        for _ in range(2):
            stage.events.run_once(0)
            seen.append(told.status)
    told.close()
    assert seen == ["1", "2"]


def test_ready_is_not_believed_of_a_stranger(stage: Trials) -> None:
    trial = stage.newcomer("notify", [], "hang")
    _say_ready_to(trial.check.environment["NOTIFY_SOCKET"])
    assert trial.run(0.5) == ""
    assert f"READY=1 came from pid {os.getpid()}, which is none of its processes" in trial.check.why_not()
    assert trial.check.status == ""


def test_a_status_of_a_stranger_is_nothing_to_tell(stage: Trials) -> None:
    trial = stage.newcomer("notify", [], "hang")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.sendto(b"STATUS=a lie", "\0" + trial.check.environment["NOTIFY_SOCKET"][1:])
    assert trial.check.why_not() == "it has not sent READY=1 to NOTIFY_SOCKET"


def test_ready_is_not_believed_of_the_old_command(stage: Trials) -> None:
    trial = stage.make("notify", [], sys.executable, NEWCOMER, "hang")
    old = stage.make("notify", [], sys.executable, NEWCOMER, "say_ready_and_hang")
    old.check.environment.update(trial.check.environment)
    old.start()
    trial.start()
    refused = f"READY=1 came from pid {old.pid}"
    eventually(lambda: trial.run(0.05) or refused in trial.check.why_not(), refused)
    assert trial.proof == ""


def test_each_process_has_a_notify_socket_of_its_own(stage: Trials) -> None:
    first, second = (stage.newcomer("notify", [], what) for what in ("say_only_a_status", "say_ready_and_hang"))
    assert second.run() == f"READY=1 from pid {second.pid}"
    eventually(lambda: stage.events.run_once(0.05) or first.check.status == "loading 7 of 9 models", "its status came")
    assert first.proof == ""


def test_ready_alone_does_not_do_for_auto_where_it_can_be_seen_that_nobody_accepts(stage: Trials) -> None:
    assert stage.newcomer("auto", [stage.listen(tcp())], "say_ready_and_hang").run(1) == ""


def test_a_delay_needs_nothing_but_a_life_of_that_long(stage: Trials) -> None:
    assert "alive for 0.1 s" in stage.newcomer("delay:0.1", [], "hang").run()
    assert stage.newcomer("delay:30", [], "crash").run() == ""


def test_a_check_leaves_no_descriptor_open(stage: Trials) -> None:
    listeners = [stage.listen(tcp())]
    before = len(os.listdir("/proc/self/fd"))
    for how, what in (("auto", "wait_in_epoll"), ("tcp", "hang"), ("notify", "say_ready_and_hang")):
        trial = stage.newcomer(how, listeners, what)
        trial.run(0.3)
        trial.end()
        stage.trials.remove(trial)
    assert len(os.listdir("/proc/self/fd")) == before


def test_nothing_is_polled_once_the_command_is_ready(stage: Trials) -> None:
    trial = stage.newcomer("auto", [stage.listen(tcp())], "wait_in_epoll")
    assert trial.run()
    assert stage.events._timeout(None) is None


@pytest.mark.skipif(not os.path.exists("/usr/bin/systemd-notify"), reason="needs systemd-notify (Debian: systemd)")
def test_systemd_notify_is_believed_although_it_ends_at_once(stage: Trials) -> None:
    trial = stage.start("notify", [], "sh", "-c", "systemd-notify --ready; sleep 60")
    assert trial.run().startswith("READY=1 from pid ")


def test_a_process_that_has_left_its_parent_still_belongs_to_the_command() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, start_new_session=True) as process:
        tree = proc.Tree(process.pid)
        assert tree.members() == [process.pid] and tree.has(process.pid) and not tree.has(os.getpid())
        assert not tree.has(1)
        process.communicate(b"\n")
    assert tree.members() == []
