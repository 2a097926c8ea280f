"""Which files and splits are for training and which for validation."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import numpy as np

from m2t_accel.config.data import ImageSettings
from m2t_accel.config.fields import ConfigurationError
from m2t_accel.data.labels import label_column
from m2t_accel.data.parquet import ParquetShards
from m2t_accel.data.parquet_index import class_conflicts

TRAIN_NAMES = ("train", "training")
VALIDATION_NAMES = ("val", "validation", "valid", "test", "testing")  # the first that can be used is


def wanted_splits(names: Iterable[str]) -> list[str]:
    """The split to train on and, if there is one, that to validate with."""
    names = list(names)
    train_name = "train" if "train" in names else names[0]
    return [train_name, *[name for name in VALIDATION_NAMES if name in names and name != train_name][:1]]


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
