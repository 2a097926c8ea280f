"""Every row of the table of layouts in docs/data.md, in miniature, and layouts that are refused."""

import os

import pytest
from helpers import documented, encoded, load, write_image, write_parquet, write_table, write_tar

from m2t_accel.config.fields import ConfigurationError

SOME = "train/a/1.png train/a/2.png train/b/3.png "
VALIDATION = "val/a/4.png val/b/5.png "

# Layout in the table (its name there), files, flags, images and classes trained on, images evaluated on, text of the
# first line. Shards hold four images each.
LAYOUTS = {
    "split and class folders": (SOME + VALIDATION, {}, 3, 2, 2, "2 classes in train/; evaluation on 2 others (val/,"),
    "only `val/`": (VALIDATION, {}, 1, 2, 1, "in val/; evaluation on 1 other (held out of the training images)"),
    "class folders": ("a/1.png a/2.png b/3.png b/4.png", {}, 3, 2, 1, "3 images of 2 classes; evaluation on 1"),
    "class folders in a wrapper": ("top/a/1.png top/a/2.png top/b/3.png top/b/4.png", {}, 3, 2, 1, "of 2 classes"),
    "images at any depth": ("1.png x/2.png x/y/3.png", {}, 3, 0, 0, "3 images; no labels, because all images are"),
    "class folders beside `val/`": ("a/1.png a/2.png b/3.png b/4.png val/a/5.png", {}, 4, 2, 1, "(val/, its own"),
    "glued names": (
        "train2017/a/1.png train2017/b/2.png train2017/b/3.png val2017/a/3.png",
        {},
        3,
        2,
        1,
        "in train2017/; evaluation on 1 other (val2017/",
    ),
    "ILSVRC's names": (
        "ILSVRC2012_img_train/a/1.png ILSVRC2012_img_train/b/2.png ILSVRC2012_img_train/b/3.png "
        "ILSVRC2012_img_val/a/3.png",
        {},
        3,
        2,
        1,
        "in ILSVRC2012_img_train/; evaluation on 1 other (ILSVRC2012_img_val/",
    ),
    "splits deeper": (
        "data/train/a/1.png data/train/b/2.png data/train/b/3.png data/val/a/3.png labels/train/1.txt",
        {},
        3,
        2,
        1,
        "in data/train/; evaluation on 1 other (data/val/",
    ),
    "splits inside `train/`": (
        "train/train/a/1.png train/train/b/2.png train/val/a/3.png train/val/b/4.png",
        {},
        2,
        2,
        2,
        "in train/train/; evaluation on 2 others (train/val/, its own",
    ),
    "splits in some class folders": (
        "a/train/1.png a/train/2.png a/test/3.png b/train/4.png b/test/5.png c/train/6.png",
        {},
        4,
        3,
        2,
        "of 3 classes in a/train/, b/train/, c/train/; evaluation on 2 others (a/test/, b/test/, its own",
    ),
    "splits in class folders": (
        "a/train/1.png a/train/2.png b/train/3.png a/val/4.png b/val/5.png",
        {},
        3,
        2,
        2,
        "in a/train/, b/train/; evaluation on 2 others (a/val/, b/val/",
    ),
    "a folder in each class folder": (
        "train/a/images/1.png train/a/images/2.png train/b/images/3.png val/images/4.png",
        {"validation_fraction": 0},
        3,
        2,
        0,
        "of 2 classes in train/; classes: a, b; not used: 1 image in val/, which has no class folders",
    ),
    "a list of images": (
        "train.csv test.csv photos/1.png photos/2.png",
        {},
        2,
        0,
        0,
        "2 images; not used: 2 *.csv",
    ),
    "parts of Google Drive": (
        "train-2024Z-001/train/a/1.png train-2024Z-002/train/a/2.png train-2024Z-002/train/b/3.png "
        "val-2024Z-001/val/a/4.png val-2024Z-001/val/b/5.png",
        {},
        3,
        2,
        2,
        "of 2 classes in train-2024Z-001/train/, train-2024Z-002/train/; evaluation on 2 others (val-2024Z-001/, "
        "its own validation split); classes: a, b",
    ),
    "words beside splits": (
        "train_mini/a/1.png train_mini/b/2.png train_mini/b/3.png public_test/4.png public_test/5.png",
        {"validation_fraction": 0},
        3,
        2,
        0,
        "of 2 classes in train_mini/; classes: a, b; not used: 2 images in public_test/, which has no class folders",
    ),
    "several training folders": (
        "train.X1/a/1.png train.X2/b/2.png train.X2/a/3.png val.X/a/4.png",
        {},
        3,
        2,
        1,
        "in train.X1/, train.X2/; evaluation on 1 other (val.X/",
    ),
    "folders beside `train/`": (SOME + "extra/1.png", {}, 2, 2, 1, "not used: 1 image in extra/"),
    "a split by flag": (
        SOME + "extra/1.png extra/2.png",
        {"train_split": "extra"},
        2,
        0,
        0,
        "2 images in extra/; no labels, because there are no class folders; not used: 3 images in train/",
    ),
    "parquet": (
        "train-00000-of-00001.parquet validation-00000-of-00001.parquet",
        {},
        4,
        2,
        4,
        "in train-00000-of-00001.parquet; evaluation on 4 others (validation-00000-of-00001.parquet",
    ),
    "`dev` beside `train`": (
        "train-0.parquet train-1.parquet dev-0.parquet",
        {},
        8,
        2,
        4,
        "in train-0.parquet … train-1.parquet (2 files); evaluation on 4 others (dev-0.parquet",
    ),
    "`eval` and `test`": (
        "train.tar eval.tar test.tar",
        {},
        4,
        2,
        4,
        "(eval.tar, its own validation split); not used: test.tar",
    ),
    "shards beside `train`": ("train.tar extra.tar", {"validation_fraction": 0}, 4, 2, 0, "not used: extra.tar"),
    "shards without names": ("0.tar 1.tar 2.tar", {}, 11, 2, 1, "in 0.tar … 2.tar (3 files)"),
    "img2dataset's tars": (
        "00000.tar 00000.parquet 00000_stats.json 00002.tar 00002.parquet 00002_stats.json",
        {},
        7,
        2,
        1,
        "in 00000.tar … 00002.tar (2 files); evaluation on 1 other (held out of the training images); "
        "not used: 2 *.json, 2 *.parquet",
    ),
    "img2dataset's files": (
        "00000/000000000.png 00000/000000001.png 00002/000020000.png 00000.parquet 00002.parquet 00000_stats.json",
        {},
        3,
        0,
        0,
        "no labels, because the folders are shards of img2dataset",
    ),
    "a stray file": (
        "train-0.parquet train-1.parquet logo.png",
        {"validation_fraction": 0},
        8,
        2,
        0,
        "not used: 1 *.png",
    ),
}


