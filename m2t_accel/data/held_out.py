"""The labelled images for evaluation: a validation split, or images held out of the training split."""

from __future__ import annotations

import functools

import numpy as np
import pyarrow
from datasets import ClassLabel, Dataset

from m2t_accel.config.data import ImageSettings
from m2t_accel.config.fields import count
from m2t_accel.data.columns import find_label_column, fits_labels
from m2t_accel.data.labels import find_classes, stored_labels
from m2t_accel.data.parquet import ParquetShards
from m2t_accel.data.shards import to_dataset

# Images that streaming holds in memory for kNN: 1.1 and 0.2 GB of ImageNet's in each process.
MAX_STREAMED_BANK, MAX_STREAMED_QUERIES = 10_000, 2_000


def hold_out_images(
    train: Dataset, validation: Dataset | None, config: ImageSettings
) -> tuple[Dataset, Dataset | None, Dataset | None]:
    """Return training images, the same images again if they have labels, and validation images.

    Without a validation split, a share of the training images is held out, unless nothing is evaluated.
    """
    if "label" not in train.features:
        return train, None, None
    if validation is not None and "label" in validation.features:
        return train, train, validation
    if config.validation_fraction == 0 or not config.evaluates:
        return train, train, None
    held_out = np.zeros(len(train), bool)
    # A fixed seed, not that of the run, so that runs are measured on the same images. Shuffled, because files are often
    # sorted by class.
    order = np.random.default_rng(0).permutation(len(train))
    held_out[order[: max(1, round(config.validation_fraction * len(train)))]] = True
    train, validation = select_images(train, ~held_out), select_images(train, held_out)
    return train, train, validation


def select_images(images: Dataset, chosen: np.ndarray) -> Dataset:
    """Return some of the images: chosen (N,) bool.

    A table in memory is filtered, because reading the places of a million images in tars through the indices of a
    selection takes `datasets` 10 s. A table on disk is not copied.
    """
    if images.cache_files or images._indices is not None:
        return images.select(np.flatnonzero(chosen))
    return to_dataset(images.data.table.filter(pyarrow.array(chosen)), images.info)


def hold_out_pieces(
    train: ParquetShards, validation: ParquetShards | None, config: ImageSettings, remarks: list[str]
) -> tuple[ParquetShards, Dataset | None, Dataset | None]:
    """Return training images as shards and, if they have labels, some training and validation images in memory.

    Without a validation split, whole pieces of the training split are held out. If all are too large, or if the flags
    hold nothing out, the second result has the column `label` alone, and the third is None.

    Args:
        train: training split.
        validation: validation split, if there is one.
        config: settings of the dataset and of evaluation.
        remarks: list to which this adds notes for the user.

    Raises:
        ConfigurationError: the column that `--label_column` names is of the wrong kind, or a validation label is not
            among the training labels.
    """
    label = find_label_column(train.features, train.column.name, config, remarks)
    if label is None or not config.evaluates:  # images for evaluation would only take memory
        return train, None, None
    kind = train.features[label.name]

    def read_labels() -> pyarrow.ChunkedArray:
        # The classes of a ClassLabel are known without reading the labels of all training images.
        return pyarrow.array([]) if isinstance(kind, ClassLabel) else train.distinct_values(label.name)

    classes = find_classes(kind, read_labels, len(train), label, config, remarks)
    if classes is None:
        return train, None, None
    if validation is not None and not (
        fits_labels(validation.features.get(label.name))
        and classes.cover(validation.distinct_values(label.name), label, config)
    ):
        validation = None
    all_images = train
    if validation is None:
        limit = min(MAX_STREAMED_QUERIES, config.validation_fraction * len(train))
        held_out = spread_pieces(train.piece_sizes, limit)
        if len(held_out):
            chosen = np.zeros(len(train.piece_sizes), bool)
            chosen[held_out] = True
            train, validation = train.select(~chosen), train.select(chosen)
        elif limit:
            size = count(smallest(train.piece_sizes)[1], "image")
            remarks.append(
                f"no image is held out, because the smallest row group has {size}, more than the {limit:,.0f} wanted: "
                "write smaller row groups, or leave out --streaming"
            )
    parts = {"train": (train, MAX_STREAMED_BANK)} | ({"val": (validation, MAX_STREAMED_QUERIES)} if validation else {})
    splits = {}
    for name, (shards, limit) in parts.items():
        pieces = spread_pieces(shards.piece_sizes, limit)
        if not len(pieces):  # at least a part of one piece
            pieces = np.array(smallest(shards.piece_sizes)[:1])
        # If nothing is held out, no kNN needs the images. The labels still tell how the classes are distributed.
        split = classes.apply(shards.dataset(pieces, label.name, limit, with_images=validation is not None))
        # The labels of a ClassLabel column have not been read before.
        read_labels = functools.partial(stored_labels, split)
        if find_classes(split.features["label"], read_labels, len(train), label, config, remarks) is None:
            return all_images, None, None
        splits[name] = split
    if validation is not None and len(splits["train"]) < len(train):
        remarks.append(f"kNN compares with {len(splits['train']):,} of the training images")
    return train, splits["train"], splits.get("val")


def spread_pieces(sizes: np.ndarray, num_images: float) -> np.ndarray:
    """Return pieces that are evenly spread and together hold at most `num_images`.

    These are all pieces if they fit, and none if the smallest does not fit.
    """
    filled = np.flatnonzero(sizes)
    if sizes.sum(dtype=np.int64) <= num_images:
        return filled
    for number in range(int(min(num_images / sizes[filled].mean(), len(filled))), 0, -1):
        pieces = filled[np.unique(np.linspace(0, len(filled) - 1, number + 2)[1:-1].round().astype(int))]
        if sizes[pieces].sum() <= num_images:
            return pieces
    piece, size = smallest(sizes)
    return np.array([piece] if size <= num_images else [], int)


def smallest(sizes: np.ndarray) -> tuple[int, int]:
    """Return the smallest piece that is not empty, and its size."""
    filled = np.flatnonzero(sizes)
    piece = int(filled[sizes[filled].argmin()])
    return piece, int(sizes[piece])
