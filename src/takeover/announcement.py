"""The first line that a service logs about itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .exchange import logger
from .namespaces import in_words

if TYPE_CHECKING:
    from .report import Report


def tell_start(report: Report, urls: Sequence[str], kind: str, *, dry_run: bool) -> None:
    """What the operator reads: which generation this is, on what kind of loop, and what became of the listeners."""
    where = ", ".join(urls)
    incumbent = in_words(0 if report.elsewhere else report.incumbent, report.incumbent)
    if dry_run:
        whom = f"from {incumbent}" if report.incumbent else "cold: nothing is running here"
        logger.info("dry run: a takeover of %s would have worked (%s)", where, whom)
        return
    if report.generation == 1:
        logger.info("serving %s (generation 1, %s)", where, kind)
        if report.from_keeper:
            tell_kept(report)
        return
    logger.info(
        "took over %d listener%s from %s (generation %d, %s) in %.0f ms",
        len(report.adopted),
        "" if len(report.adopted) == 1 else "s",
        incumbent,
        report.generation,
        kind,
        report.milliseconds,
    )
    if report.bound:
        logger.warning("bound anew, not adopted: %s", ", ".join(report.bound))
    if report.unused:
        logger.warning("not used by this version, drained by %s: %s", incumbent, ", ".join(report.unused))


def tell_kept(report: Report) -> None:
    """What became of the listeners that a keeper held when their owner was gone."""
    logger.info("adopted from the keeper: %s", ", ".join(report.adopted) or "none")
    if report.bound:
        logger.warning("bound anew, the keeper did not have them: %s", ", ".join(report.bound))
    if report.unused:
        logger.warning("held by the keeper, not used by this version, closed: %s", ", ".join(report.unused))
