import os
import tracemalloc

import pytest
from helpers import load, pixel, write_image, write_tar

from m2t_accel.config.fields import ConfigurationError
from m2t_accel.data import folders, image_files
from m2t_accel.data.decode import DecodeError, decode_image


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder of three images whose scan may be cached at once."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("a/1.jpg", "a/2.png", "b/3.jpeg"):
        write_image(tmp_path / "images" / name)
    monkeypatch.setattr(folders, "SETTLED", -10.0)
    return tmp_path / "images"


@pytest.fixture
def scans(monkeypatch):
    """The folders that are scanned."""
    seen, scandir = [], os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: seen.append(path) or scandir(path))
    return seen


def remove(folder):
    for path in sorted(folder.rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    folder.rmdir()


def test_a_second_start_scans_no_folder(folder, scans):
    for _ in range(2):
        assert folders.find_files(folder).paths == ["a/1.jpg", "a/2.png", "b/3.jpeg"]
    assert len(scans) == 3


@pytest.mark.parametrize("change", ["new file", "file gone", "new folder", "folder gone", "renamed"])
def test_a_changed_folder_is_scanned_again(folder, change):
    folders.find_files(folder)
    if change == "new file":
        write_image(folder / "b" / "4.png")
    elif change == "file gone":
        (folder / "a" / "1.jpg").unlink()
    elif change == "new folder":
        write_image(folder / "c" / "5.png")
    elif change == "folder gone":
        remove(folder / "b")
    else:
        (folder / "a" / "1.jpg").rename(folder / "a" / "9.jpg")
    assert folders.find_files(folder).paths == sorted(
        str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()
    )


def test_a_scan_of_a_folder_that_just_changed_is_not_cached(folder, scans, monkeypatch):
    monkeypatch.setattr(folders, "SETTLED", 2.0)
    for _ in range(2):
        folders.find_files(folder)
    assert len(scans) == 6


def test_a_time_that_is_set_back_does_not_hide_a_new_file(folder):
    """tar and rsync set the time of a folder back after they have added a file."""
    before = os.stat(folder / "a")
    folders.find_files(folder)
    write_image(folder / "a" / "0.png")
    os.utime(folder / "a", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert "a/0.png" in folders.find_files(folder).paths


def test_a_link_is_followed_unless_it_leads_to_a_folder_above(folder):
    (folder / "val").symlink_to(folder / "a", target_is_directory=True)
    (folder / "b" / "loop").symlink_to(folder, target_is_directory=True)
    assert folders.find_files(folder).paths == ["a/1.jpg", "a/2.png", "b/3.jpeg", "val/1.jpg", "val/2.png"]


@pytest.mark.parametrize("name", ["c", "c.png"])
def test_the_target_of_a_broken_link_is_found_when_it_appears(folder, scans, name):
    """Mounting a disk changes no folder."""
    disk = folder.parent / "disk"
    (folder / name).symlink_to(disk, target_is_directory=True)
    for _ in range(2):
        found = folders.find_files(folder)
        assert found.paths == ["a/1.jpg", "a/2.png", "b/3.jpeg", *([name] if name == "c.png" else [])]
        assert found.others == ({"": 1} if name == "c" else {})
    assert len(scans) == 3
    write_image(disk / "4.png")
    for _ in range(2):
        assert folders.find_files(folder) == (["a/1.jpg", "a/2.png", "b/3.jpeg", f"{name}/4.png"], {}, [])
    assert len(scans) == 3 + 4


def test_pipes_and_devices_are_left_out(folder):
    os.mkfifo(folder.parent / "fifo")
    for name, target in (("x.png", folder.parent / "fifo"), ("y.png", "/dev/null")):
        (folder / name).symlink_to(target)
    assert folders.find_files(folder).paths == ["a/1.jpg", "a/2.png", "b/3.jpeg"]


def test_a_broken_link_is_an_image_that_cannot_be_decoded(image_net):
    (image_net / "train" / "n01" / "a.jpg").symlink_to(image_net / "nowhere.jpg")
    images = load(image_net).train
    assert len(images) == 13
    with pytest.raises(DecodeError, match="No such file or directory"):
        decode_image(images[0]["image"])


def test_a_file_name_must_be_utf_8(tmp_path):
    write_image(tmp_path / "a.jpg")
    os.rename(tmp_path / "a.jpg", os.fsencode(tmp_path) + b"/caf\xe9.jpg")
    with pytest.raises(ConfigurationError, match=r"caf.*\.jpg is not UTF-8"):
        load(tmp_path)


def test_a_folder_must_be_readable(image_net, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(ConfigurationError, match=r"--dataset .*Permission denied"):
        load(image_net)


def test_the_search_for_class_folders_takes_little_memory_for_an_image():
    names = [f"{i % 10}/{i}.jpg" for i in range(20_000)]
    tracemalloc.start()
    try:
        assert image_files.class_folders(names, names, []) == list("0123456789")
        assert tracemalloc.get_traced_memory()[1] < 20 * len(names)
    finally:
        tracemalloc.stop()


def test_class_folders_in_splits(image_net):
    (image_net / "train" / "n01" / "loop").symlink_to(image_net / "train", target_is_directory=True)
    (image_net / "train" / "n01" / "folder.png").mkdir()
    (image_net / "train" / "metadata.parquet").write_bytes(b"not read, because there are images")
    write_image(image_net / "test" / "ILSVRC_test_0.JPEG")  # ImageNet's test images have no classes
    images = load(image_net)
    assert images.class_names == ["n01", "n02"]
    assert images.train["label"] == [0] * 6 + [1] * 6
    assert images.validation["label"] == [0] * 3 + [1] * 3
    assert [os.path.basename(row["path"]) for row in images.train["image"]][:2] == ["n01_0.JPEG", "n01_1.JPEG"]


def test_split_folders_in_other_spellings(image_net):
    (image_net / "train").rename(image_net / "Training")
    (image_net / "val").rename(image_net / "Test")
    images = load(image_net)
    assert (len(images.train), len(images.validation)) == (12, 6)


def test_a_validation_folder_alone_is_the_data_set(image_net):
    remove(image_net / "train")
    assert load(image_net, batch_size=2).class_names == ["n01", "n02"]


def test_a_validation_folder_without_class_folders_is_not_used(image_net):
    remove(image_net / "val")
    write_image(image_net / "val" / "ILSVRC_val_0.JPEG")
    note = load(image_net).note
    assert "not used: 1 image in val/, which has no class folders" in note
    assert "held out of the training images" in note


def test_a_class_that_only_validation_has_is_an_error(image_net):
    write_image(image_net / "val" / "n99" / "x.jpg")
    with pytest.raises(ConfigurationError, match=r"--dataset.* class folder n99"):
        load(image_net)


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (["cats/1.png"], "all images are in one folder, cats"),
        (["a/1.png", "b/1.png", "logo.png"], "logo.png is not directly in a class folder"),
        (["a/1.png", "b/deep/2.png"], "b/deep/2.png is not directly in a class folder"),
    ],
)
def test_the_note_says_why_there_are_no_labels(tmp_path, names, reason):
    for name in names:
        write_image(tmp_path / name)
    images = load(tmp_path)
    assert (len(images.train), images.validation, images.class_names) == (len(names), None, None)
    assert list(images.train.features) == ["image"]
    assert f"no labels, because {reason}" in images.note


def test_the_images_of_a_flat_folder_are_not_looked_at_one_by_one(tmp_path, monkeypatch):
    """On a network disk, a call for each of millions of images takes minutes at every start."""
    looked_at, stat = [], os.stat
    for i in range(20):
        write_image(tmp_path / f"{i}.png")
    load(tmp_path)  # imports what is imported late
    monkeypatch.setattr(os, "stat", lambda path, **others: looked_at.append(str(path)) or stat(path, **others))
    load(tmp_path)
    assert [path for path in looked_at if os.path.basename(path).split(".")[0].split("_")[0].isdigit()] == []


def test_splits_that_are_deeper_are_found(tmp_path):
    """Kaggle's ImageNet has this layout, and users give its top folder."""
    for name in ("train/n01/1.JPEG", "train/n02/1.JPEG", "val/1.JPEG"):
        write_image(tmp_path / "ILSVRC" / "Data" / "CLS-LOC" / name)
    found, named = load(tmp_path, validation_fraction=0), load(tmp_path / "ILSVRC/Data/CLS-LOC", validation_fraction=0)
    assert found.class_names == named.class_names == ["n01", "n02"]
    assert "2 images of 2 classes in ILSVRC/Data/CLS-LOC/train/; classes: n01, n02; not used: 1 image in " in found.note


def test_the_note_counts_images_outside_the_splits(tmp_path, image_net):
    for name in ("unlabeled/1.png", "unlabeled/2.png", "test/n01/1.png", "logo.png"):
        write_image(image_net / name)
    assert load(image_net).note.endswith(
        "; not used: 3 images in the top folder, unlabeled/; not used: 1 image in test/"
    )
    for name in ("train/1.png", "train/2.png", "bus/1.png", "car/1.png"):
        write_image(tmp_path / "vehicles" / name)
    note = load(tmp_path / "vehicles").note
    assert note.endswith("not used: 2 images in bus/, car/ (if train is a class, rename its folder)")


def test_the_note_counts_files_that_are_not_images(tmp_path):
    for name in ("a/1.jpg", "b/2.JFIF", "@eaDir/1.jpg/SYNOPHOTO_THUMB_M.jpg", "__MACOSX/a/1.jpg", "a/._1.jpg"):
        write_image(tmp_path / "images" / f"{name}.png")
        (tmp_path / "images" / f"{name}.png").rename(tmp_path / "images" / name)
    for name in ("a/3.heic", "a/4.HEIC", "b/tars.tar.gz", "LICENCE"):
        (tmp_path / "images" / name).write_bytes(b"")
    images = load(tmp_path / "images")
    warning = "warning: 2 *.heic, 1 without extension, 1 *.gz are not used, more than the 2 images: "
    assert images.warnings[0] == f"{warning}convert them to JPEG or PNG"
    assert len(images.train) + len(images.validation) == 2
    for path in (tmp_path / "images").glob("?/?.*[gF]"):
        path.unlink()
    with pytest.raises(ConfigurationError, match=r"holds no image: .*; found 2 \*\.heic, 1 without .*: convert them"):
        load(tmp_path / "images")


@pytest.mark.parametrize("kind", ["folders", "tars", "streamed tars"])
def test_the_chunks_of_a_table_change_nothing(tmp_path, monkeypatch, kind):
    """The paths of 20 million images take more than the 2 GB that one chunk holds."""
    if kind == "folders":
        for i in range(30):
            write_image(tmp_path / "ab"[i % 2] / f"{i:02}.png", value=i)
    else:
        for first, number in ((0, 13), (13, 11), (24, 6)):
            write_tar(tmp_path / f"train-{first:02}.tar", first, number)
    given = {"streaming": kind == "streamed tars", "validation_fraction": 0.2}
    whole = load(tmp_path, **given)
    monkeypatch.setattr(image_files, "PATHS_PER_CHUNK", 4)
    chunked = load(tmp_path, **given)
    assert chunked.bank.data.column("image").num_chunks > 5
    assert (len(whole.train), len(whole.validation)) == (len(chunked.train), len(chunked.validation)) == (24, 6)
    assert (chunked.fingerprint, chunked.note) == (whole.fingerprint, whole.note)
    for one, other in ((whole.bank, chunked.bank), (whole.validation, chunked.validation)):
        assert [pixel(one, i) for i in range(len(one))] == [pixel(other, i) for i in range(len(one))]
        assert one["label"][:] == other["label"][:]
    if kind == "streamed tars":
        assert whole.train.piece_sizes.tolist() == chunked.train.piece_sizes.tolist()
        for piece, size in enumerate(chunked.train.piece_sizes):
            assert whole.train.open(piece)(0, size)[1] == chunked.train.open(piece)(0, size)[1]
