"""What the commands show on a terminal. Only what shows something imports it, since that takes long (rich)."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NoReturn

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from . import namespaces
from .channel import in_words

if TYPE_CHECKING:
    from .channel import Account
    from .demo import Demo, Tally


class Screen(Console):
    """Standard output."""

    def on_broken_pipe(self) -> NoReturn:
        """Called while BrokenPipeError is handled; what it means is the same whoever has written (cli_errors.py)."""
        raise  # noqa: PLE0704


class MoveBar:
    """A bar on standard error while live connections move here, gone when all that can move has moved."""

    def __init__(self) -> None:
        self._progress: Progress | None = None
        self._began = 0.0

    def __call__(self, account: Account) -> None:
        """Shows how far it is."""
        if self._progress is None:
            if account.moved_in >= account.expected:
                return
            columns = (
                TextColumn("moving connections"),
                BarColumn(),
                TextColumn("{task.fields[rate]:,.0f}/s,"),
                TextColumn("{task.completed:,.0f} of {task.total:,.0f} moved, {task.fields[refused]:,} refused,"),
                TextColumn("{task.remaining:,.0f} still drain"),
            )
            self._progress = Progress(*columns, console=Console(stderr=True), transient=True)
            self._progress.add_task("", total=account.expected, refused=0, rate=0)
            self._began = time.monotonic()
            self._progress.start()
        done, total, refused = account.moved_in, account.expected, account.refused.total()
        rate = account.moved_in / max(time.monotonic() - self._began, 0.001)
        (task,) = self._progress.task_ids
        self._progress.update(task, completed=done, total=total, refused=refused, rate=rate)
        if account.moved_in >= account.expected:
            self._progress.stop()
            self._progress = None


async def play(clients: int) -> Tally:
    """Plays the demo and shows it; what the clients have seen."""
    from .demo import Demo

    screen = Screen()
    demo = Demo(clients, lambda line: screen.print(f"[bold]{line}"))
    with Live(console=screen, get_renderable=lambda: render_demo(demo), refresh_per_second=8, transient=True):
        await demo.run()
    screen.print(render_account(demo.tally))
    return demo.tally


def render_demo(show: Demo) -> Table:
    """Where the connections are, a bar for each generation, and what has failed so far."""
    table = Table(box=None, show_header=False, pad_edge=False)
    connections = show.status.get("connections", {"open": 0, "draining": []})
    rows = [(elder["pid"], elder["generation"], "draining", elder["connections"]) for elder in connections["draining"]]
    rows.append((show.status.get("pid", 0), show.status.get("generation", 1), "serving", connections["open"]))
    for pid, generation, state, count in sorted(rows, key=lambda row: row[1]):
        bar = ProgressBar(total=show.clients + 4, completed=count, width=40)
        table.add_row(f"generation {generation}", f"pid {pid}", state, bar, f"{count:,} connections")
    tally = show.tally
    failed = tally.failed + tally.lost
    style = "green" if not failed else "bold red"
    table.add_row(
        f"{tally.echoed:,} echoed", f"{tally.connects:,} connects", Text(f"{failed} failed", style=style), "", ""
    )
    return table


def render_account(tally: Tally) -> Table:
    """The end of the demo: what was done, and what it cost."""
    table = Table(title="What the clients saw", title_justify="left", show_header=False)
    table.add_column("")
    table.add_column("", justify="right")
    for what, value in (
        ("takeovers, and one killed half-way", f"{tally.takeovers}"),
        ("new connects tried", f"{tally.connects:,}"),
        ("new connects failed", f"{tally.failed:,}"),
        ("connections moved from process to process", f"{tally.moved:,}"),
        ("messages echoed to clients that stayed", f"{tally.echoed:,}"),
        ("clients that stayed and lost a message", f"{tally.lost:,}"),
        ("slowest connect during a takeover", f"{tally.slowest[True]:.1f} ms"),
        ("slowest connect without one", f"{tally.slowest[False]:.1f} ms"),
    ):
        table.add_row(what, value)
    return table


def moves_in_words(moved: dict[str, Any]) -> list[tuple[str, str]]:
    """What has become of the live connections of older processes, a row for each that there is something to tell of."""
    rows = []
    if moved.get("in") or moved.get("out"):
        state = f"{moved['state_bytes']:,} bytes of records, longest standstill {moved['longest_standstill_ms']:.1f} ms"
        rows.append(("moved", f"{moved['in']:,} in, {moved['out']:,} out; {state}"))
    for name, label in (("refused", "refused"), ("drained", "not moved")):
        if moved.get(name):
            rows.append((label, in_words(moved[name])))
    return rows


def command_in_words(command: dict[str, Any]) -> list[tuple[str, str]]:
    """What runs under `takeover run`, a row for the command and one for each of its processes."""
    if not command:
        return []
    rows = [("command", " ".join(command["words"])), ("ready", command["ready"])]
    for each in command["processes"]:
        where = f"pid {each['pid']}" if each["pid"] else "not running"
        since = each["ready_since"]
        state = f"ready since {time.strftime('%F %T', time.localtime(since))}" if since else "not ready"
        last = f", the last one ended with {each['last_exit']}" if each["last_exit"] else ""
        rows.append(("process", f"{where}, {state}, started again {each['restarts']} times{last}"))
    return rows


def keeper_in_words(keeper: dict[str, Any]) -> str:
    """One line on the process that holds copies of the listeners."""
    if keeper.get("failure") or not keeper["listeners"]:
        return f"none yet: {keeper.get('failure') or 'it is being started'}"
    memory = keeper.get("private_kib")
    costs = f", {memory:,} KiB of its own" if memory is not None else ""
    return f"{namespaces.in_words(keeper['pid'])} holds {keeper['listeners']} listeners{costs}"


def render(report: dict[str, Any]) -> Table:
    """The status as a table for a person."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    there = report.get("pid_there")
    pid = namespaces.in_words(
        0 if report.get("elsewhere") else report.get("pid", 0), report.get("pid", 0)
    ).removeprefix("pid ")
    table.add_row("pid", f"{pid} (it calls itself {there})" if there else pid)
    for name in ("generation", "state", "role", "service", "backend", "version"):
        table.add_row(name, str(report.get(name, "")))
    table.add_row("uptime", f"{report.get('uptime', 0):.1f} s")
    for listener in report.get("listeners", []):
        table.add_row("listener", listener["url"])
    connections = report.get("connections", {})
    table.add_row("connections", f"{connections.get('open', 0):,} open")
    for elder in connections.get("draining", []):
        table.add_row("", f"{elder['connections']:,} drain in pid {elder['pid']} (generation {elder['generation']})")
    for name, text in moves_in_words(report.get("moved") or {}):
        table.add_row(name, text)
    for name, text in command_in_words(report.get("command") or {}):
        table.add_row(name, text)
    keeper = report.get("keeper")
    if keeper:
        table.add_row("keeper", keeper_in_words(keeper))
    manager = report.get("service_manager")
    if manager:
        watchdog = f"watchdog of {manager['watchdog']:g} s" if manager["watchdog"] else "no watchdog"
        table.add_row("manager", f"listeners kept: {manager['keeps']}; {watchdog}")
    last = report.get("last_takeover")
    if last:
        phases = ", ".join(f"{name} {milliseconds:.1f} ms" for name, milliseconds in last["phases"].items())
        peer = namespaces.in_words(0 if last.get("elsewhere") else last["peer"], last["peer"])
        reason = f": {last['reason']}" if last.get("reason") else ""
        table.add_row("last takeover", f"{last['outcome']}, as {last['role']}, with {peer}{reason}")
        table.add_row("", phases)
    return table


def show(reports: Iterator[dict[str, Any]], watch: bool) -> None:
    """Each status; where it is watched on a terminal, in the place of the one before."""
    screen = Screen()
    if not (watch and screen.is_terminal):
        for report in reports:
            screen.print(render(report))
        return
    with Live(render(next(reports)), console=screen, auto_refresh=False) as live:
        while True:
            live.update(render(next(reports)), refresh=True)
