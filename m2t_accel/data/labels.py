"""The columns of images and labels, and the classes that the labels stand for."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pyarrow
from datasets import ClassLabel, Dataset, Features, Image, Value
from pyarrow import compute

from m2t_accel.config.data import ImageSettings
from m2t_accel.config.fields import ConfigurationError, did_you_mean

IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp", "pixel_values")
LABEL_COLUMNS = ("label", "labels", "fine_label", "cls", "class", "target")


def find_columns(features: Features, config: ImageSettings) -> tuple[str, str | None]:
    """Return the columns of images and of labels: those that the flags name, else the usual ones.

    Raises:
        ConfigurationError: a flag names a column that does not exist, or no column holds images.
    """
    columns = list(features)
    image = config.image_column or next(
        (name for name, feature in features.items() if isinstance(feature, Image)),
        next((name for name in IMAGE_COLUMNS if name in columns), None),
    )
    label = label_column(columns, config)
    for flag, name in (("image_column", image), ("label_column", label)):
        if name is not None and name not in columns:
            raise ConfigurationError(
                f"--{flag} {name}: no such column{did_you_mean(name, columns)}; there are {', '.join(columns)}"
            )
    if image is None:
        raise ConfigurationError(
            f"--dataset {config.dataset} has no column of images; name one of {', '.join(columns)} with --image_column"
        )
    return image, label


def label_column(columns: Sequence[str], config: ImageSettings) -> str | None:
    """Return the column of labels: the one that the flag names, else the first of the usual ones."""
    return config.label_column or next((name for name in LABEL_COLUMNS if name in columns), None)


def standard_columns(splits: dict[str, Dataset], config: ImageSettings, remarks: list[str]) -> dict[str, Dataset]:
    """Return the splits with a column `image`, undecoded, and a ClassLabel column `label` if they have labels.

    A validation split in which a label is missing loses the column; all splits lose it if a training image has none.

    Args:
        splits: the training split first.
        config: may name the columns.
        remarks: list to which this adds notes for the user.

    Raises:
        ConfigurationError: a column that a flag names is missing or of the wrong kind, or a validation label is not
            among the training labels.
    """
    image, column = find_columns(next(iter(splits.values())).features, config)
    standard, labels = {}, {}
    for name, split in splits.items():
        columns = {image: "image"} | ({column: "label"} if column in split.features else {})
        columns |= {place: place for place in ("offset", "size") if image == "image" and place in split.features}
        split = split.select_columns(list(columns)).rename_columns({k: v for k, v in columns.items() if k != v})
        if split.features["image"] != Image(decode=False):
            try:
                split = split.cast_column("image", Image(decode=False))
            except (TypeError, ValueError, pyarrow.ArrowException):
                raise ConfigurationError(
                    f"--image_column {image}: not a column of images but {split.features['image']}"
                ) from None
        standard[name] = split
        if column in columns:
            labels[name] = split.with_format("arrow")["label"][:]
    if column is None:
        return standard
    train_name, train = next(iter(standard.items()))
    classes = find_classes(train.features["label"], lambda: labels[train_name], len(train), column, config, remarks)
    for name in labels:
        if classes is not None and (name == train_name or classes.cover(labels[name], column, config)):
            standard[name] = classes.apply(standard[name], "label")
        else:
            standard[name] = standard[name].remove_columns("label")
    return standard


def find_classes(
    feature: object,
    read_labels: Callable[[], pyarrow.ChunkedArray],
    num_images: int,
    column: str,
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
        column: name of the column.
        config: names the column if the user asks for it.
        remarks: list to which this adds the reason if no labels are used.

    Raises:
        ConfigurationError: an image has no class, and `--label_column` asks for this column.
    """
    dtype = feature.dtype if isinstance(feature, Value) else ""
    numbers = dtype.startswith(("int", "uint"))
    names, reason = [], ""
    if not isinstance(feature, ClassLabel) and not numbers and dtype not in ("string", "large_string", "bool"):
        reason = f"the values are {dtype or feature}"
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
    if reason and config.label_column is not None:
        raise ConfigurationError(f"--label_column {column}: not every image has a class in it ({reason})")
    if reason:
        remarks.append(f"no labels, because not every image has a class in the column {column} ({reason})")
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

    def cover(self, labels: pyarrow.ChunkedArray, column: str, config: ImageSettings) -> bool:
        """Return whether no label of a validation split is missing.

        Args:
            labels: the labels of all images, or their distinct values.
            column: name of the column.
            config: names the dataset.

        Raises:
            ConfigurationError: a label is not among the classes.
        """
        labels = distinct(labels)
        if any(map(is_missing, labels)):
            return False
        unknown = sorted(str(label) for label in labels if self.number(label) is None)
        if unknown:
            raise ConfigurationError(
                f"--dataset {config.dataset}: the label {unknown[0]} of the validation split is not among the "
                f"training labels of the column {column}; choose another with --label_column"
            )
        return True

    def apply(self, split: Dataset, column: str) -> Dataset:
        """Return the split with its labels as ClassLabel."""
        if isinstance(split.features[column], ClassLabel):
            return split
        labels = split.with_format("arrow")[column][:]
        numbers = {label: self.number(label) for label in distinct(labels)}
        numbers = np.array([numbers[label] for label in labels.to_pylist()], np.int64)
        return split.remove_columns(column).add_column(column, numbers, feature=ClassLabel(names=self.names))

    def number(self, label: int | str) -> int | None:
        if self.by_number and isinstance(label, int):
            return label if label < len(self.names) else None
        return self.numbers.get(str(label))


def distinct(labels: pyarrow.ChunkedArray) -> list[object]:
    return compute.unique(labels).to_pylist()


def is_missing(label: object) -> bool:
    return label is None or (not isinstance(label, str) and label < 0)
