import os

import pyarrow
import pytest
from helpers import write_image, write_parquet
from pyarrow import parquet

from m2t_accel.config.fields import ConfigurationError
from m2t_accel.data import cache, folders, parquet_index, shards


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder of three images that has lain still for long."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("a/1.jpg", "a/2.png", "b/3.JPEG"):
        write_image(tmp_path / "images" / name.replace("JPEG", "jpeg"))
    monkeypatch.setattr(folders, "SETTLED", -10.0)  # as if it had lain still
    return tmp_path / "images"


@pytest.fixture
def scans(monkeypatch):
    """The folders that are scanned."""
    seen, scandir = [], os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: seen.append(path) or scandir(path))
    return seen


def test_a_second_start_scans_nothing(folder, scans):
    first = folders.find_files(folder).paths
    assert first == ["a/1.jpg", "a/2.png", "b/3.jpeg"]
    assert len(scans) == 3
    assert folders.find_files(folder).paths == first
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
        (folder / "b" / "3.jpeg").unlink()
        (folder / "b").rmdir()
    else:
        (folder / "a" / "1.jpg").rename(folder / "a" / "9.jpg")
    assert folders.find_files(folder).paths == sorted(
        str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()
    )


def test_what_may_still_change_under_the_same_time_stamp_is_not_kept(folder, scans, monkeypatch):
    monkeypatch.setattr(folders, "SETTLED", 2.0)
    for _ in range(2):
        folders.find_files(folder)
    assert len(scans) == 6


