import os

import pytest
from conftest import write_image, write_tar

from m2t_accel import index


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder of three images that has lain still for an hour."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("a/1.jpg", "a/2.png", "b/3.JPEG"):
        write_image(tmp_path / "images" / name.replace("JPEG", "jpeg"))
    settle(tmp_path / "images")
    return tmp_path / "images"


def settle(folder, seconds=3600):
    """Put the times of change of all folders back."""
    for path in [folder, *(path for path in folder.rglob("*") if path.is_dir())]:
        status = os.stat(path)
        os.utime(path, (status.st_atime, status.st_mtime - seconds))


@pytest.fixture
def scans(monkeypatch):
    """The folders that are scanned."""
    seen, scandir = [], os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: seen.append(path) or scandir(path))
    return seen


def test_a_second_start_scans_nothing(folder, scans):
    first = index.find_files(folder)
    assert first == ["a/1.jpg", "a/2.png", "b/3.jpeg"]
    assert len(scans) == 3
    assert index.find_files(folder) == first
    assert len(scans) == 3


@pytest.mark.parametrize("change", ["new file", "file gone", "new folder", "folder gone", "renamed"])
def test_a_changed_folder_is_scanned_again(folder, change):
    index.find_files(folder)
    if change == "new file":
        write_image(folder / "b" / "4.png")
    elif change == "file gone":
        (folder / "a" / "1.jpg").unlink()
    elif change == "new folder":
        write_image(folder / "c" / "5.png")
    elif change == "folder gone":
        (folder / "b" / "3.jpeg").unlink()
        (folder / "b").rmdir()
    else:
        (folder / "a" / "1.jpg").rename(folder / "a" / "9.jpg")
    assert index.find_files(folder) == sorted(
        str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()
    )


def test_what_may_still_change_under_the_same_time_stamp_is_not_kept(folder, scans):
    settle(folder, -3600)
    scans.clear()
    for _ in range(2):
        index.find_files(folder)
    assert len(scans) == 6


@pytest.mark.parametrize("damage", [b"", b"ARROW1 but not really"])
def test_a_broken_or_forbidden_cache_only_costs_a_scan(folder, damage, monkeypatch):
    first = index.find_files(folder)
    (kept,) = (folder.parent / "cache" / "m2t_accel").iterdir()
    kept.write_bytes(damage)
    assert index.find_files(folder) == first
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    assert index.find_files(folder) == first


def test_a_tar_is_indexed_once_and_again_when_it_changes(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_tar(tmp_path / "a.tar", 0, 5)
    first = index.index_tars(tmp_path, ["a.tar"])
    assert first["label"].to_pylist() == [0, 1, 0, 1, 0]
    with monkeypatch.context() as patch:
        patch.setattr(index.tarfile, "open", None)
        assert index.index_tars(tmp_path, ["a.tar"]) == first
    write_tar(tmp_path / "a.tar", 0, 6)
    assert len(index.index_tars(tmp_path, ["a.tar"])) == 6
