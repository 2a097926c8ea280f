"""From a dataset's name to its images and labels: folders, parquet files, tars, the Hub, scikit-learn's digits."""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from datasets import ClassLabel, Dataset, Features, Image
from pyarrow import compute

from m2t_accel.config.data import ImageSettings
from m2t_accel.config.fields import ConfigurationError
from m2t_accel.data.folders import IMAGE_EXTENSIONS, MAX_KINDS_TOLD, SHARD_EXTENSIONS, find_files, load_image_files
from m2t_accel.data.held_out import streamed, with_held_out
from m2t_accel.data.hub_datasets import call_datasets, load_hub
from m2t_accel.data.labels import standard_columns
from m2t_accel.data.parquet import ParquetShards
from m2t_accel.data.shards import Shards
from m2t_accel.data.splits import files_by_split, parquet_splits, wanted_splits
from m2t_accel.data.tars import TarShards, tars_to_dataset


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


def load_images(config: ImageSettings, dataset: Dataset | None = None) -> ImageData:
    """Return the images of `config.dataset`, and a validation split if there are labels.

    Args:
        dataset: images in memory to use instead; `config.dataset` is then only their name.

    Raises:
        ConfigurationError: there are no images, or no such column.
    """
    remarks: list[str] = []
    folder = Path(os.path.abspath(config.dataset))  # so that it is the same however it is spelled
    if dataset is not None:
        splits = {"train": dataset.flatten_indices() if dataset._indices is not None else dataset}
    elif config.dataset == "digits":
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
