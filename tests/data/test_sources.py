import io
import os
import tarfile

import cv2
import numpy as np
import pyarrow
import pytest
from datasets import ClassLabel, Dataset, Features, Image, Value, concatenate_datasets
from helpers import pixel, settings, write_image, write_parquet, write_tar
from loopback_hub import loopback_hub
from pyarrow import parquet

from m2t_accel.config.fields import ConfigurationError
from m2t_accel.config.recipes import build_config
from m2t_accel.data import folders, sources, splits
from m2t_accel.data.decode import DecodeError, decode_image
from m2t_accel.data.tars import TarShards
from m2t_accel.data.views import read_rows


def test_digits():
    images = sources.load_images(build_config({"recipe": "digits"}))
    assert (len(images.train), len(images.validation), len(images.class_names)) == (1437, 360, 10)
    assert decode_image(images.train[0]["image"]).shape == (8, 8, 3)


def test_class_folders_with_train_and_val(image_net):
    images = sources.load_images(settings(image_net))
    assert images.class_names == ["n01", "n02"]
    assert images.train["label"] == [0] * 6 + [1] * 6
    assert images.validation["label"] == [0] * 3 + [1] * 3
    assert [os.path.basename(row["path"]) for row in images.train["image"]][:2] == ["n01_0.JPEG", "n01_1.JPEG"]


