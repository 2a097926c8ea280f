"""The split that the name of a file or a folder stands for."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

TRAIN_NAMES = ("train", "training")
VALIDATION_NAMES = ("val", "validation", "valid", "test", "testing")  # in order of preference


def used_splits(names: Iterable[str]) -> list[str]:
    """Return the name of the training split and, if there is one, of the validation split."""
    names = list(names)
    train_name = "train" if "train" in names else names[0]
    return [train_name, *[name for name in VALIDATION_NAMES if name in names and name != train_name][:1]]


def files_by_split(files: Sequence[str]) -> dict[str, list[str]]:
    """Group shards by the split that their name, or else the name of a folder, contains as a word.

    Example: `train-00000-of-00002.parquet` belongs to `train`.
    """
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
        elif validation is None:  # a name that contains both, such as train-test-split, says nothing
            return "train"
    return "train"
