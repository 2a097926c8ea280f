"""Progress bars, and durations in words."""

from __future__ import annotations

import sys
from collections.abc import Iterable

from tqdm import tqdm

INTERVAL, LOG_INTERVAL = 0.5, 30.0  # seconds between updates, on a terminal and in a log file
PATIENCE = 5.0  # seconds before a late bar appears


def progress_bar(unit: str, total: int | None = None, **options: object) -> tqdm:
    """Return a bar on stderr that moves on a terminal; in a log file it adds a line every 30 s.

    Args:
        unit: name of one counted item, such as "step".
        total: number of items, if known.
        options: as for tqdm.
    """
    if sys.stderr is None or sys.stderr.closed:
        options["disable"] = True
    interval = LOG_INTERVAL if options.get("disable") or not sys.stderr.isatty() else INTERVAL
    return tqdm(unit=unit, total=total, mininterval=interval, dynamic_ncols=True, **options)


def late_progress_bar(doing: str, unit: str, items: Iterable | None = None, total: int | None = None) -> tqdm:
    """Return a bar that appears after 5 s and disappears at the end; it iterates over `items` if they are given."""
    return progress_bar(unit, total, iterable=items, desc=doing, delay=PATIENCE, leave=False, unit_scale=True)


def duration(seconds: float) -> str:
    """Return a duration in words: "45 s", "12 min 3 s", "5 h 12 min"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
