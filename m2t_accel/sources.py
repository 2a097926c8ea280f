"""From a dataset's name to its images and labels: folders, parquet files, tars, the Hub, scikit-learn's digits."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import datasets
import numpy as np
import pyarrow
from datasets import ClassLabel, Dataset, Features, Image, Value
from pyarrow import compute

from m2t_accel.columns import label_column, standard_columns
from m2t_accel.data_settings import ImageSettings
from m2t_accel.held_out import streamed, with_held_out
from m2t_accel.index import IMAGE_EXTENSIONS, SHARD_EXTENSIONS, class_conflicts, find_files
from m2t_accel.settings import ConfigurationError, in_short
from m2t_accel.shards import ParquetShards, Shards, TarShards, dataset_of
from m2t_accel.tars import index_tars

TRAIN_NAMES = ("train", "training")
VALIDATION_NAMES = ("val", "validation", "valid", "test", "testing")  # the first that can be used is
CHUNK = 2**18  # paths, of at most 4096 letters each
MAX_KINDS_TOLD = 6  # of files that are not used


@dataclass(frozen=True)
class ImageData:
    """Images to train on and, where there are labels, images held out for evaluation.

    A Dataset has a column `image` of undecoded {"bytes", "path"}; where that is a part of a file, its `offset` and
    `size`; and `label` (int) where `class_names` is given.
    """

    train: Dataset | Shards
    bank: Dataset | None  # training images with labels, among which kNN looks for neighbours
    validation: Dataset | None
    class_names: list[str] | None
    note: str  # one line for people: what was found
    folder: str = ""  # with which the paths begin, where they are from a folder

    @property
    def lacks(self) -> str | None:
        """What an evaluation would need and is not there, for people."""
        if self.class_names is None:
            return f"no labels (class folders, or a column named by --label_column); found: {self.note}"
        if self.validation is None:
            return (
                "no validation split, and no image is held out (--validation_fraction is 0, or no row group is so "
                f"small); found: {self.note}"
            )
        return None

    @functools.cached_property
    def fingerprint(self) -> str:
        """A name for the images to train on: their number, names and order, wherever they lie; of shards their sizes.

        Their contents are not read.
        """
        digest = hashlib.sha256(str(len(self.train)).encode())
        for part in outlines(self.train):
            digest.update(part if isinstance(part, np.ndarray) else part.replace(self.folder, "").encode())
        return digest.hexdigest()[:16]


def outlines(images: Dataset | Shards) -> Iterator[np.ndarray | str]:
    """What can be told of images without reading them: names, and sizes where a table holds them."""
    if isinstance(images, Shards):
        yield "\n".join(images.files)
        yield images.piece_sizes
        return
    # First all names and then all sizes, so that it does not matter how a table is cut into chunks.
    columns = [chunk.flatten() for chunk in images.data.column("image").chunks]
    for _, paths in columns:
        yield "".join(f"{path}\n" for path in paths.to_pylist())
    for content, _ in columns:
        yield compute.fill_null(compute.binary_length(content), -1).cast("int64").to_numpy(zero_copy_only=False)
    for name in [name for name in ("offset", "size") if name in images.column_names]:
        yield images.data.column(name).to_numpy()


def load_images(config: ImageSettings) -> ImageData:
    """The images of `config.dataset`, and a validation split where there are labels.

    Raises:
        ConfigurationError: there are no images, or no such column.
    """
    remarks: list[str] = []
    folder = Path(os.path.abspath(config.dataset))  # so that it is the same however it is spelled
    if config.dataset == "digits":
        splits = load_digits()
    elif os.path.exists(config.dataset):
        splits = load_folder(folder, config, remarks)
    else:
        splits = load_hub(config)
    splits = {name: split for name, split in splits.items() if len(split)}
    if not splits:
        raise ConfigurationError(f"--dataset {config.dataset} holds no image: its files are empty, or of other things")
    wanted = wanted_splits(splits)
    train_name, validation_name = wanted[0], wanted[1] if len(wanted) > 1 else None
    num_images = len(splits[train_name])
    if isinstance(splits[train_name], ParquetShards):
        train, bank, validation = streamed(splits[train_name], splits.get(validation_name), config, remarks)
    else:
        splits = standard_columns({name: splits[name] for name in wanted}, config, remarks)
        train, bank, validation = with_held_out(splits[train_name], splits.get(validation_name), config)
    class_names = bank.features["label"].names if bank is not None else None
    note = f"{config.dataset}: {len(train):,} images"
    if class_names is not None:
        note += f" of {len(class_names)} classes"
    if validation is not None and config.evaluates:
        origin = "held out of the training images" if len(train) < num_images else "its own validation split"
        note += f"; evaluation on {len(validation):,} others ({origin})"
    if config.streaming and isinstance(train, Dataset):
        if "offset" in train.features:
            train = TarShards(train)
        else:
            remarks.append("--streaming changes nothing for images that can be read one by one")
    if isinstance(train, Shards) and (num_pieces := np.count_nonzero(train.piece_sizes)) < config.num_virtual_devices:
        remarks.append(
            f"{num_pieces} {'piece' if num_pieces == 1 else 'pieces'} (row groups, runs of a tar) for "
            f"{config.num_virtual_devices} virtual devices: each device reads a piece from its begin to the part that "
            "it shows"
        )
    return ImageData(train, bank, validation, class_names, "; ".join([note, *remarks]), str(folder))


def wanted_splits(names: Iterable[str]) -> list[str]:
    """The split to train on and, if there is one, that to validate with."""
    names = list(names)
    train_name = "train" if "train" in names else names[0]
    return [train_name, *[name for name in VALIDATION_NAMES if name in names and name != train_name][:1]]


def load_digits() -> dict[str, Dataset]:
    """scikit-learn's 1797 handwritten digits, 8x8 pixels, as PNG; every fifth is for evaluation."""
    from sklearn.datasets import load_digits as load

    digits = load()
    images = []
    for pixels in digits.images:  # 0 to 16 each
        _, png = cv2.imencode(".png", np.rint(pixels * (255 / 16)).astype(np.uint8))
        images.append({"bytes": png.tobytes(), "path": None})
    features = Features({"image": Image(decode=False), "label": ClassLabel(names=[str(n) for n in range(10)])})
    whole = Dataset.from_dict({"image": images, "label": digits.target}, features=features)
    held_out = np.arange(len(whole)) % 5 == 0
    return {"train": whole.select(np.flatnonzero(~held_out)), "val": whole.select(np.flatnonzero(held_out))}


