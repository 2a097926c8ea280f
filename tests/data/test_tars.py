import json
import os
import tarfile
from pathlib import Path

import pytest
from helpers import add_member, documented, load, pixel, settings, write_tar

from m2t_accel.config.evaluation import build_embed, build_knn
from m2t_accel.config.fields import ConfigurationError
from m2t_accel.data import tars
from m2t_accel.data.decode import DecodeError, decode_image
from m2t_accel.data.sources import load_images
from m2t_accel.data.tars import TarShards
from m2t_accel.data.views import read_rows

EMPTY = "the file is empty"


def values(images):
    """Return the first pixel of each image, or why it cannot be decoded."""
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
def test_tars_with_labels(tmp_path, streaming):
    for name, first, number in (("train-000", 0, 70), ("train-001", 70, 20), ("val-000", 100, 6)):
        write_tar(tmp_path / f"{name}.tar", first, number)
    images = load(tmp_path, streaming=streaming)
    assert (len(images.train), len(images.bank), len(images.validation)) == (90, 90, 6)
    assert images.class_names == ["0", "1"]
    assert images.bank["label"][:3] == [0, 1, 0]
    assert [pixel(images.bank, sample) for sample in (0, 69, 70, 89)] == [0, 69, 70, 89]
    if streaming:
        assert images.train.piece_sizes.tolist() == [64, 6, 20]
        samples, rows = images.train.open(2)(3, 5)
        assert samples.tolist() == [73, 74]
        assert [decode_image(row)[0, 0, 0] for row in rows] == [73, 74]


def test_an_embedding_has_the_labels_of_an_evaluation_and_holds_nothing_out(tmp_path):
    """Without the keys of .json the names of the tars would be the labels."""
    for name, label in (("cats", "tabby"), ("dogs", "beagle")):
        with tarfile.open(tmp_path / f"{name}.tar", "w") as tar:
            for i in range(4):
                add_member(tar, f"{name}{i}.png", i)
                add_member(tar, f"{name}{i}.json", json.dumps({"label": label}).encode())
    given = {"encoder": "any", "dataset": str(tmp_path)}
    images, evaluated = (load_images(build(given)) for build in (build_embed, build_knn))
    assert images.class_names == evaluated.class_names == ["beagle", "tabby"]
    assert images.train["label"] == [1, 1, 1, 1, 0, 0, 0, 0]
    assert images.validation is None


def test_tars_without_labels(tmp_path):
    write_tar(tmp_path / "a.tar", 0, 9, labels=False)
    images = load(tmp_path)
    assert (len(images.train), images.bank, images.class_names) == (9, None, None)


def test_a_tar_of_macos_with_two_images_of_a_sample_and_a_missing_label(tmp_path):
    """macOS stores a hidden file beside each file."""
    with tarfile.open(tmp_path / "train.tar", "w") as tar:
        for i in range(3):
            for name, content in ((f"./._{i}.png", b""), (f"./{i}.png", i), (f"./{i}.mask.png", 9)):
                add_member(tar, name, content)
            if i:
                add_member(tar, f"./{i}.cls", b"1")
    images = load(tmp_path)
    assert values(images.train) == [0, 1, 2]
    assert "not used: 3 more images of the same samples" in images.note
    assert "no labels, because 1 of 3 images have no class in .cls" in images.note


@pytest.mark.parametrize("streaming", [False, True])
def test_the_image_of_a_sample_is_the_one_with_the_fewest_dots(tmp_path, streaming):
    with tarfile.open(tmp_path / "train.tar", "w") as tar:
        for name, value in (("a.depth.png", 9), ("b.png", 1), ("a.png", 0), ("a.mask.png", 9), ("c.depth.png", 9)):
            add_member(tar, name, value)
        add_member(tar, "c.png", 2)
    images = load(tmp_path, streaming=streaming)
    assert values(images.train) == [1, 0, 2]
    assert "not used: 3 more images of the same samples" in images.note


