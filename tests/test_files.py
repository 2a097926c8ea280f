import contextlib
import json
import os

import pytest

from m2t_accel.files import JsonLines, atomic_write, let_others_read, replace_folder, write_text


def test_a_file_or_folder_is_replaced_whole_or_not_at_all(tmp_path):
    file, folder = tmp_path / "a.txt", tmp_path / "folder"
    stale = tmp_path / f".folder.{os.getpid()}"  # of a killed process with the same number
    stale.mkdir()
    (stale / "stale").touch()
    for content in ("old", "new"):
        with atomic_write(file) as temporary:
            assert temporary.suffix == ".txt"
            temporary.write_text(content)
        with atomic_write(folder) as temporary:
            temporary.mkdir()
            (temporary / content).touch()
    for path in (file, folder):
        with contextlib.suppress(ZeroDivisionError), atomic_write(path) as temporary:
            temporary.mkdir() if path is folder else temporary.write_text("half")
            raise ZeroDivisionError
    assert file.read_text() == "new"
    assert [path.name for path in folder.iterdir()] == ["new"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "folder"]


def test_a_folder_is_replaced(tmp_path):
    for name in ("new", "encoder"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    replace_folder(tmp_path / "new", tmp_path / "encoder")
    assert [path.name for path in tmp_path.iterdir()] == ["encoder"]
    assert (tmp_path / "encoder" / "file").read_text() == "new"


@pytest.mark.parametrize("mode", [0o755, 0o750, 0o700])
def test_a_file_gets_the_permissions_of_its_folder(tmp_path, mode):
    tmp_path.chmod(mode)
    (tmp_path / "file").write_text("")
    (tmp_path / "file").chmod(0o600)
    let_others_read(tmp_path / "file")
    assert (tmp_path / "file").stat().st_mode & 0o777 == mode & 0o666


def test_json_lines_are_added_whole(tmp_path):
    lines = JsonLines(tmp_path / "new" / "lines.jsonl")
    assert list(lines.read()) == []
    lines.add([])
    assert not lines.path.exists()
    lines.add([{"a": 1}, {"a": 2}])
    with lines.path.open("a") as file:
        file.write('{"a": 3')  # killed in the middle
    assert [row["a"] for row in JsonLines(lines.path).read()] == [1, 2]
    again = JsonLines(lines.path)
    again.add([{"a": 4}])
    assert [json.loads(line)["a"] for line in lines.path.read_text().splitlines()] == [1, 2, 4]
    lines.path.unlink()  # by somebody else
    again.add([{"a": 5}])
    assert lines.path.read_text() == '{"a": 5}\n'


def test_json_lines_are_filtered(tmp_path):
    lines = JsonLines(tmp_path / "lines.jsonl")
    lines.add([{"a": 1}, {"a": 2}])
    lines.filter(lambda row: row["a"] > 1)
    assert lines.path.read_text() == '{"a": 2}\n'
    lines.add([{"a": 3}])
    assert [row["a"] for row in lines.read()] == [2, 3]
    lines.filter(lambda row: False)
    assert not lines.path.exists()


def test_json_lines_wait_for_space_on_a_full_disk(small_disk):
    disk = small_disk(kilobytes=64)
    lines = JsonLines(disk / "lines.jsonl")
    lines.add([{"a": 1}])
    (disk / "big").write_bytes(bytes(56 * 1024))
    with pytest.raises(OSError, match="No space left"):
        lines.add([{"a": 2, "text": "x" * 20_000}])
    with pytest.raises(OSError, match="No space left"):
        lines.add([{"a": 3}])
    assert [row["a"] for row in lines.read()] == [1, 2, 3]
    assert [row["a"] for row in JsonLines(lines.path).read()] == [1]
    (disk / "big").unlink()
    lines.add([{"a": 4}])
    assert [json.loads(line)["a"] for line in lines.path.read_text().splitlines()] == [1, 2, 3, 4]


def test_a_text_that_does_not_fit_on_the_disk_leaves_the_old_one(small_disk):
    disk = small_disk(kilobytes=64)
    write_text(disk / "file", "old")
    with pytest.raises(OSError, match="No space left"):
        write_text(disk / "file", "x" * 100_000)
    assert [path.name for path in disk.iterdir()] == ["file"]
    assert (disk / "file").read_text() == "old"
