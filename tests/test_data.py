import dataclasses
import os

import cv2
import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value
from loopback_hub import loopback_hub
from PIL import Image as PILImage

from m2t_accel import data
from m2t_accel.recipes import ConfigurationError, build_config


def settings(dataset, **others):
    return build_config(
        {"recipe": "digits", "dataset": str(dataset), "batch_size": 4, "epochs": 3, "warmup_epochs": 1, **others}
    )


def write_image(path, value=0, size=(12, 10)):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.full((*size, 3), value, np.uint8)
    pixels[2:5, 2:5] = 255 - value
    cv2.imwrite(str(path), pixels)


@pytest.fixture
def image_net(tmp_path):
    """ImageNet's layout in small: 2 classes of 6 and 3 images."""
    for split, number in (("train", 6), ("val", 3)):
        for index, name in enumerate(("n01", "n02")):
            for i in range(number):
                write_image(tmp_path / split / name / f"{name}_{i}.JPEG", value=100 * index + i)
    (tmp_path / "train" / "n01" / "notes.txt").write_text("no image")
    (tmp_path / "train" / ".cache").mkdir()
    write_image(tmp_path / "train" / ".cache" / "hidden.jpg")
    return tmp_path


# --- sources


def test_digits():
    images = data.load_images(build_config({"recipe": "digits"}))
    assert (len(images.train), len(images.validation), len(images.class_names)) == (1437, 360, 10)
    assert data.decode_image(images.train[0]["image"]).shape == (8, 8, 3)


def test_class_folders_with_train_and_val(image_net):
    images = data.load_images(settings(image_net))
    assert images.class_names == ["n01", "n02"]
    assert images.train["label"] == [0] * 6 + [1] * 6
    assert images.validation["label"] == [0] * 3 + [1] * 3
    assert [os.path.basename(row["path"]) for row in images.train["image"]][:2] == ["n01_0.JPEG", "n01_1.JPEG"]


@pytest.mark.parametrize("alone", ["train", "val"])
def test_one_split_alone_holds_out_a_part_that_no_seed_changes(image_net, alone):
    found = []
    for seed in (0, 1):
        images = data.load_images(settings(image_net / alone, validation_fraction=0.34, seed=seed, batch_size=2))
        paths = [[row["path"] for row in part["image"]] for part in (images.train, images.validation)]
        assert not set(paths[0]) & set(paths[1])
        number = {"train": 12, "val": 6}[alone]
        assert len(paths[0]) + len(paths[1]) == number
        assert len(paths[1]) == round(0.34 * number)
        found.append(paths)
    assert found[0] == found[1]


def test_nothing_is_held_out_when_not_wanted(image_net):
    images = data.load_images(settings(image_net / "train", validation_fraction=0))
    assert images.validation is None
    assert len(images.train) == 12


