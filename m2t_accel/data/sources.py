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
from m2t_accel.config.fields import ConfigurationError, count
from m2t_accel.data.held_out import (
    MAX_STREAMED_BANK,
    MAX_STREAMED_QUERIES,
    hold_out_images,
    hold_out_pieces,
    select_images,
)
from m2t_accel.data.hub_datasets import load_hub
from m2t_accel.data.hub_files import HubFiles, hold_out_files, is_listed
from m2t_accel.data.labels import standard_columns
from m2t_accel.data.local_folder import load_folder
from m2t_accel.data.parquet import ParquetShards
from m2t_accel.data.shards import Shards
from m2t_accel.data.streams import HubStream, StreamedOrder, hold_out_stream
from m2t_accel.data.tars import TarShards

# The images of a split, as they are before labelled images are held out.
Split = Dataset | ParquetShards | HubStream


@dataclass(frozen=True)
class ImageData:
    """Images to train on and, if they have labels, images for evaluation.

    A Dataset has a column `image` of undecoded {"bytes", "path"}. It also has `offset` and `size` in bytes if the
    images are parts of files, and `label` (int) if `class_names` is given. If streaming holds no image out, the bank
    has the column `label` alone.
    """

    train: Dataset | Shards | HubStream
    bank: Dataset | None  # training images with labels, among which kNN looks for neighbours
    validation: Dataset | None
    class_names: list[str] | None
    note: str  # one line for the user about the images that were found
    folder: str = ""  # common start of the paths, if the images are from a folder
    warnings: tuple[str, ...] = ()  # lines for the user

    @property
    def introduction(self) -> str:
        """Return the note and the warnings as lines for the user."""
        return "\n".join([self.note, *self.warnings])

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


def identifying_parts(images: Dataset | Shards | HubStream) -> Iterator[np.ndarray | str]:
    """Yield what identifies images without reading them: names, and sizes if a table holds them."""
    if isinstance(images, HubStream):
        yield "\n".join(images.files)
        return
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
    splits = find_splits(config, dataset, remarks)
    all_images, train, bank, validation = hold_out(splits, config, remarks)
    labelled = all_images if isinstance(all_images, Dataset) and "label" in all_images.features else bank
    num_classes = count_classes(labelled, remarks) if labelled is not None else None
    if num_classes == 1:
        train, bank, validation = all_images, None, None
        if isinstance(train, Dataset):
            train = train.remove_columns("label")
    class_names = bank.features["label"].names if bank is not None else None
    limit = min(len(train), config.max_images or len(train))
    (train_place, *others) = splits
    note = f"{config.dataset}: {f'{limit:,} of ' if limit < len(train) else ''}{count(len(train), 'image')}"
    if class_names is not None and labelled is all_images and num_classes < len(class_names):
        note += f" of {count(num_classes, 'class')} ({len(class_names)} are named)"
    elif class_names is not None:
        note += f" of {count(len(class_names), 'class')}"
    note += f" in {train_place}" if train_place else ""
    is_held_out = len(train) < len(all_images)
    if validation is not None and config.evaluates:
        origin = "held out of the training images" if is_held_out else ", ".join([*others, "its own validation split"])
        note += f"; evaluation on {count(len(validation), 'other')} ({origin})"
    if config.evaluates and (validation is None or is_held_out):
        reason = "the training images have no labels" if bank is None else "not every image in it has a label"
        for place in others:
            explained = any(place in remark for remark in remarks)
            remarks.append(f"{place} is not used" if explained else f"{place} is not used, because {reason}")
    train, bank = evenly_spread(train, limit), None if bank is None else evenly_spread(bank, limit)
    train = prepare_stream(train, config, remarks)
    warnings = tuple(remark for remark in remarks if remark.startswith("warning: "))
    note = "; ".join([note, *(remark for remark in remarks if remark not in warnings)])
    folder = os.path.abspath(config.dataset)  # the same for every spelling
    return ImageData(train, bank, validation, class_names, note, folder, warnings)


