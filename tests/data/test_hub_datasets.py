import json
import os
import shutil

import datasets
import pytest
from datasets import ClassLabel, Dataset, Features, Image
from helpers import encoded, load, pixel, settings, write_image, write_parquet, write_table, write_tar
from huggingface_hub import constants
from loopback_hub import loopback_hub

from m2t_accel.benchmark import data as benchmark
from m2t_accel.config.fields import ConfigurationError
from m2t_accel.data import hub_datasets
from m2t_accel.data.decode import decode_image
from m2t_accel.data.preview import draw_preview
from m2t_accel.data.requests import DeviceBatches
from m2t_accel.data.sources import load_images

LOAD = """
from m2t_accel.config import command_line, recipes
from m2t_accel.data import decode, sources
for name in ('pictures', 'gated-pictures', 'no-pictures'):
    for streaming in (False, True):
        try:
            with command_line.errors_in_one_line():
                given = {'recipe': 'digits', 'dataset': f'someone/{name}', 'batch_size': 4, 'streaming': streaming}
                images = sources.load_images(recipes.build_config(given))
                if streaming:
                    samples, rows = images.train.open(0)(2, 8)
                    print(samples, images.train.files[0])
                else:
                    rows = images.train['image']
                print(images.note, [int(decode.decode_image(row)[0, 0, 0]) for row in rows])
        except SystemExit as error:
            assert error.code == 2
"""


@pytest.mark.slow
def test_a_data_set_of_the_hub_over_http(tmp_path, run_script):
    """It runs in a process of its own, because the endpoint must be set before the libraries are imported."""
    folder = tmp_path / "hub" / "someone" / "pictures" / "data"
    folder.mkdir(parents=True)
    (tmp_path / "hub" / "someone" / "gated-pictures").mkdir()
    features = Features({"img": Image(), "label": ClassLabel(names=["a", "b"])})
    for name, number in (("train", 8), ("test", 4)):
        rows = {"img": encoded(0, number), "label": [i % 2 for i in range(number)]}
        Dataset.from_dict(rows, features=features).to_parquet(folder / f"{name}-00000-of-00001.parquet")
    with loopback_hub(tmp_path / "hub") as hub:
        environment = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
        environment |= {"HF_HUB_DISABLE_XET": "1", "XDG_CACHE_HOME": str(tmp_path / "new")}
        found = run_script("-c", LOAD, environment=environment)
    assert found.returncode == 0, found.stderr
    note = "someone/pictures: 8 images of 2 classes in split train; evaluation on 4 others (split test, its own"
    assert found.stdout.count(note) == 2
    copied, place, streamed = found.stdout.splitlines()
    assert copied.endswith(str([*range(8)]))
    assert place.startswith("[2 3 4 5 6 7] hf://datasets/someone/pictures@0123456789abcdef")
    assert streamed.endswith(str([*range(2, 8)]))
    errors = [line for line in found.stderr.splitlines() if "error: " in line]
    assert len(errors) == 4
    for line, name in zip(errors, ("gated-pictures", "gated-pictures", "no-pictures", "no-pictures"), strict=True):
        assert f"error: --dataset someone/{name} cannot be loaded" in line
        assert {"gated-pictures": "hf auth login", "no-pictures": "Repository Not Found"}[name] in line


def write_splits(folder, **splits):
    """Write a parquet file of four images for each split, numbered from the given numbers."""
    for name, first in splits.items():
        write_parquet(folder / "data" / f"{name}-00000-of-00001.parquet", first, 4, row_group_size=4)


def values(images):
    return [pixel(images, i) for i in range(len(images))]


CONFIGURATIONS = """---
configs:
- config_name: small
  data_files:
  - {split: train, path: small/train-*}
- config_name: large
  data_files:
  - {split: train, path: large/train-*}
  - {split: validation, path: large/validation-*}
---
"""


def write_configurations(folder):
    for name, first in (("small/train", 10), ("large/train", 20), ("large/validation", 30)):
        write_parquet(folder / f"{name}-00000-of-00001.parquet", first, 4, row_group_size=4)
    (folder / "README.md").write_text(CONFIGURATIONS)