def make(folder, files):
    """Make empty files, images (by a seed that is the number of the file), and shards of four images."""
    for number, name in enumerate(files.split()):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".png"):
            write_image(path, value=number)
        elif name.endswith(".parquet"):
            write_parquet(path, 4 * number, 4, row_group_size=1)
        elif name.endswith(".tar"):
            write_tar(path, 4 * number, 4)
        elif name.endswith("/"):
            path.mkdir()
        else:
            path.write_bytes(b"x")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(tmp_path, layout):
    files, flags, train, classes, validation, text = LAYOUTS[layout]
    make(tmp_path, files)
    for streaming in (False, True) if "parquet" in files or "tar" in files else (False,):
        images = load(tmp_path, streaming=streaming, batch_size=2, **flags)
        found = len(images.train), len(images.class_names or []), len(images.validation or [])
        assert found == (train, classes, validation)
        assert text in images.note


def test_every_row_of_the_documentation_is_tested():
    assert sorted(documented("layout of a folder") + documented("other layout")) == sorted(LAYOUTS)


# Files, and what the error says.
REFUSED = {
    "train/a/1.png train/b/2.png val/a/3.png val/c/4.png": "val/ has the class folder c, .*or type --evaluate_every 0",
    "1.mp4 2.mp4 3.csv": r"found 2 \*\.mp4, 1 \*\.csv: extract their frames",
    "train.csv test.csv": r"found 2 \*\.csv: give the folder of the images",
    "train/ val/a/1.png val/b/2.png": "train is called train but is empty: fill it, remove it, or .*--train_split",
    "train/a/1.heic train/b/2.heic val/a/1.png": r"holds no image that can be read, but 2 files like \*\.heic: convert",
    "train.zip val/a/1.png val/b/2.png": r"train.zip is called train but is not read: unpack it with `python -m "
    r"zipfile -e \S*/train.zip \S*/train`, remove it, or",
    "train.tar.gz val/a/1.png": r"unpack it with `mkdir -p (\S*/train) && tar -xf \1.tar.gz -C \1`, remove it, or",
    "train.7z val/a/1.png": "is not read: unpack it, remove it, or",
    "train.tar.aa train.tar.ab val/a/1.png": r"train\.tar\.aa is called train but is not read: unpack it, remove",
    "train.zip.part val/a/1.png": r"train\.zip\.part is called train but is not read: unpack it, remove",
    "state.json dataset_info.json data.arrow": "found 2 .*json, 1 .*arrow: write them as parquet",
    "data/train/ data/val/1.png": "data/train is called train but is empty",
    "train.csv val/a/1.png val/b/2.png": "train.csv is called train but may only list images: put them into a folder",
    "train_list.txt test/a/1.png test/b/2.png": "train_list.txt is called train but may only list images",
    "train/metadata.jsonl val/a/1.png": r"train .*holds no image that can be read, but 1 file like \*\.jsonl: put the",
    "train.tsv val-0.parquet": "train.tsv is called train but may only list images",
    "instances_train2017.json val2017/1.png": "instances_train2017.json is called train but may only list images",
    "train/ val-0.parquet": "train is called train but is empty",
    "val/a/1.png test/a/1.png": "has the splits test, validation, and none is called train",
    "val.tar test.tar": "has the splits test, validation, and none is called train",
    "a.tar b.parquet": r"holds 1 like a\.tar and 1 like b\.parquet: give a folder",
}