def test_times_that_are_set_back_are_noticed(folder):
    """As tar and rsync do after they have added a file."""
    before = os.stat(folder / "a")
    folders.find_files(folder)
    write_image(folder / "a" / "0.png")
    os.utime(folder / "a", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert "a/0.png" in folders.find_files(folder).paths


def test_a_link_to_a_folder_beside_is_followed_and_one_to_a_folder_above_is_not(folder):
    (folder / "val").symlink_to(folder / "a", target_is_directory=True)
    (folder / "b" / "loop").symlink_to(folder, target_is_directory=True)
    assert folders.find_files(folder).paths == ["a/1.jpg", "a/2.png", "b/3.jpeg", "val/1.jpg", "val/2.png"]


@pytest.mark.parametrize("name", ["c", "c.png"])
def test_what_a_link_leads_to_is_found_when_it_is_there(folder, scans, name):
    """As after a disk is mounted, when none of the folders has changed."""
    disk = folder.parent / "disk"
    (folder / name).symlink_to(disk, target_is_directory=True)
    found = folders.find_files(folder)
    assert found.paths == ["a/1.jpg", "a/2.png", "b/3.jpeg", *([name] if name == "c.png" else [])]
    assert found.others == ({"": 1} if name == "c" else {})
    write_image(disk / "4.png")
    with_disk = ["a/1.jpg", "a/2.png", "b/3.jpeg", f"{name}/4.png"]
    for _ in range(2):
        assert folders.find_files(folder) == (with_disk, {})
    assert len(scans) == 3 + 4  # not in the end


@pytest.mark.parametrize("damage", [b"", b"ARROW1 but not really"])
def test_a_broken_or_forbidden_cache_only_costs_a_scan(folder, damage, monkeypatch):
    first = folders.find_files(folder).paths
    (kept,) = (folder.parent / "cache" / "m2t_accel").iterdir()
    kept.write_bytes(damage)
    assert folders.find_files(folder).paths == first
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    assert folders.find_files(folder).paths == first


def test_a_full_disk_leaves_nothing_of_what_was_to_be_kept(small_disk):
    table = pyarrow.table({"path": [f"images/{i:08}.jpg" for i in range(20_000)]})
    folder = small_disk(100)
    cache.write_cache(folder / "kept.arrow", table)
    assert list(folder.iterdir()) == []


def test_a_footer_that_does_not_come_at_once_is_asked_for_again(tmp_path, monkeypatch):
    write_parquet(tmp_path / "a.parquet", 0, 6, row_group_size=3)
    tried, waited = [], []

    def open_shard(file):
        tried.append(file)
        if len(tried) <= 2 or file.endswith("b.parquet"):
            raise ConnectionError("503")
        return open(tmp_path / "a.parquet", "rb")

    monkeypatch.setattr(shards, "open_shard", open_shard)
    monkeypatch.setattr(parquet_index.time, "sleep", waited.append)
    assert parquet_index.remote_footer("hf://datasets/some/a.parquet").num_rows == 6
    assert waited == [1, 2]
    with pytest.raises(ConfigurationError, match=r"cannot be read \(ConnectionError: 503\)"):
        parquet_index.remote_footer("hf://datasets/some/b.parquet")
    assert waited == [1, 2, 1, 2, 4, 8]
    assert parquet_index.remote_footer("hf://datasets/some/a.parquet").num_rows == 6
    assert len(tried) == 3 + 5  # that of a is kept


def test_links_to_what_is_no_file_are_left_out(folder, scans):
    os.mkfifo(folder.parent / "fifo")
    for name, target in (("x.png", folder.parent / "fifo"), ("y.png", "/dev/null")):
        (folder / name).symlink_to(target)
    for _ in range(2):
        assert folders.find_files(folder).paths == ["a/1.jpg", "a/2.png", "b/3.jpeg"]
    assert len(scans) == 3


def test_classes_are_compared_with_those_of_the_first_file_that_has_any():
    files = [("0", {}), ("1", {"label": ["a", "b"], "kind": ["x"]}), ("2", {"label": ["a", "b"]})]
    assert parquet_index.class_conflicts(files) == {}
    told = parquet_index.class_conflicts(
        [*files, ("3", {"label": ["a", "c"]}), ("4", {"label": [], "kind": ["x", "missing"]})]
    )
    assert told.keys() == {"label", "kind"}
    assert told["label"].startswith("the class 1 of the column label is b in 1 and c in 3: ")
    assert told["kind"].startswith("the class 1 of the column kind is missing in 1 and missing in 4: ")


@pytest.mark.parametrize(
    "words",
    [b"{not json", b"", b"\xff\xfe", b"null", b"3", b"[]", b"{}", b'{"info": {"features": []}}']
    + [b'{"info": {"features": {"label": %s}}}' % kind for kind in (b"3", b"{}", b'{"_type": "ClassLabel"}')]
    + [b'{"info": {"features": {"label": {"_type": "ClassLabel", "names": null}}}}']
    + [b'{"info": {"features": {"label": {"_type": "Value", "names": ["a"]}}}}'],
)
def test_odd_words_in_a_schema_tell_of_no_classes(words):
    assert parquet_index.class_names(words) == {}


def test_a_remote_shard_that_is_not_there_is_not_asked_for_again(monkeypatch):
    def open_shard(file):
        raise FileNotFoundError(file)

    monkeypatch.setattr(shards, "open_shard", open_shard)
    monkeypatch.setattr(parquet_index.time, "sleep", None)
    with pytest.raises(ConfigurationError, match=r"gone\.parquet cannot be read \(FileNotFoundError"):
        parquet_index.remote_footer("hf://datasets/some/gone.parquet")


def test_the_values_of_a_column_are_read_once_and_again_when_a_file_changes(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    rows = {"a/../b": ["x", "y", "x", None], "label": [3, 1, 1, 3]}
    files = [str(tmp_path / "1.parquet"), str(tmp_path / "2.parquet")]
    for file in files:
        parquet.write_table(pyarrow.table(rows), file, row_group_size=1)
    read, whole = [], parquet.read_table
    monkeypatch.setattr(
        parquet_index.parquet, "read_table", lambda *a, **k: read.append(k["columns"]) or whole(*a, **k)
    )
    for _ in range(2):
        assert parquet_index.index_values(files, "label", pyarrow.int64()).to_pylist() == [3, 1]
        assert parquet_index.index_values(files, "a/../b", pyarrow.string()).to_pylist() == ["x", "y", None]
    assert read == [["label"]] * 2 + [["a/../b"]] * 2
    parquet.write_table(pyarrow.table(rows | {"label": [7, 1, 1, 3]}), files[0])
    assert parquet_index.index_values(files, "label", pyarrow.int64()).to_pylist() == [7, 1, 3]
    parquet.write_table(pyarrow.table(rows | {"label": list("abcd")}), files[1])
    with pytest.raises(ConfigurationError, match=r"the columns label of .*2\.parquet differ from those of other files"):
        parquet_index.index_values(files, "label", pyarrow.int64())
