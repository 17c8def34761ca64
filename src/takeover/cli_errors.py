"""What takeover reports on purpose is one line on standard error and an exit status, never a traceback."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable
from functools import wraps
from typing import Any

import click

from .errors import TakeoverError


def say(line: str) -> None:
    """A last word on standard error, if there is one."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        click.echo(f"takeover: {line}", err=True)


def reports_errors(command: Callable[..., None]) -> Callable[..., None]:
    """What takeover reports on purpose is one line and an exit status, never a traceback."""

    @wraps(command)
    def run(*args: Any, **options: Any) -> None:
        try:
            command(*args, **options)
        except TakeoverError as error:
            say(str(error))
            sys.exit(error.exit_status)
        except KeyboardInterrupt:
            say("interrupted")
            sys.exit(130)
        except BrokenPipeError:
            # What the buffer still holds is written when the interpreter ends, which would complain.
            with contextlib.suppress(OSError, ValueError, AttributeError), open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), sys.stdout.fileno())
            sys.exit(0)

    return run