@pytest.mark.parametrize("streaming", [False, True])
def test_only_the_splits_that_are_used_are_read(tmp_path, dataset_hub, streaming):
    write_splits(tmp_path / "hub" / "someone" / "pictures", train=10, test=20, validation=30, extra=40)
    images = load("someone/pictures", streaming=streaming)
    assert "test, extra" in images.note
    assert values(images.bank) == [10, 11, 12, 13]
    assert values(images.validation) == [30, 31, 32, 33]
    read = [request for request in dataset_hub.requests if ".parquet" in request]
    assert any("validation-0" in request for request in read)
    assert not any("test-0" in request or "extra-0" in request for request in read)
    others = load("someone/pictures", streaming=streaming, train_split="extra", validation_split="test")
    assert (values(others.bank), values(others.validation)) == ([40, 41, 42, 43], [20, 21, 22, 23])


def test_a_copy_of_some_splits_leaves_that_of_the_whole_alone(tmp_path, dataset_hub, monkeypatch):
    write_splits(tmp_path / "hub" / "someone" / "pictures", train=10, validation=30, extra=40)
    assert len(load("someone/pictures").train) == 4
    whole = datasets.load_dataset("someone/pictures")
    assert list(whole) == ["train", "validation", "extra"]
    dataset_hub.requests.clear()
    assert "datasets-cache/someone___pictures/default/" in load("someone/pictures").train.cache_files[0]["filename"]
    assert not any("GET" in request and ".parquet" in request for request in dataset_hub.requests)


def test_a_copy_is_found_without_the_network(tmp_path, dataset_hub, monkeypatch):
    write_splits(tmp_path / "hub" / "someone" / "pictures", train=10, validation=30, extra=40)
    write_configurations(tmp_path / "hub" / "someone" / "two")
    before = load("someone/pictures"), load("someone/two", dataset_config="large")
    for module in (constants, datasets.config):
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", True)
    after = load("someone/pictures"), load("someone/two", dataset_config="large")
    assert [images.fingerprint for images in after] == [images.fingerprint for images in before]
    assert values(after[1].validation) == [30, 31, 32, 33]
    with pytest.raises(ConfigurationError, match="the Hub cannot be reached: leave out --streaming"):
        load("someone/pictures", streaming=True)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_configuration_is_chosen_by_its_name(tmp_path, dataset_hub, streaming):
    write_configurations(tmp_path / "hub" / "someone" / "two")
    with pytest.raises(ConfigurationError, match="has the configurations small, large: name one with --dataset_config"):
        load("someone/two", streaming=streaming)
    with pytest.raises(
        ConfigurationError, match=r"--dataset_config larg: .* did you mean .*large.*it has small, large"
    ):
        load("someone/two", streaming=streaming, dataset_config="larg")
    images = load("someone/two", streaming=streaming, dataset_config="large")
    assert (values(images.bank), values(images.validation)) == ([20, 21, 22, 23], [30, 31, 32, 33])


@pytest.mark.parametrize("streaming", [False, True])
def test_splits_of_the_hub_may_store_images_differently(tmp_path, dataset_hub, streaming):
    train, validation = ([row["bytes"] for row in encoded(10, 4)], encoded(30, 4))
    folder = tmp_path / "hub" / "someone" / "pictures"
    write_table(folder / "train-0.parquet", image=train, label=[0, 1, 0, 1])
    write_table(folder / "validation-0.parquet", image=validation, label=[0, 1, 0, 1], width=[10] * 4)
    images = load("someone/pictures", streaming=streaming)
    assert (values(images.bank), values(images.validation)) == ([10, 11, 12, 13], [30, 31, 32, 33])


def test_a_revision_is_a_branch_or_a_commit(tmp_path, dataset_hub):
    for name, first in (("pictures", 10), ("pictures@old", 50)):
        write_splits(tmp_path / "hub" / "someone" / name, train=first, validation=first + 10)
    assert values(load("someone/pictures").train) == [10, 11, 12, 13]
    assert values(load("someone/pictures", dataset_revision="old").train) == [50, 51, 52, 53]
    with pytest.raises(ConfigurationError, match=r"cannot be loaded .*evision"):
        load("someone/pictures", dataset_revision="nothing")


def test_an_unreachable_hub_is_an_error_of_one_line(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigurationError, match=r"--dataset nobody/nothing-at-all cannot be loaded") as caught:
        load("nobody/nothing-at-all")
    assert "\n" not in str(caught.value)


def test_files_that_datasets_cannot_join_are_an_error_without_its_log(tmp_path, capfd):
    for i, label in enumerate((1, "one")):
        write_table(tmp_path / f"{i}.parquet", image=encoded(i, 1), label=[label])
    with pytest.raises(ConfigurationError, match="cannot be loaded"):
        load(tmp_path)
    assert "Failed to read" not in "".join(capfd.readouterr())


