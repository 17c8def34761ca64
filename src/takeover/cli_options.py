"""The options: how each is made, and those that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from .echo import CONTROL


def setting(
    name: str, metavar: str | None, text: str, **more: Any
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """An option that the environment can set too: --stop-timeout is TAKEOVER_STOP_TIMEOUT. metavar: None for a flag."""
    variable = "TAKEOVER_" + name.removeprefix("--").replace("-", "_").upper()
    more = {"is_flag": True, **more} if metavar is None else {"metavar": metavar, "show_default": True, **more}
    return click.option(name, envvar=variable, show_envvar=True, help=text, **more)


control = setting("--control", "PATH", "The control socket: who starts with the same path takes over.", default=CONTROL)
probation = setting(
    "--probation",
    "S",
    "Seconds that this process, once it is taken over, stands by to take the service back.",
    type=click.FloatRange(min=0, max=3600),
    default=1.0,
)
dry_run = click.option(
    "--dry-run", is_flag=True, help="Do all but the commit: the exit status says whether it would have worked."
)
strict = click.option("--strict", is_flag=True, help="Fail unless exactly the incumbent's listeners are adopted.")
max_generations = setting(
    "--max-generations",
    "N",
    "How many older generations may drain at a time; the next takeover is refused.",
    type=click.IntRange(min=1, max=252),
    default=8,
)
keep = setting(
    "--keep",
    None,
    "Have a second process hold copies of the listeners: if all else is killed, clients wait for the next start.",
)
