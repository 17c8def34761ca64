"""Either side of a live move is killed or stopped at any moment, while handlers write to all connections all the time.

What a client reads is whole lines, those of the one process in a row and all before those of the next one. The moments
are hypothesis's; what fails is printed with the line that plays it again.
"""

from __future__ import annotations

import signal
import threading
import time

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as some

from clients import Talker, eventually
from conftest import CYTHON_IS_BUILT
from processes import FAST, Boundaries, Program, Room, stop

STEPS = ("giver before CONNECTIONS", "giver after CONNECTIONS", "giver at ADOPTED", "taker at CONNECTIONS")
COUNT = 60


def check(talker: Talker, servers: list[int], last: int) -> None:
    """Reads up to the answer of the last process."""
    talker.send("last\n")
    at, tick = 0, 0
    while True:
        answer = talker.hear()
        came_from = servers.index(answer["pid"])
        assert came_from >= at, (answer, at)
        if "line" in answer:
            assert answer["pid"] == last
            return
        assert came_from > at or tick in (0, answer["tick"] - 1), (answer, tick)
        at, tick = came_from, answer["tick"]


def play(backend: str, step: str, victim: int, action: str, delay: float, pause: float) -> None:
    """The victim fails so many seconds after the boundary; one that is stopped stays so for the pause."""
    with Room(backend) as room:
        programs: list[Program] = []
        failed = threading.Event()

        def fail() -> None:
            eventually(lambda: len(programs) > victim, "the program is started")
            if action == "kill":
                programs[victim].signal(signal.SIGKILL)
                programs[victim].process.wait()
            else:
                stop(programs[victim])
            failed.set()

        def act() -> bool:
            threading.Timer(delay, fail).start()
            return False

        boundaries = Boundaries({step: act})
        try:
            wishes = {"limits": FAST, "boundaries": boundaries.name, "timer": 0.005}
            programs.append(room.protocols(wishes))
            programs[0].wait_for("serving")
            talkers = [room.talker() for _ in range(COUNT)]
            programs.append(room.protocols(wishes))
            eventually(failed.is_set, "the moment")
            old, new = programs
            if action == "stop":
                time.sleep(pause)
                programs[victim].signal(signal.SIGCONT)
                assert old.wait() == 0, old.text
            elif victim == 0:
                eventually(lambda: room.owner() == new.pid, "it owns the service")
            lost = 0
            for talker in talkers:
                try:
                    check(talker, [old.pid, new.pid], (new if new.running else old).pid)
                except (ConnectionError, OSError):
                    lost += 1  # with the process that was killed
            assert action == "kill" or not lost
            assert old.running or new.running or lost == COUNT
        finally:
            boundaries.close()


@settings(
    max_examples=4,
    deadline=None,
    phases=(Phase.explicit, Phase.generate),
    database=None,
    print_blob=True,
    suppress_health_check=list(HealthCheck),
)
@given(
    step=some.sampled_from(STEPS),
    victim=some.sampled_from((0, 1)),
    action=some.sampled_from(("kill", "stop")),
    delay=some.floats(0, 0.01),
    pause=some.sampled_from((0.0, 0.6)),
    plain=some.booleans(),
)
def test_at_whichever_moment_either_side_fails_no_line_is_broken_or_lost_in_between(
    step: str, victim: int, action: str, delay: float, pause: float, plain: bool
) -> None:
    play("python" if plain or not CYTHON_IS_BUILT else "cython", step, victim, action, delay, pause)