def test_a_folder_with_only_a_val_folder_in_it_is_that_folder(image_net):
    for path in sorted((image_net / "train").rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    (image_net / "train").rmdir()
    assert sources.load_images(settings(image_net, batch_size=2)).class_names == ["n01", "n02"]


@pytest.mark.parametrize("streaming", [True, False])
def test_parquet_as_people_have_it(tmp_path, streaming):
    """A file without rows, a column of paths, labels that are none: what can be used is, and the rest is told."""
    for i in range(6):
        write_image(tmp_path / f"{i}.png", value=40 * i)
    paths = [str(tmp_path / f"{i}.png") for i in range(6)]
    (tmp_path / "shards").mkdir()
    for name, rows in (("a", slice(0, 0)), ("b", slice(0, 6))):
        table = pyarrow.table({"image": paths[rows], "label": pyarrow.array([0, 1, None, 1, 0, 1][rows], "int64")})
        parquet.write_table(table, tmp_path / "shards" / f"{name}.parquet")
    images = sources.load_images(settings(tmp_path / "shards", streaming=streaming))
    assert (len(images.train), images.validation) == (6, None)
    assert "no labels, because the column label has not one for all images" in images.note
    assert images.lacks.endswith(f"found: {images.note}")
    rows = (
        images.train.open(images.train.piece_sizes.argmax())(0, 6)[1]
        if streaming
        else read_rows(images.train, range(6))
    )
    assert [decode_image(row)[0, 0, 0] for row in rows] == [40 * i for i in range(6)]


def test_labels_that_do_not_fit_from_shard_to_shard_are_one_line(tmp_path, capfd):
    for i, label in enumerate((1, "one")):
        table = pyarrow.table({"image": [b"image"], "label": [label]})
        parquet.write_table(table, tmp_path / f"{i}.parquet")
    with pytest.raises(ConfigurationError, match="cannot be loaded"):
        sources.load_images(settings(tmp_path))
    assert "Failed to read" not in "".join(capfd.readouterr())


def test_tars_as_people_have_them(tmp_path):
    """One of macOS, which has a file beside each, with two images of each sample, and a label that is missing."""
    png = (cv2.imencode(".png", np.zeros((8, 8, 3), np.uint8))[1]).tobytes()
    with tarfile.open(tmp_path / "train.tar", "w") as tar:
        for i in range(3):
            files = {f"./._{i}.png": b"", f"./{i}.png": png, f"./{i}.mask.png": png}
            for name, content in (files | ({f"./{i}.cls": b"1"} if i else {})).items():
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    images = sources.load_images(settings(tmp_path))
    assert len(images.train) == 3
    assert [row["size"] for row in images.train] == [len(png)] * 3
    assert "not used: 3 more images of the same samples" in images.note
    assert "no labels, because 1 of 3 images have no .cls" in images.note


@pytest.mark.parametrize("streaming", [False, True])
def test_a_tar_of_pictures_with_maps_before_them(tmp_path, streaming):
    """The picture is the image whose name has the fewest dots, wherever its bytes lie."""
    contents = {"a.depth.png": 9, "b.png": 1, "a.png": 0, "a.mask.png": 9, "c.depth.png": 9, "c.png": 2}
    with tarfile.open(tmp_path / "train.tar", "w") as tar:
        for name, value in contents.items():
            add_image(tar, name, value)
    images = sources.load_images(settings(tmp_path, streaming=streaming))
    assert values(images.train) == [1, 0, 2]
    assert "not used: 3 more images of the same samples (of 0.depth.png and 0.jpg it is 0.jpg)" in images.note


def add_image(tar, name, value):
    content = cv2.imencode(".png", np.full((8, 8, 3), value, np.uint8))[1].tobytes()
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def add_link(tar, name, to, kind):
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, to
    tar.addfile(member)


def values(images):
    """The first pixel of each image, or why there is none."""
    number = len(images)
    rows = images.open(0)(0, number)[1] if isinstance(images, TarShards) else read_rows(images, range(number))
    found = []
    for row in rows:
        try:
            found.append(int(decode_image(row)[0, 0, 0]))
        except DecodeError as error:
            found.append(str(error))
    return found


@pytest.mark.parametrize("streaming", [False, True])
def test_links_in_a_tar_lead_to_what_they_are_of(tmp_path, streaming):
    """And one that leads nowhere is an image that cannot be decoded, which a run counts and tells."""
    hard, soft = tarfile.LNKTYPE, tarfile.SYMTYPE
    with tarfile.open(tmp_path / "train.tar", "w") as tar:
        add_image(tar, "./b/1.png", 1)
        add_image(tar, "b/2.png", 2)
        for i, to in enumerate(["b/1.png", "./b/2.png", "gone.png"]):
            add_link(tar, f"c/{i}.png", to, hard)
        add_link(tar, "b/1.png", "./b/1.png", hard)  # as tar has a file that it is given twice
        for i, to in enumerate(["../b/1.png", "../d/0.png", "/b/1.png", "3.png", "../../b/1.png", "9.png"]):
            add_link(tar, f"d/{i}.png", to, soft)
        add_link(tar, "d/6.png", "d/5.png", hard)  # to a link
        add_link(tar, "d/6.png", "d/6.png", hard)
        add_image(tar, "d/9.png", 9)  # after the link to it
        add_link(tar, "d/7.png", "../b/1.png", soft)
        add_image(tar, "d/7.png", 7)
    images = sources.load_images(settings(tmp_path, streaming=streaming))
    empty = "the file is empty"
    assert values(images.train) == [1, 1, 1, 1, 2, 2, empty, empty, empty, empty, 9, 9, 9, 7]


@pytest.mark.parametrize("streaming", [False, True])
def test_of_a_name_that_comes_twice_in_a_tar_it_is_the_last(tmp_path, streaming):
    """As `tar -r` appends what has changed, and tar unpacks it."""
    with tarfile.open(tmp_path / "train.tar", "w") as tar:
        for name, value in (("0.png", 0), ("1.png", 1), ("2.png", 2), ("0.png", 7)):
            add_image(tar, name, value)
        add_link(tar, "3.png", "1.png", tarfile.LNKTYPE)
        add_link(tar, "2.png", "0.png", tarfile.SYMTYPE)
        add_image(tar, "1.png", 8)  # not what the hard link was of
        for number, label in ((0, 0), (1, 0), (2, 0), (3, 0), (0, 1)):
            member = tarfile.TarInfo(f"./{number}.cls")
            member.size = 1
            tar.addfile(member, io.BytesIO(str(label).encode()))
    images = sources.load_images(settings(tmp_path, streaming=streaming, validation_fraction=0))
    assert values(images.train) == [1, 7, 7, 8]
    assert images.bank["label"][:] == [0, 1, 0, 0]
    assert "more images" not in images.note


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("other", ["train-1.parquet", "val-0.parquet"])
def test_class_labels_with_other_numbers_are_not_taken_for_the_same(tmp_path, other, streaming):
    """As when a part without a class is numbered by itself; `datasets` would take the first file's for all."""
    write_parquet(tmp_path / "train-0.parquet", 0, 8, row_group_size=4)
    for names, number, there, here in (
        (["odd", "even"], 0, "even", "odd"),
        (["even", "odd", "prime"], 2, "missing", "prime"),
        (["even"], 1, "odd", "missing"),
    ):
        write_parquet(tmp_path / other, 8, 1, row_group_size=4, names=names)
        told = (
            rf"the class {number} of the column label is {there} in .*train-0\.parquet and {here} in .*{other}: number"
        )
        with pytest.raises(ConfigurationError, match=told):
            sources.load_images(settings(tmp_path, streaming=streaming))
    write_parquet(tmp_path / other, 8, 1, row_group_size=4)
    assert sources.load_images(settings(tmp_path, streaming=streaming)).class_names == ["even", "odd"]


@pytest.mark.parametrize("streaming", [False, True])
def test_classes_of_what_is_not_used_do_not_matter(tmp_path, streaming):
    write_parquet(tmp_path / "train-0.parquet", 0, 8, row_group_size=4)
    write_parquet(tmp_path / "val-0.parquet", 8, 4, row_group_size=4)
    write_parquet(tmp_path / "test-0.parquet", 0, 4, row_group_size=4, names=["odd", "even"])
    images = sources.load_images(settings(tmp_path, streaming=streaming))
    assert (images.class_names, len(images.train), len(images.validation)) == (["even", "odd"], 8, 4)
    write_parquet(tmp_path / "val-0.parquet", 8, 0, row_group_size=4, names=["neither"])
    (tmp_path / "test-0.parquet").unlink()
    assert sources.load_images(settings(tmp_path, streaming=streaming)).class_names == ["even", "odd"]
    for i, names in enumerate((["web", "disk"], ["disk", "web"])):
        features = Features({"image": Image(), "label": ClassLabel(2), "from": ClassLabel(names=names)})
        rows = {"image": encoded(4), "label": [0, 1, 0, 1], "from": [0, 1, 0, 1]}
        Dataset.from_dict(rows, features=features).to_parquet(tmp_path / f"train-{i}.parquet")
    assert sources.load_images(settings(tmp_path, streaming=streaming)).class_names == ["0", "1"]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("words", [b"{not json", b"3", b'{"info": {"features": {"image": 3}}}'])
def test_damaged_words_in_a_schema_are_one_line(tmp_path, streaming, words):
    write_parquet(tmp_path / "a.parquet", 0, 8, row_group_size=4)
    table = parquet.read_table(tmp_path / "a.parquet").replace_schema_metadata({"huggingface": words})
    parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(ConfigurationError):
        sources.load_images(settings(tmp_path, streaming=streaming))


def test_what_lies_beside_the_splits_is_told(tmp_path, image_net):
    for name in ("unlabeled/1.png", "unlabeled/2.png", "test/n01/1.png", "logo.png"):
        write_image(image_net / name)
    images = sources.load_images(settings(image_net))
    assert (len(images.train), len(images.validation)) == (12, 6)
    assert images.note.endswith("; not used: 4 images beside train/, in no folder, test/, unlabeled/")
    for name in ("train/1.png", "train/2.png", "bus/1.png", "car/1.png"):
        write_image(tmp_path / "vehicles" / name)
    note = sources.load_images(settings(tmp_path / "vehicles")).note
    assert note.endswith("not used: 2 images beside train/, in bus/, car/ (if train is a class, rename its folder)")


@pytest.mark.parametrize(
    ("path", "split"),
    [
        ("train-00000-of-00002.parquet", "train"),
        ("data/validation_0.parquet", "validation"),
        ("val/0000.tar", "val"),
        ("train-test-split/train-0.parquet", "train"),
        ("train-test-split/test-0.parquet", "test"),
        ("train-test-split/0.parquet", "train"),
        ("test/train/0.parquet", "train"),
        ("a.parquet", "train"),
        ("contest/latest.parquet", "train"),
    ],
)
def test_the_split_is_what_the_innermost_name_says(path, split):
    assert splits.split_of(path) == split


def test_splits_that_lie_deeper_are_told(tmp_path):
    """Kaggle's layout of ImageNet, of which somebody gives the top."""
    for name in ("train/n01/1.JPEG", "train/n02/1.JPEG", "val/1.JPEG"):
        write_image(tmp_path / "ILSVRC" / "Data" / "CLS-LOC" / name)
    note = sources.load_images(settings(tmp_path)).note
    assert "3 images; no labels, because" in note
    assert note.endswith(f"all splits together: --dataset {tmp_path}/ILSVRC/Data/CLS-LOC would keep them apart")
    assert "together" not in sources.load_images(settings(tmp_path / "ILSVRC" / "Data" / "CLS-LOC")).note


def test_one_folder_is_no_class(tmp_path):
    write_image(tmp_path / "cats" / "1.png")
    assert sources.load_images(settings(tmp_path)).note.endswith("no labels, because all are in one folder, cats")


def test_images_at_any_depth_have_no_labels(tmp_path):
    for name in ("a.jpg", "deep/b.png", "deep/deeper/c.WEBP", "deep/deeper/d.bmp", "e.tiff"):
        write_image(tmp_path / name)
    images = sources.load_images(settings(tmp_path))
    assert (len(images.train), images.validation, images.class_names) == (5, None, None)
    assert list(images.train.features) == ["image"]


def test_imagenet_as_it_is_downloaded_has_a_flat_test_folder(image_net):
    write_image(image_net / "test" / "ILSVRC_test_0.JPEG")
    images = sources.load_images(settings(image_net))
    assert len(images.validation) == 6


def test_a_flat_val_folder_is_not_used_and_the_note_says_so(image_net):
    for path in sorted((image_net / "val").rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    write_image(image_net / "val" / "ILSVRC_val_0.JPEG")
    images = sources.load_images(settings(image_net))
    assert "val/ has no class folders, and is not used" in images.note
    assert "held out of the training images" in images.note


def test_split_folders_in_other_spellings(image_net):
    (image_net / "train").rename(image_net / "Training")
    (image_net / "val").rename(image_net / "Test")
    images = sources.load_images(settings(image_net))
    assert (len(images.train), len(images.validation)) == (12, 6)


def test_a_stray_image_takes_the_labels_and_the_note_says_so(image_net):
    write_image(image_net / "train" / "logo.png")
    images = sources.load_images(settings(image_net))
    assert images.class_names is None
    assert "no labels, because logo.png is not directly in a class folder" in images.note


def test_links_and_folders_that_only_look_like_images(image_net):
    (image_net / "train" / "n01" / "loop").symlink_to(image_net / "train", target_is_directory=True)
    (image_net / "train" / "n01" / "folder.png").mkdir()
    (image_net / "train" / "metadata.parquet").write_bytes(b"not read, because there are images")
    assert len(sources.load_images(settings(image_net)).train) == 12


def test_a_link_that_leads_nowhere_is_an_image_that_cannot_be_read(image_net):
    (image_net / "train" / "n01" / "a.jpg").symlink_to(image_net / "nowhere.jpg")
    images = sources.load_images(settings(image_net)).train
    assert len(images) == 13
    with pytest.raises(DecodeError, match="No such file or directory"):
        decode_image(images[0]["image"])


def test_a_file_name_that_is_not_utf_8(tmp_path):
    write_image(tmp_path / "a.jpg")
    os.rename(tmp_path / "a.jpg", os.fsencode(tmp_path) + b"/caf\xe9.jpg")
    with pytest.raises(ConfigurationError, match=r"the file name caf.*\.jpg is not UTF-8; rename it"):
        sources.load_images(settings(tmp_path))


def test_a_folder_that_cannot_be_read(image_net, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(ConfigurationError, match=r"--dataset .* cannot be read \(Permission denied\)"):
        sources.load_images(settings(image_net))


@pytest.mark.parametrize("joint", ["-", "_", "."])
def test_parquet_splits_by_the_words_of_their_names(tmp_path, joint, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "set").mkdir()
    features = Features({"image": Image(), "label": ClassLabel(names=["a", "b"])})
    for name, number in (("train", 8), ("validation", 4)):
        rows = {"image": encoded(number), "label": [i % 2 for i in range(number)]}
        Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "set" / f"{name}{joint}00.parquet")
    images = sources.load_images(settings(tmp_path / "set"))
    assert (len(images.train), len(images.validation)) == (8, 4)


def test_a_class_that_only_validation_has_is_an_error(image_net):
    write_image(image_net / "val" / "n99" / "x.jpg")
    with pytest.raises(ConfigurationError, match="n99, which the training split has not"):
        sources.load_images(settings(image_net))


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
    images = sources.load_images(settings(tmp_path / "set"))
    assert len(images.train) == 8
    assert images.class_names == class_names
    assert (images.validation is None) == (label is None)
    assert decode_image(images.train[5]["image"])[0, 0].tolist() == [5, 5, 5]


def test_errors_of_folders(tmp_path):
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(
        ConfigurationError, match=r"holds no image: looked at any depth for \*\.parquet, \*\.tar and .*\.jpg"
    ):
        sources.load_images(settings(tmp_path))
    with pytest.raises(ConfigurationError, match="is a file: unpack it if it is an archive, and give the folder"):
        sources.load_images(settings(tmp_path / "notes.txt"))
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 but not really")
    with pytest.raises(ConfigurationError, match=r"the shard .*broken\.parquet cannot be read .*fetch it again"):
        sources.load_images(settings(tmp_path))
    with pytest.raises(ConfigurationError, match="is a file: give the folder that it is in"):
        sources.load_images(settings(tmp_path / "broken.parquet"))


def test_a_data_set_is_the_same_however_its_folder_is_spelled(image_net, monkeypatch):
    monkeypatch.chdir(image_net)
    spellings = (image_net, f"{image_net}/", f"{image_net}//", f"{image_net.parent}/./{image_net.name}", ".", "./")
    assert len({sources.load_images(settings(spelling)).fingerprint for spelling in spellings}) == 1


def test_what_is_not_used_is_told(tmp_path):
    for name in ("a/1.jpg", "b/2.JFIF", "@eaDir/1.jpg/SYNOPHOTO_THUMB_M.jpg", "__MACOSX/a/1.jpg", "a/._1.jpg"):
        write_image(tmp_path / "images" / f"{name}.png")
        (tmp_path / "images" / f"{name}.png").rename(tmp_path / "images" / name)
    for name in ("a/3.heic", "a/4.HEIC", "b/tars.tar.gz", "LICENCE"):
        (tmp_path / "images" / name).write_bytes(b"")
    images = sources.load_images(settings(tmp_path / "images"))
    assert images.note.endswith("; not used: 1 without extension, 1 *.gz, 2 *.heic")
    assert len(images.train) + len(images.validation) == 2
    for path in (tmp_path / "images").glob("?/?.*[gF]"):
        path.unlink()
    with pytest.raises(ConfigurationError, match=r"holds no image: .*; found 1 without .* 2 \*\.heic \(unpack"):
        sources.load_images(settings(tmp_path / "images"))


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
        "import sys\nfrom m2t_accel import command_line, decode, recipes, sources\n"
        "with command_line.errors_in_one_line():\n"
        "    config = recipes.build_config({'recipe': 'digits', 'dataset': sys.argv[1], 'batch_size': 4})\n"
        "    images = sources.load_images(config)\n"
        "    print(images.note, [decode.decode_image(row)[0, 0, 0] for row in images.train['image']])"
    )
    with loopback_hub(tmp_path / "hub") as hub:
        environment = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
        environment |= {"HF_HUB_DISABLE_XET": "1"}
        found = run_script("-c", load, "someone/pictures", environment=environment)
        assert found.returncode == 0, found.stderr
        assert "someone/pictures: 8 images of 2 classes; evaluation on 4 others" in found.stdout
        stream = (
            "from m2t_accel import decode, recipes, sources\n"
            "config = recipes.build_config({'recipe': 'digits', 'dataset': 'someone/pictures', 'batch_size': 4, "
            "'streaming': True})\n"
            "images = sources.load_images(config)\n"
            "samples, rows = images.train.open(0)(2, 8)\n"
            "print(images.note, samples, [int(decode.decode_image(row)[0, 0, 0]) for row in rows], "
            "images.train.files[0])"
        )
        hub.requests.clear()
        found = run_script("-c", stream, environment=environment | {"XDG_CACHE_HOME": str(tmp_path / "new")})
        assert found.returncode == 0, found.stderr
        assert "someone/pictures: 8 images of 2 classes; evaluation on 4 others" in found.stdout
        assert "hf://datasets/someone/pictures@0123456789abcdef" in found.stdout
        assert "[2 3 4 5 6 7]" in found.stdout
        assert "[2, 3, 4, 5, 6, 7]" in found.stdout
        for name, reason in (("gated-pictures", "hf auth login"), ("no-pictures", "Repository Not Found")):
            refused = run_script("-c", load, f"someone/{name}", environment=environment)
            line = refused.stderr.splitlines()[-1]
            assert refused.returncode == 2, refused.stderr
            assert f"error: --dataset someone/{name} cannot be loaded" in line
            assert reason in line


def test_no_hub(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigurationError, match=r"--dataset nobody/nothing-at-all cannot be loaded") as caught:
        sources.load_images(settings("nobody/nothing-at-all"))
    assert "\n" not in str(caught.value)


# --- streamed, and tars


@pytest.mark.parametrize("streaming", [False, True])
def test_tars(tmp_path, streaming):
    for name, first, number in (("train-000", 0, 70), ("train-001", 70, 20), ("val-000", 100, 6)):
        write_tar(tmp_path / f"{name}.tar", first, number)
    images = sources.load_images(settings(tmp_path, streaming=streaming))
    assert (len(images.train), len(images.bank), len(images.validation)) == (90, 90, 6)
    assert images.class_names == ["0", "1"]
    assert images.bank["label"][:3] == [0, 1, 0]
    assert [pixel(images.bank, sample) for sample in (0, 69, 70, 89)] == [0, 69, 70, 89]
    if streaming:
        assert images.train.piece_sizes.tolist() == [64, 6, 20]
        samples, rows = images.train.open(2)(3, 5)
        assert samples.tolist() == [73, 74]
        assert [decode_image(row)[0, 0, 0] for row in rows] == [73, 74]
        assert "pieces (row groups, runs of a tar)" not in images.note
        few = sources.load_images(settings(tmp_path, streaming=True, batch_size=64, device_batch_size=16)).note
        assert "3 pieces (row groups, runs of a tar) for 4 virtual devices" in few


@pytest.mark.parametrize("kind", ["folders", "tars", "streamed tars"])
def test_more_paths_than_a_chunk_holds(tmp_path, monkeypatch, kind):
    """Of 20 million the letters take more than the 2 GB that Arrow counts in one."""
    if kind == "folders":
        for i in range(30):
            write_image(tmp_path / "ab"[i % 2] / f"{i:02}.png", value=i)
    else:
        for first, number in ((0, 13), (13, 11), (24, 6)):
            write_tar(tmp_path / f"train-{first:02}.tar", first, number)
    config = settings(tmp_path, streaming=kind == "streamed tars", validation_fraction=0.2)
    whole = sources.load_images(config)
    monkeypatch.setattr(folders, "CHUNK", 4)
    cut = sources.load_images(config)
    assert cut.bank.data.column("image").num_chunks > 5
    assert (len(whole.train), len(whole.validation)) == (len(cut.train), len(cut.validation)) == (24, 6)
    assert (cut.fingerprint, cut.note) == (whole.fingerprint, whole.note)
    for one, other in ((whole.bank, cut.bank), (whole.validation, cut.validation)):
        assert [pixel(one, i) for i in range(len(one))] == [pixel(other, i) for i in range(len(one))]
        assert one["label"][:] == other["label"][:]
    if kind == "streamed tars":
        assert whole.train.piece_sizes.tolist() == cut.train.piece_sizes.tolist()
        for piece, size in enumerate(cut.train.piece_sizes):
            assert whole.train.open(piece)(0, size)[1] == cut.train.open(piece)(0, size)[1]


def test_tars_without_labels(tmp_path):
    write_tar(tmp_path / "a.tar", 0, 9, labels=False)
    images = sources.load_images(settings(tmp_path))
    assert (len(images.train), images.bank, images.class_names) == (9, None, None)


def test_streamed_parquet(tmp_path):
    for name, first, number in (("train-0", 0, 30), ("train-1", 30, 25), ("test-0", 100, 6)):
        write_parquet(tmp_path / f"{name}.parquet", first, number, row_group_size=10)
    images = sources.load_images(settings(tmp_path, streaming=True))
    assert images.train.piece_sizes.tolist() == [10, 10, 10, 10, 10, 5]
    assert (len(images.train), len(images.bank), len(images.validation)) == (55, 55, 6)
    assert images.class_names == ["even", "odd"]
    samples, rows = images.train.open(4)(8, 10)
    assert samples.tolist() == [48, 49]
    assert [decode_image(row)[0, 0, 0] for row in rows] == [48, 49]
    assert rows[0]["path"] == f"row 8 of row group 1 of {tmp_path}/train-1.parquet"


LABELS = {  # of training, of validation, how the latter is answered
    "the same words": (["a", "b"], ["b", "a"], 4),
    "fewer words": (["a", "b"], ["b", "b"], 4),
    "a word that training has not": (["a", "b"], ["a", "c"], "the label c of the validation split is not among"),
    "other words only": (["a", "b"], ["c", "c"], "the label c of the validation split is not among"),
    "numbers": ([0, 1], [1, 1], 4),
    "a number that training has not": ([0, 1], [1, 2], "the label 2 of the validation split is not among"),
    "withheld": ([0, 1], [-1, -1], 8),
    "some missing": (["a", "b"], ["a", None], 8),
}


@pytest.mark.parametrize("case", LABELS)
def test_streamed_labels_of_validation_and_training(tmp_path, case):
    """They fit, are told in one line, or are none, and training images are held out: 8 of 40."""
    train, validation, answer = LABELS[case]
    for name, number, labels in (("train", 40, train), ("val", 4, validation)):
        table = pyarrow.table({"image": encoded(number), "label": labels * (number // 2)})
        parquet.write_table(table, tmp_path / f"{name}.parquet", row_group_size=4)
    config = settings(tmp_path, streaming=True, validation_fraction=0.2)
    if isinstance(answer, str):
        with pytest.raises(ConfigurationError, match=answer):
            sources.load_images(config)
        return
    images = sources.load_images(config)
    assert (len(images.validation), len(images.train) + len(images.validation)) == (answer, 44 if answer == 4 else 40)
    if answer == 4:
        assert images.validation["label"][:] == [images.class_names.index(str(label)) for label in validation * 2]


def test_streamed_class_labels_and_a_validation_of_plain_numbers(tmp_path):
    write_parquet(tmp_path / "train.parquet", 0, 8, row_group_size=4)
    parquet.write_table(pyarrow.table({"image": encoded(4), "label": [1, 0, 1, 1]}), tmp_path / "val.parquet")
    images = sources.load_images(settings(tmp_path, streaming=True))
    assert images.class_names == ["even", "odd"]
    assert images.validation["label"][:] == [1, 0, 1, 1]


def test_streamed_splits_of_which_one_lacks_the_images(tmp_path):
    write_parquet(tmp_path / "train.parquet", 0, 8, row_group_size=4)
    parquet.write_table(pyarrow.table({"img": encoded(4), "label": [1, 0, 1, 1]}), tmp_path / "val.parquet")
    with pytest.raises(ConfigurationError, match=r"the validation split has no column image, .* but img, label"):
        sources.load_images(settings(tmp_path, streaming=True))


def test_two_columns_of_one_name(tmp_path):
    table = pyarrow.Table.from_arrays([pyarrow.array([1]), pyarrow.array([2])], ["label", "label"])
    parquet.write_table(table, tmp_path / "train.parquet")
    with pytest.raises(ConfigurationError, match="has two columns of one name: label, label; rename one"):
        sources.load_images(settings(tmp_path, streaming=True))


def test_few_pieces_and_what_they_cost_are_told(tmp_path):
    write_parquet(tmp_path / "all.parquet", 0, 64, row_group_size=64)
    images = sources.load_images(settings(tmp_path, streaming=True, batch_size=16, device_batch_size=2))
    assert "1 piece (row groups, runs of a tar) for 8 virtual devices: each device reads a piece from" in images.note
    assert images.validation is None


def test_streaming_image_files_is_allowed_and_told(image_net):
    images = sources.load_images(settings(image_net, streaming=True))
    assert "--streaming changes nothing for images that can be read one by one" in images.note


def test_a_folder_of_two_kinds(image_net):
    write_tar(image_net / "more.tar", 0, 3)
    with pytest.raises(
        ConfigurationError, match=r"holds 1 like more\.tar and 18 like .*\.JPEG: give a folder with files"
    ):
        sources.load_images(settings(image_net))


@pytest.mark.parametrize("streaming", [False, True])
def test_cut_shards(tmp_path, streaming):
    write_parquet(tmp_path / "parquet-0.parquet", 0, 30, row_group_size=10)
    content = (tmp_path / "parquet-0.parquet").read_bytes()
    (tmp_path / "parquet-0.parquet").write_bytes(content[: len(content) // 2])
    with pytest.raises(ConfigurationError, match=r"cannot be (loaded|read)"):
        sources.load_images(settings(tmp_path, streaming=streaming))
    (tmp_path / "tars").mkdir()
    write_tar(tmp_path / "tars" / "a.tar", 0, 30)
    content = (tmp_path / "tars" / "a.tar").read_bytes()
    for cut in (len(content) // 2, len(content) // 2 + 100, len(content) // 2 - 300):
        (tmp_path / "tars" / "a.tar").write_bytes(content[:cut])
        with pytest.raises(ConfigurationError, match=r"a\.tar cannot be read as a tar"):
            sources.load_images(settings(tmp_path / "tars", streaming=streaming))


def test_a_streamed_column_of_no_images(tmp_path):
    write_parquet(tmp_path / "a.parquet", 0, 20, row_group_size=5)
    with pytest.raises(ConfigurationError, match="--image_column label: not a column of images but int64"):
        sources.load_images(settings(tmp_path, streaming=True, image_column="label", label_column="image"))


# --- a name for the images


def test_the_fingerprint_is_that_of_names_sizes_and_order_wherever_they_lie(tmp_path, image_net):
    before = sources.load_images(settings(image_net)).fingerprint
    moved = image_net.rename(tmp_path.with_name(f"{tmp_path.name}-elsewhere"))
    assert sources.load_images(settings(moved)).fingerprint == before
    (moved / "train" / "n01" / "n01_0.JPEG").rename(moved / "train" / "n01" / "n01_00.JPEG")
    assert sources.load_images(settings(moved)).fingerprint != before


def fingerprint_of(train):
    return sources.ImageData(train, None, None, None, "").fingerprint


def test_the_fingerprint_does_not_depend_on_chunks_but_on_rows():
    def rows(*images):
        features = Features({"image": Image(decode=False)})
        return Dataset.from_dict({"image": [{"bytes": b, "path": p} for b, p in images]}, features=features)

    a, b, c = (b"one", "a"), (b"four", "b"), (None, "c")
    whole = rows(a, b, c)
    assert fingerprint_of(concatenate_datasets([rows(a), rows(b, c)])) == fingerprint_of(whole)
    others = [rows(a, b), rows(b, a, c), rows(a, (b"five5", "b"), c), rows(a, b, (b"", "c"))]
    assert len({fingerprint_of(other) for other in [whole, *others]}) == 5
