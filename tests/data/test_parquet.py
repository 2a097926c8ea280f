import sys
import tracemalloc

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from datasets import ClassLabel, Dataset, Features, Image
from helpers import encoded, load, write_parquet, write_table

from m2t_accel.config.fields import ConfigurationError
from m2t_accel.config.recipes import build_config
from m2t_accel.data import parquet, shards
from m2t_accel.data.decode import decode_image
from m2t_accel.data.order import PooledOrder
from m2t_accel.data.parquet import ParquetShards


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


def test_sample_numbers_exceed_32_bits(tmp_path):
    for name in "ab":
        write_parquet(tmp_path / f"{name}.parquet", 0, 9, row_group_size=3)
    found = ParquetShards([str(tmp_path / f"{name}.parquet") for name in "ab"])
    found.set_sizes(np.full(6, 2**31 - 1, np.int32))
    assert len(found) == 6 * (2**31 - 1)
    assert [found.first_sample(piece) for piece in range(6)] == [piece * (2**31 - 1) for piece in range(6)]
    assert found.open(5)(1, 3)[0].tolist() == [5 * (2**31 - 1) + row for row in (1, 2)]


def test_a_row_group_is_read_on_where_the_last_read_ended(tmp_path, monkeypatch):
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
    assert opened[1].closed
    assert rows(0, 200) == list(range(200))
    assert (len(opened), opened[2].closed) == (3, True)
    rows(0, 5)
    readers.clear()
    assert opened[3].closed


def test_a_network_failure_within_a_row_group_loses_no_row(tmp_path, monkeypatch):
    write_parquet(tmp_path / "a.parquet", 0, 200, row_group_size=200)
    local, opened = str(tmp_path / "a.parquet"), []

    def open_shard(file):
        opened.append(file)
        if len(opened) in (2, 3):
            raise ConnectionError("503")
        return open(local, "rb")

    monkeypatch.setattr(parquet, "open_shard", open_shard)
    monkeypatch.setattr(parquet, "remote_footer", lambda file: pyarrow.parquet.read_metadata(local))
    waited = []
    monkeypatch.setattr(shards.time, "sleep", waited.append)
    group = parquet.RowGroup("hf://datasets/some/a.parquet", 0, "image", 200)
    first = group.read(0, 70)
    group.batches = iter([])  # as if the connection were lost
    rest = group.read(70, 200)
    assert [decode_image(row)[0, 0, 0] for row in first + rest] == list(range(200))
    assert len(opened) == 4
    assert waited == [1, 2, 4]


def test_a_large_row_group_is_not_held_in_memory(tmp_path):
    images = [{"bytes": np.random.default_rng(i).bytes(100_000), "path": None} for i in range(640)]
    table = pyarrow.table({"image": images})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=640, write_batch_size=16)
    del images, table
    read, before = ParquetShards([str(tmp_path / "a.parquet")]).open(0), pyarrow.total_allocated_bytes()
    for first in range(0, 640, 64):
        read(first, first + 64 - (first == 576))
        # A buffer, a page and the rows that are read at once, instead of 64 MB.
        assert pyarrow.total_allocated_bytes() - before < 32e6


@pytest.mark.parametrize(("max_held", "openings"), [(10**9, 1), (10**6, 4)])
def test_a_page_that_is_too_large_is_dropped_between_calls(tmp_path, monkeypatch, max_held, openings):
    """pyarrow writes pages of 1024 rows by default."""
    content = [np.random.default_rng(i).bytes(20_000) for i in range(1200)]
    images = [{"bytes": image, "path": None} for image in content]
    pyarrow.parquet.write_table(pyarrow.table({"image": images}), tmp_path / "a.parquet", row_group_size=1200)
    del images
    found, opened, whole = ParquetShards([str(tmp_path / "a.parquet")]), [], parquet.open_shard
    monkeypatch.setattr(parquet, "open_shard", lambda file: opened.append(whole(file)) or opened[-1])
    read, before = found.open(0, max_held), pyarrow.total_allocated_bytes()
    for first in range(0, 1200, 300):
        rows = read(first, first + 300)[1]
        assert [row["bytes"] for row in rows] == content[first : first + 300]
        assert (pyarrow.total_allocated_bytes() - before < max_held) or openings == 1
    assert len(opened) == openings
    assert all(file.closed for file in opened)


def test_a_row_group_that_became_shorter_is_an_error(tmp_path):
    write_parquet(tmp_path / "a.parquet", 0, 20, row_group_size=20)
    read = ParquetShards([str(tmp_path / "a.parquet")]).open(0)
    write_parquet(tmp_path / "a.parquet", 0, 10, row_group_size=10)
    with pytest.raises(ConfigurationError, match=r"a\.parquet cannot be read \(EOFError: row group 0 ends at row 10\)"):
        read(0, 20)


