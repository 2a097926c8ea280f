"""Findings of the doctor: one line each, with a mark. A check that fails becomes a line, and the others still run."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from m2t_accel.config.fields import ConfigurationError, one_line

GOOD, DOUBTFUL, BAD = "good", "doubtful", "bad"
MARKS = {GOOD: "✓", DOUBTFUL: "!", BAD: "✗"}
PLAIN_MARKS = {GOOD: "v", DOUBTFUL: "!", BAD: "x"}  # for terminals without these characters
NAME_WIDTH = 15


class Finding(NamedTuple):
    """One line about a run: bad if the run would fail, doubtful if it would run but should be looked at."""

    mark: str
    name: str
    text: str


class Findings:
    """The findings of all groups, printed as they are made; those of other processes than the first are dropped."""

    def __init__(self, is_main: bool) -> None:
        self.is_main = is_main
        self.groups: dict[str, list[Finding]] = {}

    def start_group(self, name: str) -> None:
        """Start a new group of lines."""
        if self.groups:
            self.print("")
        self.groups[name] = []
        self.print(name)

    def check(self, name: str, check: Callable[..., Iterable[Finding]], *arguments: object) -> None:
        """Run a check on the first process, and print its findings; if it raises, that is a bad finding."""
        if not self.is_main:
            return
        try:
            for finding in check(*arguments):
                self.add(finding)
        except Exception as error:
            self.add(failure(name, error))

    def add(self, finding: Finding) -> None:
        """Print a finding."""
        self.groups[list(self.groups)[-1]].append(finding)
        self.print(f"  {mark_of(finding.mark)} {finding.name:<{NAME_WIDTH}}{finding.text}")

    def print(self, line: str) -> None:
        """Print a line on the first process."""
        if self.is_main:
            print(line, flush=True)

    def names(self, mark: str) -> list[str]:
        """Return the names of the findings with this mark."""
        return [finding.name for group in self.groups.values() for finding in group if finding.mark == mark]

    def as_rows(self) -> list[dict[str, str]]:
        """Return all findings as JSON types."""
        return [
            {"group": group, **finding._asdict()} for group, findings in self.groups.items() for finding in findings
        ]


def failure(name: str, error: Exception) -> Finding:
    """Return the bad finding for the error of a check."""
    text = str(error) if isinstance(error, ConfigurationError) else one_line(error)
    return Finding(BAD, name, " ".join(text.split()))


def mark_of(mark: str) -> str:
    """Return the character of a mark, or a plain letter if the terminal cannot show it."""
    try:
        MARKS[mark].encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        return PLAIN_MARKS[mark]
    return MARKS[mark]


def listed(words: Sequence[str], limit: int) -> str:
    """Return the first words, and the number of the others."""
    return ", ".join([*words[:limit], *([f"and {len(words) - limit:,} more"] if len(words) > limit else [])])


def rate(number: float) -> str:
    """Return images/s in words, with two digits at least."""
    return f"{number:,.0f} images/s" if number >= 10 else f"{number:.2g} images/s"


def gigabytes(number: float) -> str:
    """Return bytes in words, such as `27 MB` or `3.6 GB`."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}" if number < 100 * size else f"{number / size:,.0f} {unit}"
    return f"{number:.0f} bytes"
