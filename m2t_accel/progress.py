"""The bar that tells how far a loop has come."""

from __future__ import annotations

import sys
from collections.abc import Iterable

from tqdm import tqdm

INTERVAL, LOG_INTERVAL = 0.5, 30.0  # seconds
PATIENCE = 5.0  # seconds, after which a bar comes where mostly there is no need of one


def progress_bar(unit: str, total: int | None = None, **options: object) -> tqdm:
    """A bar on stderr, with tqdm's options: on a terminal one that moves, in a log file a line every half minute."""
    if sys.stderr is None or sys.stderr.closed:
        options["disable"] = True
    interval = LOG_INTERVAL if options.get("disable") or not sys.stderr.isatty() else INTERVAL
    return tqdm(unit=unit, total=total, mininterval=interval, dynamic_ncols=True, **options)


def late_progress_bar(doing: str, unit: str, items: Iterable | None = None, total: int | None = None) -> tqdm:
    """A bar that comes after some seconds, and leaves nothing behind; around the items, if they are given."""
    return progress_bar(unit, total, iterable=items, desc=doing, delay=PATIENCE, leave=False, unit_scale=True)


def duration(seconds: float) -> str:
    """Such as 45 s, 12 min 3 s, 5 h 12 min."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
