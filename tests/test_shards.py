import numpy as np
import pytest
from conftest import write_parquet, write_tar

from m2t_accel.recipes import build_config
from m2t_accel.settings import ConfigurationError
from m2t_accel.shards import ParquetShards, Shards
from m2t_accel.sources import load_images


def test_both_kinds_are_shards(tmp_path):
    write_parquet(tmp_path / "a.parquet", 0, 10, row_group_size=4)
    shards = ParquetShards([str(tmp_path / "a.parquet")])
    assert isinstance(shards, Shards)
    assert (len(shards), shards.piece_sizes.tolist()) == (10, [4, 4, 2])
    (tmp_path / "tars").mkdir()
    write_tar(tmp_path / "tars" / "a.tar", 0, 10)
    config = build_config({"recipe": "digits", "dataset": str(tmp_path / "tars"), "batch_size": 4, "streaming": True})
    assert isinstance(load_images(config).train, Shards)


def test_a_selection_keeps_the_numbers_of_its_samples(tmp_path):
    write_parquet(tmp_path / "a.parquet", 0, 10, row_group_size=4)
    some = ParquetShards([str(tmp_path / "a.parquet")]).select(np.array([0, 2]))
    assert some.piece_sizes.tolist() == [4, 2]
    assert some.read(1, 0, 2)[0].tolist() == [8, 9]


def test_a_shard_that_has_gone(tmp_path):
    write_parquet(tmp_path / "a.parquet", 0, 10, row_group_size=4)
    shards = ParquetShards([str(tmp_path / "a.parquet")])
    (tmp_path / "a.parquet").unlink()
    with pytest.raises(ConfigurationError, match=r"the shard .*a\.parquet cannot be read .*move it away"):
        shards.read(0, 0, 1)


def test_shards_that_do_not_belong_together(tmp_path):
    write_parquet(tmp_path / "a.parquet", 0, 10, row_group_size=4)
    write_parquet(tmp_path / "b.parquet", 0, 10, row_group_size=4, labels=False)
    with pytest.raises(ConfigurationError, match=r"b\.parquet has the columns image, .*a\.parquet has image, label"):
        ParquetShards([str(tmp_path / "a.parquet"), str(tmp_path / "b.parquet")])
