"""Curves of few points that keep the extremes of many."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

MAX_POINTS = 2000  # of a curve; a screen has fewer columns of pixels


def downsample(epochs: Sequence[float], values: Sequence[float], limit: int = MAX_POINTS) -> dict[str, list[float]]:
    """Return a curve as at most `limit` points, for the page's script.

    Each bucket of neighbouring points keeps its smallest and its largest value, so that no spike disappears. The first
    and the last point stay.

    Returns:
        x and y of the points and, if there are fewer of them than were given, `mean_x` and `mean_y`: the mean of each
        bucket, which smoothing averages.
    """
    x, y = np.asarray(epochs, np.float64), np.asarray(values, np.float64)
    if len(x) <= limit:
        return {"x": numbers(x), "y": numbers(y)}
    starts = np.linspace(0, len(x), (limit - 2) // 2 + 1).astype(int)
    kept = {0, len(x) - 1}
    for start, end in itertools.pairwise(starts):
        kept |= {start + int(y[start:end].argmin()), start + int(y[start:end].argmax())}
    chosen = np.array(sorted(kept))
    sizes = np.diff(starts)
    means = [numbers(np.add.reduceat(column, starts[:-1]) / sizes) for column in (x, y)]
    return {"x": numbers(x[chosen]), "y": numbers(y[chosen]), "mean_x": means[0], "mean_y": means[1]}


def numbers(values: np.ndarray) -> list[float]:
    """Return numbers rounded to seven digits, which keeps the page small."""
    return [float(f"{value:.7g}") for value in values]
