"""Images in row groups of parquet files, local or remote, read piece by piece."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import IO

import numpy as np
import pyarrow
from datasets import Dataset, Features
from pyarrow import parquet

from m2t_accel.config.data import ImageSettings
from m2t_accel.config.fields import ConfigurationError, one_line
from m2t_accel.data.columns import ImageColumn, find_image_column, find_label_column, spread, stored_values, undecoded
from m2t_accel.data.decode import DecodeError
from m2t_accel.data.labels import check_has_images, select_columns
from m2t_accel.data.parquet_index import (
    class_conflicts,
    class_names,
    columns_differ,
    distinct_values,
    index_parquet,
    remote_footer,
)
from m2t_accel.data.shards import (
    MAX_HELD_BYTES,
    Reader,
    is_remote,
    open_shard,
    read_file,
    to_dataset,
    with_retries,
)

READERS = 8  # threads that read row groups into memory
BATCH_ROWS = 64  # rows that are decoded at once

# Bytes that are read at once. ImageNet has row groups of 4320 images, 500 MB: to read one from its first row to its
# last took 0.15 s and 0.1 GB of memory with 8 MB, 0.33 s with 1 MB, 0.16 s with 32 MB, and as a whole 0.8 s and 2 GB.
BUFFER_BYTES = 8 << 20
FIRST_ROWS, FIRST_BYTES = 16, 1 << 20  # rows to look at in all, and bytes of a row group that are read at once for them
PAGE_ROWS = 1024  # rows of a page, by pyarrow's default


class ParquetShards:
    """The row groups of parquet files, each a piece. Nothing is copied to a disk."""

    def __init__(self, files: Sequence[str]) -> None:
        """Index the files: local paths or URLs."""
        self.files = files
        self.column = ImageColumn("image", "")
        index = index_parquet(files)
        self.metadata = index.schema.metadata
        groups = index["rows"].combine_chunks()
        self.first_pieces = groups.offsets.to_numpy()  # (F + 1,) int32, number of each file's first piece
        # The only array with an entry for each row group: a billion images have ten million, which take 40 MB.
        self.set_sizes(groups.values.to_numpy())

    @property
    def features(self) -> Features:
        """Return the columns of the files, without those whose types `datasets` does not know.

        Raises:
            ConfigurationError: the metadata that `datasets` has written is damaged.
        """
        try:
            return known_columns(self.schema)
        except Exception as error:  # of json, or of anything that is built from it
            raise ConfigurationError(
                f"the columns of {self.files[0]} cannot be read ({one_line(error)}); rewrite the file"
            ) from None

    @property
    def schema(self) -> pyarrow.Schema:
        schema = bytes.fromhex(self.metadata[b"schema"].decode())
        return pyarrow.ipc.read_schema(pyarrow.py_buffer(schema))

    @property
    def class_names(self) -> dict[str, list[str]]:
        """Return the class names of each ClassLabel column."""
        return class_names((self.schema.metadata or {}).get(b"huggingface", b"{}"))

    def __len__(self) -> int:
        return int(self.piece_sizes.sum(dtype=np.int64))

    def set_sizes(self, piece_sizes: np.ndarray) -> None:
        self.piece_sizes = piece_sizes
        self.file_sizes, filled = np.zeros(len(self.files), np.int64), np.diff(self.first_pieces) > 0
        if filled.any():
            self.file_sizes[filled] = np.add.reduceat(piece_sizes, self.first_pieces[:-1][filled], dtype=np.int64)
        self.first_samples = np.cumsum(self.file_sizes) - self.file_sizes  # (F,) int64, each file's first sample

    def select(self, chosen: np.ndarray) -> ParquetShards:
        """Return the same shards with all pieces empty except those chosen: (P,) bool."""
        selection = copy.copy(self)
        selection.set_sizes(self.piece_sizes * chosen)
        return selection

    def spread(self, number: int) -> ParquetShards:
        """Return the same shards with only the first `number` images of evenly spread pieces."""
        filled = np.flatnonzero(self.piece_sizes)
        for count in range(max(1, number * len(filled) // len(self)), len(filled) + 1):
            pieces = filled[np.arange(count) * len(filled) // count]
            ends = np.cumsum(self.piece_sizes[pieces], dtype=np.int64)
            if ends[-1] >= number:
                break
        sizes = np.zeros_like(self.piece_sizes)
        sizes[pieces] = np.diff(np.minimum(ends, number), prepend=0)
        selection = copy.copy(self)
        selection.set_sizes(sizes)
        return selection

    def place(self, piece: int) -> tuple[int, int]:
        """Return the number of a piece's file, and the number of its row group in that file."""
        file = int(np.searchsorted(self.first_pieces, piece, side="right")) - 1
        return file, piece - int(self.first_pieces[file])

    def first_sample(self, piece: int) -> int:
        file, _ = self.place(piece)
        before = self.piece_sizes[self.first_pieces[file] : piece].sum(dtype=np.int64)
        return int(self.first_samples[file] + before)

    def open(self, piece: int, max_held_bytes: int = MAX_HELD_BYTES) -> Reader:
        file, group = self.place(piece)
        first_sample = self.first_sample(piece)
        rows = RowGroup(self.files[file], group, self.column.name, int(self.piece_sizes[piece]), max_held_bytes)

        def read(first: int, stop: int) -> tuple[np.ndarray, list[dict[str, object]]]:
            place = f"of row group {group} of {self.files[file]}"
            images = [
                streamed(row, f"row {number} {place}", self.column.root)
                for number, row in enumerate(rows.read(first, stop), first)
            ]
            return first_sample + np.arange(first, stop), images

        return read

    def sample_rows(self, column: str) -> Iterator[tuple[str, object]]:
        """Yield the first rows of some pieces, spread over the files, each with a phrase that says where it is.

        Raises:
            ConfigurationError: a file is missing or damaged, or the network fails.
        """
        filled = np.flatnonzero(self.piece_sizes)
        places = spread(len(filled))
        rows = FIRST_ROWS // max(1, len(places))
        for number in places:
            file, group = self.place(int(filled[number]))
            read = functools.partial(read_first_rows, file=self.files[file], group=group, column=column, rows=rows)
            for row, value in enumerate(read_file(self.files[file], read)):
                yield f"row {row} of row group {group} of {self.files[file]}", value

    def dataset(self, pieces: np.ndarray, label: str, max_rows: int, with_images: bool = True) -> Dataset:
        """Return some of the pieces in memory, with the columns `image`, undecoded, and `label`.

        Args:
            pieces: their numbers.
            label: name of the column of labels.
            max_rows: rows of a piece at most; of a larger one, as many are drawn at random, always the same ones.
            with_images: if False, return only the column `label`.

        Raises:
            ConfigurationError: a file is missing or damaged, the network fails, or the files' columns differ.
        """
        columns = [self.column.name, label] if with_images else [label]
        schema = Features({name: self.features[name] for name in columns}).arrow_schema

        def read(piece: int) -> pyarrow.Table:
            number, group = self.place(int(piece))
            file = self.files[number]
            read_part = functools.partial(
                read_some_rows, file=file, group=group, columns=columns, number=min(max_rows, self.piece_sizes[piece])
            )
            part = read_file(file, read_part)
            try:
                return part.select(columns).cast(schema)
            except pyarrow.ArrowException as error:
                raise columns_differ(columns, file, error) from None

        with ThreadPoolExecutor(READERS) as readers:
            table = pyarrow.concat_tables(readers.map(read, pieces))
        images = to_dataset(table)
        if with_images:
            return select_columns(images, self.column, label)
        return images if label == "label" else images.rename_column(label, "label")

    def distinct_values(self, column: str) -> pyarrow.ChunkedArray:
        """Return the distinct values of a column in all files that have rows, such as the labels."""
        filled = [self.files[number] for number in np.flatnonzero(self.file_sizes)]  # others may lack the column
        return distinct_values(filled, column, self.features.arrow_schema.field(column).type)


