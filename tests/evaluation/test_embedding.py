import json
import shutil

import cv2
import numpy as np
import pyarrow
import pytest
import torch
from helpers import encoded, write_image, write_tar
from pyarrow import parquet
from safetensors import safe_open
from safetensors.torch import load_file

from m2t_accel.config.evaluation import build_embed
from m2t_accel.config.fields import ConfigurationError
from m2t_accel.data.crops import central_view
from m2t_accel.data.decode import decode_image
from m2t_accel.evaluation.embedding import embed_dataset
from m2t_accel.hub.encoders import load_encoder
from m2t_accel.model import embed


def test_features_are_written_with_paths_and_labels_and_drawn(given, small_images, small_run, tmp_path):
    images = tmp_path / "images"
    shutil.copytree(small_images, images)
    broken = images / "train" / "green" / "3.png"
    broken.write_bytes(b"broken")
    config = build_embed({**given, "dataset": str(images), "query_images": 3, "nearest": 4})
    lines = embed_dataset(config)
    folder = tmp_path / "result"
    assert "features.parquet: 41 images, 128 features each" in lines[0]
    assert lines[1].startswith(f"1 image cannot be decoded, and left out, the first is {broken} (no known image")
    table = parquet.read_table(folder / "features.parquet").to_pydict()
    assert len(table["path"]) == 41
    assert not any(path.endswith("green/3.png") for path in table["path"])
    loaded = load_encoder(str(small_run))
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (loaded.image_mean, loaded.image_std))
    for row in (0, 20, 40):
        assert table["path"][row].split("/")[-2] == table["class"][row]
        pixels = decode_image({"bytes": None, "path": table["path"][row]})
        crop = torch.from_numpy(central_view(pixels, 16, 0.8).copy()).permute(2, 0, 1)[None] / 255
        with torch.no_grad():
            expected = embed(loaded.model, (crop - mean) / std)[0]
        torch.testing.assert_close(torch.tensor(table["features"][row]), expected, rtol=1e-4, atol=1e-5)
    for name in ("map.png", "neighbours.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    result = json.loads((folder / "result.json").read_text())
    assert result["data"]["train"]["images"] == 41
    assert embed_dataset(config) == [f"{folder} is already complete"]


def test_features_of_the_validation_split_as_safetensors(given, small_images, tmp_path):
    """The paths are not in the header, because it holds 100 MB at most."""
    settings = {"split": "validation", "format": "safetensors", "map_images": 0, "query_images": 0}
    embed_dataset(build_embed({**given, **settings}))
    folder = tmp_path / "result"
    with safe_open(folder / "features.safetensors", "np") as file:
        assert file.get_tensor("features").shape == (21, 128)
        assert np.bincount(file.get_tensor("labels")).tolist() == [7, 7, 7]
        assert file.metadata() == {"classes": "blue\ngreen\nred"}
        parts = np.split(file.get_tensor("paths"), np.cumsum(file.get_tensor("path_lengths"))[:-1])
    assert (folder / "features.safetensors").stat().st_mode == (folder / "config.yaml").stat().st_mode
    assert [part.tobytes().decode() for part in parts] == sorted(map(str, (small_images / "val").rglob("*.png")))
    assert not (folder / "map.png").exists()


def test_labels_are_optional_and_few_images_make_no_map(given, tmp_path):
    for i in range(12):
        write_image(tmp_path / "plain" / f"{i}.png", value=20 * i)
    settings = {**given, "dataset": str(tmp_path / "plain"), "query_images": 0}
    for number in (1, 9):
        few = {"map_images": number, "output_dir": str(tmp_path / f"few{number}")}
        assert "no map.png" in embed_dataset(build_embed({**settings, **few}))[1]
    lines = embed_dataset(build_embed(settings))
    assert "12 images" in lines[0]
    assert set(parquet.read_table(tmp_path / "result" / "features.parquet").column_names) == {
        *("sample", "path", "features")
    }
    assert (tmp_path / "result" / "map.png").exists()


@pytest.mark.parametrize("format", ["parquet", "safetensors"])
def test_features_of_images_in_tars_have_their_places(given, tmp_path, format):
    (tmp_path / "tars").mkdir()
    write_tar(tmp_path / "tars" / "a.tar", 0, 12)
    settings = {"dataset": str(tmp_path / "tars"), "format": format, "map_images": 0, "query_images": 0}
    embed_dataset(build_embed({**given, **settings}))
    if format == "parquet":
        table = parquet.read_table(tmp_path / "result" / "features.parquet").to_pydict()
        assert table["class"] == ["0", "1"] * 6
        places = table["offset"], table["size"]
    else:
        tensors = load_file(tmp_path / "result" / "features.safetensors")
        places = tensors["offsets"].tolist(), tensors["sizes"].tolist()
    content = (tmp_path / "tars" / "a.tar").read_bytes()
    found = [content[offset : offset + size] for offset, size in zip(*places, strict=True)]
    assert found == [image["bytes"] for image in encoded(0, 12)]


def test_a_row_without_an_image_is_left_out(given, tmp_path):
    images = [cv2.imencode(".png", np.full((12, 12, 3), 20 * i, np.uint8))[1].tobytes() for i in range(10)]
    table = pyarrow.table({"image": [*images, None], "label": ["$a$"] * 5 + ["日$$"] * 6})
    (tmp_path / "rows").mkdir()
    parquet.write_table(table, tmp_path / "rows" / "train.parquet")
    lines = embed_dataset(build_embed({**given, "dataset": str(tmp_path / "rows"), "query_images": 2}))
    assert lines[1].startswith("1 image cannot be decoded")
    assert (tmp_path / "result" / "neighbours.png").exists()


def test_a_missing_split_and_broken_images_are_refused(given, tmp_path):
    write_image(tmp_path / "plain" / "a.png")
    settings = {**given, "dataset": str(tmp_path / "plain")}
    with pytest.raises(ConfigurationError, match="--split validation"):
        embed_dataset(build_embed({**settings, "split": "validation"}))
    (tmp_path / "plain" / "a.png").write_bytes(b"broken")
    with pytest.raises(ConfigurationError, match=r"--dataset .* none of the 1 images .*a\.png \(no known image format"):
        embed_dataset(build_embed(settings))


@pytest.mark.usefixtures("full_disk")
def test_a_full_disk_is_one_line_and_leaves_no_half_picture(given, tmp_path):
    with pytest.raises(ConfigurationError, match=r"--output_dir \S+ cannot be written \(No space left on device\)"):
        embed_dataset(build_embed(given))
    names = sorted(path.name for path in (tmp_path / "result").iterdir())
    assert names == ["config.yaml", "features.parquet"]


def test_safetensors_that_do_not_fit_on_the_disk_are_one_line(given, small_disk):
    disk = small_disk(16)
    with pytest.raises(ConfigurationError, match=r"--output_dir \S+ cannot be written \(.*No space left"):
        embed_dataset(build_embed({**given, "output_dir": str(disk), "format": "safetensors"}))
    assert [path.name for path in disk.iterdir()] == ["config.yaml"]


@pytest.mark.slow
def test_two_processes_write_the_same_features(given, tmp_path, two_processes):
    settings, folder = two_processes("embed")
    embed_dataset(build_embed({**given, **settings}))
    alone, two = (parquet.read_table(path / "features.parquet") for path in (tmp_path / "result", folder))
    assert alone.equals(two)
