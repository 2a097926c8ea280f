"""The splits that the names of files, folders and the Hub's splits stand for, and the choice among them.

One rule serves all sources: if anything is called a training split, nothing else is trained on.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from m2t_accel.config.data import ImageSettings
from m2t_accel.config.fields import ConfigurationError, did_you_mean

TRAIN, UNNAMED = "train", ""  # the training split, and what has no name of a split
TRAIN_WORDS = ("train", "training", "trn", "trainval")
# Evaluation splits in order of preference: a test split may have no labels.
EVALUATION_WORDS = {
    "validation": ("validation", "val", "valid", "validate", "dev", "devel", "development", "minival"),
    "heldout": ("heldout", "holdout", "eval", "evaluation"),
    "test": ("test", "testing", "tst"),
}
SPLIT_OF_WORD = {word: TRAIN for word in TRAIN_WORDS} | {
    word: split for split, words in EVALUATION_WORDS.items() for word in words
}
# Words beside the name of a split that say nothing more, also when they are glued to it: train_images, testset.
FILLERS = ("set", "sets", "data", "dataset", "split", "splits", "image", "images", "img", "imgs", "photos", "pictures")
# A folder or file that is a fold of a cross validation: fold_1, cv3, train-fold2.parquet.
FOLD = re.compile(r"(.*[\W_])?(cv|fold|split)[-_ ]?\d+(\.\w+)?", re.IGNORECASE)
GLUED = re.compile(f"({'|'.join(SPLIT_OF_WORD)})({'|'.join(FILLERS)})")


def words_of(name: str) -> list[str]:
    """Return the words of a name in lower case. A word ends at any character that is no letter, and before a capital.

    Example: `ILSVRC2012_imgTrain` has the words ilsvrc, img and train.
    """
    words = []
    for part in re.findall(r"[^\W\d_]+", name):
        for word in re.findall(r"[A-Z]?[^A-Z]+|[A-Z]+", part):
            glued = GLUED.fullmatch(word.lower())
            words += glued.groups() if glued else [word.lower()]
    return words


def split_of(name: str) -> str:
    """Return the split that a name contains as a word; UNNAMED if it contains none, or both kinds."""
    splits = [SPLIT_OF_WORD[word] for word in words_of(name) if word in SPLIT_OF_WORD]
    # A name with both, such as train-test-split, says nothing.
    return splits[0] if len({split == TRAIN for split in splits}) == 1 else UNNAMED


def split_of_folder(name: str, siblings: Iterable[str]) -> str:
    """Return the split that a folder of images is; UNNAMED if it may be a class.

    A class can have such a word in its name (freight_train). So the folder must have no other word, or a sibling of
    the other kind with the same other words: ILSVRC2012_img_train beside ILSVRC2012_img_val. Other words may also
    differ if no sibling can be a class, and none is plainly of the same kind: train_mini beside public_test.

    Args:
        name: name of the folder.
        siblings: names of the folders beside it; they may include its own.
    """
    split = split_of(name)
    if split == UNNAMED or not (others := other_words(name)):
        return split
    found = [(split_of(sibling), other_words(sibling)) for sibling in siblings]
    opposite = [words for other, words in found if other != UNNAMED and (other == TRAIN) != (split == TRAIN)]
    plain = any(not words and (other == TRAIN) == (split == TRAIN) for other, words in found)
    is_split = others in opposite or (opposite and not plain and all(other != UNNAMED for other, _ in found))
    return split if is_split else UNNAMED


def says_evaluation(name: str) -> bool:
    """Return whether a folder is called like an evaluation split, and not like a class (test_tube)."""
    words = words_of(name)
    return split_of(name) not in (UNNAMED, TRAIN) and (not other_words(name) or any(word in FILLERS for word in words))


def other_words(name: str) -> list[str]:
    return [word for word in words_of(name) if word not in SPLIT_OF_WORD and word not in FILLERS]


def split_of_path(path: str) -> str:
    """Return the split of a file by its name, or else by the name of a folder, the innermost first."""
    return next((split for name in reversed(path.split("/")) if (split := split_of(name)) != UNNAMED), UNNAMED)


class Choice(NamedTuple):
    """The splits that are used, by name."""

    train: str
    validation: str | None
    unused: list[str]


def choose_splits(names: Sequence[str], config: ImageSettings) -> Choice:
    """Choose the splits to train and to validate on: those that the flags name, else by the words in their names.

    Args:
        names: names of the splits, at least one.
        config: names the dataset, and may name the splits.

    Raises:
        ConfigurationError: a flag names a split that does not exist, or no name is that of a training split.
    """
    named = [name for name in names if name != UNNAMED]
    for flag, name in (("train_split", config.train_split), ("validation_split", config.validation_split)):
        if name is not None and name not in names:
            raise ConfigurationError(
                f"--{flag} {name}: --dataset {config.dataset} has no such split{did_you_mean(name, named)}; "
                f"it has {', '.join(named) or 'no folder or file that is called like a split'}"
            )
    train = config.train_split or find_train(names, config)
    candidates = [name for name in names if name != train and split_of(name) not in (TRAIN, UNNAMED)]
    candidates.sort(key=preference)
    validation = config.validation_split or (candidates[0] if candidates else None)
    return Choice(train, validation, [name for name in names if name not in (train, validation)])


def find_train(names: Sequence[str], config: ImageSettings) -> str:
    names = [name for name in names if name != config.validation_split]
    if not names:
        raise ConfigurationError(
            f"--validation_split {config.validation_split}: --dataset {config.dataset} has no other split to train on; "
            "leave the flag out to train on this one"
        )
    train = sorted((name for name in names if split_of(name) == TRAIN), key=preference)
    unnamed = [name for name in names if split_of(name) == UNNAMED]
    if train or len(unnamed) == 1 or len(names) == 1:
        return (train or unnamed or names)[0]
    raise ConfigurationError(
        f"--dataset {config.dataset} has the splits {', '.join(sorted(names))}, and none is called train: name the one "
        "to train on with --train_split"
    )


def preference(name: str) -> tuple[int, int]:
    """Return the sort key of a split: validation before test, and the plain name before a longer one."""
    split = split_of(name)
    return list(EVALUATION_WORDS).index(split) if split in EVALUATION_WORDS else -1, len(name)


def group_files(files: Iterable[str], config: ImageSettings) -> dict[str, list[str]]:
    """Return files by split: by one that a flag names, if it is a word of their name or a folder, else by their path.

    Example: with `--train_split extra`, the files of `extra/` and `extra-00000.parquet` are the training split, but
    not `extra-val-00000.parquet`: a word does not make a split of one kind a split of the other.
    """
    flags = [name for name in (config.train_split, config.validation_split) if name is not None]
    groups: dict[str, list[str]] = {}
    for path in files:
        found = split_of_path(path)
        names = {path, *path.split("/"), posixpath.dirname(path), found}
        words = set(words_of(posixpath.basename(path)))
        split = next((flag for flag in flags if flag in names), None)
        if split is None and config.train_split in words and found in (TRAIN, UNNAMED):
            split = config.train_split
        if split is None and config.validation_split in words and found != TRAIN:
            split = config.validation_split
        groups.setdefault(found if split is None else split, []).append(path)
    return groups


def describe_files(files: Sequence[str]) -> str:
    """Return the first and the last file in words, and their number."""
    return files[0] if len(files) == 1 else f"{files[0]} … {files[-1]} ({len(files):,} files)"


def warn_of_folds(train: Iterable[str], validation: Iterable[str]) -> list[str]:
    """Return a warning if both splits lie in several folds of a cross validation: each fold holds the same images.

    Args:
        train: files or folders of the training split.
        validation: files or folders of the validation split.
    """
    train, validation = (
        {name for path in paths for name in path.split("/") if FOLD.fullmatch(name)} for paths in (train, validation)
    )
    if min(len(train), len(validation)) < 2:
        return []
    return [
        f"warning: {', '.join(sorted(train))} are folds that may hold the same images, so held-out images may be "
        "trained on; give one of them"
    ]