def known_columns(schema: pyarrow.Schema) -> Features:
    """Return the columns of a parquet file, without those whose types `datasets` does not know, such as maps.

    Images and labels have other types, and no other column is read.
    """

    def is_known(field: pyarrow.Field) -> bool:
        try:
            Features.from_arrow_schema(pyarrow.schema([field]))
        except ValueError:
            return False
        return True

    return Features.from_arrow_schema(pyarrow.schema(filter(is_known, schema), schema.metadata))


def parquet_splits(files: dict[str, list[str]], config: ImageSettings) -> dict[str, ParquetShards]:
    """Return the shards of each split, with the column of images found by a look at some training images.

    Args:
        files: local paths or URLs by split, the training split first.
        config: may name the columns.

    Raises:
        ConfigurationError: a file cannot be read, the files number the classes differently, or a split lacks the column
            of images.
    """
    splits = {name: ParquetShards(paths) for name, paths in files.items()}
    filled = [split for split in splits.values() if len(split)]
    first_files = [(split.files[int(np.argmax(split.file_sizes > 0))], split.class_names) for split in filled]
    between_splits = class_conflicts(first_files)
    for split in splits.values():
        label = config.label_column or getattr(find_label_column(split.features, "", config), "name", None)
        for conflicts in (json.loads(split.metadata[b"conflicts"]), between_splits):
            if label in conflicts:
                raise ConfigurationError(conflicts[label])
    train = next(iter(splits.values()))
    if len(train):
        column = find_image_column(train.features, train.sample_rows, config)
        for split in filled:
            check_has_images(split.features, column.name, config)
            split.column = column
    return splits


