"""The command `takeover`. Only the cli files import click and rich."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import sys
import time
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from . import cli_options, namespaces, query
from ._backend import backend
from ._version import VERSION
from .channel import in_words
from .cli_errors import reports_errors, say
from .cli_run import run
from .echo import LISTEN
from .echo import echo as run_echo
from .logs import log_to_standard_error

if TYPE_CHECKING:
    from rich.progress import Progress

    from .channel import Account
    from .demo import Demo, Tally


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(VERSION, message=f"takeover %(version)s ({backend})")
def main() -> None:
    """Zero-downtime restarts: start the new version, and it takes over from the one that is running.

    Try it: run `takeover echo` in one terminal, and again in another one, in the same folder.

    \b
    Exit status: 0 served and ended as asked, or was taken over and has drained
                 1 it failed; if there was an incumbent, it still serves
                 2 wrong usage
                 3 nothing is running there
                 4 out of time
    """


@main.command("echo")
@click.option(
    "--listen",
    multiple=True,
    default=[LISTEN],
    show_default=True,
    envvar="TAKEOVER_LISTEN",
    show_envvar=True,
    metavar="URL",
    help="tcp://HOST:PORT, tcp://[::]:PORT or unix:PATH; may be repeated. After a ?: v6only=0 takes IPv4 too, "
    "reuseport=N makes a group of N sockets.",
)
@cli_options.control
@click.option(
    "--drain-timeout",
    type=click.FloatRange(min=0),
    default=30.0,
    show_default=True,
    envvar="TAKEOVER_DRAIN_TIMEOUT",
    show_envvar=True,
    metavar="S",
    help="Seconds that clients have to leave after a takeover or a stop.",
)
@cli_options.probation
@click.option("--no-live", is_flag=True, help="Let established connections drain instead of moving them.")
@cli_options.dry_run
@cli_options.strict
@cli_options.max_generations
@cli_options.keep
@click.option("--verbose", "-v", is_flag=True, help="Log each connection too.")
@reports_errors
def echo(listen: tuple[str, ...], no_live: bool, keep: bool, verbose: bool, **options: Any) -> None:
    """Run the echo server, or take over from the one that runs.

    Alone it is the original: port 9999 on loopback, control socket ./takeover.sock. Start it again in the same folder,
    and the second takes over from the first.
    """
    log_to_standard_error(logging.DEBUG if verbose else logging.INFO)
    observer = MoveBar() if is_terminal(sys.stderr) else None
    run_echo(listen=listen, live=not no_live, keeper=keep, observer=observer, **options)
    end_at_once()


def end_at_once() -> None:
    """Ends the process with status 0: to take an interpreter apart takes longer than to move thousands of clients."""
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()
    os._exit(0)


def is_terminal(stream: Any) -> bool:
    """Also false for a stream that is closed, or was never there."""
    try:
        return bool(stream.isatty())
    except (AttributeError, ValueError):
        return False


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
            from rich.progress import BarColumn, Progress, TextColumn

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


@main.command()
@click.option(
    "--clients", type=click.IntRange(1, 2000), default=100, show_default=True, help="Clients that stay and talk."
)
@reports_errors
def demo(clients: int) -> None:
    """Play the main job before your eyes: takeovers under traffic, one of them killed half-way.

    Ends with what it cost the clients; the exit status is 1 if anything was lost.
    """
    from .demo import Demo

    console = Console()
    show = Demo(clients, lambda line: console.print(f"[bold]{line}"))

    async def play() -> None:
        with Live(console=console, get_renderable=lambda: render_demo(show), refresh_per_second=8, transient=True):
            await show.run()

    asyncio.run(play())
    console.print(render_account(show.tally))
    if not show.tally.clean:
        say(f"something was lost; the first of it: {show.tally.first_failure}")
        sys.exit(1)


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


@main.command()
@cli_options.control
@click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")
@click.option("--watch", is_flag=True, help="Go on showing it, each second, until interrupted.")
@click.option(
    "--here", is_flag=True, help="Exit with 3 unless it serves in this container: a process of this pid namespace."
)
@reports_errors
def status(control: str, as_json: bool, watch: bool, here: bool) -> None:
    """Show who serves: pid, generation, state, listeners, connections, the last takeover."""
    console = Console()
    if not watch:
        report = query.status(control)
        if here:
            query.expect_here(report)
        click.echo(json.dumps(report, indent=2)) if as_json else console.print(render(report))
    elif as_json:
        while True:
            click.echo(json.dumps(query.status(control)))
            time.sleep(1)
    else:
        with Live(render(query.status(control)), console=console, auto_refresh=False) as live:
            while True:
                time.sleep(1)
                live.update(render(query.status(control)), refresh=True)


@main.command()
@cli_options.control
@reports_errors
def stop(control: str) -> None:
    """Stop the service: it accepts no more, drains to its deadline, and ends. Returns when it has ended."""
    click.echo(f"{namespaces.in_words(query.stop(control))} has ended")


main.add_command(run)
