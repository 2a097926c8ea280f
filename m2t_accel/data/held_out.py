"""Which labelled images there are to measure kNN with: a validation split, or some held out of training."""

from __future__ import annotations

import numpy as np
import pyarrow
import pyarrow.types
from datasets import Dataset

from m2t_accel.config.data import ImageSettings
from m2t_accel.config.fields import ConfigurationError
from m2t_accel.data.labels import find_columns, has_labels, label_names, standard_columns, with_names
from m2t_accel.data.parquet import ParquetShards
from m2t_accel.data.shards import dataset_of

# What streaming holds in memory to measure kNN: of ImageNet, 1.1 and 0.2 GB a process.
MAX_STREAMED_BANK, MAX_STREAMED_QUERIES = 10_000, 2_000


def with_held_out(
    train: Dataset, validation: Dataset | None, config: ImageSettings
) -> tuple[Dataset, Dataset | None, Dataset | None]:
    """Training images, the same again where they have labels, and validation images, which may be held out of them."""
    if "label" not in train.features:
        return train, None, None
    if validation is not None and "label" in validation.features:
        return train, train, validation
    if config.validation_fraction == 0 or not config.evaluates:
        return train, train, None
    held_out = np.zeros(len(train), bool)
    # Not the run's seed: the figure must not depend on a lucky split. Scattered: files come class by class.
    order = np.random.default_rng(0).permutation(len(train))
    held_out[order[: max(1, round(config.validation_fraction * len(train)))]] = True
    train, validation = choose(train, ~held_out), choose(train, held_out)
    return train, train, validation


def choose(images: Dataset, chosen: np.ndarray) -> Dataset:
    """Some of the images: chosen (N,) bool.

    Names in memory become a table of their own: through the indices of a selection, `datasets` would need 10 s to hand
    out the places in a tar of a million images.
    """
    if images.cache_files:  # what is on a disk stays there
        return images.select(np.flatnonzero(chosen))
    return dataset_of(images.data.table.filter(pyarrow.array(chosen)), images.info)


def streamed(
    train: ParquetShards, validation: ParquetShards | None, config: ImageSettings, remarks: list[str]
) -> tuple[ParquetShards, Dataset | None, Dataset | None]:
    """Training images as shards and, where they have labels, some of them and of the validation images in memory."""
    image, label = find_columns(train.features, config)
    kind = train.features.arrow_schema.field(image).type
    is_image = pyarrow.types.is_struct(kind) and kind.get_field_index("bytes") >= 0
    if not is_image and kind not in (
        pyarrow.binary(),
        pyarrow.large_binary(),
        pyarrow.string(),
        pyarrow.large_string(),
    ):
        raise ConfigurationError(f"--image_column {image}: not a column of images but {kind}")
    for shards in (train, validation):
        if shards is not None:
            if image not in shards.features:
                raise ConfigurationError(
                    f"--dataset {config.dataset}: the validation split has no column {image}, which the training split "
                    f"has, but {', '.join(shards.features)}; rename it, or move the split away"
                )
            shards.column = image
    if label is None or not config.evaluates:  # what serves evaluation alone would be held in memory
        return train, None, None
    # Which classes there are say all labels, not those of the images in memory.
    names = label_names(train.features[label], train, label)
    if names is None:
        if config.label_column is not None:
            raise ConfigurationError(f"--label_column {label}: not class labels for all images")
        remarks.append(f"no labels, because the column {label} has not one for all images")
        return train, None, None
    if validation is not None and not has_labels(validation, label, names):
        validation = None
    whole, held_out = train, np.empty(0, int)
    if validation is None:
        limit = min(MAX_STREAMED_QUERIES, config.validation_fraction * len(train))
        held_out = spread_pieces(train.piece_sizes, limit)
        if len(held_out):
            chosen = np.zeros(len(train.piece_sizes), bool)
            chosen[held_out] = True
            train, validation = train.select(~chosen), train.select(chosen)
        elif limit:
            remarks.append(
                f"no image is held out, because the smallest row group has {smallest(train.piece_sizes)[1]:,}, more "
                f"than the {limit:,.0f} wanted"
            )
    parts = {"train": (train, MAX_STREAMED_BANK)} | ({"val": (validation, MAX_STREAMED_QUERIES)} if validation else {})
    splits = {}
    for name, (shards, limit) in parts.items():
        # Where the least is too much, it is taken all the same: at least one piece.
        pieces = spread_pieces(shards.piece_sizes, limit)
        splits[name] = shards.dataset(
            pieces if len(pieces) else np.array(smallest(shards.piece_sizes)[:1]), [image, label]
        )
    splits = {name: with_names(split, label, names) for name, split in splits.items()}
    splits = standard_columns(splits, config, remarks)
    if any("label" not in split.features for split in splits.values()):
        return whole, None, None
    if len(splits["train"]) < len(train):
        remarks.append(f"its neighbours are looked for among {len(splits['train']):,}")
    return train, splits["train"], splits.get("val")


def spread_pieces(sizes: np.ndarray, num_images: float) -> np.ndarray:
    """Pieces evenly spread that hold at most so many images: all if they do, none where the smallest holds more."""
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
    """The smallest piece that is not empty, and its size."""
    filled = np.flatnonzero(sizes)
    piece = int(filled[sizes[filled].argmin()])
    return piece, int(sizes[piece])
