import json

import numpy as np
import pytest
from matplotlib.figure import Figure

from m2t_accel.pictures import draw_curves, plain_words, thumbnail


def test_text_is_no_formula_and_a_missing_glyph_no_warning(tmp_path):
    """pytest turns warnings into errors."""
    with plain_words():
        figure = Figure()
        figure.suptitle("日本 $\\frac_13$ é.jpg")
        figure.savefig(tmp_path / "words.png")
    assert (tmp_path / "words.png").stat().st_size > 1000


def test_a_thumbnail_keeps_the_shape_and_at_least_one_pixel():
    assert thumbnail(np.zeros((40, 20, 3), np.uint8), 10).shape == (10, 5, 3)
    assert thumbnail(np.zeros((1, 2000, 3), np.uint8), 10).shape == (1, 10, 3)
    small = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    assert (thumbnail(small, 4)[::2, ::2] == small).all()


@pytest.mark.parametrize("with_knn", [True, False])
def test_curves_are_drawn_with_and_without_knn(tmp_path, with_knn):
    rows = [{"step": 0, "epoch": 0.0, "knn_top1": 0.5}] if with_knn else []
    for step in range(1, 6):
        row = {"step": step, "epoch": step / 5, "loss": 4 - step, "embedding_std": 0.5, "learning_rate": 0.1}
        row |= {"weight_momentum": 0.99, "statistics_momentum": 1 - step / 5}
        rows.append(row | ({"knn_top1": 0.9} if with_knn and step == 5 else {}))
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    draw_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png", "title")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
