"""Small Arrow tables kept between starts, below ~/.cache/m2t_accel (or $XDG_CACHE_HOME/m2t_accel)."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow
import pyarrow.feather

from m2t_accel.data.shards import is_remote, unreadable_shard

CACHE_VERSION = 6  # of what is kept; another one is not read


def times_of_change(status: os.stat_result) -> list[int]:
    """Both times in ns: the first can be set back, as tar and rsync do; the second cannot."""
    return [status.st_mtime_ns, status.st_ctime_ns]


def kept_for_files(
    kind: str, files: Sequence[str], build: Callable[[Sequence[str]], pyarrow.Table], *words: str
) -> pyarrow.Table:
    """The table built of some files, kept for as long as their sizes and times are the same, and the words."""
    kept = place_for_files(kind, files, *words)
    table = read_cache(kept)
    if table is None:
        table = build(files)
        write_cache(kept, table)
    return table


def place_for_files(kind: str, files: Sequence[str], *words: str) -> Path:
    """Where something is kept of files as they are now."""
    return cache_file(kind, json.dumps([*words, *(file_fingerprint(file) for file in files)]))


def file_fingerprint(file: str) -> list[object]:
    """What says that a local file is the same; a remote one is named with its revision, and does not change."""
    if is_remote(file):
        return [file]
    try:
        status = os.stat(file)
    except OSError as error:
        raise unreadable_shard(file, error) from None
    return [os.path.realpath(file), status.st_size, status.st_ino, *times_of_change(status)]


def cache_file(kind: str, key: str) -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    kind = f"{kind}-{CACHE_VERSION}"
    return Path(root, "m2t_accel", f"{kind}-{hashlib.sha256(key.encode()).hexdigest()[:32]}.arrow")


def read_cache(path: Path) -> pyarrow.Table | None:
    """The table kept in the file; None if there is none, or it is broken."""
    try:
        # Not mapped: a process may hold 65 530 maps, and there may be more tars.
        with pyarrow.OSFile(str(path)) as source:
            return pyarrow.ipc.open_file(source).read_all()
    except (OSError, pyarrow.ArrowInvalid):
        return None


def write_cache(path: Path, table: pyarrow.Table) -> None:
    """Keep the table, whole or not at all; a cache that cannot be written only costs time."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            try:
                pyarrow.feather.write_feather(table, file, compression="uncompressed")
            except OSError:  # the disk is full
                os.unlink(file.name)
                raise
        os.replace(file.name, path)
    except OSError:
        return