def load_folder(
    folder: Path, config: ImageSettings, remarks: list[str]
) -> dict[str, Dataset] | dict[str, ParquetShards]:
    """The splits of a folder of image files, of parquet files or of tars.

    `train/` and `val/` (or validation, valid, test) in it are splits; without `train/` the folder is one.

    Raises:
        ConfigurationError: it is a file, holds none of them, or holds several kinds.
    """
    if folder.is_file():
        known = folder.suffix.lower() in (*IMAGE_EXTENSIONS, *SHARD_EXTENSIONS)
        advice = "give the folder that it is in" if known else "unpack it if it is an archive, and give the folder"
        raise ConfigurationError(f"--dataset {folder} is a file: {advice}")
    kinds: dict[str, list[str]] = {}
    found = find_files(folder)
    others = [f"{number:,} {f'*{name}' if name else 'without extension'}" for name, number in found.others.items()]
    others = ", ".join(others if len(others) <= MAX_KINDS_TOLD else [*others[:MAX_KINDS_TOLD], "and other kinds"])
    for path in found.paths:
        stem, extension = os.path.splitext(path)
        if extension.lower() not in SHARD_EXTENSIONS:
            kinds.setdefault("image", []).append(path)
        elif os.path.basename(stem) != "metadata":  # the Hub's way to describe a folder of images
            kinds.setdefault(extension.lower(), []).append(path)
    if not kinds:
        raise ConfigurationError(
            f"--dataset {folder} holds no image: looked at any depth for *.parquet, *.tar and "
            f"{' '.join(sorted(IMAGE_EXTENSIONS))}"
            + (f"; found {others} (unpack archives; Arrow tables: Dataset.to_parquet)" if others else "")
        )
    if len(kinds) > 1:
        found = " and ".join(f"{len(paths):,} like {paths[0]}" for paths in kinds.values())
        raise ConfigurationError(f"--dataset {folder} holds {found}: give a folder with files of one kind")
    if others:
        remarks.append(f"not used: {others}")
    ((kind, files),) = kinds.items()
    if kind == "image":
        return load_image_files(folder, files, remarks)
    by_split = files_by_split(files)
    if kind == ".tar":
        return {name: tars_to_dataset(folder, paths, remarks) for name, paths in by_split.items()}
    shards = parquet_splits({name: [str(folder / path) for path in paths] for name, paths in by_split.items()}, config)
    if config.streaming:
        return shards
    # `datasets` stumbles over a file without rows.
    whole = {
        name: [part.files[i] for i in np.flatnonzero(part.file_sizes)] for name, part in shards.items() if len(part)
    }
    return call_datasets(config, "parquet", data_files=whole) if whole else {}


