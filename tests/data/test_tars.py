import os
import re
import tarfile
import tracemalloc
from pathlib import Path

import pytest
from helpers import add_member, encoded, load, pixel, write_tar

from m2t_accel import progress
from m2t_accel.config.fields import ConfigurationError
from m2t_accel.data import tars
from m2t_accel.data.decode import DecodeError, decode_image
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
    assert "no labels, because 1 of 3 images have no .cls" in images.note


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
    images = load(tmp_path, streaming=streaming)
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


def test_damaged_truncated_and_joined_tars_are_errors(tmp_path):
    write_tar(tmp_path / "a.tar", 0, 20)
    content = (tmp_path / "a.tar").read_bytes()
    half = len(content) // 2
    for bad in (
        content + content,
        content[:10240] + b"x" * 512 + content[10752:],
        content + bytes(tars.TAIL_BYTES) + b"x",
        content[:half],
        content[: half + 100],
        content[: half - 300],
        b"no tar",
        b"",
    ):
        (tmp_path / "a.tar").write_bytes(bad)
        with pytest.raises(ConfigurationError, match=r"a\.tar cannot be read as a tar .*move it away"):
            tars.index_tars(tmp_path, ["a.tar"])
    (tmp_path / "a.tar").unlink()
    with pytest.raises(ConfigurationError, match=r"a\.tar cannot be read"):
        tars.index_tars(tmp_path, ["a.tar"])


@pytest.mark.parametrize("word", [b"cat", b"9" * 5000, b"9" * 19, b"-1", b""])
def test_a_label_is_a_number_of_at_most_18_digits(tmp_path, word):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, content in (("0.png", b"image"), ("0.cls", word), ("1.png", b"image"), ("1.cls", b" 7\n")):
            add_member(tar, name, content)
    assert tars.index_tars(tmp_path, ["a.tar"])[0]["label"].to_pylist() == [None, 7]


def test_a_cached_index_serves_every_path_of_a_tar(tmp_path, monkeypatch):
    """The same relative path may mean another tar in another working directory."""
    for number, name in enumerate(("here", "there")):
        (tmp_path / name / "set").mkdir(parents=True)
        write_tar(tmp_path / name / "set" / "a.tar", 100 * number, 3)
    for name in ("here", "there", "here"):
        monkeypatch.chdir(tmp_path / name)
        for folder in (Path("set"), tmp_path / name / "set"):
            images = tars.tars_to_dataset(folder, ["a.tar"], [])
            assert [image["path"] for image in images["image"]] == [f"{folder}/a.tar"] * 3


def test_a_tar_is_indexed_once_and_again_when_it_changes(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_tar(tmp_path / "a.tar", 0, 5)
    (tmp_path / "b.tar").write_bytes(b"no tar")
    with pytest.raises(ConfigurationError, match=r"b\.tar"):
        tars.index_tars(tmp_path, ["a.tar", "b.tar"])
    with monkeypatch.context() as patch:  # the index of a.tar is cached, although b.tar failed
        patch.setattr(tars.tarfile, "open", None)
        assert tars.index_tars(tmp_path, ["a.tar"])[0]["label"].to_pylist() == [0, 1, 0, 1, 0]
    write_tar(tmp_path / "a.tar", 0, 6)
    assert len(tars.index_tars(tmp_path, ["a.tar"])[0]) == 6


def test_a_bar_shows_the_progress_of_indexing(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(progress, "PATIENCE", -1.0)
    monkeypatch.setattr(progress, "LOG_INTERVAL", 0.0)
    for i in range(4):
        write_tar(tmp_path / f"{i}.tar", 10 * i, 3 + i)
    tars.index_tars(tmp_path, [f"{i}.tar" for i in range(4)])
    shares = [int(share) for share in re.findall(r"indexing tars: +(\d+)%", capsys.readouterr().err)]
    assert shares == sorted(shares)
    assert len(set(shares)) >= 4


def test_the_memory_for_indexing_does_not_grow_with_the_members(tmp_path):
    """tarfile would keep an object with the header of each member."""
    content = encoded(0, 1)[0]["bytes"]
    for number in (100, 1100):
        with tarfile.open(tmp_path / f"{number}.tar", "w") as tar:
            for i in range(number):
                add_member(tar, f"{i:06}.png", content)
                add_member(tar, f"{i:06}.cls", b"1")
        tracemalloc.start()
        tars.index_tar(str(tmp_path / f"{number}.tar"))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 2.5e6  # 4.7 MB with the headers


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