@pytest.mark.parametrize("files", REFUSED)
def test_refused_layouts(tmp_path, files):
    make(tmp_path, files)
    with pytest.raises(ConfigurationError, match=f"--dataset .*{REFUSED[files]}"):
        load(tmp_path)


# Files, a flag, and what the error says.
REFUSED_FLAGS = [
    ("val/a/1.png val/b/2.png", {"validation_split": "val"}, "has no other split to train on"),
    ("val-0.parquet", {"validation_split": "validation"}, "has no other split to train on"),
    ("a/1.png b/2.png", {"train_split": "train"}, "it has no folder or file that is called like a split"),
    ("1.png train/2.png", {"train_split": "trian"}, "did you mean train.; it has train$"),
]


@pytest.mark.parametrize(("files", "flags", "text"), REFUSED_FLAGS)
def test_refused_flags(tmp_path, files, flags, text):
    make(tmp_path, files)
    with pytest.raises(ConfigurationError, match=text):
        load(tmp_path, **flags)


@pytest.mark.parametrize(
    ("flags", "train", "validation"),
    [
        ({"train_split": "small"}, "train-small.tar", "val-large.tar"),
        ({"train_split": "val-small.tar"}, "val-small.tar", "val-large.tar"),
        ({"validation_split": "small"}, "train-large.tar … train-small.tar", "val-small.tar"),
    ],
)
def test_a_word_of_a_flag_does_not_make_a_split_of_one_kind_the_other(tmp_path, flags, train, validation):
    make(tmp_path, "train-small.tar train-large.tar val-small.tar val-large.tar")
    note = load(tmp_path, **flags).note
    assert f"in {train}" in note
    assert f"({validation}" in note


def test_a_split_may_be_given_with_slashes(tmp_path):
    make(tmp_path, "first/a/1.png first/b/2.png second/a/3.png second/b/4.png")
    assert "in first/; evaluation on 2 others (second/, its own" in (
        load(tmp_path, batch_size=2, train_split="./first", validation_split="second/").note
    )


@pytest.mark.parametrize("streaming", [False, True])
def test_a_training_shard_without_rows_is_not_replaced_by_the_validation_split(tmp_path, streaming):
    write_parquet(tmp_path / "train.parquet", 0, 0, row_group_size=4)
    write_parquet(tmp_path / "validation.parquet", 0, 8, row_group_size=4)
    with pytest.raises(ConfigurationError, match=r"holds no image to train on .*train\.parquet is the training split"):
        load(tmp_path, streaming=streaming)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_single_row_group_may_start_with_rows_without_an_image(tmp_path, streaming):
    images = [row["bytes"] for row in encoded(0, 20)]
    write_table(tmp_path / "train.parquet", image=[None] * 5 + images[5:])
    assert "20 images in train.parquet" in load(tmp_path, streaming=streaming).note


@pytest.mark.parametrize("streaming", [False, True])
def test_shards_whose_labels_have_two_types_are_refused(tmp_path, streaming):
    images = [row["bytes"] for row in encoded(0, 2)]
    write_table(tmp_path / "0.parquet", image=images, label=[0, 1])
    write_table(tmp_path / "1.parquet", image=images, label=["a", "b"])
    with pytest.raises(ConfigurationError, match="give a folder of files"):
        load(tmp_path, streaming=streaming)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["train.parquet", "0.tar"])
