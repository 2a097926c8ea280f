"""What is in a folder or in parquet files: found in one scan, and kept with a fingerprint for the next start.

Kept are small Arrow files below ~/.cache/m2t_accel (or $XDG_CACHE_HOME/m2t_accel); removing them costs a scan.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import os
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, NamedTuple, TypeVar

import cachetools
import fsspec
import numpy as np
import pyarrow
import pyarrow.feather
from pyarrow import compute, parquet

from m2t_accel.progress import late_progress_bar
from m2t_accel.settings import ConfigurationError, in_short

Read = TypeVar("Read")

OF_JPEG = (".jpg", ".jpeg", ".jpe", ".jfif")
IMAGE_EXTENSIONS = frozenset(
    (*OF_JPEG, ".png", ".webp", ".avif", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm", ".jp2")
)
SHARD_EXTENSIONS = (".parquet", ".tar")
NOT_OURS = ("@eaDir", "__MACOSX")  # folders in which a NAS and macOS keep thumbnails and what else they know
SOME = 10_000  # entries of a folder, after which it is told how many there are
CLASSES = "ClassLabel"  # as `datasets` calls it in what it writes
SETTLED = 2.0  # seconds; what was changed so short a time before its scan may change again under the same time stamp
LAYOUT = 6  # of what is kept; another one is not read
ATTEMPTS = 5  # at reading from a network, with 1, 2, 4 and 8 seconds between them
READERS = 32  # threads that read the ends of shards
FOOTERS = 16 << 20  # bytes of remote footers that are kept; in memory they take up to three times as much


# --- files of a folder


class FoundFiles(NamedTuple):
    """What is in a folder, at any depth; hidden entries left out. A link that leads nowhere counts as a file."""

    paths: list[str]  # of images and shards (parquet, tar), relative, sorted
    others: dict[str, int]  # the number of all other files by their extension


def find_files(folder: Path) -> FoundFiles:
    """Images and shards at any depth, and how many other files; one scan.

    The scan is kept with the times at which each folder was last changed, so a second start looks at the folders only;
    except where a link leads nowhere.

    Raises:
        ConfigurationError: a folder cannot be read, or a name is not UTF-8.
    """
    kept = cache_file("folder", str(folder.resolve()))
    known = read_cache(kept)
    if known is not None and is_unchanged(folder, json.loads(known.schema.metadata[b"folders"])):
        return FoundFiles(known["path"].to_pylist(), json.loads(known.schema.metadata[b"others"]))
    started = time.time()
    paths, others, folders, dangling = scan(folder)
    paths.sort()
    # What a link leads to may come back, as a disk does, without a change of any folder.
    if not dangling and max(max(times) for times in folders.values()) < (started - SETTLED) * 1e9:
        table = pyarrow.table({"path": pyarrow.array(paths, pyarrow.string())})
        metadata = {"folders": json.dumps(folders), "others": json.dumps(others)}
        write_cache(kept, table.replace_schema_metadata(metadata))
    return FoundFiles(paths, others)


def scan(folder: Path) -> tuple[list[str], dict[str, int], dict[str, list[int]], bool]:
    """Images and shards below the folder, the number of other files, each folder's times of change, and whether there
    is a link that leads nowhere.
    """
    paths, others, folders, any_dangling = [], Counter(), {}, False
    pending: list[tuple[str, frozenset]] = [("", frozenset())]
    bar = late_progress_bar(f"looking for images in {folder}", " files")
    try:
        while pending:
            below, above = pending.pop()
            bar.update(len(paths) - bar.n)
            status = os.stat(os.path.join(folder, below))
            if (status.st_dev, status.st_ino) in above:  # a link back to a folder above
                continue
            above |= {(status.st_dev, status.st_ino)}
            folders[below] = times_of_change(status)
            with os.scandir(os.path.join(folder, below)) as entries:
                for number, entry in enumerate(entries, 1):
                    if number % SOME == 0:
                        bar.update(len(paths) - bar.n)
                    if is_hidden(entry.name):
                        continue
                    path = f"{below}/{entry.name}" if below else entry.name
                    if entry.is_dir():
                        pending.append((path, above))
                        continue
                    dangling = entry.is_symlink() and not os.path.exists(entry.path)
                    any_dangling |= dangling
                    if dangling or entry.is_file():
                        extension = os.path.splitext(entry.name)[1].lower()
                        if extension in IMAGE_EXTENSIONS or extension in SHARD_EXTENSIONS:
                            path.encode()
                            paths.append(path)
                        else:
                            others[extension.encode(errors="replace").decode()] += 1
    except OSError as error:
        raise ConfigurationError(f"--dataset {folder}: {error.filename} cannot be read ({error.strerror})") from None
    except UnicodeEncodeError as error:
        name = error.object.encode(errors="backslashreplace").decode()
        raise ConfigurationError(f"--dataset {folder}: the file name {name} is not UTF-8; rename it") from None
    finally:
        bar.close()
    return paths, dict(sorted(others.items())), folders, any_dangling


def times_of_change(status: os.stat_result) -> list[int]:
    """Both times in ns: the first can be set back, as tar and rsync do; the second cannot."""
    return [status.st_mtime_ns, status.st_ctime_ns]


def is_hidden(name: str) -> bool:
    return name.startswith(".") or name in NOT_OURS


def is_unchanged(folder: Path, folders: dict[str, list[int]]) -> bool:
    try:
        return all(times_of_change(os.stat(os.path.join(folder, below))) == times for below, times in folders.items())
    except OSError:
        return False


# --- row groups of parquet files


def index_parquet(files: Sequence[str]) -> pyarrow.Table:
    """The row groups of parquet files, local or remote (`hf://…`): of each file `rows`, a list of the rows of each.

    The schema is that of the first file with rows; `conflicts` are those of class_conflicts.

    Raises:
        ConfigurationError: a file is missing, cut or no parquet, or its columns are not those of the first.
    """
    return kept_for_files("parquet", files, read_outlines)


class Outline(NamedTuple):
    """What is kept of a parquet file while a set is indexed; its whole footer takes much more."""

    columns: list[str]
    class_names: dict[str, list[str]]  # of the columns that `datasets` has written as class labels
    rows: np.ndarray  # (groups,) int32


def read_outlines(files: Sequence[str]) -> pyarrow.Table:
    with ThreadPoolExecutor(READERS) as readers:
        outlines = readers.map(read_outline, files)
        outlines = list(late_progress_bar("reading the ends of shards", " shards", outlines, len(files)))
    # A file without rows may have anything for columns.
    filled = [(file, outline) for file, outline in zip(files, outlines, strict=True) if outline.rows.any()]
    first_file, first = (filled or [(files[0], outlines[0])])[0]
    for file, outline in filled:
        names = outline.columns
        if len(set(names)) < len(names):
            raise ConfigurationError(f"{file} has two columns of one name: {', '.join(sorted(names))}; rename one")
        if sorted(names) != sorted(first.columns):
            raise ConfigurationError(
                f"{file} has the columns {', '.join(names)}, {first_file} has {', '.join(first.columns)}: give a "
                "folder of files that belong together"
            )
    conflicts = class_conflicts([(file, outline.class_names) for file, outline in filled])
    ends = np.cumsum([0, *(len(outline.rows) for outline in outlines)], dtype=np.int32)
    rows = pyarrow.ListArray.from_arrays(ends, np.concatenate([outline.rows for outline in outlines]))
    schema = in_attempts(first_file, parquet.read_schema)
    metadata = {"schema": schema.serialize().to_pybytes().hex(), "conflicts": json.dumps(conflicts)}
    return pyarrow.table({"rows": rows}, metadata=metadata)


def read_outline(file: str) -> Outline:
    footer = in_attempts(file, parquet.read_metadata)
    rows = [footer.row_group(group).num_rows for group in range(footer.num_row_groups)]
    words = (footer.metadata or {}).get(b"huggingface", b"{}")
    return Outline(footer.schema.to_arrow_schema().names, class_names(words), np.array(rows, np.int32))


@functools.lru_cache(maxsize=8)  # most files of a set say the same
def class_names(words: bytes) -> dict[str, list[str]]:
    """The classes of each column of class labels, in the words that `datasets` writes into a schema, if they say so."""
    try:
        kinds = json.loads(words)["info"]["features"].items()
        kinds = {name: kind.get("names") for name, kind in kinds if isinstance(kind, dict) and kind["_type"] == CLASSES}
    except (ValueError, LookupError, TypeError, AttributeError):
        return {}
    return {name: names for name, names in kinds.items() if isinstance(names, list)}


def class_conflicts(files: Sequence[tuple[str, Mapping[str, list[str]]]]) -> dict[str, str]:
    """For each column of class labels whose numbers do not mean the same in all files: where, and what to do.

    `datasets` would take the classes of the first file for all.
    """
    first: dict[str, tuple[str, list[str]]] = {}
    conflicts: dict[str, str] = {}
    for file, classes in files:
        for column, names in classes.items():
            first_file, first_names = first.setdefault(column, (file, names))
            if names != first_names and column not in conflicts:
                pairs = enumerate(itertools.zip_longest(first_names, names))
                number, (name, other) = next((i, pair) for i, pair in pairs if pair[0] != pair[1])
                conflicts[column] = (
                    f"the class {number} of the column {column} is {name or 'missing'} in {first_file} and "
                    f"{other or 'missing'} in {file}: number both alike (Dataset.align_labels_with_mapping)"
                )
    return conflicts


def index_values(files: Sequence[str], column: str, kind: pyarrow.DataType) -> pyarrow.ChunkedArray:
    """The different values of a column of parquet files, such as the labels, null among them if there is one.

    Raises:
        ConfigurationError: a file is missing or cut, or its values are not of this kind.
    """

    def read_values(files: Sequence[str]) -> pyarrow.Table:
        def different(file: str) -> pyarrow.ChunkedArray:
            values = in_attempts(file, lambda source: parquet.read_table(source, columns=[column], use_threads=False))
            try:
                return compute.unique(values[column].cast(kind))
            except pyarrow.ArrowException as error:
                raise columns_differ([column], file, error) from None

        with ThreadPoolExecutor(READERS) as readers:
            values = pyarrow.chunked_array(list(readers.map(different, files)), kind)
        return pyarrow.table({"value": compute.unique(values)})

    return kept_for_files("values", files, read_values, column, str(kind))["value"]


def columns_differ(columns: Sequence[str], file: str, error: Exception) -> ConfigurationError:
    return ConfigurationError(
        f"the columns {', '.join(columns)} of {file} differ from those of other files ({in_short(error)}): "
        "give a folder of files that belong together"
    )


@cachetools.cached(cachetools.LRUCache(FOOTERS, lambda footer: footer.serialized_size), lock=threading.Lock())
def remote_footer(file: str) -> parquet.FileMetaData:
    """What a parquet file says of itself at its end, without which none of its row groups can be read.

    Of a local file it is read again each time, which takes 0.1 ms; of a remote one it would take as long as an image.

    Raises:
        ConfigurationError: it is missing, cut or no parquet.
    """
    return in_attempts(file, parquet.read_metadata)


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
        f"the shard {file} cannot be read ({in_short(error)}): it is missing, cut or no parquet file; fetch it again, "
        "or move it away and start anew"
    )


# --- what is kept


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
    kind = f"{kind}-{LAYOUT}"
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
