"""Time goes wrong: the clock on the wall jumps, or both processes sleep for longer than every limit."""

import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest

from clients import eventually
from processes import FAST, Room, stop

ROOT = pathlib.Path(__file__).parent.parent

JUMPING = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <sys/time.h>
#include <time.h>

/* A day forward and a day back, by turns of 50 ms; the other clocks are as they are. */
static long shift(void) {
    static int (*real)(clockid_t, struct timespec *);
    struct timespec now;
    if (!real) *(void **)&real = dlsym(RTLD_NEXT, "clock_gettime");
    real(CLOCK_MONOTONIC, &now);
    return now.tv_nsec / 50000000 % 2 ? 86400 : -86400;
}

int clock_gettime(clockid_t clock, struct timespec *told) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) *(void **)&real = dlsym(RTLD_NEXT, "clock_gettime");
    int result = real(clock, told);
    if (!result && clock == CLOCK_REALTIME) told->tv_sec += shift();
    return result;
}

int gettimeofday(struct timeval *restrict told, void *restrict zone) {
    struct timespec now;
    (void)zone;
    clock_gettime(CLOCK_REALTIME, &now);
    told->tv_sec = now.tv_sec;
    told->tv_usec = now.tv_nsec / 1000;
    return 0;
}

time_t time(time_t *told) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (told) *told = now.tv_sec;
    return now.tv_sec;
}
"""

SHOWN = {"src/takeover/controller.py": '"at": time.time(),', "src/takeover/run/crew.py": "self.ready_at ="}
"""Where the time of day is read: to be shown to people."""


@pytest.fixture
def jumping_clock(room: Room) -> None:
    """All processes of the room have a CLOCK_REALTIME that jumps to and fro."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler (cc)")
    source, library = (pathlib.Path(room.folder, name) for name in ("jumping.c", "jumping.so"))
    source.write_text(JUMPING)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    room.environment["LD_PRELOAD"] = str(library)
    ask = "import time; print(*(time.time() for _ in range(1000) if not time.sleep(0.001)))"
    told = subprocess.check_output([sys.executable, "-c", ask], env=room.environment, text=True).split()
    assert max(map(float, told)) - min(map(float, told)) > 100_000, "the clock does not jump"


@pytest.mark.usefixtures("jumping_clock")
def test_a_clock_that_jumps_a_day_to_and_fro_changes_nothing(room: Room) -> None:
    old = room.echo({"limits": FAST}, probation=0.3)
    room.wait_for_owner(old)
    load, streams = room.pound(), room.streams(5, idle=5)
    for generation in range(2, 6):
        new = room.echo({"limits": FAST}, probation=0.3)
        new.wait_for("took over")
        room.wait_for_owner(new)
        assert old.wait() == 0, old.text
        assert room.status()["generation"] == generation
        streams.goes_on()
        load.goes_on()
        old = new
    load.stop()
    streams.stop()
    assert (load.lost, streams.failures) == ([], [])


@pytest.mark.skipif(not (ROOT / "src").is_dir(), reason="the sources are not beside the tests")
def test_the_time_of_day_is_read_only_where_it_is_shown() -> None:
    reads = re.compile(r"\btime\.time(_ns)?\(|CLOCK_REALTIME|datetime|gettimeofday|\btime\(NULL\)")
    found = []
    for folder, suffixes in (("src", (".py",)), ("ext", (".pyx", ".pxd", ".pxi", ".h"))):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in suffixes:
                name = str(path.relative_to(ROOT))
                found += [(name, line.strip()) for line in path.read_text().splitlines() if reads.search(line)]
    assert {name for name, _ in found} == set(SHOWN), found
    for name, line in found:
        assert SHOWN[name] in line, (name, line)


@pytest.mark.parametrize("first", ["incumbent", "successor"], ids="the {} wakes first".format)
def test_both_may_sleep_in_a_takeover_for_longer_than_every_limit(room: Room, first: str) -> None:
    """As in a suspended machine, but for the clients, who wait."""
    old = room.echo({"limits": FAST})
    room.wait_for_owner(old)
    load, streams = room.pound(), room.streams(5, idle=5)
    load.goes_on()
    new = room.member(join={"service": "echo", "limits": FAST}, plan=["wait"])
    new.wait_for("waiting")
    sleepers = [old, new] if first == "incumbent" else [new, old]
    for program in sleepers:
        stop(program)
    time.sleep(1.2 * max(FAST.values()))  # what is tested is that this time passes
    awake, asleep = sleepers
    awake.signal(signal.SIGCONT)
    time.sleep(1.2 * FAST["silence"])
    asleep.signal(signal.SIGCONT)
    new.tell()
    eventually(lambda: "ready" in new.text or not new.running, "the takeover is decided")
    owner = eventually(room.owner, "one of them owns the service")
    assert owner in (old.pid, new.pid)
    load.goes_on()
    streams.goes_on()
    last = room.echo({"limits": FAST})
    last.wait_for("took over")
    room.wait_for_owner(last)
    assert room.status()["last_takeover"]["peer"] == owner
    eventually(lambda: not new.running, "the one that was too late has ended")
    streams.goes_on()
    load.goes_on()
    load.stop()
    streams.stop()
    assert (load.lost, streams.failures) == ([], [])


def test_a_service_that_slept_between_takeovers_hands_over_when_it_wakes(room: Room) -> None:
    """SIGSTOP of the owner and of the one that still drains, for longer than every limit."""
    old = room.echo({"limits": FAST}, live=False)
    room.wait_for_owner(old)
    steady = room.steady(3)
    steady.goes_on()
    new = room.echo({"limits": FAST}, live=False)
    new.wait_for("took over")
    room.wait_for_owner(new)
    for program in (old, new):
        stop(program)
    time.sleep(1.2 * max(FAST.values()))
    for program in (new, old):
        os.kill(program.pid, signal.SIGCONT)
    last = room.echo({"limits": FAST}, live=False)
    last.wait_for("took over")
    room.wait_for_owner(last)
    assert new.wait() == 0
    steady.goes_on()
    steady.stop()
    assert steady.lost == []
    assert old.wait() == 0
