"""The files in a folder: a scan that is cached."""

from __future__ import annotations

import json
import os
import re
import shlex
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import pyarrow

from m2t_accel.config.data import ImageSettings
from m2t_accel.config.fields import ConfigurationError, count
from m2t_accel.data.cache import cache_path, read_cache, times_of_change, write_cache
from m2t_accel.data.splits import TRAIN, UNNAMED, split_of, split_of_path
from m2t_accel.progress import late_progress_bar

MAX_LISTED = 6  # kinds of files or folders that a message lists
JPEG_EXTENSIONS = (".jpg", ".jpeg", ".jpe", ".jfif")
IMAGE_EXTENSIONS = frozenset(
    (
        *(*JPEG_EXTENSIONS, ".mpo", ".png", ".webp", ".avif", ".bmp", ".tif", ".tiff", ".gif"),
        *(".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".jpx"),
    )
)
SHARD_EXTENSIONS = (".parquet", ".tar")
# Files that may hold images, but are not read.
ARCHIVE_EXTENSIONS = frozenset(
    (".7z", ".arrow", ".beton", ".bz2", ".gz", ".h5", ".hdf5", ".lmdb", ".mat", ".mdb", ".npy", ".npz", ".rar", ".rec")
)
ARCHIVE_EXTENSIONS |= {".tfrecord", ".tgz", ".xz", ".zip", ".zst"}
LIST_EXTENSIONS = (".csv", ".json", ".jsonl", ".tsv", ".txt")  # of files that may list images, such as train.csv
# Notes that people keep beside images. Many of them are no reason for a warning.
NOTES_EXTENSIONS = frozenset(
    (".cls", ".csv", ".html", ".json", ".jsonl", ".log", ".md", ".npy", ".pkl", ".pt", ".tsv", ".txt", ".xml", ".yaml")
)
VIDEO_EXTENSIONS = (".avi", ".mkv", ".mov", ".mp4", ".mpg", ".webm")
# Thumbnails, metadata and deleted files of network storage, macOS and Windows.
IGNORED_FOLDERS = ("@eaDir", "#recycle", "@Recycle", "@__thumb", "__MACOSX", "$RECYCLE.BIN", "lost+found")
PROGRESS_INTERVAL = 10_000  # entries of a folder between two updates of the progress bar
RUN_FILES = ("metrics.jsonl", "config.yaml")  # in the folder of every run; other tools write one of them
SETTLED = 2.0  # seconds; a folder that changed this recently may change again without a new time stamp


class FoundFiles(NamedTuple):
    """Files below a folder, without hidden ones."""

    paths: list[str]  # images and shards, relative to the folder, sorted
    others: dict[str, int]  # number of other files by extension
    called_train: list[str]  # folders, archives, lists and broken links that are called train, sorted


def find_files(folder: Path) -> FoundFiles:
    """Find images and shards at any depth, and count the other files.

    The result is cached with the times of change of all subfolders. The next run reads only these times. Otherwise each
    process would list millions of files at every start, which is slow on network disks.

    Raises:
        ConfigurationError: a folder cannot be read, or a name is not UTF-8.
    """
    cached = cache_path("folder", str(folder.resolve()))
    table = read_cache(cached)
    if table is not None and times_now(folder, times := json.loads(table.schema.metadata[b"times"])) == times:
        return FoundFiles(table["path"].to_pylist(), *json.loads(table.schema.metadata[b"others"]))
    started = time.time()
    found, times = scan(folder)
    if max(max(pair) for pair in times.values() if pair) < (started - SETTLED) * 1e9:
        table = pyarrow.table({"path": pyarrow.array(found.paths, pyarrow.string())})
        metadata = {"times": json.dumps(times), "others": json.dumps([found.others, found.called_train])}
        write_cache(cached, table.replace_schema_metadata(metadata))
    return found


def times_now(folder: Path, places: Iterable[str]) -> dict[str, list[int] | None]:
    """Return the times of change of some places below the folder; None for one that does not exist."""
    times: dict[str, list[int] | None] = {}
    for place in places:
        try:
            times[place] = times_of_change(os.stat(os.path.join(folder, place)))
        except OSError:
            times[place] = None
    return times


def scan(folder: Path) -> tuple[FoundFiles, dict[str, list[int] | None]]:
    """Return the files below a folder, and the times of change of each subfolder.

    A broken link counts as a file. Its time is None, because a folder may appear in its place when a disk is mounted.
    The folders of runs are skipped: their pictures are no images to train on.
    """
    paths, others, called_train, times = [], Counter(), [], {}
    lists: dict[str, str] = {}  # by folder, the first one, because there may be one for each image
    pending: list[tuple[str, frozenset]] = [("", frozenset())]
    bar = late_progress_bar(f"looking for images in {folder}", " files")
    try:
        while pending:
            below, parents = pending.pop()
            bar.update(len(paths) - bar.n)
            status = os.stat(os.path.join(folder, below))
            if (status.st_dev, status.st_ino) in parents:  # a link to a folder that contains it
                continue
            if below and all(os.path.exists(os.path.join(folder, below, name)) for name in RUN_FILES):
                continue
            parents |= {(status.st_dev, status.st_ino)}
            times[below] = times_of_change(status)
            with os.scandir(os.path.join(folder, below)) as entries:
                for number, entry in enumerate(entries, 1):
                    if number % PROGRESS_INTERVAL == 0:
                        bar.update(len(paths) - bar.n)
                    if is_hidden(entry.name):
                        continue
                    path = f"{below}/{entry.name}" if below else entry.name
                    if entry.is_dir():
                        pending.append((path, parents))
                        if split_of(entry.name) == TRAIN:
                            called_train.append(path)
                        continue
                    is_broken = entry.is_symlink() and not os.path.exists(entry.path)
                    if is_broken:
                        times[path] = None
                    elif not entry.is_file():  # a device or a pipe
                        continue
                    extension = os.path.splitext(entry.name)[1].lower()
                    if extension in IMAGE_EXTENSIONS or extension in SHARD_EXTENSIONS:
                        path.encode()
                        paths.append(path)
                        continue
                    others[extension.encode(errors="replace").decode()] += 1
                    if (is_data := is_broken or is_archive(entry.name)) or extension in LIST_EXTENSIONS:
                        if split_of(entry.name) == TRAIN and is_data:
                            called_train.append(path)
                        elif split_of(entry.name) == TRAIN:
                            lists[below] = min(path, lists.get(below, path))
    except OSError as error:
        raise ConfigurationError(f"--dataset {folder}: {error.filename} cannot be read ({error.strerror})") from None
    except UnicodeEncodeError as error:
        name = error.object.encode(errors="backslashreplace").decode()
        raise ConfigurationError(f"--dataset {folder}: the file name {name} is not UTF-8; rename it") from None
    finally:
        bar.close()
    called_train += lists.values()
    return FoundFiles(sorted(paths), dict(others.most_common()), sorted(called_train)), times


def is_archive(name: str) -> bool:
    """Return whether a file is an archive, or a part of one: train.zip, train.tar.aa, train.tar.part."""
    *outer, last = [extension.lower() for extension in Path(name).suffixes] or [""]
    outer = () if last in NOTES_EXTENSIONS else outer  # a note about an archive, such as train.tar.txt
    return last in ARCHIVE_EXTENSIONS or any(extension in (*ARCHIVE_EXTENSIONS, ".tar") for extension in outer)


def how_to_unpack(archive: Path) -> str:
    """Return what to type to unpack an archive into a folder of its name beside it."""
    name = archive.name.lower()
    stem = re.fullmatch(r"(.+?)(\.zip|\.tgz|\.tar(\.(gz|bz2|xz|zst))?)", name)
    if stem is None:  # another format, or a part of an archive
        return "unpack it"
    source, target = (shlex.quote(str(path)) for path in (archive, archive.with_name(archive.name[: stem.end(1)])))
    if name.endswith(".zip"):
        return f"unpack it with `python -m zipfile -e {source} {target}`"
    return f"unpack it with `mkdir -p {target} && tar -xf {source} -C {target}`"


def unique_names(paths: Sequence[str]) -> set[str]:
    """Return the paths of shards, and the folders of images, because these have too many paths to look at each."""
    return {path if path.lower().endswith(SHARD_EXTENSIONS) else os.path.dirname(path) for path in paths}


def is_hidden(name: str) -> bool:
    return name.startswith(".") or name in IGNORED_FOLDERS


def check_train(
    folder: Path, splits: Iterable[str], called_train: Sequence[str], files: Sequence[str], config: ImageSettings
) -> None:
    """Check that what is called train holds images.

    Args:
        folder: top folder.
        splits: the splits that the used files belong to.
        called_train: folders, archives, lists and broken links that are called train.
        files: the used files.
        config: may name the training split.

    Raises:
        ConfigurationError: one of them holds none of the files, and no other file is of a training split.
    """
    if config.train_split is not None or TRAIN in splits:
        return
    # A list of training images beside images that are called nothing is one of these.
    lists_count = all(split_of_path(path) != UNNAMED for path in unique_names(files))
    for place in called_train:
        is_list = os.path.splitext(place)[1].lower() in LIST_EXTENSIONS and not is_archive(place)
        if any(path.startswith(f"{place}/") for path in files) or (is_list and not lists_count):
            continue
        path = folder / place
        kinds = Counter(os.path.splitext(name)[1].lower() for _, _, names in os.walk(path) for name in names)
        if not path.exists():
            reason = "is a broken link: mount its disk"
        elif is_list:
            reason = "may only list images: put them into a folder train"
        elif path.is_file():
            reason = f"is not read: {how_to_unpack(path)}"
        elif kinds:
            (kind, number), *_ = kinds.most_common(1)
            advice = "put the images beside" if kind in LIST_EXTENSIONS else "convert or unpack them"
            reason = f"holds no image that can be read, but {count(number, 'file')} like *{kind}: {advice}"
        else:
            reason = "is empty: fill it"
        raise ConfigurationError(
            f"--dataset {folder}: {place} is called train but {reason}, remove it, or name another split with "
            "--train_split"
        )


def unused_files(others: Counter[str], num_used: int, kind: str) -> list[str]:
    """Return a remark about files that are not read: a warning if they, without notes, are more than the used ones."""
    if not others:
        return []
    skipped = Counter({name: number for name, number in others.items() if name not in NOTES_EXTENSIONS})
    if kind == "image" and skipped.total() > num_used:
        used = count(num_used, "image")
        return [f"warning: {list_files(skipped)} are not used, more than the {used}: {advice_on(skipped)}"]
    return [f"not used: {list_files(others)}"]


def list_files(others: Counter[str]) -> str:
    """Return the counts of files by extension in words, the most frequent first."""
    kinds = [f"{number:,} {f'*{name}' if name else 'without extension'}" for name, number in others.most_common()]
    return ", ".join(kinds if len(kinds) <= MAX_LISTED else [*kinds[:MAX_LISTED], "and other kinds"])


def advice_on(others: Counter[str]) -> str:
    kinds = [name for name, _ in others.most_common()]
    name = next((name for name in kinds if name in ARCHIVE_EXTENSIONS or name not in NOTES_EXTENSIONS), kinds[0])
    if name in VIDEO_EXTENSIONS:
        return "extract their frames, for example by ffmpeg"
    if name in LIST_EXTENSIONS:
        return "give the folder of the images"
    if name == ".arrow":
        return "write them as parquet (Dataset.to_parquet)"
    return "unpack them" if name in (*ARCHIVE_EXTENSIONS, ".tar") else "convert them to JPEG or PNG"
