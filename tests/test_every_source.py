"""Every kind of source through preview, pretraining with a stop and a resume, and kNN."""

import zipfile

import pytest
from datasets import ClassLabel, Dataset, Features, Image
from helpers import encoded, tiny, write_image, write_parquet, write_table, write_tar
from test_pretrain import assert_same_run, stop_in_step, write_hub_tars

from m2t_accel.config.evaluation import build_knn
from m2t_accel.config.fields import Interrupted
from m2t_accel.config.recipes import build_config
from m2t_accel.data import order, preview
from m2t_accel.data.preview import draw_preview
from m2t_accel.evaluation.knn import evaluate_knn
from m2t_accel.pretrain import pretrain
from m2t_accel.run import completion


def write_images(folder):
    for i in range(48):
        write_image(folder / "train" / "ab"[i % 2] / f"{i:02}.png", value=5 * i)


def write_flat_images(folder):
    for i in range(48):
        write_image(folder / f"{i:02}.png", value=5 * i)


def write_tars(folder):
    folder.mkdir(parents=True)
    for first in (0, 24):
        write_tar(folder / f"{first:02}.tar", first, 24)


def write_shards(folder):
    write_parquet(folder / "train.parquet", 0, 48, row_group_size=6)
    write_parquet(folder / "validation.parquet", 48, 12, row_group_size=6)


def write_arrays(folder):
    """Write gray pixels without an encoding."""
    pixels, kinds = [[[5 * i] * 12] * 10 for i in range(48)], [i % 2 for i in range(48)]
    write_table(folder / "train.parquet", row_group_size=4, pixels=pixels, kind=kinds)


def write_zips(folder):
    """Write images in zips, as people upload them."""
    folder.mkdir(parents=True)
    for half in range(2):
        with zipfile.ZipFile(folder / f"train-{half}.zip", "w") as archive:
            for i, image in enumerate(encoded(24 * half, 24)):
                archive.writestr(f"{24 * half + i:02}.png", image["bytes"])


# How the source is written (on the Hub if the name says so), settings, and whether it has labels for kNN.
SOURCES = {
    "class folders": (write_images, {}, True),
    "images": (write_flat_images, {}, False),
    "tars": (write_tars, {}, True),
    "tars, streamed": (write_tars, {"streaming": True}, True),
    "parquet": (write_shards, {}, True),
    "parquet, streamed": (write_shards, {"streaming": True}, True),
    "pixel arrays": (write_arrays, {"label_column": "kind"}, True),
    "pixel arrays, streamed": (write_arrays, {"label_column": "kind", "streaming": True}, True),
    "parquet on the Hub": (write_shards, {}, True),
    "parquet on the Hub, streamed": (write_shards, {"streaming": True}, True),
    "tars on the Hub": (write_hub_tars, {"batch_size": 16}, True),
    "tars on the Hub, streamed": (write_hub_tars, {"streaming": True, "images_per_epoch": 96, "batch_size": 16}, True),
    "zip on the Hub": (write_zips, {}, False),
    "zip on the Hub, streamed": (write_zips, {"streaming": True}, False),
    "memory": (None, {}, True),
}


@pytest.mark.slow
@pytest.mark.parametrize("source", SOURCES)
def test_every_source_is_shown_trained_on_resumed_and_evaluated(tmp_path, monkeypatch, capsys, source, request):
    write, given, has_labels = SOURCES[source]
    monkeypatch.setattr(completion, "draw_curves", lambda *arguments, **options: None)  # takes as long as a small run
    monkeypatch.setattr(preview, "NUM_PAIRS", 2)
    monkeypatch.setattr(order, "POOL_SIZE", 1)
    monkeypatch.setattr(order, "MIN_POOL_BATCHES", 2)
    dataset, images = "memory", None
    if "on the Hub" in source:
        request.getfixturevalue("dataset_hub")
        dataset = "someone/images"
        write(tmp_path / "hub" / "someone" / "images")
    elif write is not None:
        dataset = str(tmp_path / "images")
        write(tmp_path / "images")
    else:
        features = Features({"image": Image(), "label": ClassLabel(names=["even", "odd"])})
        rows = {"image": encoded(0, 48), "label": [i % 2 for i in range(48)]}
        images = Dataset.from_dict(rows, features=features)

    def settings(folder, **others):
        given_all = {"dataset": dataset, "batch_size": 8, "device_batch_size": 4, "image_size": 16, **given, **others}
        if has_labels:
            given_all["evaluate_every"] = 2
        return tiny(tmp_path / folder, **given_all)

    if images is None:
        lines = draw_preview(build_config(settings("preview")), tmp_path / "preview.png")
        assert "pairs of views" in lines[-1]
        assert (tmp_path / "preview.png").stat().st_size > 5_000
    pretrain(build_config(settings("whole")), images)
    whole = capsys.readouterr().out
    with monkeypatch.context() as patch:
        stop_in_step(patch, 3)
        with pytest.raises(Interrupted, match=r"SIGTERM.* 3 of "):
            pretrain(build_config(settings("run", num_workers=1)), images)
    pretrain(build_config(settings("run")), images)
    assert "resumes from step 3 of " in capsys.readouterr().out
    assert_same_run(tmp_path / "whole", tmp_path / "run")
    assert ("Teacher kNN top-1" in whole) == has_labels
    if has_labels and images is None:
        flags = {name: value for name, value in given.items() if name == "label_column"}
        found = evaluate_knn(
            build_knn({"encoder": str(tmp_path / "run"), "dataset": dataset, "k": (2,), "num_workers": 0, **flags})
        )
        assert "top1_k2" in found["figures"]
