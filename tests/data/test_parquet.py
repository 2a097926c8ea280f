import io
import os
import sys
import tarfile
import time
import tracemalloc

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from helpers import encoded, write_parquet, write_tar

from m2t_accel.config.fields import ConfigurationError
from m2t_accel.config.recipes import build_config
from m2t_accel.data import parquet, parquet_index
from m2t_accel.data.decode import decode_image
from m2t_accel.data.order import PooledOrder
from m2t_accel.data.parquet import ParquetShards
from m2t_accel.data.shards import Shards
from m2t_accel.data.sources import load_images


def test_both_kinds_are_shards(tmp_path):
    write_parquet(tmp_path / "a.parquet", 0, 10, row_group_size=4)
    found = ParquetShards([str(tmp_path / "a.parquet")])
    assert isinstance(found, Shards)
    assert (len(found), found.piece_sizes.tolist()) == (10, [4, 4, 2])
    (tmp_path / "tars").mkdir()
    write_tar(tmp_path / "tars" / "a.tar", 0, 10)
    config = build_config({"recipe": "digits", "dataset": str(tmp_path / "tars"), "batch_size": 4, "streaming": True})
    assert isinstance(load_images(config).train, Shards)


def test_a_selection_numbers_its_samples_without_gaps(tmp_path):
    for name, number in (("a", 10), ("b", 3), ("c", 9)):
        write_parquet(tmp_path / f"{name}.parquet", 0, number, row_group_size=4)
    whole = ParquetShards([str(tmp_path / f"{name}.parquet") for name in "abc"])
    assert whole.piece_sizes.tolist() == [4, 4, 2, 3, 4, 4, 1]
    some = whole.select(np.isin(np.arange(7), [0, 2, 5, 6]))
    assert (len(some), some.piece_sizes.tolist()) == (11, [4, 0, 2, 0, 0, 4, 1])
    samples = [some.open(piece)(0, some.piece_sizes[piece])[0].tolist() for piece in (0, 2, 5, 6)]
    assert samples == [[0, 1, 2, 3], [4, 5], [6, 7, 8, 9], [10]]
    assert whole.open(5)(1, 3)[0].tolist() == [18, 19]


def test_samples_are_counted_beyond_32_bits(tmp_path):
    for name in "ab":
        write_parquet(tmp_path / f"{name}.parquet", 0, 9, row_group_size=3)
    found = ParquetShards([str(tmp_path / f"{name}.parquet") for name in "ab"])
    found.set_sizes(np.full(6, 2**31 - 1, np.int32))
    assert len(found) == 6 * (2**31 - 1)
    assert [found.first_sample(piece) for piece in range(6)] == [piece * (2**31 - 1) for piece in range(6)]
    assert found.open(5)(1, 3)[0].tolist() == [5 * (2**31 - 1) + row for row in (1, 2)]


def test_values_are_of_files_with_rows(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"other": pyarrow.array([], "int8")}), tmp_path / "a.parquet")
    write_parquet(tmp_path / "b.parquet", 0, 10, row_group_size=4)
    found = ParquetShards([str(tmp_path / "a.parquet"), str(tmp_path / "b.parquet")])
    assert found.values("label").to_pylist() == [0, 1]


# --- read onwards


def test_a_row_group_is_read_onwards_and_from_the_begin_where_it_must(tmp_path, monkeypatch):
    write_parquet(tmp_path / "a.parquet", 0, 200, row_group_size=200)
    opened, whole = [], parquet.open_shard
    monkeypatch.setattr(parquet, "open_shard", lambda file: opened.append(whole(file)) or opened[-1])
    readers = [ParquetShards([str(tmp_path / "a.parquet")]).open(0)]

    def rows(first, stop):
        samples, images = readers[0](first, stop)
        assert samples.tolist() == list(range(first, stop))
        return [decode_image(image)[0, 0, 0] for image in images]

    assert rows(3, 10) == list(range(3, 10))
    assert rows(10, 150) == list(range(10, 150))
    assert rows(180, 199) == list(range(180, 199))
    assert (len(opened), opened[0].closed) == (1, False)
    assert rows(20, 30) == list(range(20, 30))
    assert (len(opened), opened[0].closed) == (2, True)
    assert rows(199, 200) == [199]
    assert opened[1].closed  # nothing is left of it
    assert rows(0, 200) == list(range(200))
    assert (len(opened), opened[2].closed) == (3, True)
    rows(0, 5)
    readers.clear()
    assert opened[3].closed


def test_a_network_that_fails_within_a_row_group_costs_no_row(tmp_path, monkeypatch):
    write_parquet(tmp_path / "a.parquet", 0, 200, row_group_size=200)
    local, opened = str(tmp_path / "a.parquet"), []

    def fails_while_rows_are_read(file):
        opened.append(file)
        if len(opened) in (2, 3):
            raise ConnectionError("503")
        return open(local, "rb")

    monkeypatch.setattr(parquet, "open_shard", fails_while_rows_are_read)
    monkeypatch.setattr(parquet, "remote_footer", lambda file: pyarrow.parquet.read_metadata(local))
    waited = []
    monkeypatch.setattr(parquet_index.time, "sleep", waited.append)
    group = parquet.RowGroup("hf://datasets/some/a.parquet", 0, "image", 200)
    first = group.read(0, 70)
    group.batches = iter([])  # the connection is lost: no more comes
    rest = group.read(70, 200)
    assert [decode_image(row)[0, 0, 0] for row in first + rest] == list(range(200))
    assert len(opened) == 4
    assert waited == [1, 2, 4]


