"""Starts servers on one CPU and load on another, and reads what they cost from /proc."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import pathlib
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from . import build

ROOT = pathlib.Path(__file__).parent.parent
_CPUS = sorted(os.sched_getaffinity(0))
SERVER_CPU, LOAD_CPU = _CPUS[0], _CPUS[-1]
OTHER_CPUS = frozenset(_CPUS) - {SERVER_CPU, LOAD_CPU} or frozenset(_CPUS)
"""For the clients of two servers that have a CPU each; where there is no third one, the kernel finds them room."""


def raise_descriptor_limit() -> int:
    """Raise this process's (and so its children's) limit of open descriptors as far as it goes, and return it."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def environment(**extra: str) -> dict[str, str]:
    """The environment of a child in any folder: the takeover that this process would import, else the one in src/."""
    spec = importlib.util.find_spec("takeover")
    package = pathlib.Path(spec.origin).absolute().parent if spec and spec.origin else ROOT / "src" / "takeover"
    paths = [str(ROOT), str(package.parent), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), **extra}


def start(command: Sequence[str], cpu: int | Iterable[int], **options: Any) -> subprocess.Popen[str]:
    """Start a process (and whatever it will start) on one CPU, or on any of several."""
    options.setdefault("env", environment())
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {cpu} if isinstance(cpu, int) else cpu)
    try:
        return subprocess.Popen(command, text=True, **options)
    finally:
        os.sched_setaffinity(0, before)


def end(process: subprocess.Popen[Any], limit: float = 10) -> None:
    """SIGTERM, and SIGKILL after the limit (seconds); reaps the process and closes its pipes."""
    process.terminate()
    try:
        process.wait(limit)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for pipe in (process.stdin, process.stdout, process.stderr):
        if pipe is not None:
            pipe.close()


@contextlib.contextmanager
def server(command: Sequence[str], variables: Mapping[str, str]) -> Iterator[tuple[int, int]]:
    """A server that prints its port when it listens: gives its pid and the port, and kills it afterwards."""
    process = start(command, SERVER_CPU, env=environment(**variables), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    try:
        port = process.stdout.readline()
        if not port.strip().isdigit():
            process.kill()
            raise RuntimeError(f"{' '.join(command)} did not start: {process.stderr.read().strip()[-400:]}")
        yield process.pid, int(port)
    finally:
        process.kill()
        end(process)


def load(name: str, *arguments: object) -> dict[str, Any]:
    """Run the load generator c/NAME.c to its end, and return what it measured; raises RuntimeError if it failed."""
    process = start(
        [build.program(name), *map(str, arguments)], LOAD_CPU, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        out, complaint = process.communicate(timeout=600)
    finally:
        process.kill()
        process.wait()
    if process.returncode:
        raise RuntimeError(f"{name} {' '.join(map(str, arguments))}: {complaint.strip() or process.returncode}")
    measured: dict[str, Any] = json.loads(out)
    return measured


def private_memory(pid: int) -> int:
    """Bytes of a process that it shares with nobody (smaps_rollup, see proc(5))."""
    kib = 0
    for line in pathlib.Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith(("Private_Clean:", "Private_Dirty:", "Private_Hugetlb:")):
            kib += int(line.split()[1])
    return kib * 1024


def cpu_ns(pid: int) -> int:
    """CPU time of all threads of a process so far, brought up to this instant (clock_getcpuclockid(3))."""
    return time.clock_gettime_ns(~pid << 3 | 2)


def stolen_ms() -> int:
    """CPU time that the hypervisor has given to others instead of to this machine so far (proc(5), /proc/stat)."""
    ticks = int(pathlib.Path("/proc/stat").read_text().split("\n", 1)[0].split()[8])
    return ticks * 1000 // os.sysconf("SC_CLK_TCK")


def descriptors(pid: int) -> int:
    """How many descriptors a process has open."""
    return len(os.listdir(f"/proc/{pid}/fd"))


def children(pid: int) -> set[int]:
    """The pids of a process's children; none if it is gone."""
    try:
        return {int(child) for child in pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()}
    except (FileNotFoundError, ProcessLookupError):
        return set()


def wait_until(condition: Callable[[], object], what: str, limit: float = 30) -> None:
    """Poll until the condition holds; raises TimeoutError after the limit (seconds)."""
    deadline = time.monotonic() + limit
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {limit:.0f} s for {what}")
        time.sleep(0.005)


def is_alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        stat = pathlib.Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


PYTHON = sys.executable
