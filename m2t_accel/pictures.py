"""Helpers for pictures, and the curves of a run."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np

from m2t_accel.files import atomic_write, read_metrics


@contextlib.contextmanager
def plain_words() -> Iterator[None]:
    """Draw text as it is: a name with two $ is no formula, and a letter that the font lacks causes no warning.

    Use it as a context manager or as a decorator.
    """
    from matplotlib import rc_context  # late: importing matplotlib takes about 1 s

    with rc_context({"text.parse_math": False}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)
        yield


def thumbnail(pixels: np.ndarray, side: int) -> np.ndarray:
    """Return an image (H, W, 3) resized so that its longer side has `side` pixels."""
    scale = side / max(pixels.shape[:2])
    size = (max(1, round(pixels.shape[1] * scale)), max(1, round(pixels.shape[0] * scale)))
    return cv2.resize(pixels, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_NEAREST)


def save_picture(figure: object, picture: Path, dpi: int = 110) -> None:
    """Write a matplotlib Figure atomically, in the format of the suffix; without one, as PNG.

    Raises:
        OSError: the file cannot be written; the old one stays.
    """
    with atomic_write(picture) as temporary:
        figure.savefig(temporary, dpi=dpi, format=picture.suffix.removeprefix(".") or "png")


@plain_words()
def draw_curves(metrics: Path, picture: Path, title: str) -> None:
    """Draw loss, kNN accuracy, spread of the embeddings and schedules of a metrics.jsonl as one picture."""
    from matplotlib.figure import Figure  # late: importing matplotlib takes about 1 s

    rows = list(read_metrics(metrics))

    def series(name: str) -> tuple[list[float], list[float]]:
        points = [(row["epoch"], row[name]) for row in rows if name in row]
        return [epoch for epoch, _ in points], [value for _, value in points]

    figure = Figure(figsize=(10, 6.5), layout="constrained")
    figure.suptitle(title)
    loss, knn, spread, rates = figure.subplots(2, 2).flat
    loss.plot(*series("loss"))
    loss.set_title("loss (0 aligned, 4 unrelated)")
    epochs, accuracies = series("knn_top1")
    if accuracies:
        knn.plot(epochs, [100 * accuracy for accuracy in accuracies], marker="o", markersize=4)
        knn.set_title(f"teacher kNN top-1 (%): {100 * accuracies[0]:.1f} → {100 * accuracies[-1]:.1f}")
    else:
        knn.set_title("teacher kNN: not measured")
        knn.set_axis_off()
    spread.plot(*series("embedding_std"))
    spread.set_ylim(0, 1.1)
    spread.set_title("embedding standard deviation × √C (0 is collapse)")
    rates.plot(*series("weight_momentum"), label="weight momentum")
    rates.plot(*series("statistics_momentum"), label="statistics momentum")
    epochs, values = series("learning_rate")
    peak = max(values, default=1.0)
    rates.plot(epochs, [value / peak for value in values], label=f"learning rate / {peak:.3g}")
    rates.set_title("schedules")
    rates.legend(loc="center right")
    for axes in (loss, knn, spread, rates):
        axes.set_xlabel("epoch")
        axes.grid(alpha=0.3)
    save_picture(figure, picture)