def test_a_large_row_group_is_not_held(tmp_path):
    images = [{"bytes": np.random.default_rng(i).bytes(100_000), "path": None} for i in range(640)]
    table = pyarrow.table({"image": images})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=640, write_batch_size=16)
    del images, table
    read, before = ParquetShards([str(tmp_path / "a.parquet")]).open(0), pyarrow.total_allocated_bytes()
    for first in range(0, 640, 64):
        read(first, first + 64 - (first == 576))
        assert pyarrow.total_allocated_bytes() - before < 32e6  # of 64: a buffer, a page and what is read at once


@pytest.mark.parametrize(("may_hold", "openings"), [(10**9, 1), (10**6, 4)])
def test_a_page_that_is_too_large_is_let_go_of_between_calls(tmp_path, monkeypatch, may_hold, openings):
    """As pyarrow writes them by itself: of 1024 rows."""
    content = [np.random.default_rng(i).bytes(20_000) for i in range(1200)]
    images = [{"bytes": image, "path": None} for image in content]
    pyarrow.parquet.write_table(pyarrow.table({"image": images}), tmp_path / "a.parquet", row_group_size=1200)
    del images
    found, opened, whole = ParquetShards([str(tmp_path / "a.parquet")]), [], parquet.open_shard
    monkeypatch.setattr(parquet, "open_shard", lambda file: opened.append(whole(file)) or opened[-1])
    read, before = found.open(0, may_hold), pyarrow.total_allocated_bytes()
    for first in range(0, 1200, 300):
        rows = read(first, first + 300)[1]
        assert [row["bytes"] for row in rows] == content[first : first + 300]
        assert (pyarrow.total_allocated_bytes() - before < may_hold) or openings == 1
    assert len(opened) == openings
    assert all(file.closed for file in opened)


def test_a_row_group_that_has_become_shorter_is_named(tmp_path):
    write_parquet(tmp_path / "a.parquet", 0, 20, row_group_size=20)
    read = ParquetShards([str(tmp_path / "a.parquet")]).open(0)
    write_parquet(tmp_path / "a.parquet", 0, 10, row_group_size=10)
    with pytest.raises(ConfigurationError, match=r"a\.parquet cannot be read \(EOFError: row group 0 ends at row 10\)"):
        read(0, 20)


@pytest.mark.parametrize("gap", [0, 500_000])
def test_a_tar_with_other_things_between_its_images(tmp_path, monkeypatch, gap):
    """A run that is mostly of other things is not read as one; and what is cut while it is read is no bad image."""
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for i in range(5):
            for name, content in ((f"{i}.mp4", bytes(gap)), (f"{i}.png", encoded(i, 1)[0]["bytes"])):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    config = build_config({"recipe": "digits", "dataset": str(tmp_path), "batch_size": 4, "streaming": True})
    sizes, whole = [], parquet.os.pread
    monkeypatch.setattr(parquet.os, "pread", lambda file, size, at: sizes.append(size) or whole(file, size, at))
    images = load_images(config).train
    assert [decode_image(row)[0, 0, 0] for row in images.open(0)(0, 5)[1]] == list(range(5))
    assert sum(sizes) < 20_000
    os.truncate(tmp_path / "a.tar", os.path.getsize(tmp_path / "a.tar") // 2)
    with pytest.raises(ConfigurationError, match=r"a\.tar cannot be read \(EOFError: it ends at byte [\d,]+\)"):
        images.open(0)(0, 5)


def test_the_plan_of_a_billion_images_with_its_shards_takes_200_megabytes(monkeypatch):
    """What a rank holds to know who reads what: names, row groups, and the order of an epoch; and at its peak."""
    num_files, groups = 100_000, 100
    rows = pyarrow.ListArray.from_arrays(
        np.arange(0, (num_files + 1) * groups, groups, dtype=np.int32), np.full(num_files * groups, 100, np.int32)
    )
    table = pyarrow.table({"rows": rows}, metadata={"schema": "00"})
    monkeypatch.setattr(parquet, "index_parquet", lambda files: table)
    names = [f"/data/some/where/train-{i:05}-of-{num_files}.parquet" for i in range(num_files)]
    config = build_config({"recipe": "digits", "batch_size": 1024 * 32, "device_batch_size": 32})
    chosen = np.arange(num_files * groups) > 0
    tracemalloc.start()
    started = time.perf_counter()
    rest = ParquetShards(names).select(chosen)
    pool = PooledOrder(rest.piece_sizes, config).pool(epoch=3, device=1023, index=0)
    first = pool.segments[0]
    place, sample = rest.place(first.piece), rest.first_sample(first.piece)
    seconds, peak = time.perf_counter() - started, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (place, sample) == (divmod(first.piece, 100), first.piece * 100 - 100)
    assert len(rest) == 10**9 - 100
    assert seconds < 2
    assert peak + table.nbytes + chosen.nbytes + sum(map(sys.getsizeof, names)) < 200e6


def test_a_shard_that_has_gone(tmp_path):
    write_parquet(tmp_path / "a.parquet", 0, 10, row_group_size=4)
    gone = ParquetShards([str(tmp_path / "a.parquet")])
    (tmp_path / "a.parquet").unlink()
    with pytest.raises(ConfigurationError, match=r"the shard .*a\.parquet cannot be read .*move it away"):
        gone.open(0)(0, 1)


def test_shards_that_do_not_belong_together(tmp_path):
    write_parquet(tmp_path / "a.parquet", 0, 10, row_group_size=4)
    write_parquet(tmp_path / "b.parquet", 0, 10, row_group_size=4, labels=False)
    with pytest.raises(ConfigurationError, match=r"b\.parquet has the columns image, .*a\.parquet has image, label"):
        ParquetShards([str(tmp_path / "a.parquet"), str(tmp_path / "b.parquet")])
