"""The standard columns `image` and `label`, and the classes that the labels stand for."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable

import numpy as np
import pyarrow
from datasets import ClassLabel, Dataset, Features, Image, Value
from pyarrow import compute

from m2t_accel.config.data import ImageSettings
from m2t_accel.config.fields import ConfigurationError
from m2t_accel.data.columns import (
    ImageColumn,
    LabelColumn,
    dataset_rows,
    describe_type,
    explain_type,
    find_image_column,
    find_label_column,
    fits_labels,
    image_rank,
    listed,
    stored_values,
    undecoded,
)
from m2t_accel.data.decode import DecodeError
from m2t_accel.data.shards import is_standard


def standard_columns(splits: dict[str, Dataset], config: ImageSettings, remarks: list[str]) -> dict[str, Dataset]:
    """Return the splits with a column `image`, undecoded, and a ClassLabel column `label` if they have labels.

    A validation split in which a label is missing loses the column; all splits lose it if a training image has none.

    Args:
        splits: the training split first.
        config: may name the columns.
        remarks: list to which this adds notes for the user.

    Raises:
        ConfigurationError: there is no column of images, a column that a flag names is missing or of the wrong kind, or
            a validation label is not among the training labels.
    """
    train_name, train = next(iter(splits.items()))
    if is_standard(train):
        check_flags(train, config)
        label = LabelColumn("label", []) if "label" in train.features else None
    else:
        image = find_image_column(train.features, dataset_rows(train), config)
        label = find_label_column(train.features, image.name, config, remarks)
        for split in splits.values():
            check_has_images(split.features, image.name, config)
        splits = {name: select_columns(split, image, label and label.name) for name, split in splits.items()}
        train = splits[train_name]
    if label is None:
        return splits
    labels = {name: stored_labels(split) for name, split in splits.items() if fits_labels(split.features.get("label"))}
    classes = find_classes(train.features["label"], lambda: labels[train_name], len(train), label, config, remarks)
    standard = {}
    for name, split in splits.items():
        usable = classes is not None and name in labels
        if usable and (name == train_name or classes.cover(labels[name], label, config)):
            standard[name] = classes.apply(split)
        else:
            standard[name] = split.remove_columns("label") if "label" in split.features else split
    return standard


def check_flags(images: Dataset, config: ImageSettings) -> None:
    """Check that no flag names a column of images that are files or parts of tars.

    Raises:
        ConfigurationError: a flag does.
    """
    if config.image_column not in (None, "image"):
        raise ConfigurationError(
            f"--image_column {config.image_column}: --dataset {config.dataset} is no table and has no columns; leave "
            "the flag out"
        )
    if config.label_column is not None and "label" not in images.features:
        raise ConfigurationError(
            f"--label_column {config.label_column}: --dataset {config.dataset} is no table and has no columns; its "
            "labels would be the names of class folders, or in tars"
        )


def select_columns(split: Dataset, image: ImageColumn, label: str | None) -> Dataset:
    """Return a user's table with the columns `image`, undecoded, and `label` if it has usable labels.

    Args:
        split: the table.
        image: its column of images.
        label: name of its column of labels.
    """
    columns = {image.name: "image"} | ({label: "label"} if label in split.features else {})
    split = split.with_format(None).select_columns(list(columns))  # a format or a transform would change the rows
    split = split.rename_columns({name: other for name, other in columns.items() if name != other})
    feature = split.features["image"]
    if isinstance(feature, dict | Image) or (isinstance(feature, Value) and not image.root):
        with contextlib.suppress(TypeError, ValueError, pyarrow.ArrowException):  # views, or 2 GB in a chunk
            split = split.cast_column("image", Image(decode=False))
    if split.features["image"] == Image(decode=False) and not image.root:
        return split
    return (
        split.with_format("arrow")
        .map(
            functools.partial(undecoded_rows, root=image.root),
            batched=True,
            features=Features({**split.features, "image": Image(decode=False)}),
            desc="reading the column of images",
        )
        .with_format(None)
    )


def undecoded_rows(rows: pyarrow.Table, root: str) -> pyarrow.Table:
    """Return some rows with undecoded images; null for a row without an image."""
    images = []
    for value in stored_values(rows["image"].combine_chunks()):
        try:
            image = undecoded(value, root)
        except DecodeError:
            image = {"bytes": None, "path": None}
        images.append(None if image["bytes"] is None and image["path"] is None else image)
    images = pyarrow.array(images, Image(decode=False).pa_type)
    return rows.set_column(rows.column_names.index("image"), "image", images)


def check_has_images(features: Features, column: str, config: ImageSettings) -> None:
    """Check that a split has the column of images, and that its type fits them.

    Raises:
        ConfigurationError: it has none, or of another type.
    """
    if column not in features:
        raise ConfigurationError(
            f"--dataset {config.dataset}: the validation split has no column {column}, which the training split has, "
            f"but {', '.join(features)}; rename it, or move the split away"
        )
    if image_rank(features[column]) is None:
        raise ConfigurationError(
            f"--dataset {config.dataset}: the column {column} of the validation split has "
            f"{explain_type(features[column])}, and no images; move the split away"
        )


def find_classes(
    feature: object,
    read_labels: Callable[[], pyarrow.ChunkedArray],
    num_images: int,
    column: LabelColumn,
    config: ImageSettings,
    remarks: list[str],
) -> Classes | None:
    """Return the classes of the training labels; None with a remark if an image has no class.

    Labels are class labels, whole numbers from 0, words or booleans. A label that is null or negative is missing; on
    the Hub, -1 stands for a withheld label.

    Args:
        feature: type of the column.
        read_labels: returns the labels of all images, or their distinct values.
        num_images: number of training images; a label of this size or more is not the number of a class.
        column: the column, and others that may be meant.
        config: names the column if the user asks for it.
        remarks: list to which this adds the reason if no labels are used.

    Raises:
        ConfigurationError: an image has no class, and `--label_column` asks for this column.
    """
    dtype = feature.dtype if isinstance(feature, Value) else ""
    numbers = dtype.startswith(("int", "uint"))
    names, reason = [], ""
    if not fits_labels(feature):
        reason = f"the values are {describe_type(feature)}"
        if dtype.startswith("float"):
            reason += ", which pandas makes of whole numbers if some are missing"
    else:
        labels = distinct(read_labels())
        if any(map(is_missing, labels)):
            reason = "some are missing or negative"
        elif isinstance(feature, ClassLabel):
            names = feature.names
        elif numbers and max(labels) >= num_images:
            reason = f"the values are numbers up to {max(labels):,}"
        else:
            names = [str(i) for i in range(max(labels) + 1)] if numbers else sorted(map(str, labels))
    others = f"; --label_column may name {listed(column.others)}" if reason and column.others else ""
    if reason and config.label_column is not None:
        raise ConfigurationError(f"--label_column {column.name}: not every image has a class in it ({reason}){others}")
    if reason:
        remarks.append(f"no labels, because not every image has a class in the column {column.name} ({reason}){others}")
        return None
    return Classes(names, isinstance(feature, ClassLabel))


class Classes:
    """The classes of the training images."""

    def __init__(self, names: list[str], by_number: bool) -> None:
        """Number the classes.

        Args:
            names: name of each class.
            by_number: whether a label that is a whole number is the number of a class; else it is one of the names.
        """
        self.names = names
        self.numbers = {name: number for number, name in enumerate(names)}
        self.by_number = by_number

    def cover(self, labels: pyarrow.ChunkedArray, column: LabelColumn, config: ImageSettings) -> bool:
        """Return whether a validation split can be used: no label is missing.

        Args:
            labels: the labels of all images, or their distinct values.
            column: the column.
            config: names the dataset.

        Raises:
            ConfigurationError: a label is not among the classes, and the split would be used.
        """
        labels = distinct(labels)
        if any(map(is_missing, labels)):
            return False
        unknown = sorted(str(label) for label in labels if self.number(label) is None)
        if unknown and not config.evaluates:
            return False
        if unknown:
            raise ConfigurationError(
                f"--dataset {config.dataset}: the label {unknown[0]} of the validation split is not among the "
                f"training labels of the column {column.name}; choose another with --label_column"
                f"{config.or_no_evaluation}"
            )
        return True

    def apply(self, split: Dataset) -> Dataset:
        """Return the split with its labels as ClassLabel."""
        if isinstance(split.features["label"], ClassLabel):
            return split
        labels = stored_labels(split)
        numbers = {label: self.number(label) for label in distinct(labels)}
        numbers = np.array([numbers[label] for label in labels.to_pylist()], np.int64)
        # Added first: without any column, a Dataset has no rows.
        split = split.add_column("class", numbers, feature=ClassLabel(names=self.names))
        return split.remove_columns("label").rename_column("class", "label")

    def number(self, label: int | str) -> int | None:
        if self.by_number and isinstance(label, int):
            return label if label < len(self.names) else None
        return self.numbers.get(str(label))


def stored_labels(split: Dataset) -> pyarrow.ChunkedArray:
    return split.with_format("arrow")["label"][:]


def distinct(labels: pyarrow.ChunkedArray) -> list[object]:
    return compute.unique(labels).to_pylist()


def is_missing(label: object) -> bool:
    return label is None or (not isinstance(label, str) and label < 0)