def test_the_order_of_a_billion_images_and_their_shards_takes_200_megabytes(monkeypatch):
    """The peak memory of a process for the names of files, the row groups and the order of an epoch."""
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
    rest = ParquetShards(names).select(chosen)
    pool = PooledOrder(rest.piece_sizes, config).pool(epoch=3, device=1023, index=0)
    first = pool.segments[0]
    place, sample = rest.place(first.piece), rest.first_sample(first.piece)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (place, sample) == (divmod(first.piece, 100), first.piece * 100 - 100)
    assert len(rest) == 10**9 - 100
    assert peak + table.nbytes + chosen.nbytes + sum(map(sys.getsizeof, names)) < 200e6


def test_a_missing_shard_is_an_error(tmp_path):
    write_parquet(tmp_path / "a.parquet", 0, 10, row_group_size=4)
    gone = ParquetShards([str(tmp_path / "a.parquet")])
    (tmp_path / "a.parquet").unlink()
    with pytest.raises(ConfigurationError, match=r"the shard .*a\.parquet cannot be read .*move it away"):
        gone.open(0)(0, 1)


def test_streamed_parquet(tmp_path):
    for name, first, number in (("train-0", 0, 30), ("train-1", 30, 25), ("test-0", 100, 6)):
        write_parquet(tmp_path / f"{name}.parquet", first, number, row_group_size=10)
    images = load(tmp_path, streaming=True)
    assert images.train.piece_sizes.tolist() == [10, 10, 10, 10, 10, 5]
    assert (len(images.train), len(images.bank), len(images.validation)) == (55, 55, 6)
    assert images.class_names == ["even", "odd"]
    samples, rows = images.train.open(4)(8, 10)
    assert samples.tolist() == [48, 49]
    assert [decode_image(row)[0, 0, 0] for row in rows] == [48, 49]
    assert rows[0]["path"] == f"row 8 of row group 1 of {tmp_path}/train-1.parquet"


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("other", ["train-1.parquet", "val-0.parquet"])
def test_all_files_must_number_the_classes_in_the_same_way(tmp_path, other, streaming):
    """`datasets` would apply the class names of the first file to all."""
    write_parquet(tmp_path / "train-0.parquet", 0, 8, row_group_size=4)
    for names, number, first, second in (
        (["odd", "even"], 0, "even", "odd"),
        (["even", "odd", "prime"], 2, "missing", "prime"),
        (["even"], 1, "odd", "missing"),
    ):
        write_parquet(tmp_path / other, 8, 1, row_group_size=4, names=names)
        message = rf"class {number} of the column label is {first} in .*train-0\.parquet and {second} in .*{other}"
        with pytest.raises(ConfigurationError, match=message):
            load(tmp_path, streaming=streaming)
    write_parquet(tmp_path / other, 8, 1, row_group_size=4)
    assert load(tmp_path, streaming=streaming).class_names == ["even", "odd"]


@pytest.mark.parametrize("streaming", [False, True])
def test_the_classes_of_unused_files_and_columns_do_not_matter(tmp_path, streaming):
    write_parquet(tmp_path / "train-0.parquet", 0, 8, row_group_size=4)
    write_parquet(tmp_path / "val-0.parquet", 8, 4, row_group_size=4)
    write_parquet(tmp_path / "test-0.parquet", 0, 4, row_group_size=4, names=["odd", "even"])
    images = load(tmp_path, streaming=streaming)
    assert (images.class_names, len(images.train), len(images.validation)) == (["even", "odd"], 8, 4)
    write_parquet(tmp_path / "val-0.parquet", 8, 0, row_group_size=4, names=["neither"])
    (tmp_path / "test-0.parquet").unlink()
    assert load(tmp_path, streaming=streaming).class_names == ["even", "odd"]
    for i, names in enumerate((["web", "disk"], ["disk", "web"])):
        features = Features({"image": Image(), "label": ClassLabel(2), "from": ClassLabel(names=names)})
        rows = {"image": encoded(0, 4), "label": [0, 1, 0, 1], "from": [0, 1, 0, 1]}
        Dataset.from_dict(rows, features=features).to_parquet(tmp_path / f"train-{i}.parquet")
    assert load(tmp_path, streaming=streaming).class_names == ["0", "1"]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_column_whose_type_datasets_does_not_know_is_not_read(tmp_path, streaming):
    notes = pyarrow.array([[("camera", "a")]] * 8, pyarrow.map_(pyarrow.string(), pyarrow.string()))
    for name, words in (("train", ["cat", "dog"] * 4), ("val", ["dog", "cat"] * 4)):
        write_table(tmp_path / f"{name}.parquet", notes=notes, image=encoded(0, 8), label=words)
    images = load(tmp_path, streaming=streaming)
    assert (images.class_names, len(images.train), len(images.validation)) == (["cat", "dog"], 8, 8)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_truncated_file_is_an_error(tmp_path, streaming):
    write_parquet(tmp_path / "a.parquet", 0, 30, row_group_size=10)
    content = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(content[: len(content) // 2])
    with pytest.raises(ConfigurationError, match=r"a\.parquet cannot be read"):
        load(tmp_path, streaming=streaming)
