"""How the command logs: an event a line, on standard error."""

from __future__ import annotations

import logging
import os
import time


class OneLine(logging.Formatter):
    """An event a line, with the time and the pid: the lines of two generations mix on one terminal."""

    def format(self, record: logging.LogRecord) -> str:
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        line = f"{clock}.{int(record.msecs):03d} {os.getpid()} {record.levelname.lower()}: {record.getMessage()}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def log_to_standard_error(level: int) -> None:
    """Logs go to standard error; one that is closed or full costs the line, not the service."""
    logging.raiseExceptions = False
    handler = logging.StreamHandler()
    handler.setFormatter(OneLine())
    logger = logging.getLogger("takeover")
    logger.handlers[:] = [handler]
    logger.setLevel(level)
    logger.propagate = False
