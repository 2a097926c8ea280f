import numpy as np
from matplotlib.figure import Figure

from m2t_accel.pictures import plain_words, thumbnail


def test_words_are_no_formulas_and_letters_without_a_glyph_no_warnings(tmp_path):
    """pytest makes errors of warnings."""
    with plain_words():
        figure = Figure()
        figure.suptitle("日本 $\\frac_13$ é.jpg")
        figure.savefig(tmp_path / "words.png")
    assert (tmp_path / "words.png").stat().st_size > 1000


def test_a_thumbnail_keeps_the_shape_and_at_least_a_pixel():
    assert thumbnail(np.zeros((40, 20, 3), np.uint8), 10).shape == (10, 5, 3)
    assert thumbnail(np.zeros((1, 2000, 3), np.uint8), 10).shape == (1, 10, 3)
    small = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    assert (thumbnail(small, 4)[::2, ::2] == small).all()
