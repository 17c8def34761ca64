"""The process of `takeover run`, from its options to its exit status."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
from collections.abc import Sequence

from takeover.errors import TakeoverError, UsageError
from takeover.logs import log_to_standard_error

from . import telling
from .options import NOT_BY_HAND, Options
from .supervisor import Moment, Observer, Supervisor

_SET_BY_PYTHON = frozenset({signal.SIGPIPE, signal.SIGXFSZ})
"""Python ignores these at its start, whatever they were before."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Takes the options as the only argument, Options.to_json(). Returns the exit status."""
    ignored = frozenset(signum for signum in signal.valid_signals() if signal.getsignal(signum) == signal.SIG_IGN)
    words = sys.argv[1:] if arguments is None else arguments
    log_to_standard_error(logging.INFO)
    try:
        if len(words) != 1:
            raise UsageError(NOT_BY_HAND)
        options = Options.from_json(words[0])
        observers: list[Observer] = []
        if options.detach:
            status = _detach(observers)
            if status is not None:
                return status
        supervisor = Supervisor(options, ignored - _SET_BY_PYTHON)
        supervisor.observers += [*observers, telling.observer_of(supervisor)]
        return supervisor.run()
    except TakeoverError as error:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            print(f"takeover: {error}", file=sys.stderr, flush=True)  # noqa: T201 - the last word of a command
        return error.exit_status


def _detach(observers: list[Observer]) -> int | None:
    """Forks; in the background, in a session of its own, returns None. In the foreground waits until the service is
    committed, or the process in the background has failed, and returns the exit status that tells it.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        os.setsid()

        def committed(moment: Moment, _text: str) -> None:
            if moment is Moment.READY:
                os.write(writing, b"0")
                os.close(writing)

        observers.append(committed)
        return None
    os.close(writing)
    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(signum, lambda signum, _: os.kill(child, signum))
    with os.fdopen(reading, "rb") as told:
        if told.read(1):
            return 0
    return abs(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
