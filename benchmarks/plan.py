"""What a run is asked to do: which subjects, how long, how often, and where its rows go."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

from .results import Document
from .subjects import AGAIN, REFERENCE, SUBJECTS, Subject


@functools.cache
def _missing(subject_name: str) -> str | None:
    return next(subject for subject in SUBJECTS if subject.name == subject_name).missing()


class Plan(NamedTuple):
    """`seconds` and `warm_up` are for one run of one subject; `only` are words of which a subject's name holds one."""

    document: Document
    quick: bool
    rounds: int
    seconds: float
    warm_up: float
    only: tuple[str, ...]
    say: Callable[[str], None]

    def wants(self, name: str) -> bool:
        """Whether a subject was asked for; the reference always is, twice."""
        return name in (REFERENCE, AGAIN) or not self.only or any(word in name for word in self.only)

    def subjects(self, case: str) -> list[Subject]:
        """The echo servers that were asked for and can run here; the others are noted as skipped."""
        found = []
        for subject in SUBJECTS:
            if self.wants(subject.name):
                why = _missing(subject.name)
                if why is None:
                    found.append(subject)
                else:
                    self.document.skip(case, subject.name, why)
        return found