def add_link(tar, name, target, kind):
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    tar.addfile(member)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_link_stands_for_its_target(tmp_path, streaming):
    """A link without a target is an image that cannot be decoded, which a run counts and reports."""
    hard, symbolic = tarfile.LNKTYPE, tarfile.SYMTYPE
    with tarfile.open(tmp_path / "train.tar", "w") as tar:
        add_member(tar, "./b/1.png", 1)
        add_member(tar, "b/2.png", 2)
        for i, target in enumerate(["b/1.png", "./b/2.png", "gone.png"]):
            add_link(tar, f"c/{i}.png", target, hard)
        add_link(tar, "b/1.png", "./b/1.png", hard)  # written by tar if it is given a file twice
        for i, target in enumerate(["../b/1.png", "../d/0.png", "/b/1.png", "3.png", "../../b/1.png", "9.png"]):
            add_link(tar, f"d/{i}.png", target, symbolic)
        add_link(tar, "d/6.png", "d/5.png", hard)  # to a link
        add_link(tar, "d/6.png", "d/6.png", hard)
        add_member(tar, "d/9.png", 9)  # after the link to it
        add_link(tar, "d/7.png", "../b/1.png", symbolic)
        add_member(tar, "d/7.png", 7)
    images = load(tmp_path, streaming=streaming, validation_fraction=0)
    assert values(images.train) == [1, 1, 1, 1, 2, 2, EMPTY, EMPTY, EMPTY, EMPTY, 9, 9, 9, 7]


@pytest.mark.parametrize("streaming", [False, True])
def test_the_last_member_of_a_name_counts(tmp_path, streaming):
    """`tar -r` appends changed files, and unpacking keeps the last one."""
    with tarfile.open(tmp_path / "train.tar", "w") as tar:
        for name, value in (("0.png", 0), ("1.png", 1), ("2.png", 2), ("0.png", 7)):
            add_member(tar, name, value)
        add_link(tar, "3.png", "1.png", tarfile.LNKTYPE)
        add_link(tar, "2.png", "0.png", tarfile.SYMTYPE)
        add_member(tar, "1.png", 8)  # the hard link keeps the earlier file
        for number, label in ((0, 0), (1, 0), (2, 0), (3, 0), (0, 1)):
            add_member(tar, f"./{number}.cls", str(label).encode())
    images = load(tmp_path, streaming=streaming, validation_fraction=0)
    assert values(images.train) == [1, 7, 7, 8]
    assert images.bank["label"][:] == [0, 1, 0, 0]
    assert "more images" not in images.note


def test_a_cached_index_serves_every_path_of_a_tar(tmp_path, monkeypatch):
    """The same relative path may mean another tar in another working directory."""
    for number, name in enumerate(("here", "there")):
        (tmp_path / name / "set").mkdir(parents=True)
        write_tar(tmp_path / name / "set" / "a.tar", 100 * number, 3)
    for name in ("here", "there", "here"):
        monkeypatch.chdir(tmp_path / name)
        for folder in (Path("set"), tmp_path / name / "set"):
            images = tars.tar_splits(folder, {"": ["a.tar"]}, settings(folder), [])[""]
            assert [image["path"] for image in images["image"]] == [f"{folder}/a.tar"] * 3


