"""Load the images and labels of a dataset by its name: a folder, parquet files, tars, the Hub or digits."""

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
from m2t_accel.data.folders import IMAGE_EXTENSIONS, MAX_LISTED, SHARD_EXTENSIONS, find_files, load_image_files
from m2t_accel.data.held_out import hold_out_images, hold_out_pieces
from m2t_accel.data.hub_datasets import copy_parquet, load_hub
from m2t_accel.data.labels import standard_columns
from m2t_accel.data.parquet import ParquetShards, parquet_splits
from m2t_accel.data.shards import Shards
from m2t_accel.data.splits import files_by_split, used_splits
from m2t_accel.data.tars import TarShards, tar_splits


@dataclass(frozen=True)
class ImageData:
    """Images to train on and, if they have labels, images for evaluation.

    A Dataset has a column `image` of undecoded {"bytes", "path"}. It also has `offset` and `size` in bytes if the
    images are parts of files, and `label` (int) if `class_names` is given.
    """

    train: Dataset | Shards
    bank: Dataset | None  # training images with labels, among which kNN looks for neighbours
    validation: Dataset | None
    class_names: list[str] | None
    note: str  # one line for the user about the images that were found
    folder: str = ""  # common start of the paths, if the images are from a folder

    @property
    def lacks(self) -> str | None:
        """Return what is missing for an evaluation, in words; None if nothing is."""
        if self.class_names is None:
            return f"no labels (from class folders, or from a column that --label_column names); found: {self.note}"
        if self.validation is None:
            return (
                "no validation split, and no image is held out (--validation_fraction is 0, or every row group is too "
                f"large); found: {self.note}"
            )
        return None

    @functools.cached_property
    def fingerprint(self) -> str:
        """Return a hash of the number, names, sizes and order of the training images.

        It does not depend on the folder they are in. Their contents are not read.
        """
        digest = hashlib.sha256(str(len(self.train)).encode())
        for part in identifying_parts(self.train):
            digest.update(part if isinstance(part, np.ndarray) else part.replace(self.folder, "").encode())
        return digest.hexdigest()[:16]


def identifying_parts(images: Dataset | Shards) -> Iterator[np.ndarray | str]:
    """Yield what identifies images without reading them: names, and sizes if a table holds them."""
    if isinstance(images, Shards):
        yield "\n".join(images.files)
        yield images.piece_sizes
        return
    # All names before all sizes, so that the result does not depend on the chunks of the table.
    columns = [chunk.flatten() for chunk in images.data.column("image").chunks]
    for _, paths in columns:
        yield "".join(f"{path}\n" for path in paths.to_pylist())
    for content, _ in columns:
        yield compute.fill_null(compute.binary_length(content), -1).cast("int64").to_numpy(zero_copy_only=False)
    for name in [name for name in ("offset", "size") if name in images.column_names]:
        yield images.data.column(name).to_numpy()


def load_images(config: ImageSettings, dataset: Dataset | None = None) -> ImageData:
    """Return the images of `config.dataset`, and images for evaluation if there are labels.

    Args:
        config: settings of the dataset and of evaluation.
        dataset: images in memory to use instead; `config.dataset` is then only their name.

    Raises:
        ConfigurationError: there are no images, or a column is missing or of the wrong kind.
    """
    remarks: list[str] = []
    folder = Path(os.path.abspath(config.dataset))  # the same for every spelling
    if dataset is not None:
        splits = {"train": dataset.flatten_indices() if dataset._indices is not None else dataset}
    elif config.dataset == "digits":
        splits = load_digits()
    elif os.path.exists(config.dataset):
        splits = load_folder(folder, config, remarks)
    else:
        splits = load_hub(config, remarks)
    splits = {name: split for name, split in splits.items() if len(split)}
    if not splits:
        raise ConfigurationError(f"--dataset {config.dataset} holds no image: its files are empty or contain no images")
    splits = {name: splits[name] for name in used_splits(splits)}
    num_images = len(next(iter(splits.values())))
    if isinstance(next(iter(splits.values())), ParquetShards):
        train, bank, validation = hold_out_pieces(*with_validation(splits), config, remarks)
    else:
        splits = standard_columns(splits, config, remarks)
        train, bank, validation = hold_out_images(*with_validation(splits), config)
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
            f"{config.num_virtual_devices} virtual devices: several devices read the same piece, each from its start"
        )
    return ImageData(train, bank, validation, class_names, "; ".join([note, *remarks]), str(folder))


