import numpy as np
import pytest
from helpers import write_deep_images, write_image, write_parquet
from matplotlib.axes import Axes
from PIL import Image

from m2t_accel.config.fields import ConfigurationError
from m2t_accel.config.recipes import build_config
from m2t_accel.data import preview
from m2t_accel.data.preview import draw_preview


def settings(dataset, **others):
    return build_config({"recipe": "8x2080Ti-b256-100ep", "dataset": str(dataset), "image_size": 32, **others})


@pytest.mark.parametrize(("kind", "num_pairs"), [("files", 5), ("streamed", 4)])
def test_the_preview_is_a_picture_of_pairs_of_views(tmp_path, monkeypatch, kind, num_pairs):
    monkeypatch.setattr(preview, "NUM_PAIRS", num_pairs)
    folder = tmp_path / "images"
    folder.mkdir()
    if kind == "files":
        for i in range(6):
            write_image(folder / f"{i:02}.png", value=30 * i, size=(40, 50))
        (folder / "03.png").write_text("broken")
    else:
        write_parquet(folder / "a.parquet", 0, 20, row_group_size=2)
    lines = draw_preview(settings(folder, streaming=kind != "files"), tmp_path / "new" / "preview.png")
    assert lines[-1] == f"{num_pairs} pairs of views: {tmp_path}/new/preview.png"
    assert ("03.png (no known image format)" in "".join(lines)) == (kind == "files")
    with Image.open(tmp_path / "new" / "preview.png") as picture:
        assert picture.width > 1000
        assert np.asarray(picture.convert("RGB")).std() > 20


def test_large_images_are_drawn_small_with_their_crops_in_the_right_places(tmp_path, monkeypatch):
    drawn = []

    def imshow(axes, pixels, **options):
        drawn.append((axes, pixels, options))

    monkeypatch.setattr(Axes, "imshow", imshow)
    for i in range(2):
        write_image(tmp_path / "images" / f"{i} $\\frac$.jpg", size=(700, 1400))
    draw_preview(settings(tmp_path / "images"), tmp_path / "new" / "preview.png")
    originals = [(axes, pixels, options) for axes, pixels, options in drawn if options]
    assert len(originals) == 2
    for axes, pixels, options in originals:
        assert pixels.shape == (256, 512, 3)
        assert options["extent"] == (-0.5, 1399.5, 699.5, -0.5)
        boxes = np.concatenate([line.get_xydata() for line in axes.lines])
        assert (boxes >= -0.5).all()
        assert (boxes <= (1399.5, 699.5)).all()
        assert boxes.max() > 512


@pytest.mark.parametrize(("largest", "warns"), [(4095, True), (65535, False)])
def test_images_of_12_bits_in_16_are_a_warning(tmp_path, largest, warns):
    write_deep_images(tmp_path / "images", largest)
    _, *others, last = draw_preview(settings(tmp_path / "images"), tmp_path / "preview.png")
    assert last.startswith("4 pairs of views")
    assert ["warning: 4 of 4 images of more than 8 bits have no value above 15 of 255" in x for x in others] == (
        [True] if warns else []
    )


def test_a_preview_of_few_images_and_of_none(tmp_path):
    for i in range(3):
        write_image(tmp_path / "few" / f"{i}.png")
        (tmp_path / "none").mkdir(exist_ok=True)
        (tmp_path / "none" / f"{i}.png").write_text("broken")
    assert draw_preview(settings(tmp_path / "few"), tmp_path / "few.png")[-1].startswith("2 pairs of views")
    with pytest.raises(ConfigurationError, match=r"--dataset .*no known image format"):
        draw_preview(settings(tmp_path / "none"), tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
    with pytest.raises(ConfigurationError, match=r"--output .*0\.png"):
        draw_preview(settings(tmp_path / "few"), tmp_path / "none" / "0.png" / "below.png")
    with pytest.raises(ConfigurationError, match=r"--output .* is in --dataset .*few, and would be trained on"):
        draw_preview(settings(tmp_path / "few"), tmp_path / "few" / "preview.png")
