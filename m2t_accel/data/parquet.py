"""Images in row groups of parquet files, local or remote, read piece by piece."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import IO

import numpy as np
import pyarrow
from datasets import Dataset, Features
from pyarrow import parquet

from m2t_accel.config.fields import ConfigurationError, one_line
from m2t_accel.data.parquet_index import class_names, columns_differ, index_parquet, index_values, remote_footer
from m2t_accel.data.shards import HELD, Reader, attempts, dataset_of, in_attempts, is_remote, open_shard

READERS = 8  # threads that read what is then held in memory
ROWS = 64  # of a row group, that are decoded at once

# Bytes of a row group that are read at once: one of 4320 of ImageNet's images, 500 MB, took 0.15 s and 0.1 GB so, in
# rows from begin to end; 0.33 s with 1 MB, 0.16 s with 32; and as a whole 0.8 s and 2 GB.
BUFFER = 8 << 20
PAGE_ROWS = 1024  # of a page that pyarrow writes, if nobody tells it otherwise


class ParquetShards:
    """The row groups of parquet files; nothing of them is copied to a disk."""

    def __init__(self, files: Sequence[str]) -> None:
        """Of these files, paths or URLs."""
        self.files = files
        self.column = "image"  # of the images
        index = index_parquet(files)
        self.metadata = index.schema.metadata
        groups = index["rows"].combine_chunks()
        self.starts = groups.offsets.to_numpy()  # (F + 1,) int32, the first piece of each file
        # The only array of all row groups: of the ten million of a billion images it takes 40 MB.
        self.set_sizes(groups.values.to_numpy())

    @property
    def features(self) -> Features:
        """The columns of the files.

        Raises:
            ConfigurationError: what `datasets` has written of them is damaged.
        """
        try:
            return Features.from_arrow_schema(self.schema)
        except Exception as error:  # of json and of whatever is made of its words
            raise ConfigurationError(
                f"the columns of {self.files[0]} cannot be told ({one_line(error)}): write it anew"
            ) from None

    @property
    def schema(self) -> pyarrow.Schema:
        schema = bytes.fromhex(self.metadata[b"schema"].decode())
        return pyarrow.ipc.read_schema(pyarrow.py_buffer(schema))

    @property
    def columns(self) -> list[str]:
        return self.schema.names

    @property
    def class_names(self) -> dict[str, list[str]]:
        """The classes of each column of class labels."""
        return class_names((self.schema.metadata or {}).get(b"huggingface", b"{}"))

    @property
    def conflicts(self) -> dict[str, str]:
        """As class_conflicts has found them."""
        return json.loads(self.metadata[b"conflicts"])

    def __len__(self) -> int:
        return int(self.piece_sizes.sum(dtype=np.int64))

    def set_sizes(self, piece_sizes: np.ndarray) -> None:
        self.piece_sizes = piece_sizes
        self.file_sizes, filled = np.zeros(len(self.files), np.int64), np.diff(self.starts) > 0
        if filled.any():
            self.file_sizes[filled] = np.add.reduceat(piece_sizes, self.starts[:-1][filled], dtype=np.int64)
        self.firsts = np.cumsum(self.file_sizes) - self.file_sizes  # the first sample of each file

    def select(self, chosen: np.ndarray) -> ParquetShards:
        """The same with all pieces empty but those chosen: (P,) bool."""
        some = copy.copy(self)
        some.set_sizes(self.piece_sizes * chosen)
        return some

    def place(self, piece: int) -> tuple[int, int]:
        """The number of a piece's file, and that of the row group in it."""
        file = int(np.searchsorted(self.starts, piece, side="right")) - 1
        return file, piece - int(self.starts[file])

    def first_sample(self, piece: int) -> int:
        file, _ = self.place(piece)
        return int(self.firsts[file] + self.piece_sizes[self.starts[file] : piece].sum(dtype=np.int64))

    def open(self, piece: int, may_hold: int = HELD) -> Reader:
        file, group = self.place(piece)
        begin = self.first_sample(piece)
        rows = RowGroup(self.files[file], group, self.column, int(self.piece_sizes[piece]), may_hold)

        def read(first: int, stop: int) -> tuple[np.ndarray, list[dict[str, object]]]:
            place = f"of row group {group} of {self.files[file]}"
            images = [
                undecoded(row, f"row {number} {place}") for number, row in enumerate(rows.read(first, stop), first)
            ]
            return begin + np.arange(first, stop), images

        return read

    def dataset(self, pieces: np.ndarray, columns: list[str]) -> Dataset:
        """Some of the pieces in memory.

        Raises:
            ConfigurationError: a file is missing or cut, the network stays away, or the files' columns differ.
        """
        schema = Features({name: self.features[name] for name in columns}).arrow_schema

        def read(piece: int) -> pyarrow.Table:
            number, group = self.place(int(piece))
            file = self.files[number]
            part = in_attempts(file, functools.partial(read_row_group, file=file, group=group, columns=columns))
            try:
                return part.select(columns).cast(schema)
            except pyarrow.ArrowException as error:
                raise columns_differ(columns, file, error) from None

        with ThreadPoolExecutor(READERS) as readers:
            return dataset_of(pyarrow.concat_tables(readers.map(read, pieces)))

    def values(self, column: str) -> pyarrow.ChunkedArray:
        """The different values of a column in all files, such as the labels."""
        filled = [self.files[number] for number in np.flatnonzero(self.file_sizes)]  # others may have no such column
        return index_values(filled, column, self.features.arrow_schema.field(column).type)


