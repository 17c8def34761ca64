"""Private memory of the server for each idle connection: the difference that N of them make, by N."""

from __future__ import annotations

import subprocess
import sys

from .build import program
from .plan import Plan
from .processes import LOAD_CPU, descriptors, end, private_memory, server, start, wait_until
from .servers.echo_protocol import Echo
from .subjects import REFERENCE


def _hold(port: int, connections: int) -> subprocess.Popen[str]:
    command = [program("load_connect"), "hold", "--port", str(port), "--connections", str(connections)]
    holder = start(command, LOAD_CPU, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdout is not None
    if holder.stdout.readline() != "holding\n":
        end(holder)
        raise RuntimeError("the connections could not be opened")
    return holder


def _warm(pid: int, port: int) -> None:
    holder = _hold(port, 64)
    held = descriptors(pid)
    end(holder)
    wait_until(lambda: descriptors(pid) <= held - 64, "the server to close what its clients have closed")


def memory(plan: Plan) -> None:
    """Each server first has a few clients that leave again, so that what it loads at its first one is not counted."""
    count = 1000 if plan.quick else 9000
    for index in range(1 if plan.quick else plan.rounds):
        for subject in plan.subjects("memory"):
            connections = min(count, subject.most_connections - 10)
            plan.say(f"memory: {subject.name}, round {index + 1}")
            with server(subject.command(), subject.variables) as (pid, port):
                _warm(pid, port)
                before = private_memory(pid)
                holder = _hold(port, connections)
                try:
                    spent = (private_memory(pid) - before) / connections
                finally:
                    end(holder)
            row = plan.document.row("memory", "idle connections", subject.name, REFERENCE)
            row.add(bytes=spent)
            row.facts["protocol_object"] = -sys.getsizeof(Echo()) // 16 * -16
