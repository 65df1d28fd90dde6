"""Prints a manifest's problems, and of many that are alike only the first."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable

from producer.manifest import Problem

PRINTED_PER_KIND = 10
KINDS = 100
# What differs between two problems of a kind: quoted values, and numbers.
_VALUE = re.compile(r"'[^']*+'|\"[^\"]*+\"|\d++")
_OTHER = "of other kinds"


class ProblemReport:
    """Prints the first ``PRINTED_PER_KIND`` problems of each kind and counts the others."""

    def __init__(self, print_line: Callable[[str], None]) -> None:
        self._print_line = print_line
        self._counts: Counter[str] = Counter()

    def __call__(self, problem: Problem) -> None:
        kind = self._kind(problem)
        self._counts[kind] += 1
        # Where the kinds are countless too, the rest of them share one count.
        if kind != _OTHER and self._counts[kind] <= PRINTED_PER_KIND:
            self._print_line(str(problem))

    def _kind(self, problem: Problem) -> str:
        kind = _VALUE.sub("...", problem.text)[:200]
        return kind if kind in self._counts or len(self._counts) < KINDS else _OTHER

    def summarize(self) -> None:
        """Print how many problems of each kind were not printed, and start again."""
        for kind, count in self._counts.items():
            more = count if kind == _OTHER else count - PRINTED_PER_KIND
            if more > 0:
                like = _OTHER if kind == _OTHER else f"like this: {kind}"
                self._print_line(f"{more:,} more {like}")
        self._counts.clear()