@pytest.mark.parametrize(
    ("name", "neighbour"),
    [
        ("photos[1]", "photos1"),
        ("a*b", "aXb"),
        ("what?", "what1"),
        ("**", "other"),
        ("$HOME", "home"),
        ("~x", "x"),
        ("a::b", "a"),
        ("zip:", "zip"),
        ("{a}", "a"),
        ("%41#1", "A"),
        ("a b\nc", "a b"),
    ],
)
def test_no_path_is_a_pattern_a_variable_or_a_chained_url(tmp_path, monkeypatch, name, neighbour):
    """Each folder has a neighbour with other images, which must not be loaded in its place."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    for folder, first in ((name, 30), (neighbour, 90)):
        for kind in ("parquet", "tars", "files"):
            (tmp_path / kind / folder).mkdir(parents=True)
        write_parquet(tmp_path / "parquet" / folder / f"train-{name}-0.parquet", first, 6, row_group_size=6)
        write_tar(tmp_path / "tars" / folder / f"train-{name}-0.tar", first, 6)
        for i in range(6):
            write_image(tmp_path / "files" / folder / f"{name}-{i}.png", first + i)
    for kind in ("parquet", "tars", "files"):
        images = load(tmp_path / kind / name, validation_fraction=0).train
        assert [pixel(images, i) for i in range(len(images))] == [*range(30, 36)]
        if kind != "files":
            streamed = load(tmp_path / kind / name, validation_fraction=0, streaming=True).train
            assert streamed.open(0)(0, 6)[1][0]["bytes"] == encoded(30, 1)[0]["bytes"]


def test_a_copy_is_made_once_and_again_when_a_file_has_changed(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    file = tmp_path / "set" / "train-0.parquet"

    def load_copy():
        images = load(tmp_path / "set", validation_fraction=0).train
        return images.cache_files[0]["filename"], [pixel(images, i) for i in range(4)]

    write_parquet(file, 0, 4, row_group_size=4)
    before = os.stat(file)
    first, values = load_copy()
    assert values == [0, 1, 2, 3]
    written = os.stat(first).st_mtime_ns
    assert load_copy() == (first, values)
    assert os.stat(first).st_mtime_ns == written
    write_parquet(file, 50, 4, row_group_size=4)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))  # as rsync and tar do
    assert load_copy()[1] == [50, 51, 52, 53]


@pytest.mark.parametrize("variable", ["HF_HOME", "HF_DATASETS_CACHE"])
@pytest.mark.parametrize("home", ["/proc/home", "file"])
def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch, home, variable):
    write_parquet(tmp_path / "set" / "train-0.parquet", 0, 4, row_group_size=4)
    (tmp_path / "file").touch()
    cache = tmp_path / home / "datasets"
    monkeypatch.delenv("HF_DATASETS_CACHE", raising=False)
    monkeypatch.setenv(variable, str(cache))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", cache)
    with pytest.raises(ConfigurationError, match=rf"into the cache {cache} .*set {variable} .*--streaming"):
        load(tmp_path / "set")


def test_a_shard_that_cannot_be_read_is_not_taken_for_the_cache(tmp_path):
    shard, cache = tmp_path / "train-0.parquet", str(datasets.config.HF_DATASETS_CACHE)
    assert hub_datasets.failed_cache(PermissionError(13, "Permission denied", str(shard))) is None
    assert hub_datasets.failed_cache(PermissionError(13, "Permission denied", f"{cache}/a.lock")).folder == cache
    assert hub_datasets.failed_cache(OSError(28, "No space left on device")).folder == cache


def test_a_full_disk_is_named(tmp_path, monkeypatch, small_disk):
    write_table(tmp_path / "set" / "train-0.parquet", image=[encoded(0, 1)[0]["bytes"] + os.urandom(200_000)] * 4)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", small_disk(64))
    with pytest.raises(ConfigurationError, match=r"into the cache .*No space left on device.*--streaming"):
        load(tmp_path / "set")


def write_loose(folder):
    """Write class folders of images in two splits."""
    for split, number in (("train", 9), ("test", 4)):
        for i in range(number):
            write_image(folder / split / "ab"[i % 2] / f"{i}.png", (30 if split == "train" else 90) + i)


def write_zips(folder):
    for split in ("train", "test"):
        write_loose(folder / "loose")
        shutil.make_archive(str(folder / f"{split}"), "zip", folder / "loose" / split)
    shutil.rmtree(folder / "loose")


def write_metadata(folder):
    for split, number in (("train", 9), ("test", 4)):
        lines = [json.dumps({"file_name": f"{i}.png", "species": "ab"[i % 2]}) for i in range(number)]
        for i in range(number):
            write_image(folder / split / f"{i}.png", (30 if split == "train" else 90) + i)
        (folder / split / "metadata.jsonl").write_text("\n".join(lines))


def write_tars(folder):
    folder.mkdir(parents=True)
    write_tar(folder / "train-0.tar", 30, 5)
    write_tar(folder / "train-1.tar", 35, 4)
    write_tar(folder / "test-0.tar", 90, 4)


def write_arrow(folder):
    features = Features({"image": Image(), "label": ClassLabel(names=["a", "b"])})
    for split, first, number in (("train", 30, 9), ("test", 90, 4)):
        rows = {"image": encoded(first, number), "label": [i % 2 for i in range(number)]}
        Dataset.from_dict(rows, features=features).save_to_disk(folder / "saved")
        (file,) = (folder / "saved").glob("*.arrow")
        file.rename(folder / f"{split}-00000-of-00001.arrow")
        shutil.rmtree(folder / "saved")


def write_pixels(folder):
    """Write gray images of 4 × 4 pixels as JSON lines."""
    folder.mkdir(parents=True)
    for split, first, number in (("train", 30, 9), ("test", 90, 4)):
        rows = [{"image": [[first + i] * 4] * 4, "label": "ab"[i % 2]} for i in range(number)]
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))


@pytest.mark.parametrize(
    ("write", "more"),
    [
        (write_zips, {}),
        (write_tars, {"images_per_epoch": 9}),
        pytest.param(write_loose, {}, marks=pytest.mark.slow),
        pytest.param(write_metadata, {}, marks=pytest.mark.slow),
        pytest.param(write_arrow, {"images_per_epoch": 9}, marks=pytest.mark.slow),
        pytest.param(write_pixels, {"images_per_epoch": 9}, marks=pytest.mark.slow),
    ],
)
def test_every_format_of_the_hub_is_streamed_and_copied(tmp_path, dataset_hub, write, more):
    write(tmp_path / "hub" / "someone" / "pictures")
    config = settings("someone/pictures", streaming=True, epochs=2, **more)
    streamed = load_images(config)
    assert "9 images of 2 classes in split train; evaluation on 4 others (split test, its own" in streamed.note
    assert sorted(values(streamed.bank)) == [*range(30, 39)]
    assert sorted(values(streamed.validation)) == [*range(90, 94)]
    requests = [list(DeviceBatches(streamed.train, config, 1, 0)) for _ in range(2)]
    assert [r.samples.tolist() for r in requests[0]] == [r.samples.tolist() for r in requests[1]]
    shown = [decode_image(image)[0, 0, 0] for request in requests[0] for image in request.images]
    assert len(set(shown[:8])) == len(set(shown[8:])) == 8
    assert set(shown) <= set(range(30, 39))
    copied = load("someone/pictures")
    assert sorted(values(copied.train)) == [*range(30, 39)]
    assert sorted(copied.class_names) == sorted(streamed.class_names)


@pytest.mark.slow
@pytest.mark.parametrize(("write", "more"), [(write_loose, {}), (write_tars, {"images_per_epoch": 9})])
def test_streams_are_previewed_and_benchmarked(tmp_path, dataset_hub, monkeypatch, write, more):
    write(tmp_path / "hub" / "someone" / "pictures")
    config = settings("someone/pictures", streaming=True, **more)
    assert "pairs of views" in draw_preview(config, tmp_path / "preview.png")[-1]
    monkeypatch.setattr(benchmark, "BATCH_SIZE", 4)
    requests = benchmark.choose_requests(load_images(config).train, 8)
    assert [len(request.images) for request in requests] == [4, 4]
    assert len({sample for request in requests for sample in request.samples.tolist()}) == 8


def test_a_stream_needs_the_length_of_an_epoch(tmp_path, dataset_hub):
    write_tars(tmp_path / "hub" / "someone" / "pictures")
    with pytest.raises(ConfigurationError, match=r"how many images the split train has: .*--images_per_epoch N"):
        load("someone/pictures", streaming=True)


def test_the_length_of_an_epoch_is_for_streams_alone(image_net):
    with pytest.raises(ConfigurationError, match="--images_per_epoch 9: leave it out, an epoch shows all 12 images"):
        load(image_net, streaming=True, images_per_epoch=9)
