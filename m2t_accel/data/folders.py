"""Image files in a folder: a scan that is cached, and the splits and classes that the subfolders name."""

from __future__ import annotations

import itertools
import json
import os
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import pyarrow
from datasets import ClassLabel, Dataset, Features, Image

from m2t_accel.config.fields import ConfigurationError
from m2t_accel.data.cache import cache_path, read_cache, times_of_change, write_cache
from m2t_accel.data.shards import to_dataset
from m2t_accel.data.splits import TRAIN_NAMES, VALIDATION_NAMES
from m2t_accel.progress import late_progress_bar

PATHS_PER_CHUNK = 2**18  # a path has at most 4096 bytes, and a chunk must stay below 2 GB
MAX_LISTED = 6  # kinds of files or folders that a message lists
JPEG_EXTENSIONS = (".jpg", ".jpeg", ".jpe", ".jfif")
IMAGE_EXTENSIONS = frozenset(
    (*JPEG_EXTENSIONS, ".png", ".webp", ".avif", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm", ".jp2")
)
SHARD_EXTENSIONS = (".parquet", ".tar")
IGNORED_FOLDERS = ("@eaDir", "__MACOSX")  # thumbnails and metadata of network storage and of macOS
PROGRESS_INTERVAL = 10_000  # entries of a folder between two updates of the progress bar
SETTLED = 2.0  # seconds; a folder that changed this recently may change again without a new time stamp


class FoundFiles(NamedTuple):
    """Files below a folder, without hidden ones."""

    paths: list[str]  # images and shards, relative to the folder, sorted
    others: dict[str, int]  # number of other files by extension


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
        return FoundFiles(table["path"].to_pylist(), json.loads(table.schema.metadata[b"others"]))
    started = time.time()
    found, times = scan(folder)
    if max(max(pair) for pair in times.values() if pair) < (started - SETTLED) * 1e9:
        table = pyarrow.table({"path": pyarrow.array(found.paths, pyarrow.string())})
        metadata = {"times": json.dumps(times), "others": json.dumps(found.others)}
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
    """
    paths, others, times = [], Counter(), {}
    pending: list[tuple[str, frozenset]] = [("", frozenset())]
    bar = late_progress_bar(f"looking for images in {folder}", " files")
    try:
        while pending:
            below, parents = pending.pop()
            bar.update(len(paths) - bar.n)
            status = os.stat(os.path.join(folder, below))
            if (status.st_dev, status.st_ino) in parents:  # a link to a folder that contains it
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
                        continue
                    if entry.is_symlink() and not os.path.exists(entry.path):
                        times[path] = None
                    elif not entry.is_file():  # a device or a pipe
                        continue
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
    return FoundFiles(sorted(paths), dict(sorted(others.items()))), times


def is_hidden(name: str) -> bool:
    return name.startswith(".") or name in IGNORED_FOLDERS


def load_image_files(folder: Path, images: Sequence[str], remarks: list[str]) -> dict[str, Dataset]:
    """Return the splits of a folder of image files, with labels if the images are in class folders.

    Args:
        folder: top folder.
        images: paths relative to it.
        remarks: list to which this adds notes for the user.
    """
    by_folder: dict[str, list[str]] = {}
    for path in images:
        top, _, rest = path.partition("/") if "/" in path else ("", "", path)
        by_folder.setdefault(top, []).append(rest)
    split_folders = {name.lower(): name for name in by_folder if name.lower() in (*TRAIN_NAMES, *VALIDATION_NAMES)}
    train_name = next((split_folders[name] for name in TRAIN_NAMES if name in split_folders), None)
    if train_name is None and len(by_folder) == len(split_folders) == 1:
        train_name = next(iter(by_folder))  # there is only val/
    if train_name is None:
        class_names = class_folders(images, remarks)
        if class_names is None and (below := folder_of_splits(images)):
            remarks.append(f"training and validation images are mixed: --dataset {folder / below} keeps them apart")
        return {"train": images_to_dataset(folder, images, class_names)}
    class_names = class_folders(by_folder[train_name], remarks)
    splits, used = {"train": images_to_dataset(folder / train_name, by_folder[train_name], class_names)}, {train_name}
    if class_names is not None:
        candidates = [split_folders[name] for name in VALIDATION_NAMES if name in split_folders]
        for name in [name for name in candidates if name != train_name]:
            used.add(name)
            if class_folders(by_folder[name], []) is not None:
                splits["val"] = images_to_dataset(folder / name, by_folder[name], class_names)
                break
            remarks.append(f"{name}/ is not used, because it has no class folders")
    unused = {name: len(paths) for name, paths in by_folder.items() if name not in used}
    if unused:
        places = [f"{name}/" if name else "the top folder" for name in unused]
        names = ", ".join(places if len(places) <= MAX_LISTED else [*places[:MAX_LISTED], "…"])
        number = sum(unused.values())
        hint = "" if class_names or len(split_folders) > 1 else f" (if {train_name} is a class, rename its folder)"
        remarks.append(f"not used: {number:,} image{'s' * (number > 1)} outside {train_name}/, in {names}{hint}")
    return splits


def folder_of_splits(images: Sequence[str]) -> str | None:
    """Return the first deeper folder that contains a training and a validation folder; None if there is none."""
    below: dict[str, set[str]] = {}
    for parent in {path.rpartition("/")[0] for path in images}:
        names = parent.split("/")
        for i, name in enumerate(names):
            for kind in (TRAIN_NAMES, VALIDATION_NAMES):
                if i and name.lower() in kind:
                    below.setdefault("/".join(names[:i]), set()).add(kind)
    return next((place for place in sorted(below) if len(below[place]) == 2), None)


def class_folders(paths: Sequence[str], remarks: list[str]) -> list[str] | None:
    """Return the class names if every file is directly in one of several folders, else None with a remark."""
    parts = [path.split("/") for path in paths]
    names = sorted({part[0] for part in parts if len(part) > 1})
    if len(names) < 2:
        remarks += [f"no labels, because all images are in one folder, {name}" for name in names]
        return None
    stray = next(("/".join(part) for part in parts if len(part) != 2), None)
    if stray is not None:
        remarks.append(f"no labels, because {stray} is not directly in a class folder")
        return None
    return names


def images_to_dataset(root: Path, paths: Sequence[str], class_names: list[str] | None) -> Dataset:
    """Return a Dataset of the paths below `root`, labelled by their folder if class names are given.

    Raises:
        ConfigurationError: a folder is not among the class names.
    """
    columns, features = [image_column(f"{root}/{path}" for path in paths)], Features({"image": Image(decode=False)})
    if class_names is not None:
        class_numbers = {name: i for i, name in enumerate(class_names)}
        folders = [path.split("/")[0] for path in paths]
        unknown = sorted(set(folders) - class_numbers.keys())
        if unknown:
            raise ConfigurationError(
                f"--dataset: {root} has the class folder {unknown[0]}, which the training split does not have; "
                "both need the same names"
            )
        columns.append(pyarrow.array([class_numbers[name] for name in folders], pyarrow.int64()))
        features["label"] = ClassLabel(names=class_names)
    return to_dataset(pyarrow.Table.from_arrays(columns, schema=features.arrow_schema))


def image_column(paths: Iterable[str]) -> pyarrow.ChunkedArray:
    """Return a column of undecoded images at these paths, in chunks because one holds at most 2 GB of text."""
    chunks, paths, kind = [], iter(paths), Image(decode=False).pa_type
    while part := list(itertools.islice(paths, PATHS_PER_CHUNK)):
        names = pyarrow.array(part, pyarrow.string())
        chunks.append(pyarrow.StructArray.from_arrays([pyarrow.nulls(len(part), pyarrow.binary()), names], fields=kind))
    return pyarrow.chunked_array(chunks, kind)
