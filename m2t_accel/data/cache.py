"""Small Arrow tables kept between runs, in ~/.cache/m2t_accel or $XDG_CACHE_HOME/m2t_accel."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow
import pyarrow.feather

from m2t_accel.data.shards import is_remote, unreadable_shard
from m2t_accel.files import atomic_write

CACHE_VERSION = 11  # increase it when the content of a table changes; tables of other versions are ignored


def cached_table(
    kind: str, files: Sequence[str], build: Callable[[Sequence[str]], pyarrow.Table], *parameters: str
) -> pyarrow.Table:
    """Return build(files), from the cache if neither the files nor the parameters have changed.

    Raises:
        ConfigurationError: a file is missing.
    """
    path = cache_path(kind, json.dumps([*parameters, *(file_fingerprint(file) for file in files)]))
    table = read_cache(path)
    if table is None:
        table = build(files)
        write_cache(path, table)
    return table


def file_fingerprint(file: str) -> list[object]:
    """Return what identifies the content of a file: its path, size, inode and times.

    The name of a remote file contains its revision, so the name is enough.
    """
    if is_remote(file):
        return [file]
    status = file_status(file)
    return [os.path.realpath(file), status.st_size, status.st_ino, *times_of_change(status)]


def file_status(file: str) -> os.stat_result:
    """Return os.stat(file).

    Raises:
        ConfigurationError: the file is missing.
    """
    try:
        return os.stat(file)
    except OSError as error:
        raise unreadable_shard(file, error) from None


def times_of_change(status: os.stat_result) -> list[int]:
    """Return the times of change of content and status, in ns; tar and rsync set back the first, but not the second."""
    return [status.st_mtime_ns, status.st_ctime_ns]


def cache_path(kind: str, key: str) -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    digest = hashlib.sha256(key.encode()).hexdigest()[:32]
    return Path(root, "m2t_accel", f"{kind}-{CACHE_VERSION}-{digest}.arrow")


def read_cache(path: Path) -> pyarrow.Table | None:
    """Return the table in a file; None if the file is missing or damaged."""
    try:
        # Not memory-mapped: Linux allows a process 65 530 maps, and a dataset may have more tars.
        with pyarrow.OSFile(str(path)) as source:
            return pyarrow.ipc.open_file(source).read_all()
    except (OSError, pyarrow.ArrowInvalid):
        return None


def write_cache(path: Path, table: pyarrow.Table) -> None:
    """Write a table atomically; if that fails, the next run builds the table again."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as temporary:
            pyarrow.feather.write_feather(table, str(temporary), compression="uncompressed")
