import pytest
from helpers import load, write_parquet, write_tar

from m2t_accel.config.fields import ConfigurationError
from m2t_accel.data import parquet_index, shards
from m2t_accel.data.shards import Shards


@pytest.fixture
def waits(monkeypatch):
    """The seconds that reading waits between its attempts."""
    waits = []
    monkeypatch.setattr(shards.time, "sleep", waits.append)
    return waits


def test_parquet_and_tars_are_shards(tmp_path):
    write_parquet(tmp_path / "parquet" / "a.parquet", 0, 10, row_group_size=4)
    (tmp_path / "tars").mkdir()
    write_tar(tmp_path / "tars" / "a.tar", 0, 10)
    for name, sizes in (("parquet", [4, 4, 2]), ("tars", [10])):
        found = load(tmp_path / name, streaming=True, validation_fraction=0).train
        assert isinstance(found, Shards)
        assert (len(found), found.piece_sizes.tolist()) == (10, sizes)


def test_a_remote_file_is_tried_five_times(tmp_path, monkeypatch, waits):
    write_parquet(tmp_path / "a.parquet", 0, 6, row_group_size=3)
    tried = []

    def open_shard(file):
        tried.append(file)
        if len(tried) <= 2 or file.endswith("b.parquet"):
            raise ConnectionError("503")
        return open(tmp_path / "a.parquet", "rb")

    monkeypatch.setattr(shards, "open_shard", open_shard)
    assert parquet_index.remote_footer("hf://datasets/some/a.parquet").num_rows == 6
    assert waits == [1, 2]
    with pytest.raises(ConfigurationError, match=r"b\.parquet cannot be read \(ConnectionError: 503\)"):
        parquet_index.remote_footer("hf://datasets/some/b.parquet")
    assert waits == [1, 2, 1, 2, 4, 8]
    assert parquet_index.remote_footer("hf://datasets/some/a.parquet").num_rows == 6
    assert len(tried) == 3 + 5, "the footer of a.parquet is kept in memory"


def test_a_missing_remote_file_is_tried_once(monkeypatch, waits):
    def open_shard(file):
        raise FileNotFoundError(file)

    monkeypatch.setattr(shards, "open_shard", open_shard)
    with pytest.raises(ConfigurationError, match=r"gone\.parquet cannot be read \(FileNotFoundError"):
        parquet_index.remote_footer("hf://datasets/some/gone.parquet")
    assert waits == []
