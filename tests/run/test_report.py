import json

import pytest
import torch
from torch.nn import functional

from m2t_accel import model, pictures
from m2t_accel.config.recipes import build_config
from m2t_accel.data.views import BadImage
from m2t_accel.run import report


@pytest.mark.parametrize(("spread", "low", "high"), [(0.0, 0.0, 0.0), (1e-3, 0.0, 0.01), (1e3, 0.97, 1.01)])
def test_embedding_std_tells_collapse_from_spread(spread, low, high):
    torch.manual_seed(0)
    embeddings = functional.normalize(torch.ones(512, 64) + spread * torch.randn(512, 64), dim=1)
    assert low <= model.embedding_std(embeddings).item() <= high


@pytest.mark.parametrize("with_knn", [True, False])
def test_curves_are_drawn(tmp_path, with_knn):
    rows = [{"step": 0, "epoch": 0.0, "knn_top1": 0.5}] if with_knn else []
    for step in range(1, 6):
        row = {"step": step, "epoch": step / 5, "loss": 4 - step, "embedding_std": 0.5, "learning_rate": 0.1}
        row |= {"weight_momentum": 0.99, "statistics_momentum": 1 - step / 5}
        rows.append(row | ({"knn_top1": 0.9} if with_knn and step == 5 else {}))
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pictures.draw_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png", "title")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("num_images", "fraction", "allowed"), [(100, 0.001, 10), (100, 0.5, 50), (1_000_000, 0.0001, 100), (50_000, 0, 10)]
)
def test_how_many_bad_images_are_allowed(num_images, fraction, allowed):
    config = build_config({"recipe": "digits", "max_bad_fraction": fraction})
    bad = report.BadImages(config, num_images)
    bad.add([BadImage(sample, "a.jpg", "cut") for sample in range(allowed)])
    assert bad.add([BadImage(0, "a.jpg", "cut")]) == []
    bad.check()
    assert len(bad.add([BadImage(allowed, "b.jpg", "cut")])) == 1
    with pytest.raises(
        report.TooManyBadImagesError, match=rf"{allowed + 1} of {num_images:,} .*more than the {allowed}"
    ):
        bad.check()
