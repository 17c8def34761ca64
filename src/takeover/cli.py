"""The command `takeover`. Only the cli files import click, and only cli_screens.py rich."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import time
from collections.abc import Iterator
from typing import Any

import click

from . import cli_options, namespaces, query
from ._backend import backend
from ._version import VERSION
from .cli_errors import reports_errors, say
from .cli_options import setting
from .cli_run import run
from .echo import LISTEN
from .echo import echo as run_echo
from .logs import log_to_standard_error


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
@setting(
    "--listen",
    "URL",
    "tcp://HOST:PORT, tcp://[::]:PORT or unix:PATH; may be repeated. After a ?: v6only=0 takes IPv4 too, reuseport=N "
    "makes a group of N sockets.",
    multiple=True,
    default=[LISTEN],
)
@cli_options.control
@setting(
    "--drain-timeout",
    "S",
    "Seconds that clients have to leave after a takeover or a stop.",
    type=click.FloatRange(min=0),
    default=30.0,
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
    observer = None
    if is_terminal(sys.stderr):
        from .cli_screens import MoveBar

        observer = MoveBar()
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


@main.command()
@click.option(
    "--clients", type=click.IntRange(1, 2000), default=100, show_default=True, help="Clients that stay and talk."
)
@reports_errors
def demo(clients: int) -> None:
    """Play the main job before your eyes: takeovers under traffic, one of them killed half-way.

    Ends with what it cost the clients; the exit status is 1 if anything was lost.
    """
    import asyncio

    from .cli_screens import play

    tally = asyncio.run(play(clients))
    if not tally.clean:
        say(f"something was lost; the first of it: {tally.first_failure}")
        sys.exit(1)


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

    def reports() -> Iterator[dict[str, Any]]:
        while True:
            report = query.status(control)
            if here:
                query.expect_here(report)
            yield report
            if not watch:
                return
            time.sleep(1)

    if as_json:
        for report in reports():
            click.echo(json.dumps(report, indent=None if watch else 2))
        return

    from .cli_screens import show

    show(reports(), watch)


@main.command()
@cli_options.control
@reports_errors
def stop(control: str) -> None:
    """Stop the service: it accepts no more, drains to its deadline, and ends. Returns when it has ended."""
    click.echo(f"{namespaces.in_words(query.stop(control))} has ended")


main.add_command(run)