@pytest.mark.parametrize("gap", [0, 500_000])
def test_a_run_that_is_mostly_other_files_is_read_image_by_image(tmp_path, monkeypatch, gap):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for i in range(5):
            add_member(tar, f"{i}.mp4", bytes(gap))
            add_member(tar, f"{i}.png", i)
    images = load(tmp_path, streaming=True).train
    sizes, pread = [], os.pread
    monkeypatch.setattr(os, "pread", lambda file, size, at: sizes.append(size) or pread(file, size, at))
    assert [decode_image(row)[0, 0, 0] for row in images.open(0)(0, 5)[1]] == list(range(5))
    assert sum(sizes) < 20_000
    os.truncate(tmp_path / "a.tar", os.path.getsize(tmp_path / "a.tar") // 2)
    with pytest.raises(ConfigurationError, match=r"a\.tar cannot be read \(EOFError: it ends at byte [\d,]+\)"):
        images.open(0)(0, 5)


def write_tars(folder, tars):
    """Write tars of the members that are listed: images numbered by their order, and other files, NAME=CONTENT."""
    number = 0
    for tar_name, members in tars.items():
        (folder / tar_name).parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(folder / tar_name, "w") as tar:
            for member in members.split():
                name, _, content = member.partition("=")
                add_member(tar, name, number if name.endswith(".png") else content.encode())
                number += name.endswith(".png")


def samples(*others, first=0, number=4):
    """Return samples of an image and other files; {i} stands for 0 or 1, {w} for cat or dog."""
    return " ".join(
        f"{sample}{name}".replace("{i}", str(sample % 2)).replace("{w}", ("cat", "dog")[sample % 2])
        for sample in range(first, first + number)
        for name in (".png", *others)
    )


JSON, WORDS = '.json={"label":{i},"width":3}', '.json={"kind":"{w}","width":3}'
IMG2DATASET = '.json={"key":"0","status":"success","url":"u","caption":"c","width":3}'
CATS, DOGS = "cat/1.png cat/2.png", "dog/1.png dog/2.png"

# Layout in docs/data.md (its name there), members of the tars, flags, classes, images evaluated on, text of the note.
LABELS = {
    "numbers in `.cls`": ({"train.tar": samples(".cls={i}"), "val.tar": samples(".cls={i}")}, {}, "0 1", 4, ""),
    "words in `.cls`": ({"train.tar": samples(".cls={w}"), "val.tar": samples(".cls={w}")}, {}, "cat dog", 4, ""),
    "a key of `.json`": ({"a.tar": samples(JSON)}, {}, "0 1", 1, "labels from .json (key label)"),
    "another key of `.json`": ({"a.tar": samples(WORDS)}, {"label_column": "kind"}, "cat dog", 1, "(key kind)"),
    "another kind of file": ({"a.tar": samples(".txt={w}")}, {"label_column": "txt"}, "cat dog", 1, "from .txt"),
    "folders in the tars": (
        {"train.tar": f"{CATS} {DOGS}", "val.tar": f"x/{CATS.split()[0]} x/{DOGS.split()[0]}"},
        {},
        "cat dog",
        2,
        "labels from the folders in the tars",
    ),
    "splits in a tar": (
        {"a.tar": "x/train/cat/1.png x/train/cat/2.png x/train/dog/1.png x/train/dog/2.png x/val/dog/1.png x/y/2.png"},
        {},
        "cat dog",
        1,
        "4 images of 2 classes in x/train/ in a.tar; evaluation on 1 other (x/val/ in a.tar, its own validation split)"
        "; not used: 1 image in x/y/ in a.tar",
    ),
    "splits in a tar by flag": (
        {
            "a.tar": "train/cat/1.png test/cat/2.png test/dog/2.png "
            + " ".join(f"extra/{m}" for m in f"{CATS} {DOGS}".split())
        },
        {"train_split": "extra", "validation_split": "test"},
        "cat dog",
        2,
        "4 images of 2 classes in extra/ in a.tar; evaluation on 2 others (test/ in a.tar, its own validation split)",
    ),
    "a folder of tars for each class": (
        {
            "train/cat/0.tar": samples(),
            "train/dog/0.tar": samples(),
            "train/dog/1.tar": samples(),
            "val/dog/0.tar": "1.png",
        },
        {},
        "cat dog",
        1,
        "labels from the folders of the tars",
    ),
    "a tar for each class": (
        {"train/cat.tar": samples(), "train/dog.tar": samples(), "val/dog.tar": samples()},
        {},
        "cat dog",
        4,
        "labels from the names of the tars",
    ),
    "ILSVRC's tars": (
        {"train/n01440764.tar": samples(), "train/n01443537.tar": samples(), "ILSVRC2012_img_val.tar": samples()},
        {},
        "n01440764 n01443537",
        1,
        "no labels of ILSVRC2012_img_val.tar, because the names of the tars are other classes than those of the "
        "training images",
    ),
}
NO_LABELS = {  # what is not in the table of the documentation: members of the tars, text of the note
    "img2dataset": ({"00000.tar": samples(IMG2DATASET, ".txt=c"), "00002.tar": samples(IMG2DATASET)}, "(2 files)"),
    "captions": ({"a.tar": samples(".txt=c")}, "no labels, because *.txt hold captions; --label_column txt takes"),
    "unknown keys": ({"a.tar": samples(WORDS)}, "no key label, class or the like; --label_column may name kind, width"),
    "json of some": ({"a.tar": samples(JSON) + " 9.png"}, "1 of 5 images have no class in .json (key label)"),
    "binary labels": ({"a.tar": samples(".cls=\0")}, "no labels, because 4 of 4 images have no class in .cls"),
    "two kinds": ({"a.tar": samples(".cls={i}"), "b.tar": samples(JSON)}, "4 of 8 images have no class in .cls"),
    "a stray image": ({"a.tar": f"{CATS} {DOGS} 1.png 2.png"}, "such as the top and cat/, are no class folders"),
    "deeper images": (
        {"a.tar": f"{CATS} {DOGS} dog/x/1.png dog/x/2.png"},
        "such as cat/ and dog/, are no class folders",
    ),
    "parts": ({"a.tar": "00001/1.png 00001/2.png 00002/3.png 00002/4.png"}, "no class folders"),
    "folders like tars": ({"s-0.tar": "s-0/1.png s-0/2.png", "s-1.tar": "s-1/1.png s-1/2.png"}, "no class folders"),
    "folder of a sample": ({"a.tar": "x/0.png y/0.png z/0.png"}, "no class folders"),
    "splits without train": ({"a.tar": "val/1.png val/2.png test/1.png test/2.png"}, "no class folders"),
}


@pytest.mark.parametrize("layout", LABELS)
def test_labels_of_tars(tmp_path, layout):
    members, flags, classes, evaluated, text = LABELS[layout]
    write_tars(tmp_path, members)
    for streaming in (False, True):
        images = load(tmp_path, streaming=streaming, batch_size=2, **flags)
        assert (images.class_names, len(images.validation)) == (classes.split(), evaluated)
        assert text in images.note


@pytest.mark.parametrize("streaming", [False, True])
def test_the_keys_of_meta_json_are_labels(tmp_path, streaming):
    def members(content):
        return samples(f".meta.json={content}", '.camera.json={"x":1}') + " list.json={}"

    write_tars(tmp_path / "kind", {"a.tar": members('{"kind":"{w}"}')})
    write_tars(tmp_path / "label", {"a.tar": members('{"label":{i}}')})
    write_tars(tmp_path / "null", {"a.tar": members('{"kind":null}')})
    flags = {"streaming": streaming, "batch_size": 2}
    assert load(tmp_path / "kind", label_column="kind", **flags).class_names == ["cat", "dog"]
    assert "labels from .meta.json (key label)" in load(tmp_path / "label", **flags).note
    assert "--label_column may name kind" in load(tmp_path / "kind", **flags).note
    with pytest.raises(ConfigurationError, match=r"4 of 4 images have no class in \.meta\.json \(key kind\)"):
        load(tmp_path / "null", label_column="kind", **flags)
    with pytest.raises(ConfigurationError, match=r"column meta\.json: neither text files .* there are kind$"):
        load(tmp_path / "kind", label_column="meta.json", **flags)


def test_every_row_of_the_documentation_is_tested():
    assert sorted(documented("labels in tars")) == sorted(LABELS)


@pytest.mark.parametrize("case", NO_LABELS)
def test_tars_without_labels_say_why(tmp_path, case):
    members, text = NO_LABELS[case]
    write_tars(tmp_path, members)
    images = load(tmp_path, batch_size=2)
    assert (images.class_names, images.validation) == (None, None)
    assert text in images.note
    assert ("no labels" in images.note) == (case != "img2dataset")
    quiet = load(tmp_path, batch_size=2, evaluate_every=0).note
    assert "no labels" not in quiet or "have no class" in quiet


def test_no_json_is_read_for_labels_if_nothing_is_evaluated(tmp_path):
    write_tars(tmp_path, {"a.tar": samples(JSON)})
    assert load(tmp_path, batch_size=2, evaluate_every=0).note == f"{tmp_path}: 4 images in a.tar"


def test_the_labels_of_tars_belong_to_their_images(tmp_path):
    """Validation labels are matched by name: 1 is written as 01, and dog has another number there."""
    write_tars(tmp_path / "words", {"train.tar": samples(".cls={w}"), "val.tar": "5.png 5.cls=dog"})
    write_tars(tmp_path / "numbers", {"train.tar": samples(".cls={i}"), "val.tar": "5.png 5.cls=01"})
    write_tars(tmp_path / "folders", {"train.tar": f"{CATS} {DOGS}", "val.tar": "dog/1.png"})
    write_tars(tmp_path / "tars", {"train/dog.tar": samples(), "train/cat.tar": samples(), "val/dog.tar": "1.png"})
    for name in ("words", "numbers", "folders", "tars"):
        images = load(tmp_path / name)
        assert images.validation["label"][:] == [1]
        labels = {int(pixel(images.bank, i)): label for i, label in enumerate(images.bank["label"][:])}
        dogs = {"words": (1, 3), "numbers": (1, 3), "folders": (2, 3), "tars": (0, 1, 2, 3)}[name]
        assert labels == {i: int(i in dogs) for i in labels}


VALIDATION = {  # members of val.tar beside labelled training images, text of the note
    "none": (samples(), "no labels of val.tar, because 4 of 4 images have no class in .cls; val.tar is not used"),
    "some": (samples(".cls={i}") + " 9.png", "no labels of val.tar, because 1 of 5 images have no class in .cls"),
    "others": (samples(".cls={w}"), "because .cls are other classes than those of the training images"),
    "no image": ("1.heic", "val.tar is not used, because it holds no image"),
}


@pytest.mark.parametrize("case", VALIDATION)
def test_validation_tars_that_are_not_used_are_named(tmp_path, case):
    members, text = VALIDATION[case]
    write_tars(tmp_path, {"train.tar": samples(".cls={i}"), "val.tar": members})
    images = load(tmp_path, batch_size=2)
    assert (len(images.train), len(images.validation)) == (3, 1)  # held out of the training images
    assert text in images.note


CLASS_OF_TAR = {
    "cat": ["cat.tar", "train-cat.tar", "val_cat.tar", "cat.test.tar"],
    "n01440764": ["n01440764.tar", "train/n01440764.tar", "train_n01440764.tar"],
    "001.Black_footed_Albatross": ["001.Black_footed_Albatross.tar"],
    "golden retriever": ["golden retriever.tar"],
    "kočka": ["kočka.tar"],
    None: [
        *("00000.tar", "imagenet-train-000123.tar", "part-0007.tar", "shard_3.tar", "train.tar", "val2017.tar"),
        *("a.tar", "x-1.tar", "laion2B-en.tar", "n0144.tar", "3f2a9c.tar", "ILSVRC2012_img_train.tar", "train-0.tar"),
    ],
}


FOLDERS_OF_TARS = {  # tars, whether their folders are classes
    ("cat/0.tar", "dog/0.tar"): True,
    ("x/cat/train-0.tar", "x/dog/train-0.tar"): True,
    ("0.tar", "dog/0.tar"): False,
    ("cat/0.tar", "cat/1.tar"): False,
    ("part-0/0.tar", "part-1/0.tar"): False,
    ("images/0.tar", "more_photos/0.tar"): False,
    ("a/cat/0.tar", "b/dog/0.tar"): False,
}


@pytest.mark.parametrize("files", FOLDERS_OF_TARS)
def test_the_folders_of_tars_that_are_classes(files):
    assert tars.folders_of_tars_are_classes([f"/set/{file}" for file in files]) == FOLDERS_OF_TARS[files]


def test_the_class_that_the_name_of_a_tar_stands_for():
    for name, files in CLASS_OF_TAR.items():
        assert {file: tars.class_of_tar(file) for file in files} == dict.fromkeys(files, name)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_flag_names_a_folder_in_tars(tmp_path, streaming):
    write_tars(tmp_path, {"a.tar": "train/1.png train/2.png test/3.png"})
    images = load(tmp_path, train_split="train", batch_size=2, streaming=streaming)
    assert (len(images.train), images.class_names) == (2, None)
    assert "2 images in train/ in a.tar" in images.note
    with pytest.raises(ConfigurationError, match=r"--train_split trian: .* did you mean train\?; it has test, train"):
        load(tmp_path, train_split="trian", streaming=streaming)


REFUSED = {  # members of train.tar beside labelled validation images, flags, text of the error
    "n01440764.tar n01443537.tar": (
        {},
        r"train\.tar holds no image but 2 \*\.tar: unpack it with "
        r"`mkdir -p (.*)train && tar -xf \1train\.tar -C \1train`",
    ),
    "1.heic 2.heic 3.txt": ({}, r"train\.tar holds no image but 2 \*\.heic, 1 \*\.txt: convert them to JPEG or PNG"),
    "": ({}, r"train\.tar holds no image$"),
    samples(WORDS): ({"label_column": "kid"}, r"--label_column kid: .*did you mean kind\?; there are kind, width"),
    samples(JSON) + " 9.png": ({"label_column": "label"}, r"--label_column label: 1 of 5 images have no class in"),
}


@pytest.mark.parametrize("members", REFUSED)
def test_refused_tars(tmp_path, members):
    flags, text = REFUSED[members]
    write_tars(tmp_path, {"train.tar": members, "val.tar": samples(".cls={i}")})
    with pytest.raises(ConfigurationError, match=text):
        load(tmp_path, **flags)


def test_an_unpacked_tar_of_tars_is_used_although_it_is_still_there(tmp_path):
    write_tars(tmp_path, {"train.tar": "cat.tar dog.tar", "train/cat.tar": samples(), "train/dog.tar": samples()})
    images = load(tmp_path)
    assert images.class_names == ["cat", "dog"]
    assert "not used: 2 *.tar" in images.note


def test_members_that_are_not_images_are_named(tmp_path):
    write_tars(tmp_path / "few", {"a.tar": samples(".cls={i}", ".heic=x", ".json={}") + " 8.heic 9.CR2 README"})
    assert "not used: 1 *.heic, 1 *.cr2, 1 without extension" in load(tmp_path / "few", batch_size=2).note
    write_tars(tmp_path / "most", {"a.tar": samples(first=0) + "".join(f" {i}.heic" for i in range(5, 12))})
    (warning,) = load(tmp_path / "most", batch_size=2).warnings
    assert warning == "warning: 7 *.heic are not used, more than the 4 images: convert them to JPEG or PNG"
