"""Load the images and labels of a dataset by its name: a folder, parquet files, tars, the Hub or digits."""

from __future__ import annotations

import functools
import hashlib
import itertools
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from datasets import ClassLabel, Dataset, Features, Image
from pyarrow import compute

from m2t_accel.config.data import ImageSettings
from m2t_accel.config.fields import ConfigurationError
from m2t_accel.data.configurations import configured_files
from m2t_accel.data.folders import (
    IMAGE_EXTENSIONS,
    SHARD_EXTENSIONS,
    advice_on,
    check_train,
    find_files,
    list_files,
    unused_files,
)
from m2t_accel.data.held_out import (
    MAX_STREAMED_BANK,
    MAX_STREAMED_QUERIES,
    hold_out_images,
    hold_out_pieces,
    select_images,
)
from m2t_accel.data.hub_datasets import copy_parquet, load_hub
from m2t_accel.data.image_files import load_image_files
from m2t_accel.data.labels import standard_columns
from m2t_accel.data.parquet import ParquetShards, parquet_splits
from m2t_accel.data.shards import Shards
from m2t_accel.data.splits import TRAIN, choose_splits, describe_files, group_files, split_of_path
from m2t_accel.data.streams import HubStream, StreamedOrder, hold_out_stream
from m2t_accel.data.tars import TarShards, tar_splits

CLEAR_SHARE = 0.9  # share of the bytes of a folder that makes a kind of files the one that is meant
SIZED_FILES = 200  # files whose sizes are read for an estimate of all