def parquet_splits(files: dict[str, list[str]], config: ImageSettings) -> dict[str, ParquetShards]:
    """The splits of parquet files that are wanted.

    Raises:
        ConfigurationError: a file cannot be read, or their labels are not numbered alike.
    """
    splits = {name: ParquetShards(paths) for name, paths in files.items()}
    splits = {name: split for name, split in splits.items() if len(split)}
    splits = {name: splits[name] for name in (wanted_splits(splits) if splits else ())}
    firsts = [(split.files[int(np.argmax(split.file_sizes > 0))], split.class_names) for split in splits.values()]
    for split in splits.values():
        label = label_column(split.columns, config)
        for conflicts in (split.conflicts, class_conflicts(firsts)):
            if label in conflicts:
                raise ConfigurationError(conflicts[label])
    return splits


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


def tars_to_dataset(folder: Path, files: Sequence[str], remarks: list[str]) -> Dataset:
    """A Dataset of the images in tar files, where they lie; labelled where all have a .cls."""
    tables = index_tars(folder, files)
    table = pyarrow.concat_tables(tables).combine_chunks()
    if more := compute.sum(table["others"]).as_py():
        remarks.append(f"not used: {more:,} more images of the same samples (of 0.depth.png and 0.jpg it is 0.jpg)")
    if 0 < table["label"].null_count < len(table):
        remarks.append(f"no labels, because {table['label'].null_count:,} of {len(table):,} images have no .cls")
    paths = (itertools.repeat(str(folder / file), len(part)) for file, part in zip(files, tables, strict=True))
    features = Features({"image": Image(decode=False), "offset": Value("int64"), "size": Value("int64")})
    columns = [image_column(itertools.chain.from_iterable(paths)), table["offset"], table["size"]]
    if len(table) and table["label"].null_count == 0:
        features["label"] = Value("int64")
        columns.append(table["label"])
    return dataset_of(pyarrow.Table.from_arrays(columns, schema=features.arrow_schema))


def image_column(paths: Iterable[str]) -> pyarrow.ChunkedArray:
    """Undecoded images at these paths; in chunks, because one holds no more than 2 GB of letters."""
    chunks, paths, kind = [], iter(paths), Image(decode=False).pa_type
    while part := list(itertools.islice(paths, CHUNK)):
        names = pyarrow.array(part, pyarrow.string())
        chunks.append(pyarrow.StructArray.from_arrays([pyarrow.nulls(len(part), pyarrow.binary()), names], fields=kind))
    return pyarrow.chunked_array(chunks, kind)


def files_by_split(files: Sequence[str]) -> dict[str, list[str]]:
    """Shards by their split, told by a word of their name or else of a folder's: `train-00000-of-00002.parquet`."""
    by_split: dict[str, list[str]] = {}
    for path in files:
        by_split.setdefault(split_of(path), []).append(path)
    return by_split


def split_of(path: str) -> str:
    for name in reversed(path.lower().split("/")):
        words = set(re.split(r"[-_.]", name))
        validation = next((word for word in VALIDATION_NAMES if word in words), None)
        if words.isdisjoint(TRAIN_NAMES):
            if validation is not None:
                return validation
        elif validation is None:  # a name of both, such as train-test-split, says nothing
            return "train"
    return "train"


def load_hub(config: ImageSettings) -> dict[str, Dataset] | dict[str, ParquetShards]:
    """The splits of a dataset on the Hub, downloaded to the cache or, with `--streaming`, where they are."""
    if not config.streaming:
        return call_datasets(config, config.dataset)
    with datasets_errors(config):
        files = datasets.load_dataset_builder(config.dataset).config.data_files
    splits = {str(name): list(paths) for name, paths in (files or {}).items()}
    other = next((path for paths in splits.values() for path in paths if not path.endswith(".parquet")), None)
    if other is not None or not splits:
        found = os.path.basename(other) if other else "no files"
        raise ConfigurationError(
            f"--dataset {config.dataset} is stored as {found}, and only parquet can be streamed: leave out --streaming"
        )
    return parquet_splits(splits, config)


def call_datasets(config: ImageSettings, *arguments: object, **options: object) -> dict[str, Dataset]:
    """`datasets.load_dataset`, its many ways to fail as one line."""
    with datasets_errors(config):
        return dict(datasets.load_dataset(*arguments, **options))


@contextlib.contextmanager
def datasets_errors(config: ImageSettings) -> Iterator[None]:
    verbosity = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # it writes of an error, at length, and then raises it
    try:
        yield
    except Exception as error:  # of datasets, huggingface_hub, pyarrow, fsspec, httpx: no common ancestor
        if isinstance(error, datasets.exceptions.DatasetGenerationError) and error.__cause__ is not None:
            error = error.__cause__  # what the wrapper says is only that something went wrong
        raise ConfigurationError(
            f"--dataset {config.dataset} cannot be loaded ({in_short(error)}); give a folder that exists, "
            "or a Hub id that you can reach (`hf auth login` for a gated one)"
        ) from error
    finally:
        datasets.logging.set_verbosity(verbosity)
