import tarfile

import pytest
from datasets import ClassLabel, Dataset, Features, Image, Value, concatenate_datasets
from helpers import add_member, encoded, load, write_image, write_parquet, write_table, write_tar

from m2t_accel.config.fields import ConfigurationError
from m2t_accel.data import columns, sources
from m2t_accel.data.decode import decode_image
from m2t_accel.data.shards import Shards
from m2t_accel.data.views import read_rows


def test_digits():
    images = load("digits")
    assert (len(images.train), len(images.validation), len(images.class_names)) == (1437, 360, 10)
    assert decode_image(images.train[0]["image"]).shape == (8, 8, 3)


PARQUET_COLUMNS = {  # features, the label of image i, class names
    "hub": (Features({"img": Image(), "fine_label": ClassLabel(names=["a", "b"])}), lambda i: i % 2, ["a", "b"]),
    "numbers": (Features({"image": Image(), "label": Value("int64")}), lambda i: i % 3, ["0", "1", "2"]),
    "words": (Features({"photo": Image(), "label": Value("string")}), lambda i: "xy"[i % 2], ["x", "y"]),
    "bare": (
        Features({"image": {"bytes": Value("binary"), "path": Value("string")}, "label": Value("int64")}),
        lambda i: i % 2,
        ["0", "1"],
    ),
    "unlabelled": (Features({"image": Image()}), None, None),
}


@pytest.mark.parametrize("kind", PARQUET_COLUMNS)
def test_parquet_that_is_copied(tmp_path, kind, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    features, label, class_names = PARQUET_COLUMNS[kind]
    names = list(features)
    for split, number in (("train-00000-of-00001", 8), ("test-00000-of-00001", 4)):
        columns = {names[0]: encoded(0, number)}
        if label:
            columns[names[1]] = [label(i) for i in range(number)]
        folder = tmp_path / "set" / "data"
        folder.mkdir(parents=True, exist_ok=True)
        Dataset.from_dict(columns, features=features).to_parquet(folder / f"{split}.parquet")
    images = load(tmp_path / "set")
    assert len(images.train) == 8
    assert images.class_names == class_names
    assert (images.validation is None) == (label is None)
    assert decode_image(images.train[5]["image"])[0, 0].tolist() == [5, 5, 5]


@pytest.mark.parametrize("streaming", [True, False])
def test_parquet_of_paths_with_a_file_without_rows(tmp_path, streaming):
    for i in range(6):
        write_image(tmp_path / f"{i}.png", value=40 * i)
    paths = [str(tmp_path / f"{i}.png") for i in range(6)]
    for name, rows in (("a", slice(0, 0)), ("b", slice(0, 6))):
        write_table(tmp_path / "shards" / f"{name}.parquet", image=paths[rows])
    images = load(tmp_path / "shards", streaming=streaming).train
    rows = images.open(images.piece_sizes.argmax())(0, 6)[1] if streaming else read_rows(images, range(6))
    assert [decode_image(row)[0, 0, 0] for row in rows] == [40 * i for i in range(6)]


def test_few_pieces_for_many_virtual_devices_are_noted(tmp_path):
    write_parquet(tmp_path / "parquet" / "all.parquet", 0, 64, row_group_size=64)
    images = load(tmp_path / "parquet", streaming=True, batch_size=16, device_batch_size=2)
    assert "1 piece (row groups, runs of a tar) for 8 virtual devices" in images.note
    assert images.validation is None
    (tmp_path / "tars").mkdir()
    write_tar(tmp_path / "tars" / "a.tar", 0, 70)
    assert "pieces (row" not in load(tmp_path / "tars", streaming=True).note
    note = load(tmp_path / "tars", streaming=True, batch_size=64, device_batch_size=8, validation_fraction=0).note
    assert "2 pieces (row groups, runs of a tar) for 8 virtual devices" in note


def test_streaming_changes_nothing_for_image_files(image_net):
    assert "--streaming changes nothing" in load(image_net, streaming=True).note


@pytest.mark.parametrize(
    ("files", "dataset", "message"),
    [
        ({"notes.txt": b"no image"}, ".", r"searched at any depth for \*\.parquet, \*\.tar and .*\.jpg .*1 \*\.txt"),
        ({"notes.txt": b"no image"}, "notes.txt", "is a file: unpack it .* give the folder"),
        (
            {"a.zip": b""},
            "a.zip",
            r"is a file: unpack it with `python -m zipfile -e \S*a.zip \S*a`, and give the folder",
        ),
        ({"a.parquet": b"PAR1 but not really"}, ".", r"shard .*a\.parquet cannot be read .*download it again"),
        ({"a.parquet": b"PAR1 but not really"}, "a.parquet", "is a file: give the folder that it is in"),
        ({"a.tar": b"", "b/1.png": b""}, ".", r"holds 1 like a\.tar and 1 like b/1\.png: give a folder"),
        ({}, ".", "holds no image"),
    ],
)
def test_a_folder_must_hold_images_of_one_kind(tmp_path, files, dataset, message):
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigurationError, match=message):
        load(tmp_path / dataset)


def test_shards_must_hold_rows(tmp_path):
    write_parquet(tmp_path / "a.parquet", 0, 0, row_group_size=4)
    for streaming in (False, True):
        with pytest.raises(ConfigurationError, match="holds no image"):
            load(tmp_path, streaming=streaming)