@dataclass(frozen=True)
class ImageData:
    """Images to train on and, if they have labels, images for evaluation.

    A Dataset has a column `image` of undecoded {"bytes", "path"}. It also has `offset` and `size` in bytes if the
    images are parts of files, and `label` (int) if `class_names` is given.
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
    folder = Path(os.path.abspath(config.dataset))  # the same for every spelling
    if dataset is not None:
        splits = {"": dataset.flatten_indices() if dataset._indices is not None else dataset}
    elif config.dataset == "digits":
        splits = load_digits()
    elif os.path.exists(config.dataset):
        splits = load_folder(folder, config, remarks)
    else:
        splits = {f"split {name}": split for name, split in load_hub(config, remarks).items()}
    train_place = next(iter(splits))
    for place in [place for place, split in splits.items() if not len(split)]:
        if place == train_place:
            found = "; ".join([*([f"{place} is the training split"] if place else []), *remarks])
            raise ConfigurationError(
                f"--dataset {config.dataset} holds no image to train on" + (f" ({found})" if found else "")
            )
        remarks.append(f"{place} is not used, because it holds no image")
        del splits[place]
    all_images = splits[train_place]
    if isinstance(all_images, ParquetShards):
        train, bank, validation = hold_out_pieces(all_images, validation_of(splits), config, remarks)
    elif isinstance(all_images, HubStream):
        limits = (MAX_STREAMED_BANK, MAX_STREAMED_QUERIES)
        train, bank, validation = hold_out_stream(all_images, validation_of(splits), limits, config, remarks)
        remarks += StreamedOrder(train, config).describe()
    else:
        splits = standard_columns(splits, config, remarks)
        all_images = splits[train_place]
        train, bank, validation = hold_out_images(all_images, validation_of(splits), config)
    labelled = all_images if isinstance(all_images, Dataset) and "label" in all_images.features else bank
    num_classes = count_classes(labelled, remarks) if labelled is not None else 0
    if num_classes < 2:
        train, bank, validation = all_images, None, None
        if isinstance(train, Dataset) and "label" in train.features:
            train = train.remove_columns("label")
    limit = min(len(train), config.max_images or len(train))
    note = f"{config.dataset}: {f'{limit:,} of ' if limit < len(train) else ''}{len(train):,} images"
    class_names = bank.features["label"].names if bank is not None else None
    if class_names is not None and isinstance(all_images, Dataset) and num_classes < len(class_names):
        note += f" of {num_classes} classes ({len(class_names)} are named)"
    elif class_names is not None:
        note += f" of {len(class_names)} classes"
    if train_place:
        note += f" in {train_place}"
    if validation is not None and config.evaluates:
        origin = "held out of the training images"
        if len(train) == len(all_images):
            origin = f"{list(splits)[1]}, its own validation split" if list(splits)[1] else "its own validation split"
        note += f"; evaluation on {len(validation):,} others ({origin})"
    if config.evaluates and (validation is None or len(train) < len(all_images)):
        reason = "the training images have no labels" if bank is None else "not every image in it has a label"
        remarks += [f"{place or 'the validation split'} is not used, because {reason}" for place in list(splits)[1:]]
    train, bank = evenly_spread(train, limit), None if bank is None else evenly_spread(bank, limit)
    if config.streaming and isinstance(train, Dataset):
        if "offset" in train.features:
            train = TarShards(train)
        else:
            remarks.append("--streaming changes nothing for images that can be read one by one")
    if config.images_per_epoch is not None and not isinstance(train, HubStream):
        raise ConfigurationError(
            f"--images_per_epoch {config.images_per_epoch}: leave it out, an epoch shows all {len(train):,} images of "
            f"--dataset {config.dataset}"
        )
    if isinstance(train, Shards) and (num_pieces := np.count_nonzero(train.piece_sizes)) < config.num_virtual_devices:
        remarks.append(
            f"{num_pieces} {'piece' if num_pieces == 1 else 'pieces'} (row groups, runs of a tar) for "
            f"{config.num_virtual_devices} virtual devices: several devices read the same piece, each from its start"
        )
    warnings = tuple(remark for remark in remarks if remark.startswith("warning: "))
    note = "; ".join([note, *(remark for remark in remarks if remark not in warnings)])
    return ImageData(train, bank, validation, class_names, note, str(folder), warnings)


def validation_of(splits: dict[str, Dataset] | dict[str, ParquetShards]) -> Dataset | ParquetShards | None:
    return next(itertools.islice(splits.values(), 1, None), None)


def evenly_spread(images: Dataset | ParquetShards, number: int) -> Dataset | ParquetShards:
    """Return only so many of the images, evenly spread; all if there are not more."""
    if len(images) <= number:
        return images
    if isinstance(images, ParquetShards):
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
            "warning: no class has two training images, so a nearest neighbour never has the right class; name another "
            "column with --label_column"
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


def load_folder(
    folder: Path, config: ImageSettings, remarks: list[str]
) -> dict[str, Dataset] | dict[str, ParquetShards]:
    """Return the training and the validation split of a folder of image files, parquet files or tars, by their places.

    Raises:
        ConfigurationError: the path is a file, the folder holds no images or files of several kinds, or a training
            split holds nothing.
    """
    if folder.is_file():
        known = folder.suffix.lower() in (*IMAGE_EXTENSIONS, *SHARD_EXTENSIONS)
        advice = "give the folder that it is in" if known else "unpack it if it is an archive, and give the folder"
        raise ConfigurationError(f"--dataset {folder} is a file: {advice}")
    found = find_files(folder)
    files_by_kind: dict[str, list[str]] = {}
    for path in found.paths:
        stem, extension = os.path.splitext(path)
        if extension.lower() not in SHARD_EXTENSIONS:
            files_by_kind.setdefault("image", []).append(path)
        elif os.path.basename(stem) != "metadata":  # the Hub describes folders of images in such a file
            files_by_kind.setdefault(extension.lower(), []).append(path)
    if not files_by_kind:
        others = Counter(found.others)
        raise ConfigurationError(
            f"--dataset {folder} holds no image: searched at any depth for *.parquet, *.tar and "
            f"{' '.join(sorted(IMAGE_EXTENSIONS))}"
            + (f"; found {list_files(others)}: {advice_on(others)}" if others else "")
        )
    kind = choose_kind(folder, files_by_kind)
    files = files_by_kind.pop(kind)
    others = Counter(found.others)
    for paths in files_by_kind.values():
        others.update(os.path.splitext(path)[1].lower() for path in paths)
    remarks += unused_files(others, len(files), kind)
    if kind == "image":
        return load_image_files(folder, files, found.called_train, config, remarks)
    groups = configured_files(folder, files, config) or group_files(files, config)
    check_train(folder, list(groups), found.called_train, files, config)
    choice = choose_splits(list(groups), config)
    remarks += [f"not used: {describe_files(groups[name])}, no part of the training split" for name in choice.unused]
    chosen = {describe_files(groups[name]): groups[name] for name in choice[:2] if name is not None}
    if kind == ".tar":
        return tar_splits(folder, chosen, config, remarks)
    shards = parquet_splits({place: [str(folder / path) for path in paths] for place, paths in chosen.items()}, config)
    if config.streaming:
        return shards
    # `datasets` fails on a file without rows.
    filled = {place: [part.files[i] for i in np.flatnonzero(part.file_sizes)] for place, part in shards.items()}
    copied = (
        copy_parquet({place: files for place, files in filled.items() if files}, config) if any(filled.values()) else {}
    )
    return {place: copied.get(place, []) for place in filled}


def choose_kind(folder: Path, files_by_kind: dict[str, list[str]]) -> str:
    """Return the kind of files to use: `image`, `.parquet` or `.tar`.

    It is the only kind, the only one with files that are called train, or the one with nearly all bytes. Parquet files
    that img2dataset writes beside tars or folders of images of the same names describe these images.

    Raises:
        ConfigurationError: no kind stands out.
    """
    stems = {os.path.splitext(path)[0] for path in files_by_kind.get(".tar", [])}
    stems |= {os.path.dirname(path) for path in files_by_kind.get("image", [])}
    described = [path for path in files_by_kind.get(".parquet", []) if os.path.splitext(path)[0] in stems]
    kinds = [kind for kind in files_by_kind if kind != ".parquet" or not described] or list(files_by_kind)
    if len(kinds) > 1:
        training = [kind for kind in kinds if any(map(says_train, unique_names(files_by_kind[kind])))]
        kinds = training if len(training) == 1 else kinds
    if len(kinds) > 1:
        sizes = {kind: estimate_size(folder, files_by_kind[kind]) for kind in kinds}
        kinds = [kind for kind in kinds if sizes[kind] >= CLEAR_SHARE * sum(sizes.values())] or kinds
    if len(kinds) > 1:
        examples = " and ".join(f"{len(files_by_kind[kind]):,} like {files_by_kind[kind][0]}" for kind in kinds)
        raise ConfigurationError(f"--dataset {folder} holds {examples}: give a folder with files of one kind")
    return kinds[0]


def unique_names(paths: Sequence[str]) -> set[str]:
    """Return the paths of shards, and the folders of images, because these have too many paths to look at each."""
    return {path if path.lower().endswith(SHARD_EXTENSIONS) else os.path.dirname(path) for path in paths}


def says_train(path: str) -> bool:
    return split_of_path(path) == TRAIN


def estimate_size(folder: Path, paths: Sequence[str]) -> float:
    """Return the size of files in bytes, estimated from some of them."""
    sample = [paths[i] for i in np.linspace(0, len(paths) - 1, min(len(paths), SIZED_FILES)).astype(int)]
    sizes = [os.path.getsize(folder / path) for path in sample if os.path.exists(folder / path)]
    return sum(sizes) / len(sample) * len(paths)