def test_a_pointer_in_place_of_a_shard(tmp_path, name, streaming):
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(ConfigurationError, match=rf"{name} is a pointer of git-lfs, .*: type `git lfs pull`"):
        load(tmp_path, streaming=streaming)


def test_a_training_folder_on_a_disk_that_is_not_mounted(tmp_path):
    make(tmp_path, "val/a/1.png val/b/2.png")
    os.symlink(tmp_path / "disk", tmp_path / "train")
    with pytest.raises(ConfigurationError, match="train is called train but is a broken link: mount its disk"):
        load(tmp_path)


@pytest.mark.parametrize("kind", ["folders", "tars", "parquet", "streamed"])
def test_one_class_is_no_class(tmp_path, kind):
    """Every neighbour has the right class then, and kNN reaches 100 %."""
    for i in range(0, 8, 2):  # write_tar and write_parquet label even images 0
        if kind == "folders":
            write_image(tmp_path / "train" / "a" / f"{i}.png")
            (tmp_path / "train" / "b").mkdir(exist_ok=True)
        elif kind == "tars":
            write_tar(tmp_path / f"{i}.tar", i, 1)
        else:
            write_parquet(tmp_path / f"{i}.parquet", i, 1, row_group_size=1)
    images = load(tmp_path, streaming=kind == "streamed")
    assert (len(images.train), images.bank, images.validation, images.class_names) == (4, None, None, None)
    assert "no labels, because all images are" in images.note


def test_classes_of_one_image_each_are_a_warning(tmp_path):
    make(tmp_path, "a/1.png b/2.png c/3.png d/4.png")
    assert "warning: no class has two training images" in load(tmp_path).warnings[0]


CONFIGURATIONS = """---
configs:
- config_name: large
  data_files:
  - split: train
    path: large/*
- config_name: small
  data_files:
  - split: train
    path: small/part-0*
  - split: test
    path: small/part-1.parquet
---
"""


@pytest.mark.parametrize("streaming", [False, True])
def test_a_copy_of_a_repository_with_two_configurations(tmp_path, streaming):
    make(tmp_path, "large/0.parquet large/1.parquet small/part-0.parquet small/part-1.parquet")
    (tmp_path / "README.md").write_text(CONFIGURATIONS)
    with pytest.raises(ConfigurationError, match="has the configurations large, small: name one with --dataset_config"):
        load(tmp_path, streaming=streaming)
    with pytest.raises(ConfigurationError, match=r"--dataset_config smal: .* did you mean small\?"):
        load(tmp_path, streaming=streaming, dataset_config="smal")
    images = load(tmp_path, streaming=streaming, dataset_config="small")
    assert (len(images.train), len(images.validation)) == (4, 4)
    assert "in small/part-0.parquet; evaluation on 4 others (small/part-1.parquet" in images.note


@pytest.mark.parametrize(
    ("fields", "chosen"),
    [
        ("data_dir: en", "en/1.parquet … en/2.parquet"),
        ("data_dir: ./en/", "en/1.parquet … en/2.parquet"),
        ("data_dir: en, data_files: '2*'", "en/2.parquet"),
    ],
)
def test_the_files_of_a_configuration_are_in_its_folder(tmp_path, fields, chosen):
    make(tmp_path, "en/1.parquet en/2.parquet fr/2.parquet english/2.parquet")
    configs = f"[{{config_name: en, {fields}}}, {{config_name: fr, data_dir: fr}}]"
    (tmp_path / "README.md").write_text(f"---\nconfigs: {configs}\n---\n")
    assert f"in {chosen}" in load(tmp_path, dataset_config="en").note


def test_a_configuration_is_refused_where_there_is_none(tmp_path):
    make(tmp_path / "rows", "0.parquet")
    with pytest.raises(ConfigurationError, match=r"--dataset_config small: .* has no such configuration"):
        load(tmp_path / "rows", dataset_config="small")
    make(tmp_path / "images", "small/1.png large/2.png")
    with pytest.raises(ConfigurationError, match=r"--dataset_config small: .* holds image files, .*: leave the flag"):
        load(tmp_path / "images", dataset_config="small")


