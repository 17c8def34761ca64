"""The options that several commands share."""

from __future__ import annotations

import click

from .echo import CONTROL

control = click.option(
    "--control",
    default=CONTROL,
    show_default=True,
    envvar="TAKEOVER_CONTROL",
    show_envvar=True,
    metavar="PATH",
    help="The control socket: who starts with the same path takes over.",
)
probation = click.option(
    "--probation",
    type=click.FloatRange(min=0, max=3600),
    default=1.0,
    show_default=True,
    envvar="TAKEOVER_PROBATION",
    show_envvar=True,
    metavar="S",
    help="Seconds that this process, once it is taken over, stands by to take the service back.",
)
dry_run = click.option(
    "--dry-run", is_flag=True, help="Do all but the commit: the exit status says whether it would have worked."
)
strict = click.option("--strict", is_flag=True, help="Fail unless exactly the incumbent's listeners are adopted.")
max_generations = click.option(
    "--max-generations",
    type=click.IntRange(min=1, max=252),
    default=8,
    show_default=True,
    envvar="TAKEOVER_MAX_GENERATIONS",
    show_envvar=True,
    metavar="N",
    help="How many older generations may drain at a time; the next takeover is refused.",
)
keep = click.option(
    "--keep",
    is_flag=True,
    envvar="TAKEOVER_KEEP",
    show_envvar=True,
    help="Have a second process hold copies of the listeners: if all else is killed, clients wait for the next start.",
)
