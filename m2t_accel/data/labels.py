"""Which columns of a data set are its images and labels, and which classes there are."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow
from datasets import ClassLabel, Dataset, Features, Image, Value
from pyarrow import compute

from m2t_accel.config.data import ImageSettings
from m2t_accel.config.fields import ConfigurationError, did_you_mean
from m2t_accel.data.parquet import ParquetShards

IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp", "pixel_values")
LABEL_COLUMNS = ("label", "labels", "fine_label", "cls", "class", "target")


def find_columns(features: Features, config: ImageSettings) -> tuple[str, str | None]:
    """The columns of images and of labels: those that the flags name, else the usual ones.

    Raises:
        ConfigurationError: there is no such column, or none of images.
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
    """The column of labels: that of the flag, else the first of the usual ones that there is."""
    return config.label_column or next((name for name in LABEL_COLUMNS if name in columns), None)


def standard_columns(splits: dict[str, Dataset], config: ImageSettings, remarks: list[str]) -> dict[str, Dataset]:
    """The splits with a column `image`, undecoded, and a ClassLabel column `label` where they have labels.

    The first split says what the columns are and which classes there are.
    """
    image, label = find_columns(next(iter(splits.values())).features, config)
    standard = {}
    for name, split in splits.items():
        wanted = {image: "image"} | ({label: "label"} if label in split.features else {})
        wanted |= {place: place for place in ("offset", "size") if image == "image" and place in split.features}
        split = split.select_columns(list(wanted)).rename_columns({k: v for k, v in wanted.items() if k != v})
        if split.features["image"] != Image(decode=False):
            try:
                split = split.cast_column("image", Image(decode=False))
            except (TypeError, ValueError, pyarrow.ArrowException):
                raise ConfigurationError(
                    f"--image_column {image}: not a column of images but {split.features['image']}"
                ) from None
        standard[name] = split
    return standard if label is None else with_class_labels(standard, label, config, remarks)


def with_class_labels(
    splits: dict[str, Dataset], column: str, config: ImageSettings, remarks: list[str]
) -> dict[str, Dataset]:
    """The splits with `label` as one ClassLabel: of class labels, whole numbers from 0, words or booleans.

    A split of which a label is missing or negative (the Hub's way to withhold them) loses the column, and so
    do all where the labels are no classes.

    Raises:
        ConfigurationError: labels that `--label_column` asks for are missing or no classes, or a validation
            split has others than the training split.
    """
    first = next(iter(splits.values()))
    feature = first.features["label"]
    columns = {
        name: split.with_format("arrow")["label"][:] for name, split in splits.items() if "label" in split.features
    }
    dtype = feature.dtype if isinstance(feature, Value) else ""
    names, values = None, {}
    if isinstance(feature, ClassLabel) or dtype.startswith(("int", "uint")):
        values = {
            name: compute.fill_null(part.cast("int64", safe=False), -1).to_numpy() for name, part in columns.items()
        }
        largest = int(max(part.max() for part in values.values()))
        if isinstance(feature, ClassLabel):
            names = feature.names
        elif largest < len(first):
            names = [str(i) for i in range(largest + 1)]
    elif dtype in ("string", "large_string", "bool"):
        words = {
            name: [None if value is None else str(value) for value in part.to_pylist()]
            for name, part in columns.items()
        }
        names = sorted(set(words[next(iter(splits))]) - {None})
        index = {name: i for i, name in enumerate(names)} | {None: -1}
        unknown = sorted({word for part in words.values() for word in part} - index.keys())
        if unknown:
            raise ConfigurationError(
                f"--dataset {config.dataset}: the label {unknown[0]} of the validation split is not among the "
                f"training labels of the column {column}; choose another with --label_column"
            )
        values = {name: np.array([index[word] for word in part]) for name, part in words.items()}
    complete = {name for name, part in values.items() if names and part.min() >= 0}
    if next(iter(splits)) not in complete:
        reason = f"they are {dtype or feature}"
        if names:
            reason = "some are missing or negative"
        elif values:
            reason = f"they are numbers up to {largest:,}"
        elif dtype.startswith("float"):
            reason = f"they are {dtype}, as pandas makes of whole numbers some of which are missing"
        if config.label_column is not None:
            raise ConfigurationError(f"--label_column {column}: not class labels for all images ({reason})")
        remarks.append(f"no labels, because the column {column} has not one for all images ({reason})")
    labelled = {}
    for name, split in splits.items():
        if "label" in split.features and not (name in complete and isinstance(feature, ClassLabel)):
            split = split.remove_columns("label")
            if name in complete:
                split = split.add_column("label", values[name].astype(np.int64), feature=ClassLabel(names=names))
        labelled[name] = split
    return labelled


def label_names(feature: object, shards: ParquetShards, column: str) -> list[str] | None:
    """The classes of a column of labels: words, or whole numbers from 0, over all rows; None if it is no such."""
    if isinstance(feature, ClassLabel):
        return feature.names
    if not isinstance(feature, Value) or not feature.dtype.startswith(
        ("string", "large_string", "bool", "int", "uint")
    ):
        return None
    values = shards.values(column)
    if values.null_count or not len(values):
        return None
    values = values.to_pylist()
    if isinstance(values[0], bool | str):
        return sorted(str(value) for value in values)
    return [str(i) for i in range(max(values) + 1)] if 0 <= min(values) <= max(values) < len(shards) else None


def has_labels(shards: ParquetShards, column: str, names: list[str]) -> bool:
    """Whether all images of a validation split have a label.

    Raises:
        ConfigurationError: one of them is not among the classes.
    """
    values = shards.values(column).to_pylist() if column in shards.features else [None]
    if any(value is None or (not isinstance(value, str) and value < 0) for value in values):
        return False
    for value, number in zip(values, class_numbers(values, names), strict=True):
        if number is None:
            raise ConfigurationError(
                f"the label {value} of the validation split is not among the training labels of the column {column}; "
                "choose another with --label_column"
            )
    return True


def class_numbers(values: Sequence[object], names: list[str]) -> list[int | None]:
    """Which class each label is, a word or the number of one; None where it is of none."""
    index = {name: i for i, name in enumerate(names)}
    numbers = [
        value if isinstance(value, int) and not isinstance(value, bool) else index.get(str(value)) for value in values
    ]
    return [number if number is not None and 0 <= number < len(names) else None for number in numbers]


def with_names(split: Dataset, column: str, names: list[str]) -> Dataset:
    """The split with its labels as ClassLabel of these names."""
    if isinstance(split.features[column], ClassLabel):
        return split
    numbers = class_numbers(split[column], names)
    return split.remove_columns(column).add_column(column, np.array(numbers, np.int64), feature=ClassLabel(names=names))