@pytest.mark.parametrize("small", ["data_files: 'small/*'", "data_dir: small"])
def test_a_configuration_that_is_not_in_the_copy_is_refused(tmp_path, small):
    make(tmp_path, "large/0.parquet")
    configs = f"[{{config_name: large, data_dir: large}}, {{config_name: small, {small}}}]"
    (tmp_path / "README.md").write_text(f"---\nconfigs: {configs}\n---\n")
    with pytest.raises(ConfigurationError, match=r"--dataset_config small: .* of its files, small/\*?: download"):
        load(tmp_path, dataset_config="small")


# Files, and a part of the note about folders of images.
NOTES = {
    "train/a/1.png train/b/2.png val/A/3.png val/B/4.png": "val/, because the training split has no class folder A",
    "top/train/1.png top/val/2.png top/more/deep/3.png": "not used: 1 image in top/more/deep/",
    "top/train/a/1.png top/train/b/b/2.png": "no labels, because top/train/b/b/2.png is not directly in a class folder",
    "a/1.png b/2.png #recycle/a/3.png $RECYCLE.BIN/4.png lost+found/5.png": "2 images of 2 classes; classes: a, b",
    "images_001/images/1.png images_002/images/2.png": "because images_001 and the folders beside it are parts",
    "a/1.png b/2.png runs/x/metrics.jsonl runs/x/config.yaml runs/x/curves.png runs/x/knn/3.png": (
        "2 images of 2 classes; classes: a, b"
    ),
    "a/1.png b/2.png b/metrics.jsonl": "2 images of 2 classes; not used: 1 *.jsonl; classes: a, b",
    "VOC/JPEGImages/1.png VOC/SegmentationClass/1.png": "classes: JPEGImages, SegmentationClass",
}


@pytest.mark.parametrize("files", NOTES)
def test_notes_about_folders(tmp_path, files):
    make(tmp_path, files)
    assert NOTES[files] in load(tmp_path, validation_fraction=0).note


@pytest.mark.parametrize("extension", ["parquet", "tar", "png"])
def test_folds_of_a_cross_validation_are_a_warning(tmp_path, extension):
    folds = [f"fold_{number}/{split}" for number in (1, 2) for split in ("train", "val")]
    if extension == "png":
        folds = [f"{fold}/{name}/{name}" for fold in folds for name in "ab"]
    make(tmp_path, " ".join(f"{fold}.{extension}" for fold in folds))
    assert "fold_1, fold_2 are folds that may hold the same images" in load(tmp_path).introduction
    assert "are folds" not in load(tmp_path / "fold_1", batch_size=2).introduction


@pytest.mark.parametrize(
    ("files", "folders"),
    [
        ("ADE/images/training/1.png ADE/images/validation/2.png ADE/annotations/training/1.png", "ADE/annotations/"),
        (
            "JPEGImages/1.png SegmentationClass/1.png SegmentationObject/1.png",
            "SegmentationClass/, SegmentationObject/",
        ),
        ("images/train/1.png images/val/2.png labels/train/1.txt", None),
        ("with_mask/1.png without_mask/2.png", None),
        ("masks/1.png masks/2.png", None),
    ],
)
def test_folders_of_masks_are_a_warning(tmp_path, files, folders):
    make(tmp_path, files)
    warnings = [line for line in load(tmp_path).warnings if "may hold masks" in line]
    assert [line.partition(" may hold")[0] for line in warnings] == ([f"warning: {folders}"] if folders else [])


def test_a_class_that_training_lacks_does_not_matter_without_evaluation(tmp_path):
    make(tmp_path, "train/a/1.png train/b/2.png val/a/3.png val/c/4.png")
    note = load(tmp_path, evaluate_every=0).note
    assert "not used: 2 images in val/, because the training split has no class folder c" in note


@pytest.mark.parametrize(
    ("files", "folders"),
    [
        ("cats/1.png cats/test/2.png dogs/1.png dogs/test/3.png", "cats/test/, dogs/test/"),
        ("train/a/1.png train/b/2.png train/val/3.png", "train/val/"),
        ("images/1.png test_images_v2/2.png", "test_images_v2/"),
        ("beaker/1.png test_tube/2.png", None),
        ("test/a/1.png test/b/2.png", None),
        ("a/1.png b/2.png", None),
    ],
)
def test_folders_that_may_be_held_out_are_a_warning(tmp_path, files, folders):
    make(tmp_path, files)
    warnings = [line for line in load(tmp_path, batch_size=2).warnings if "may be held out" in line]
    assert [line.partition(" may be")[0] for line in warnings] == ([f"warning: {folders}"] if folders else [])
