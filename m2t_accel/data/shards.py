"""Images that are read in pieces: the protocol of their sources, and access to local and remote files."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from typing import IO, Protocol, TypeVar, runtime_checkable

import fsspec
import numpy as np
import pyarrow
from datasets import Dataset, DatasetInfo

from m2t_accel.config.fields import ConfigurationError, one_line

Read = TypeVar("Read")
ATTEMPTS = 5  # at reading from a network, with 1, 2, 4 and 8 seconds between them
HELD = 1 << 30  # bytes that all readers of a process may hold of the pieces that they have begun

# What reads rows `first` to `stop` of a piece: the samples (n,) int64 and their n undecoded images.
Reader = Callable[[int, int], tuple[np.ndarray, list[dict[str, object]]]]


@runtime_checkable
class Shards(Protocol):
    """Images in pieces, some of them empty; a sample is the number of a row, over all of them."""

    piece_sizes: np.ndarray  # (P,) int32, images of each piece

    def __len__(self) -> int: ...

    def open(self, piece: int, may_hold: int = HELD) -> Reader:
        """What reads a piece; rows that are asked for in their order are read once, if for that it need not hold more
        than so many bytes between two calls.
        """
        ...


def dataset_of(table: pyarrow.Table, info: DatasetInfo | None = None) -> Dataset:
    """The table as a Dataset, with a name of ours: for one of its own `datasets` would put the whole into one chunk."""
    return Dataset(table, info, fingerprint=uuid.uuid4().hex[:16])


def in_attempts(file: str, read: Callable[[IO[bytes]], Read]) -> Read:
    """What `read` makes of an open shard; a remote one is tried again when it fails.

    Raises:
        ConfigurationError: the file is missing or cut, or the network stays away.
    """

    def open_and_read() -> Read:
        with open_shard(file) as source:
            return read(source)

    return attempts(file, open_and_read)


def attempts(file: str, read: Callable[[], Read]) -> Read:
    """As in_attempts, where `read` opens the shard itself."""
    for attempt in range(ATTEMPTS):
        try:
            return read()
        except ConfigurationError:
            raise
        except Exception as error:  # of pyarrow, fsspec, huggingface_hub and httpx: no common ancestor
            if not is_remote(file) or isinstance(error, FileNotFoundError) or attempt == ATTEMPTS - 1:
                raise unreadable_shard(file, error) from error
            time.sleep(2**attempt)
    raise AssertionError("not reached")


def is_remote(file: str) -> bool:
    return "://" in file


def open_shard(file: str) -> IO[bytes]:
    """A file, local or remote, open for reading at any place."""
    if not is_remote(file):
        return open(file, "rb")
    filesystem, path = fsspec.core.url_to_fs(file)
    return filesystem.open(path, "rb", cache_type="none")  # pyarrow asks for what it needs


def unreadable_shard(file: str, error: Exception) -> ConfigurationError:
    return ConfigurationError(
        f"the shard {file} cannot be read ({one_line(error)}): it is missing, cut or no parquet file; fetch it again, "
        "or move it away and start anew"
    )
