"""What the pictures that people look at share: words as they are, and small images."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

import cv2
import numpy as np


@contextlib.contextmanager
def plain_words() -> Iterator[None]:
    """While a picture is drawn: a name with two $ is no formula, and letters that the font has not are no warning."""
    from matplotlib import rc_context  # late: a second of import

    with rc_context({"text.parse_math": False}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)
        yield


def thumbnail(pixels: np.ndarray, side: int) -> np.ndarray:
    """An image (H, W, 3), its longer side of so many pixels."""
    scale = side / max(pixels.shape[:2])
    size = (max(1, round(pixels.shape[1] * scale)), max(1, round(pixels.shape[0] * scale)))
    return cv2.resize(pixels, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_NEAREST)