def read_some_rows(source: IO[bytes], file: str, group: int, columns: list[str], number: int) -> pyarrow.Table:
    """Return `number` rows of a row group, always the same ones, without holding the others in memory.

    They are drawn at random, because labels often follow a pattern. The row group is read in small batches, also
    because Arrow cannot return 2 GB of a column of structs in one piece.
    """
    shard = open_parquet(source, file, buffer_size=BUFFER_BYTES)
    size = shard.metadata.row_group(group).num_rows
    chosen = np.sort(np.random.default_rng(0).permutation(size)[:number])
    parts, start = [], 0
    for batch in shard.iter_batches(BATCH_ROWS, row_groups=[group], columns=columns, use_threads=False):
        first, stop = np.searchsorted(chosen, (start, start + len(batch)))
        parts.append(batch.take(pyarrow.array(chosen[first:stop] - start)) if number < size else batch)
        start += len(batch)
    return pyarrow.Table.from_batches(parts)


def open_parquet(source: IO[bytes], file: str, **options: object) -> parquet.ParquetFile:
    footer = remote_footer(file) if is_remote(file) else None
    # No pre_buffer: its threads call Python, and may do so even after the interpreter has shut down.
    return parquet.ParquetFile(source, metadata=footer, pre_buffer=False, **options)


def read_first_rows(source: IO[bytes], file: str, group: int, column: str, rows: int) -> list[object]:
    shard = open_parquet(source, file, buffer_size=FIRST_BYTES)
    batches = shard.iter_batches(rows, row_groups=[group], columns=[column], use_threads=False)
    return stored_values(next(batches)[column])


def streamed(row: object, place: str, root: str) -> dict[str, object]:
    """Return the image of a row as decode_image takes it; `place` serves as its path if it has none."""
    try:
        image = undecoded(row, root)
    except DecodeError as error:
        return {"bytes": b"", "path": f"{place}, {error}"}
    if image["bytes"] is None and image["path"] is None:
        image["bytes"] = b""  # a row without an image
    return {**image, "path": image["path"] or place}


class RowGroup:
    """Reads one column of a row group, and holds no more than a page and the requested rows.

    If even a page takes more than `max_held_bytes`, it is dropped after each call, and the next call reads the row
    group from its first row.
    """

    def __init__(self, file: str, group: int, column: str, size: int, max_held_bytes: int = MAX_HELD_BYTES) -> None:
        self.file, self.group, self.column, self.size = file, group, column, size
        self.max_held_bytes = max_held_bytes
        self.source: IO[bytes] | None = None

    def read(self, first: int, stop: int) -> list[object]:
        """Return the values of rows `first` to `stop`. Earlier rows need a new start at the first row of the group.

        Raises:
            ConfigurationError: the file is missing or damaged, or the network fails.
        """
        return with_retries(self.file, functools.partial(self.read_once, first, stop))

    def read_once(self, first: int, stop: int) -> list[object]:
        rows: list[object] = []
        try:
            if self.source is None or first < self.batch_start:
                self.start()
            while first < stop:
                if first < self.batch_start + len(self.batch):
                    part = self.batch.slice(first - self.batch_start, stop - first)
                    rows += stored_values(part)
                    first += len(part)
                else:
                    self.batch_start += len(self.batch)
                    batch = next(self.batches, None)
                    if batch is None:
                        raise EOFError(f"row group {self.group} ends at row {self.batch_start}")
                    self.batch = batch[self.column]
        except BaseException:
            self.close()
            raise
        if stop == self.size or self.page_bytes > self.max_held_bytes:
            self.close()
        return rows

    def start(self) -> None:
        self.close()
        self.source = open_shard(self.file)
        shard = open_parquet(self.source, self.file, buffer_size=BUFFER_BYTES)
        self.batches = shard.iter_batches(BATCH_ROWS, row_groups=[self.group], columns=[self.column], use_threads=False)
        self.batch_start, self.batch = 0, pyarrow.nulls(0)
        self.page_bytes = max_page_bytes(shard.metadata.row_group(self.group), self.column)

    def close(self) -> None:
        if self.source is not None:
            self.source.close()
        self.source = self.batches = self.batch = None

    def __del__(self) -> None:
        self.close()


def max_page_bytes(group: parquet.RowGroupMetaData, column: str) -> int:
    """Return the memory of a page, as stored and decompressed, if it was written with pyarrow's default size."""
    parts = [group.column(i) for i in range(group.num_columns)]
    parts = [part for part in parts if part.path_in_schema.split(".")[0] == column]
    total = sum(
        part.total_uncompressed_size + part.total_compressed_size * (part.compression != "UNCOMPRESSED")
        for part in parts
    )
    return total * min(group.num_rows, PAGE_ROWS) // max(group.num_rows, 1)
