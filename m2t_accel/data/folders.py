"""Image files in a folder: one scan, kept for the next start."""

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
import pyarrow.feather
from datasets import ClassLabel, Dataset, Features, Image

from m2t_accel.config.fields import ConfigurationError
from m2t_accel.data.cache import cache_file, read_cache, times_of_change, write_cache
from m2t_accel.data.shards import dataset_of
from m2t_accel.data.splits import TRAIN_NAMES, VALIDATION_NAMES
from m2t_accel.progress import late_progress_bar

CHUNK = 2**18  # paths, of at most 4096 letters each
MAX_KINDS_TOLD = 6  # of files that are not used
OF_JPEG = (".jpg", ".jpeg", ".jpe", ".jfif")
IMAGE_EXTENSIONS = frozenset(
    (*OF_JPEG, ".png", ".webp", ".avif", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm", ".jp2")
)
SHARD_EXTENSIONS = (".parquet", ".tar")
NOT_OURS = ("@eaDir", "__MACOSX")  # folders in which a NAS and macOS keep thumbnails and what else they know
PROGRESS_INTERVAL = 10_000  # entries of a folder, after which it is told how many there are
SETTLED = 2.0  # seconds; what was changed so short a time before its scan may change again under the same time stamp


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
                    if number % PROGRESS_INTERVAL == 0:
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


def is_hidden(name: str) -> bool:
    return name.startswith(".") or name in NOT_OURS


def is_unchanged(folder: Path, folders: dict[str, list[int]]) -> bool:
    try:
        return all(times_of_change(os.stat(os.path.join(folder, below))) == times for below, times in folders.items())
    except OSError:
        return False


def load_image_files(folder: Path, images: Sequence[str], remarks: list[str]) -> dict[str, Dataset]:
    """The splits of a folder of image files, in class folders or not."""
    by_folder: dict[str, list[str]] = {}
    for path in images:
        top, _, rest = path.rpartition("/") if "/" not in path else path.partition("/")
        by_folder.setdefault(top, []).append(rest)
    named = {name.lower(): name for name in by_folder if name.lower() in (*TRAIN_NAMES, *VALIDATION_NAMES)}
    train_name = next((named[name] for name in TRAIN_NAMES if name in named), None)
    if train_name is None and len(by_folder) == len(named) == 1:
        train_name = next(iter(by_folder))  # val/ alone
    if train_name is None:
        class_names = class_folders(images, remarks)
        if class_names is None and (below := folder_of_splits(images)):
            remarks.append(f"all splits together: --dataset {folder / below} would keep them apart")
        return {"train": images_to_dataset(folder, images, class_names)}
    class_names = class_folders(by_folder[train_name], remarks)
    splits, used = {"train": images_to_dataset(folder / train_name, by_folder[train_name], class_names)}, {train_name}
    if class_names is not None:
        for name in (named[name] for name in VALIDATION_NAMES if name in named and named[name] != train_name):
            used.add(name)
            if class_folders(by_folder[name], []) is not None:
                splits["val"] = images_to_dataset(folder / name, by_folder[name], class_names)
                break
            remarks.append(f"{name}/ has no class folders, and is not used")
    left = {name: len(paths) for name, paths in by_folder.items() if name not in used}
    if left:
        names = ", ".join(f"{name}/" if name else "no folder" for name in itertools.islice(left, MAX_KINDS_TOLD))
        names += ", …" if len(left) > MAX_KINDS_TOLD else ""
        number, hint = (
            sum(left.values()),
            "" if class_names or len(named) > 1 else f" (if {train_name} is a class, rename its folder)",
        )
        remarks.append(f"not used: {number:,} image{'s' * (number > 1)} beside {train_name}/, in {names}{hint}")
    return splits


def folder_of_splits(images: Sequence[str]) -> str | None:
    """The folder, if there is one, that has a folder of training and one of validation images further down."""
    below: dict[str, set[str]] = {}
    for parent in {path.rpartition("/")[0] for path in images}:
        names = parent.split("/")
        for i, name in enumerate(names):
            kind = "train" * (name.lower() in TRAIN_NAMES) or "validation" * (name.lower() in VALIDATION_NAMES)
            if i and kind:
                below.setdefault("/".join(names[:i]), set()).add(kind)
    return next((place for place in sorted(below) if len(below[place]) == 2), None)


def class_folders(paths: Sequence[str], remarks: list[str]) -> list[str] | None:
    """The class names where every path is of a file in a folder at the top and there are several, else None."""
    parts = [path.split("/") for path in paths]
    names = sorted({part[0] for part in parts if len(part) > 1})
    if len(names) < 2:
        remarks += [f"no labels, because all are in one folder, {name}" for name in names]
        return None
    stray = next(("/".join(part) for part in parts if len(part) != 2), None)
    if stray is not None:
        remarks.append(f"no labels, because {stray} is not directly in a class folder")
        return None
    return names


def images_to_dataset(root: Path, paths: Sequence[str], class_names: list[str] | None) -> Dataset:
    """A Dataset of paths below the root, labelled by their folder where class names are given."""
    storage = image_column(f"{root}/{path}" for path in paths)
    columns, features = [storage], Features({"image": Image(decode=False)})
    if class_names is not None:
        index = {name: i for i, name in enumerate(class_names)}
        folders = [path.split("/")[0] for path in paths]
        unknown = sorted(set(folders) - index.keys())
        if unknown:
            raise ConfigurationError(
                f"--dataset: {root} has the class folder {unknown[0]}, which the training split has not; "
                "both need the same names"
            )
        columns.append(pyarrow.array([index[name] for name in folders], pyarrow.int64()))
        features["label"] = ClassLabel(names=class_names)
    return dataset_of(pyarrow.Table.from_arrays(columns, schema=features.arrow_schema))


def image_column(paths: Iterable[str]) -> pyarrow.ChunkedArray:
    """Undecoded images at these paths; in chunks, because one holds no more than 2 GB of letters."""
    chunks, paths, kind = [], iter(paths), Image(decode=False).pa_type
    while part := list(itertools.islice(paths, CHUNK)):
        names = pyarrow.array(part, pyarrow.string())
        chunks.append(pyarrow.StructArray.from_arrays([pyarrow.nulls(len(part), pyarrow.binary()), names], fields=kind))
    return pyarrow.chunked_array(chunks, kind)
