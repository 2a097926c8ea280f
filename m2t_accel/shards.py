"""Images that are read piece by piece: row groups of parquet files, local or remote, and runs of a tar's images."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import IO, Protocol, runtime_checkable

import numpy as np
import pyarrow
from datasets import Dataset, Features
from pyarrow import parquet

from m2t_accel.index import READERS, in_attempts, index_parquet, read_footer, unreadable_shard
from m2t_accel.settings import ConfigurationError, in_short

TAR_RUN = 64  # images of a tar that are read at once: of ImageNet's, 7 MB


@runtime_checkable
class Shards(Protocol):
    """Images in pieces; a sample is the number of a row, over all of them."""

    piece_sizes: np.ndarray  # (P,) int32, images of each piece

    def __len__(self) -> int: ...

    def read(self, piece: int, first: int, stop: int) -> tuple[np.ndarray, list[dict[str, object]]]:
        """Some rows of a piece: the samples (n,) int64 and their n undecoded images."""
        ...


class ParquetShards:
    """The row groups of parquet files; nothing of them is copied to a disk."""

    def __init__(self, files: Sequence[str], pieces: pyarrow.Table | None = None) -> None:
        """Of these files, paths or URLs; `pieces` are rows of `index_parquet`, with `first`, the number of a row."""
        self.files = files
        if pieces is None:
            pieces = index_parquet(files)
            sizes = pieces["rows"].to_numpy()
            pieces = pieces.append_column("first", pyarrow.array(np.cumsum(sizes, dtype=np.int64) - sizes))
        self.pieces = pieces
        self.file, self.group, self.first = (pieces[name].to_numpy() for name in ("file", "group", "first"))
        self.piece_sizes = pieces["rows"].to_numpy()
        self.column = "image"  # of the images

    @property
    def features(self) -> Features:
        """The columns of the files."""
        schema = bytes.fromhex(self.pieces.schema.metadata[b"schema"].decode())
        return Features.from_arrow_schema(pyarrow.ipc.read_schema(pyarrow.py_buffer(schema)))

    def __len__(self) -> int:
        return int(self.piece_sizes.sum(dtype=np.int64))

    def select(self, pieces: np.ndarray) -> ParquetShards:
        """Some of the pieces; their samples keep their numbers."""
        chosen = ParquetShards(self.files, self.pieces.take(pyarrow.array(pieces)))
        chosen.column = self.column
        return chosen

    def read(self, piece: int, first: int, stop: int) -> tuple[np.ndarray, list[dict[str, object]]]:
        column = self.table(piece, [self.column])[self.column].slice(first, stop - first).to_pylist()
        images = []
        for i, row in enumerate(column):
            content, path = row, None
            if isinstance(row, dict):
                content, path = row.get("bytes"), row.get("path")
            elif isinstance(row, str):
                content, path = None, row
            if content is None and path is None:
                content = b""  # a row without an image
            place = f"row {first + i} of row group {self.group[piece]} of {self.files[self.file[piece]]}"
            images.append({"bytes": content, "path": path or place})
        return self.first[piece] + np.arange(first, stop), images

    def table(self, piece: int, columns: list[str]) -> pyarrow.Table:
        """A row group.

        Raises:
            ConfigurationError: its file is missing or cut, or the network stays away.
        """
        file = self.files[self.file[piece]]

        def read_group(source: IO[bytes]) -> pyarrow.Table:
            # Not pre_buffer: its threads call Python, and may still do so when the interpreter has gone.
            shard = parquet.ParquetFile(source, metadata=read_footer(file), pre_buffer=False)
            return shard.read_row_group(int(self.group[piece]), columns=columns, use_threads=False)

        return in_attempts(file, read_group)

    def dataset(self, pieces: np.ndarray, columns: list[str]) -> Dataset:
        """Some of the pieces in memory."""
        features = self.features
        features = Features({name: features[name] for name in columns})
        tables = [self.table(int(piece), columns).select(columns) for piece in pieces]
        try:
            return Dataset(pyarrow.concat_tables([table.cast(features.arrow_schema) for table in tables]))
        except pyarrow.ArrowException as error:
            raise ConfigurationError(
                f"the columns {', '.join(columns)} differ from {self.files[0]} to others ({in_short(error)}): "
                "give a folder of files that belong together"
            ) from None

    def values(self, column: str) -> pyarrow.ChunkedArray:
        """A column of all pieces, such as the labels."""
        kind = self.features.arrow_schema.field(column).type
        with ThreadPoolExecutor(READERS) as readers:
            parts = readers.map(lambda piece: self.table(piece, [column])[column].cast(kind), range(len(self.file)))
            return pyarrow.chunked_array([chunk for part in parts for chunk in part.chunks], kind)


class TarShards:
    """Runs of the images that lie one after the other in tar files, each read at once."""

    def __init__(self, images: Dataset) -> None:
        """Of images with columns `image`, `offset` and `size`, in the order of the files."""
        table = images.with_format("arrow")
        paths = table["image"][:].combine_chunks().field("path").dictionary_encode()
        self.files = paths.dictionary.to_pylist()
        self.file = paths.indices.to_numpy()
        self.offset, self.size = (table[name][:].to_numpy() for name in ("offset", "size"))
        # A run ends after TAR_RUN images, and where its file ends.
        starts = np.flatnonzero(np.diff(self.file, prepend=-1))
        ends = np.append(starts[1:], len(self.file))
        runs = [np.arange(start, end, TAR_RUN) for start, end in zip(starts, ends, strict=True)]
        self.starts = np.concatenate(runs)
        self.piece_sizes = np.diff(np.append(self.starts, len(self.file))).astype(np.int32)

    def __len__(self) -> int:
        return len(self.file)

    def read(self, piece: int, first: int, stop: int) -> tuple[np.ndarray, list[dict[str, object]]]:
        """As of Shards.

        Raises:
            ConfigurationError: the file is missing.
        """
        samples = np.arange(self.starts[piece] + first, self.starts[piece] + stop)
        file, begin = self.files[self.file[samples[0]]], int(self.offset[samples[0]])
        end = int(self.offset[samples[-1]] + self.size[samples[-1]])
        try:
            with open(file, "rb") as source:
                content = os.pread(source.fileno(), end - begin, begin)
        except OSError as error:
            raise unreadable_shard(file, error) from None
        places = zip(self.offset[samples] - begin, self.size[samples], strict=True)
        return samples, [
            {"bytes": content[at : at + size], "path": f"{file}, {size} bytes at {begin + at}"} for at, size in places
        ]
