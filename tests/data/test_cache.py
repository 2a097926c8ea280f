import os

import pyarrow
import pytest
from helpers import write_image

from m2t_accel.config.fields import ConfigurationError
from m2t_accel.data import cache, folders


@pytest.fixture
def cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "m2t_accel"


def test_a_table_is_built_again_when_a_file_or_a_parameter_changes(tmp_path, cache_folder):
    file, built = tmp_path / "file", []

    def build(files):
        built.append(files)
        return pyarrow.table({"number": [len(built)]})

    def number(*parameters):
        return cache.cached_table("kind", [str(file)], build, *parameters)["number"].to_pylist()

    file.write_bytes(b"one")
    assert [number(), number(), number("a"), number("a"), number()] == [[1], [1], [2], [2], [1]]
    before = os.stat(file)
    (tmp_path / "other").write_bytes(b"two")
    os.replace(tmp_path / "other", file)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert number() == [3], "a file of the same size and modification time"
    file.unlink()
    with pytest.raises(ConfigurationError, match=r"shard .*file cannot be read"):
        number()


@pytest.mark.parametrize("damage", [b"", b"ARROW1 but not really"])
def test_a_damaged_or_forbidden_cache_only_costs_a_scan(tmp_path, cache_folder, damage, monkeypatch):
    write_image(tmp_path / "images" / "1.png")
    monkeypatch.setattr(folders, "SETTLED", -10.0)
    folders.find_files(tmp_path / "images")
    (cached,) = cache_folder.iterdir()
    cached.write_bytes(damage)
    assert folders.find_files(tmp_path / "images").paths == ["1.png"]
    assert cached.read_bytes() != damage
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    assert folders.find_files(tmp_path / "images").paths == ["1.png"]


def test_a_full_disk_keeps_no_part_of_a_table(small_disk):
    table = pyarrow.table({"path": [f"images/{i:08}.jpg" for i in range(20_000)]})
    folder = small_disk(100)
    cache.write_cache(folder / "cached.arrow", table)
    assert list(folder.iterdir()) == []
