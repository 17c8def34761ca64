"""Both backends in a run: what takes `backend`, `fdpass` or `loop_module` runs once on each, and its id says which."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import importlib
import os
import signal
import zlib
from collections.abc import Awaitable, Iterator
from types import ModuleType
from typing import Any

import pytest
from hypothesis import settings

from aio_rooms import Aio, Run
from channel_cases import MakeScene, Scene, Tally
from clients import LIMIT
from kernel import opened
from processes import OFFSET, STEP, Room, nursery

BACKENDS = ("cython", "python")

# A shell starts what runs in its background so, and nohup(1) everything; each process of the tests would inherit it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

# With it a process of the tests would write a line's text and its end apart, and a log line may come in between.
os.environ.pop("PYTHONUNBUFFERED", None)


def _backend_is_built() -> bool:
    try:
        importlib.import_module("takeover._fdpass")
        importlib.import_module("takeover._loop")
    except ImportError:
        return False
    return True


CYTHON_IS_BUILT = _backend_is_built()


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """The name of a backend, also for TAKEOVER_BACKEND in the environment of a process that a test starts."""
    if request.param == "cython" and not CYTHON_IS_BUILT:
        if os.environ.get("TAKEOVER_TEST_EXT") == "require":
            pytest.fail("the compiled modules are required here and cannot be imported")
        pytest.skip("the compiled modules are not built")
    return str(request.param)


@pytest.fixture
def fdpass(backend: str) -> ModuleType:
    """The descriptor-passing module of the backend."""
    return importlib.import_module("takeover._fdpass" if backend == "cython" else "takeover._fdpass_py")


@pytest.fixture
def loop_module(backend: str) -> ModuleType:
    """The event-loop module of the backend."""
    return importlib.import_module("takeover._loop" if backend == "cython" else "takeover._loop_py")


@pytest.fixture
def room(backend: str, fdpass: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[Room]:
    """A folder of its own for real processes on the backend; they are killed, and it is removed, at the end.

    What the test itself joins passes its descriptors with that backend too.
    """
    monkeypatch.setattr("takeover.link.fdpass", fdpass)
    with Room(backend) as room:
        yield room


@pytest.fixture(params=["asyncio", "uvloop"])
def aio(request: pytest.FixtureRequest) -> Iterator[Aio]:
    if request.param == "uvloop":
        pytest.importorskip("uvloop", reason="uvloop cannot be imported here")
    with Room("cython" if CYTHON_IS_BUILT else "python") as room:
        yield Aio(room, request.param)


@pytest.fixture(params=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Run:
    if request.param == "asyncio":
        return lambda work: asyncio.run(asyncio.wait_for(work, LIMIT))
    uvloop = pytest.importorskip("uvloop", reason="uvloop cannot be imported here")

    def run_on_uvloop(work: Awaitable[Any]) -> Any:
        loop = uvloop.new_event_loop()
        with contextlib.closing(loop):
            return loop.run_until_complete(asyncio.wait_for(work, LIMIT))

    return run_on_uvloop


@pytest.fixture
def make_scene(loop_module: ModuleType) -> Iterator[MakeScene]:
    """Makes a scene on loops of the backend; what is open at the end is what was open before it."""
    scenes: list[Scene] = []
    before = opened()

    def make(handler: Any = Tally, taking: ModuleType = loop_module) -> Scene:
        scenes.append(Scene(loop_module, taking, handler))
        return scenes[-1]

    yield make
    for scene in scenes:
        scene.close()
    assert opened() == before


@pytest.fixture
def scene(make_scene: MakeScene) -> Scene:
    return make_scene()


ONCE = frozenset(
    {
        "test_bad_luck.py",
        "test_bare_ends.py",
        "test_benchmarks.py",
        "test_channel_explorer.py",
        "test_chaos.py",
        "test_contention.py",
        "test_control_path.py",
        "test_crash_points.py",
        "test_descriptor_faults.py",
        "test_explorer.py",
        "test_hostile_peers.py",
        "test_keeper.py",
        "test_keeper_faults.py",
        "test_kubernetes.py",
        "test_live_faults.py",
        "test_live_tcp_states.py",
        "test_long_rows.py",
        "test_model.py",
        "test_namespaces.py",
        "test_packaging.py",
        "test_run_broken_versions.py",
        "test_run_crew.py",
        "test_run_deploys.py",
        "test_run_diagnosis.py",
        "test_run_keeper.py",
        "test_run_life.py",
        "test_run_proc.py",
        "test_run_readiness.py",
        "test_run_readiness_ways.py",
        "test_run_servers.py",
        "test_run_systemd.py",
        "test_security.py",
        "test_storms.py",
        "test_systemd.py",
        "test_takeover_under_load.py",
        "test_thousand_hostiles.py",
        "test_time.py",
        "test_unit_files.py",
        "test_valgrind.py",
    }
)
"""Files of which each test is marked `once`: of the kernel, the supervisor, other programs, not of the interpreter."""

SHARE, SHARES = map(int, os.environ.get("TAKEOVER_TEST_SHARE", "1/1").split("/"))
"""Which part of the tests that start processes is run here, of how many; another one with each TAKEOVER_TEST_OFFSET."""

settings.register_profile("few", max_examples=max(5, 100 // STEP))
if STEP > 1:
    settings.load_profile("few")


def _is_ours(item: pytest.Item) -> bool:
    """Whether a test is one of our share: those that start processes are dealt out, all others are everybody's."""
    starts_processes = bool({"room", "aio"} & set(getattr(item, "fixturenames", ())))
    return not starts_processes or (zlib.crc32(item.nodeid.encode()) + OFFSET) % SHARES == SHARE - 1


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Takes our share of the tests, and marks those that one Python is enough for."""
    others = [item for item in items if not _is_ours(item)]
    if others:
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if _is_ours(item)]
    for item in items:
        if item.path.name in ONCE:
            item.add_marker(pytest.mark.once)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Starts what all tests share, and has no collection of garbage look again at what stays to the end."""
    if any({"room", "aio"} & set(getattr(item, "fixturenames", ())) for item in session.items):
        for backend in ("auto", *BACKENDS[not CYTHON_IS_BUILT :]):
            nursery(backend)  # now, and not between two looks at the descriptors of this process
    gc.collect()
    gc.freeze()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Closes what other tests have left, so that it is not closed between two looks of one that counts descriptors."""
    looks = {"opened", "open_descriptors"} & vars(getattr(item, "module", object)).keys()
    if looks or "make_scene" in getattr(item, "fixturenames", ()):
        gc.collect()