def test_the_fingerprint_is_the_same_for_every_spelling_of_a_folder(image_net, monkeypatch):
    monkeypatch.chdir(image_net)
    spellings = (image_net, f"{image_net}/", f"{image_net}//", f"{image_net.parent}/./{image_net.name}", ".", "./")
    assert len({load(spelling).fingerprint for spelling in spellings}) == 1


def test_the_fingerprint_depends_on_names_but_not_on_the_place(tmp_path, image_net):
    before = load(image_net).fingerprint
    moved = image_net.rename(tmp_path.with_name(f"{tmp_path.name}-elsewhere"))
    assert load(moved).fingerprint == before
    (moved / "train" / "n01" / "n01_0.JPEG").rename(moved / "train" / "n01" / "n01_00.JPEG")
    assert load(moved).fingerprint != before


def test_the_fingerprints_are_those_of_earlier_versions(tmp_path, monkeypatch):
    """A saved run must find its images again. The bytes of these images cannot be decoded."""
    monkeypatch.setattr(columns, "decode_image", lambda image, max_pixels: None)
    for i in range(4):
        (tmp_path / "files" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        (tmp_path / "files" / "ab"[i % 2] / f"{i}.png").touch()
    (tmp_path / "tars").mkdir()
    with tarfile.open(tmp_path / "tars" / "train.tar", "w") as tar:
        for i in range(70):
            add_member(tar, f"{i}.png", b"x" * i)
    rows = [{"bytes": b"x" * i, "path": f"{i}.png"} for i in range(40)]
    write_table(tmp_path / "parquet" / "train.parquet", row_group_size=4, image=rows)
    found = {
        (name, streaming): load(tmp_path / name, streaming=streaming).fingerprint
        for name in ("files", "tars", "parquet")
        for streaming in (False, True)
    }
    assert found == {
        ("files", False): "248487d187440c1b",
        ("files", True): "248487d187440c1b",
        ("tars", False): "fee3627aff564630",
        ("tars", True): "5c887d7838461f6d",
        ("parquet", False): "d1da983e81dab89a",
        ("parquet", True): "d0a45d0858053fc4",
    }


def fingerprint_of(train):
    return sources.ImageData(train, None, None, None, "").fingerprint


def test_the_fingerprint_depends_on_rows_but_not_on_chunks():
    def rows(*images):
        features = Features({"image": Image(decode=False)})
        return Dataset.from_dict({"image": [{"bytes": b, "path": p} for b, p in images]}, features=features)

    a, b, c = (b"one", "a"), (b"four", "b"), (None, "c")
    whole = rows(a, b, c)
    assert fingerprint_of(concatenate_datasets([rows(a), rows(b, c)])) == fingerprint_of(whole)
    others = [rows(a, b), rows(b, a, c), rows(a, (b"five5", "b"), c), rows(a, b, (b"", "c"))]
    assert len({fingerprint_of(other) for other in [whole, *others]}) == 5


def write_unlabelled_files(folder):
    for i in range(30):
        write_image(folder / f"{i:02}.png", value=i)


LAYOUTS = {  # each holds 30 images, whose pixels are their numbers
    "files": write_unlabelled_files,
    "tars": lambda folder: [write_tar(folder / f"{n}.tar", 10 * n, 10, labels=False) for n in range(3)],
    "parquet": lambda folder: [write_parquet(folder / f"{n}.parquet", 10 * n, 10, 3, labels=False) for n in range(3)],
}


def all_pixels(images):
    """Return the first pixel of each image, in the order of the source."""
    if isinstance(images, Shards):
        parts = [images.open(i)(0, size) for i, size in enumerate(images.piece_sizes) if size]
        assert [sample for samples, _ in parts for sample in samples] == list(range(len(images)))
        rows = [row for _, rows in parts for row in rows]
    else:
        rows = read_rows(images, range(len(images)))
    return [int(decode_image(row)[0, 0, 0]) for row in rows]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_max_images_takes_an_even_sample_that_is_always_the_same(tmp_path, layout, streaming):
    (tmp_path / "images").mkdir()
    LAYOUTS[layout](tmp_path / "images")
    given = {"dataset": tmp_path / "images", "streaming": streaming, "evaluate_every": 0}
    data, again = load(**given, max_images=10), load(**given, max_images=10)
    assert len(data.train) == 10
    assert "10 of 30 images" in data.note
    assert data.fingerprint == again.fingerprint != load(**given).fingerprint
    if layout == "parquet" and streaming:  # row groups 0, 3, 6 and 9 of twelve
        expected = [0, 1, 2, 9, 16, 17, 18, 23, 24, 25]
    else:
        expected = [0, 3, 6, 9, 12, 15, 18, 21, 24, 27]
    assert all_pixels(data.train) == all_pixels(again.train) == expected
    assert load(**given, max_images=30).note == load(**given).note


def test_max_images_limits_the_training_images_and_the_bank_but_not_the_validation_images(image_net):
    data = load(image_net, max_images=4)
    assert (len(data.train), len(data.bank), len(data.validation)) == (4, 4, 6)
    assert sorted(data.bank["label"]) == [0, 0, 1, 1]
    assert "4 of 12 images of 2 classes in train/; evaluation on 6 others" in data.note
    assert len(load("digits", max_images=100).train) == 100
