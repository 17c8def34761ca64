"""Deploys of HTTP servers under load: what clients see of `takeover run`, and of each server's own reload.

And requests a second through a server under `takeover run` beside the same server without it.
"""

from __future__ import annotations

import json
import pathlib
import re
import shutil
import subprocess
import tempfile
import time
from typing import Any

from .deploy_rivals import GROUPS, Alone, Server, UnderTakeover
from .plan import Plan
from .processes import LOAD_CPU, PYTHON, end, start

DEPLOYS, RATE = "deploys", "requests a second"
KEEP_ALIVE, NEW, WEBSOCKETS = 8, 8, 4
LOST = ("connects_failed", "requests_failed", "keep_alives_lost")
"""Columns of which less is better."""


class Load:
    """http_load.py, from its making to finish()."""

    def __init__(self, server: Server) -> None:
        options = {"--keep-alive": KEEP_ALIVE, "--new": NEW, "--websockets": WEBSOCKETS * server.kind.websockets}
        words = [str(word) for option in options.items() for word in option]
        program = pathlib.Path(__file__).parent / "http_load.py"
        command = [PYTHON, str(program), "127.0.0.1", str(server.port), *words]
        self.process = start(command, LOAD_CPU, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self.process.stdout is not None
        self.process.stdout.readline()

    def finish(self) -> dict[str, Any]:
        try:
            out, _ = self.process.communicate(timeout=60)
        finally:
            end(self.process)
        seen: dict[str, Any] = json.loads(out)
        return seen


def deploys(plan: Plan) -> None:
    """20 deploys of each (quick: 2), and the rate of each server with and without takeover run."""
    times = 2 if plan.quick else 20
    for group, servers in GROUPS.items():
        for kind in servers:
            if plan.wants(kind.name):
                try:
                    _measure(plan, group, kind, times)
                except (OSError, RuntimeError) as error:
                    plan.document.skip("deploys", kind.name, f"failed: {error}")
        rated = [kind for kind in servers if kind.__base__ in (UnderTakeover, Alone) and plan.wants(kind.name)]
        if len(rated) == 2:
            _rate(plan, group, rated)


def _ready(plan: Plan, kind: type[Server], folder: str) -> Server | None:
    server = kind(pathlib.Path(folder))
    why = server.missing()
    if why:
        plan.document.skip("deploys", kind.name, why)
        server.log.close()
        return None
    server.start()
    return server


def _measure(plan: Plan, group: str, kind: type[Server], times: int) -> None:
    plan.say(f"deploys: {kind.name}")
    with tempfile.TemporaryDirectory(prefix="deploys") as folder:
        server = _ready(plan, kind, folder)
        if server is None:
            return
        try:
            load = Load(server)
            took = []
            try:
                for index in range(times):
                    began = time.monotonic()
                    server.restart()
                    took.append(time.monotonic() - began)
                    plan.say(f"deploys: {kind.name}, {index + 1} of {times}")
            finally:
                seen = load.finish()
        finally:
            server.stop()
    row = plan.document.row("deploys", group, kind.name, GROUPS[group][0].name)
    row.facts.update(
        {key: seen[key] for key in ("connects_failed", "requests_failed", "websockets_closed")} | {"deploys": times}
    )
    row.add(
        connects=seen["connects"],
        requests=seen["requests"],
        connects_failed=sum(seen["connects_failed"].values()),
        requests_failed=sum(seen["requests_failed"].values()),
        keep_alives_lost=seen["keep_alives_lost"],
        keep_alives_noticed=seen["keep_alives_noticed"],
        websockets_closed=sum(seen["websockets_closed"].values()),
        rate=seen["requests"] / seen["seconds"],
        slowest_ms=seen["slowest_ms"],
        deploy_s=sorted(took)[len(took) // 2],
    )


def _rate(plan: Plan, group: str, kinds: list[type[Server]]) -> None:
    """Both run at once, one of them under load at a time, in turns."""
    if not shutil.which("wrk"):
        plan.document.skip("deploys", RATE, "wrk is not installed")
        return
    running: list[Server] = []
    with tempfile.TemporaryDirectory(prefix="deploys") as folder:
        try:
            for index, kind in enumerate(kinds):
                place = pathlib.Path(folder) / str(index)
                place.mkdir()
                server = _ready(plan, kind, str(place))
                if server is None:
                    return
                running.append(server)
            for index in range(plan.rounds):
                for server in running if index % 2 else reversed(running):
                    plan.say(f"deploys: {RATE}, {server.name}")
                    row = plan.document.row("deploys", f"{group}: {RATE}", server.name, kinds[1].name)
                    row.add(rate=_wrk(server.port, plan.seconds))
        finally:
            for server in running:
                server.stop()


def _wrk(port: int, seconds: float) -> float:
    """Requests a second of 32 kept-alive connections; wrk takes whole seconds."""
    command = ["wrk", "-t1", "-c32", f"-d{max(1, round(seconds))}s", f"http://127.0.0.1:{port}/"]
    process = start(command, LOAD_CPU, stdout=subprocess.PIPE)
    try:
        out, _ = process.communicate(timeout=60)
    finally:
        end(process)
    found = re.search(r"Requests/sec:\s*([\d.]+)", out)
    if not found:
        raise RuntimeError(f"wrk: {out.strip()[-200:]}")
    return float(found[1])
