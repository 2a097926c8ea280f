"""The protocol of image sources that are read in pieces, and functions that read local and remote files."""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Callable
from typing import IO, Protocol, TypeVar, runtime_checkable

import fsspec
import numpy as np
import pyarrow
from datasets import Dataset, DatasetInfo

from m2t_accel.config.fields import ConfigurationError, one_line
from m2t_accel.data.headers import LFS_POINTER

Result = TypeVar("Result")
RETRY_DELAYS = (1, 2, 4, 8)  # seconds before a remote file is tried again
BUILDER = "m2t_accel"  # marks a Dataset whose columns are those of ImageData, whatever columns a user's table has
MAX_HELD_BYTES = 1 << 30  # memory that all readers of a process together may hold between two reads

# A function of the first row and the stop row in a piece. It returns n sample numbers, int64, and n undecoded images.
Reader = Callable[[int, int], tuple[np.ndarray, list[dict[str, object]]]]


@runtime_checkable
class Shards(Protocol):
    """Images stored in pieces: row groups of parquet files, or runs of images in tars. A piece may be empty.

    Samples are numbered from 0 through all pieces, in their order.
    """

    piece_sizes: np.ndarray  # (P,) int32, images in each piece

    def __len__(self) -> int: ...

    def open(self, piece: int, max_held_bytes: int = MAX_HELD_BYTES) -> Reader:
        """Return a reader of one piece.

        If the calls ask for rows in ascending order, each row is read once, unless the reader would have to hold more
        than `max_held_bytes` between two calls.
        """
        ...


def to_dataset(table: pyarrow.Table, info: DatasetInfo | None = None) -> Dataset:
    """Return a table with the columns of ImageData as a Dataset, marked as such in its info.

    It gets a random fingerprint, because `datasets` would compute its own by copying the whole table into one chunk.
    """
    return Dataset(table, info or DatasetInfo(builder_name=BUILDER), fingerprint=uuid.uuid4().hex[:16])


def is_standard(images: Dataset) -> bool:
    """Return whether `to_dataset` made this Dataset, so that no column of it is a user's."""
    return images.info.builder_name == BUILDER


def read_file(file: str, read: Callable[[IO[bytes]], Result]) -> Result:
    """Open a local or remote file and return the result of `read`; see with_retries."""

    def open_and_read() -> Result:
        with open_shard(file) as source:
            return read(source)

    return with_retries(file, open_and_read)


def with_retries(file: str, read: Callable[[], Result]) -> Result:
    """Return the result of `read`; if the file is remote, call it up to five times until it succeeds.

    Raises:
        ConfigurationError: the file is missing or damaged, or the network fails.
    """
    for delay in (*RETRY_DELAYS, None):
        try:
            return read()
        except ConfigurationError:
            raise
        except Exception as error:  # pyarrow, fsspec, huggingface_hub and httpx have no common base class
            if delay is None or not is_remote(file) or isinstance(error, FileNotFoundError):
                raise unreadable_shard(file, error) from error
            time.sleep(delay)
    raise AssertionError


def is_lfs_pointer(file: str) -> bool:
    with contextlib.suppress(OSError):
        if not is_remote(file):
            with open(file, "rb") as source:
                return source.read(len(LFS_POINTER)) == LFS_POINTER
    return False


def is_remote(file: str) -> bool:
    return "://" in file


def open_shard(file: str) -> IO[bytes]:
    """Open a local or remote file for reading at any position."""
    if not is_remote(file):
        return open(file, "rb")
    filesystem, path = fsspec.core.url_to_fs(file)
    return filesystem.open(path, "rb", cache_type="none")  # pyarrow asks for exactly the bytes that it needs


def unreadable_shard(file: str, error: Exception) -> ConfigurationError:
    if is_lfs_pointer(file):
        return ConfigurationError(
            f"the shard {file} is a pointer of git-lfs, not the shard itself: type `git lfs pull` in its repository"
        )
    advice = "it is missing, truncated or damaged; download it again, or move it away and start again"
    if is_remote(file):
        advice = "the server or the network has failed, or the shard is damaged there; try again later"
    return ConfigurationError(f"the shard {file} cannot be read ({one_line(error)}): {advice}")