def with_validation(splits: dict[str, Dataset] | dict[str, ParquetShards]) -> tuple:
    train, *validation = splits.values()
    return train, validation[0] if validation else None


def load_digits() -> dict[str, Dataset]:
    """Return scikit-learn's 1797 handwritten digits, 8×8 pixels, as PNG; every fifth is for validation."""
    from sklearn.datasets import load_digits as load  # late: takes a second, and only this dataset needs it

    digits = load()
    images = []
    for pixels in digits.images:  # values from 0 to 16
        _, png = cv2.imencode(".png", np.rint(pixels * (255 / 16)).astype(np.uint8))
        images.append({"bytes": png.tobytes(), "path": None})
    features = Features({"image": Image(decode=False), "label": ClassLabel(names=[str(n) for n in range(10)])})
    digits = Dataset.from_dict({"image": images, "label": digits.target}, features=features)
    held_out = np.arange(len(digits)) % 5 == 0
    return {"train": digits.select(np.flatnonzero(~held_out)), "val": digits.select(np.flatnonzero(held_out))}


def load_folder(
    folder: Path, config: ImageSettings, remarks: list[str]
) -> dict[str, Dataset] | dict[str, ParquetShards]:
    """Return the splits of a folder of image files, of parquet files or of tars.

    Its subfolders `train` and `val` (or validation, valid, test) are splits; without `train` the folder is one split.

    Raises:
        ConfigurationError: the path is a file, or the folder holds no images or files of several kinds.
    """
    if folder.is_file():
        known = folder.suffix.lower() in (*IMAGE_EXTENSIONS, *SHARD_EXTENSIONS)
        advice = "give the folder that it is in" if known else "unpack it if it is an archive, and give the folder"
        raise ConfigurationError(f"--dataset {folder} is a file: {advice}")
    found = find_files(folder)
    others = [f"{number:,} {f'*{name}' if name else 'without extension'}" for name, number in found.others.items()]
    others = ", ".join(others if len(others) <= MAX_LISTED else [*others[:MAX_LISTED], "and other kinds"])
    files_by_kind: dict[str, list[str]] = {}
    for path in found.paths:
        stem, extension = os.path.splitext(path)
        if extension.lower() not in SHARD_EXTENSIONS:
            files_by_kind.setdefault("image", []).append(path)
        elif os.path.basename(stem) != "metadata":  # the Hub describes folders of images in such a file
            files_by_kind.setdefault(extension.lower(), []).append(path)
    if not files_by_kind:
        raise ConfigurationError(
            f"--dataset {folder} holds no image: searched at any depth for *.parquet, *.tar and "
            f"{' '.join(sorted(IMAGE_EXTENSIONS))}"
            + (f"; found {others} (unpack archives; Arrow tables: Dataset.to_parquet)" if others else "")
        )
    if len(files_by_kind) > 1:
        examples = " and ".join(f"{len(paths):,} like {paths[0]}" for paths in files_by_kind.values())
        raise ConfigurationError(f"--dataset {folder} holds {examples}: give a folder with files of one kind")
    if others:
        remarks.append(f"not used: {others}")
    ((kind, files),) = files_by_kind.items()
    if kind == "image":
        return load_image_files(folder, files, remarks)
    by_split = files_by_split(files)
    if kind == ".tar":
        return tar_splits(folder, {name: by_split[name] for name in used_splits(by_split)}, config, remarks)
    shards = parquet_splits({name: [str(folder / path) for path in paths] for name, paths in by_split.items()}, config)
    if config.streaming:
        return shards
    # `datasets` fails on a file without rows.
    filled = {
        name: [part.files[i] for i in np.flatnonzero(part.file_sizes)] for name, part in shards.items() if len(part)
    }
    return copy_parquet(filled, config) if filled else {}
