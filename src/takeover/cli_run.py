"""The command `takeover run`: checks how it was called, and becomes the supervisor, which needs neither click nor rich.

A supervisor lives as long as its service, and is to cost next to no memory: so this process executes a new interpreter,
with the same pid.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import click

from . import cli_options
from .cli_errors import reports_errors
from .cli_options import setting
from .listeners import resolve
from .run import readiness
from .run.command import check_words
from .run.options import Options, parse_listen, parse_signal


@click.command("run")
@setting(
    "--listen",
    "[NAME=]URL",
    "tcp://HOST:PORT, tcp://[::]:PORT, unix:PATH or udp://HOST:PORT; may be repeated. NAME is for {fd:NAME} and "
    "LISTEN_FDNAMES.",
    multiple=True,
    required=True,
)
@cli_options.control
@setting("--ready", "HOW", "How to know that the command is ready.", default="auto")
@setting(
    "--ready-timeout",
    "S",
    "Seconds that the command has to get ready.",
    type=click.FloatRange(min=0, min_open=True),
    default=60.0,
)
@setting(
    "--workers",
    "N",
    "How many processes run the command, all on the same listeners.",
    type=click.IntRange(min=1, max=1000),
    default=1,
)
@setting(
    "--stop-signal",
    "NAME",
    "The signal that asks the command to finish what it has accepted, and end.",
    default="TERM",
)
@setting(
    "--stop-timeout",
    "S",
    "Seconds that it has to end; then it is killed with all that it has started.",
    type=click.FloatRange(min=0),
    default=30.0,
)
@setting(
    "--drain-first",
    None,
    "For a command that cuts off its connections at the stop signal: send it when none is left, or after as many "
    "seconds. Idle ones are ended from outside.",
)
@setting(
    "--spare-idle",
    None,
    "With --drain-first: leave idle connections alone, websockets for one; they stay with the old command until they "
    "leave.",
)
@cli_options.probation
@setting("--service", "NAME", "What this service is; one of another name is not taken over.", default="run")
@click.option("--no-restart", is_flag=True, help="End with the command, and with its exit status.")
@cli_options.dry_run
@cli_options.strict
@cli_options.max_generations
@cli_options.keep
@click.option("--detach", is_flag=True, help="Return when the command serves, and go on in the background.")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED, metavar="-- COMMAND...")
@reports_errors
def run(listen: tuple[str, ...], command: tuple[str, ...], no_restart: bool, stop_signal: str, **options: Any) -> None:
    """Run any server, and take over from the one that runs.

    The command gets the listeners as LISTEN_FDS from descriptor 3 on. In its words, {fd} becomes the number of the
    first one, {fd:NAME} that of a named one, {host} and {port} where it is bound. Start the same again, and when the
    new command is ready, the old one is stopped. SIGHUP replaces the command in place.
    """
    wishes = parse_listen(listen)
    for wish in wishes:
        resolve(wish.url)
    check_words(command, [wish.name for wish in wishes])
    readiness.parse(options["ready"])
    wanted = Options(
        listen=wishes,
        command=command,
        restart=not no_restart,
        stop_signal=parse_signal(stop_signal),
        **options,
    )
    program = os.path.join(os.path.dirname(os.path.abspath(readiness.__file__)), "__main__.py")
    os.execv(sys.executable, [sys.executable, program, wanted.to_json()])