def test_a_folder_with_only_a_val_folder_in_it_is_that_folder(image_net):
    for path in sorted((image_net / "train").rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    (image_net / "train").rmdir()
    assert data.load_images(settings(image_net, batch_size=2)).class_names == ["n01", "n02"]


def test_images_at_any_depth_have_no_labels(tmp_path):
    for name in ("a.jpg", "deep/b.png", "deep/deeper/c.WEBP", "deep/deeper/d.bmp", "e.tiff"):
        write_image(tmp_path / name)
    images = data.load_images(settings(tmp_path))
    assert (len(images.train), images.validation, images.class_names) == (5, None, None)
    assert list(images.train.features) == ["image"]


def test_a_class_that_only_validation_has_is_an_error(image_net):
    write_image(image_net / "val" / "n99" / "x.jpg")
    with pytest.raises(ConfigurationError, match="n99, which the training split has not"):
        data.load_images(settings(image_net))


def encoded(number, values=None):
    return [
        {"bytes": cv2.imencode(".png", np.full((9, 9, 3), i, np.uint8))[1].tobytes(), "path": None}
        for i in range(number)
    ]


PARQUET_COLUMNS = {
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
def test_parquet(tmp_path, kind, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    features, label, class_names = PARQUET_COLUMNS[kind]
    names = list(features)
    for split, number in (("train-00000-of-00001", 8), ("test-00000-of-00001", 4)):
        columns = {names[0]: encoded(number)}
        if label:
            columns[names[1]] = [label(i) for i in range(number)]
        folder = tmp_path / "set" / "data"
        folder.mkdir(parents=True, exist_ok=True)
        Dataset.from_dict(columns, features=features).to_parquet(folder / f"{split}.parquet")
    images = data.load_images(settings(tmp_path / "set"))
    assert len(images.train) == 8
    assert images.class_names == class_names
    assert (images.validation is None) == (label is None)
    assert data.decode_image(images.train[5]["image"])[0, 0].tolist() == [5, 5, 5]


@pytest.mark.parametrize(
    ("columns", "given", "message"),
    [
        ({"image": "x"}, {"image_column": "imgae"}, "--image_column imgae: no such column, did you mean image"),
        ({"image": "x"}, {"label_column": "kind"}, "--label_column kind: no such column; there are image"),
        ({"words": "x"}, {}, "no column of images; name one of words with --image_column"),
        ({"words": 3}, {"image_column": "words"}, "--image_column words: not a column of images"),
        ({"image": "x", "label": 0.5}, {"label_column": "label"}, "--label_column label: not class labels"),
    ],
)
def test_columns_that_are_not_there_or_not_right(columns, given, message):
    split = Dataset.from_dict({name: [value] * 8 for name, value in columns.items()})
    with pytest.raises(ConfigurationError, match=message):
        data.standard_columns({"train": split}, settings("digits", **given))


def labelled_splits(train, validation, feature=None):
    feature = feature or Value("string" if isinstance(train[0], str) else "int64")
    return {
        name: Dataset.from_dict(
            {"image": encoded(len(labels)), "label": labels}, features=Features({"image": Image(), "label": feature})
        )
        for name, labels in (("train", train), ("test", validation))
    }


def test_words_mean_the_same_class_in_every_split():
    splits = data.standard_columns(labelled_splits(["b", "c", "a", "c"], ["c", "b"]), settings("digits"))
    assert splits["train"].features["label"].names == splits["test"].features["label"].names == ["a", "b", "c"]
    assert (splits["train"]["label"][:], splits["test"]["label"][:]) == ([1, 2, 0, 2], [2, 1])


def test_a_word_that_only_validation_has_is_an_error():
    with pytest.raises(ConfigurationError, match="the label z of a validation split is not among"):
        data.standard_columns(labelled_splits(["a", "b"], ["z"]), settings("digits"))


@pytest.mark.parametrize("withheld", [[-1, -1], [None, None]])
def test_withheld_labels_are_no_labels(withheld):
    splits = data.standard_columns(
        labelled_splits([0, 1, 0], withheld, ClassLabel(names=["a", "b"])), settings("digits")
    )
    assert "label" in splits["train"].features
    assert "label" not in splits["test"].features


def test_numbers_that_are_no_classes_are_no_labels():
    splits = data.standard_columns(labelled_splits([20_000_001, 7, 9], [5]), settings("digits"))
    assert list(splits["train"].features) == ["image"]


def test_errors_of_folders(tmp_path):
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(
        ConfigurationError, match=r"holds no image: looked for \*\.parquet and, at any depth, for .*\.jpg"
    ):
        data.load_images(settings(tmp_path))
    with pytest.raises(ConfigurationError, match="is a file: give the folder"):
        data.load_images(settings(tmp_path / "notes.txt"))
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 but not really")
    with pytest.raises(ConfigurationError, match="cannot be loaded") as caught:
        data.load_images(settings(tmp_path))
    assert "\n" not in str(caught.value)


def test_fewer_images_than_one_batch(image_net):
    with pytest.raises(ConfigurationError, match="has 12 images to train on, fewer than one batch: use --batch_size 6"):
        data.load_images(settings(image_net, batch_size=64))


@pytest.mark.slow
def test_a_dataset_of_the_hub_over_http(tmp_path, run_script):
    """In processes of their own, because the endpoint must be set before the libraries are imported."""
    folder = tmp_path / "hub" / "someone" / "pictures" / "data"
    folder.mkdir(parents=True)
    (tmp_path / "hub" / "someone" / "gated-pictures").mkdir()
    features = Features({"img": Image(), "label": ClassLabel(names=["a", "b"])})
    for name, number in (("train", 8), ("test", 4)):
        rows = {"img": encoded(number), "label": [i % 2 for i in range(number)]}
        Dataset.from_dict(rows, features=features).to_parquet(folder / f"{name}-00000-of-00001.parquet")
    load = (
        "import sys\nfrom m2t_accel import data, recipes\nwith recipes.errors_in_one_line():\n"
        "    config = recipes.build_config({'dataset': sys.argv[1], 'batch_size': 4})\n"
        "    images = data.load_images(config)\n"
        "    print(images.note, [data.decode_image(row)[0, 0, 0] for row in images.train['image']])"
    )
    with loopback_hub(tmp_path / "hub") as hub:
        environment = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
        environment |= {"HF_HUB_DISABLE_XET": "1"}
        found = run_script("-c", load, "someone/pictures", environment=environment)
        assert found.returncode == 0, found.stderr
        assert "someone/pictures: 8 images of 2 classes; kNN is measured on 4 others" in found.stdout
        for name, reason in (("gated-pictures", "hf auth login"), ("no-pictures", "Repository Not Found")):
            refused = run_script("-c", load, f"someone/{name}", environment=environment)
            line = refused.stderr.splitlines()[-1]
            assert refused.returncode == 2, refused.stderr
            assert f"error: --dataset someone/{name} cannot be loaded" in line
            assert reason in line


def test_no_hub(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigurationError, match=r"--dataset nobody/nothing-at-all cannot be loaded") as caught:
        data.load_images(settings("nobody/nothing-at-all"))
    assert "\n" not in str(caught.value)


# --- decoding


def test_every_kind_of_image_becomes_rgb(tmp_path):
    color = np.zeros((8, 6, 3), np.uint8)
    color[..., 0] = 200
    picture = PILImage.fromarray(color)
    kinds = {
        "rgb.png": picture,
        "gray.png": picture.convert("L"),
        "palette.png": picture.convert("P"),
        "alpha.png": picture.convert("RGBA"),
        "cmyk.jpg": picture.convert("CMYK"),
        "animation.gif": picture,
        "png_named.JPEG": picture,
    }
    for name, image in kinds.items():
        path = tmp_path / name
        image.save(path, format="PNG" if name.startswith("png_") else None)
        pixels = data.decode_image({"bytes": None, "path": str(path)})
        assert (pixels.shape, pixels.dtype) == ((8, 6, 3), np.uint8), name
        expected = [60] * 3 if name.startswith("gray") else [200, 0, 0]
        assert np.abs(pixels[4, 3].astype(int) - expected).max() <= 6, name
    cv2.imwrite(str(tmp_path / "deep.png"), np.full((8, 6), 40_000, np.uint16))
    assert data.decode_image({"bytes": None, "path": str(tmp_path / "deep.png")})[0, 0].tolist() == [156] * 3


def test_a_photograph_is_turned_upright(tmp_path):
    picture = PILImage.fromarray(np.zeros((8, 6, 3), np.uint8))
    exif = picture.getexif()
    exif[0x0112] = 6
    picture.save(tmp_path / "turned.jpg", exif=exif)
    assert data.decode_image({"bytes": None, "path": str(tmp_path / "turned.jpg")}).shape == (6, 8, 3)


# --- order


@pytest.mark.parametrize("num_processes", [1, 2, 4])
def test_a_global_batch_is_a_slice_of_the_permutation_whatever_the_processes(num_processes):
    config = settings("digits", batch_size=16, device_batch_size=4)
    order = data.epoch_order(100, config.seed, epoch=2)
    assert sorted(order) == list(range(100))
    shares = []
    for process in range(num_processes):
        batches = data.DeviceBatches(100, config, num_processes, process)
        batches.epoch = 2
        shares.append(list(batches))
        assert len(shares[-1]) == len(batches) == 6 * 4 // num_processes
    micro_steps = 4 // num_processes
    for k in range(6):
        sub_batches = [shares[p][k * micro_steps + j] for j in range(micro_steps) for p in range(num_processes)]
        assert [sample for batch in sub_batches for _, sample in batch] == order[k * 16 : (k + 1) * 16].tolist()
        assert {epoch for batch in sub_batches for epoch, _ in batch} == {2}


def test_orders_differ_between_epochs_and_seeds():
    orders = [tuple(data.epoch_order(50, seed, epoch)) for seed in (0, 1) for epoch in (0, 1)]
    assert len(set(orders)) == 4


# --- views


def batches_of(config, num_workers, process=0, num_processes=1):
    images = data.load_images(config).train
    batches = data.DeviceBatches(len(images), config, num_processes, process)
    batches.epoch = 1
    loader = data.create_loader(
        data.TwoViews(images, config), batches, dataclasses.replace(config, num_workers=num_workers)
    )
    found = {}
    for batch in loader:
        crops = batch.crops.view(2, -1, *batch.crops.shape[1:])
        for i, sample in enumerate(batch.samples.tolist()):
            parameters = [part.view(2, len(batch.samples), -1)[:, i] for part in batch.photometry]
            found[sample] = [crops[:, i], *parameters]
    return found


def test_views_are_the_same_for_any_number_of_workers_and_processes():
    config = settings("digits", batch_size=256, device_batch_size=128)
    reference = batches_of(config, num_workers=0)
    assert len(reference) == 1280
    others = [batches_of(config, num_workers=2)]
    others.append({k: v for p in range(2) for k, v in batches_of(config, 0, process=p, num_processes=2).items()})
    for other in others:
        assert other.keys() == reference.keys()
        assert all(torch.equal(a, b) for k in reference for a, b in zip(reference[k], other[k], strict=True))
    reseeded = batches_of(dataclasses.replace(config, seed=5), num_workers=0)
    shared = reference.keys() & reseeded.keys()
    assert not any(torch.equal(reference[k][0], reseeded[k][0]) for k in shared)


def test_the_loader_leaves_the_global_random_state_alone():
    config = settings("digits", batch_size=256)
    before = torch.get_rng_state()
    batches_of(config, num_workers=1)
    assert torch.equal(before, torch.get_rng_state())