def read_row_group(source: IO[bytes], file: str, group: int, columns: list[str]) -> pyarrow.Table:
    return open_parquet(source, file).read_row_group(group, columns=columns, use_threads=False)


def open_parquet(source: IO[bytes], file: str, **options: object) -> parquet.ParquetFile:
    footer = remote_footer(file) if is_remote(file) else None
    # Not pre_buffer: its threads call Python, and may still do so when the interpreter has gone.
    return parquet.ParquetFile(source, metadata=footer, pre_buffer=False, **options)


def undecoded(row: object, place: str) -> dict[str, object]:
    """The image of a row as m2t_accel.decode takes it; `place` is what stands for a path if it has none."""
    content, path = row, None
    if isinstance(row, dict):
        content, path = row.get("bytes"), row.get("path")
    elif isinstance(row, str):
        content, path = None, row
    if content is None and path is None:
        content = b""  # a row without an image
    return {"bytes": content, "path": path or place}


class RowGroup:
    """A row group's column, read onwards: of a large one nothing is held but the rows asked for and a page.

    Where even a page is more than `may_hold` bytes, it is let go of after each call, and the next reads from the begin.
    """

    def __init__(self, file: str, group: int, column: str, size: int, may_hold: int = HELD) -> None:
        self.file, self.group, self.column, self.size, self.may_hold = file, group, column, size, may_hold
        self.source: IO[bytes] | None = None

    def read(self, first: int, stop: int) -> list[object]:
        """The values of some rows; those before the rows of the last call are found by reading from the begin.

        Raises:
            ConfigurationError: the file is missing or cut, or the network stays away.
        """
        return attempts(self.file, functools.partial(self.read_once, first, stop))

    def read_once(self, first: int, stop: int) -> list[object]:
        rows: list[object] = []
        try:
            if self.source is None or first < self.begin:
                self.start()
            while first < stop:
                if first < self.begin + len(self.batch):
                    part = self.batch.slice(first - self.begin, stop - first)
                    rows += part.to_pylist()
                    first += len(part)
                else:
                    self.begin += len(self.batch)
                    batch = next(self.batches, None)
                    if batch is None:
                        raise EOFError(f"row group {self.group} ends at row {self.begin}")
                    self.batch = batch[self.column]
        except BaseException:
            self.close()
            raise
        if stop == self.size or self.page > self.may_hold:
            self.close()
        return rows

    def start(self) -> None:
        self.close()
        self.source = open_shard(self.file)
        shard = open_parquet(self.source, self.file, buffer_size=BUFFER)
        self.batches = shard.iter_batches(ROWS, row_groups=[self.group], columns=[self.column], use_threads=False)
        self.begin, self.batch = 0, pyarrow.nulls(0)  # the row that a batch begins with
        self.page = page_bytes(shard.metadata.row_group(self.group), self.column)

    def close(self) -> None:
        if self.source is not None:
            self.source.close()
        self.source = self.batches = self.batch = None

    def __del__(self) -> None:
        self.close()


def page_bytes(group: parquet.RowGroupMetaData, column: str) -> int:
    """What a page of a column takes at most, if its writer was not told otherwise: as it is read, and decompressed."""
    parts = [group.column(i) for i in range(group.num_columns)]
    parts = [part for part in parts if part.path_in_schema.split(".")[0] == column]
    whole = sum(
        part.total_uncompressed_size + part.total_compressed_size * (part.compression != "UNCOMPRESSED")
        for part in parts
    )
    return whole * min(group.num_rows, PAGE_ROWS) // max(group.num_rows, 1)