def find_splits(config: ImageSettings, dataset: Dataset | None, remarks: list[str]) -> dict[str, Split]:
    """Return the training and, if there is one, the validation split, by their places in words.

    Raises:
        ConfigurationError: there are no images, or the training split is empty.
    """
    if dataset is not None:
        splits = {"": dataset.flatten_indices() if dataset._indices is not None else dataset}
    elif config.dataset == "digits":
        splits = load_digits()
    elif os.path.exists(config.dataset):
        splits = load_folder(Path(os.path.abspath(config.dataset)), config, remarks)
    else:
        splits = {f"split {name}": split for name, split in load_hub(config, remarks).items()}
    train_place, *others = splits
    if not len(splits[train_place]):
        found = "; ".join([*([f"{train_place} is the training split"] if train_place else []), *remarks])
        raise ConfigurationError(
            f"--dataset {config.dataset} holds no image to train on" + (f" ({found})" if found else "")
        )
    for place in others:
        if not len(splits[place]):
            remarks.append(f"{place} is not used, because it holds no image")
            del splits[place]
    return splits


def hold_out(
    splits: dict[str, Split], config: ImageSettings, remarks: list[str]
) -> tuple[Split, Split, Dataset | None, Dataset | None]:
    """Return all images of the training split, those to train on, the bank and the validation images.

    Raises:
        ConfigurationError: a column is missing or of the wrong kind.
    """
    if isinstance(next(iter(splits.values())), Dataset):
        splits = standard_columns(splits, config, remarks)
    train, validation = (*splits.values(), None)[:2]
    if isinstance(train, ParquetShards):
        return train, *hold_out_pieces(train, validation, config, remarks)
    if isinstance(train, HubStream):
        limits = (MAX_STREAMED_BANK, MAX_STREAMED_QUERIES)
        return train, *hold_out_stream(train, validation, limits, config, remarks)
    if is_listed(train):
        limits = (MAX_STREAMED_BANK, MAX_STREAMED_QUERIES)
        return train, *hold_out_files(train, validation, limits, config)
    return train, *hold_out_images(train, validation, config)


def prepare_stream(train: Split, config: ImageSettings, remarks: list[str]) -> Split | Shards:
    """Return training images in tars as shards if they are streamed, and remark on what streaming costs.

    Raises:
        ConfigurationError: --images_per_epoch is given for images whose number is known.
    """
    if config.streaming and isinstance(train, Dataset):
        if "offset" in train.features:
            train = TarShards(train)
        elif is_listed(train):
            train = HubFiles(train)
        else:
            remarks.append("--streaming changes nothing for images that can be read one by one")
    if isinstance(train, HubStream):
        remarks += StreamedOrder(train, config).describe()
    elif config.images_per_epoch is not None:
        raise ConfigurationError(
            f"--images_per_epoch {config.images_per_epoch}: leave it out, an epoch shows all {len(train):,} images of "
            f"--dataset {config.dataset}"
        )
    if isinstance(train, Shards) and (num_pieces := np.count_nonzero(train.piece_sizes)) < config.num_virtual_devices:
        remarks.append(
            f"{count(num_pieces, 'piece')} (row groups, runs of a tar) for "
            f"{config.num_virtual_devices} virtual devices: several devices read the same piece, each from its start"
        )
    return train


def evenly_spread(images: Split, number: int) -> Split:
    """Return `number` of the images, evenly spread; all if there are not more."""
    if len(images) <= number:
        return images
    if isinstance(images, ParquetShards | HubStream):
        return images.spread(number)
    chosen = np.zeros(len(images), bool)
    chosen[np.arange(number) * len(images) // number] = True
    return select_images(images, chosen)


def count_classes(images: Dataset, remarks: list[str]) -> int:
    """Return the number of classes that occur; warn if they do not suffice for an evaluation.

    Args:
        images: training images with labels, or a sample of them.
        remarks: list to which this adds the warning.
    """
    counts = np.bincount(images.with_format("arrow")["label"][:].to_numpy())
    names = images.features["label"].names
    if np.count_nonzero(counts) == 1:
        remarks.append(f"no labels, because all images are of one class, {names[int(counts.argmax())]}")
    elif counts.max() == 1:
        remarks.append(
            "warning: no class has two training images, so a nearest neighbour never has the right class; if the "
            "labels are in another column, name it with --label_column"
        )
    return np.count_nonzero(counts)


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
    train, validation = digits.select(np.flatnonzero(~held_out)), digits.select(np.flatnonzero(held_out))
    return {"": train, "every fifth digit": validation}
