"""A folder of image files, parquet files or tars: the kind of files that it holds, and their splits."""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from datasets import Dataset

from m2t_accel.config.data import ImageSettings
from m2t_accel.config.fields import ConfigurationError
from m2t_accel.data.configurations import configured_files
from m2t_accel.data.folders import (
    IMAGE_EXTENSIONS,
    SHARD_EXTENSIONS,
    advice_on,
    check_train,
    find_files,
    how_to_unpack,
    is_archive,
    list_files,
    unique_names,
    unused_files,
)
from m2t_accel.data.hub_datasets import copy_parquet
from m2t_accel.data.image_files import load_image_files
from m2t_accel.data.parquet import ParquetShards, parquet_splits
from m2t_accel.data.splits import (
    TRAIN,
    UNNAMED,
    choose_splits,
    describe_files,
    group_files,
    split_of_path,
    warn_of_folds,
)
from m2t_accel.data.tars import tar_splits

CLEAR_SHARE = 0.9  # share of the bytes of a folder that makes a kind of files the one that is meant
SIZED_FILES = 200  # files whose sizes are read for an estimate of all


def load_folder(
    folder: Path, config: ImageSettings, remarks: list[str]
) -> dict[str, Dataset] | dict[str, ParquetShards]:
    """Return the training and the validation split of a folder of image files, parquet files or tars, by their places.

    Raises:
        ConfigurationError: the path is a file, the folder holds no images or files of several kinds, a training split
            holds nothing, or `--dataset_config` names no files.
    """
    if folder.is_file():
        known = folder.suffix.lower() in (*IMAGE_EXTENSIONS, *SHARD_EXTENSIONS)
        unpack = how_to_unpack(folder) if is_archive(folder.name) else "unpack it if it is an archive"
        advice = "give the folder that it is in" if known else f"{unpack}, and give the folder"
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
        if config.dataset_config is not None:
            raise ConfigurationError(
                f"--dataset_config {config.dataset_config}: --dataset {folder} holds image files, whose "
                "configurations are not read: leave the flag out, and give the folder of the images that are wanted"
            )
        return load_image_files(folder, files, found.called_train, config, remarks)
    groups = configured_files(folder, files, config) or group_files(files, config)
    check_train(folder, list(groups), found.called_train, files, config)
    # The flags can only name folders in the tars, if the tars are one split.
    in_tars = kind == ".tar" and list(groups) == [UNNAMED] and bool(config.train_split or config.validation_split)
    flags = dataclasses.replace(config, train_split=None, validation_split=None) if in_tars else config
    choice = choose_splits(list(groups), flags)
    remarks += [f"not used: {describe_files(groups[name])}, not part of the training split" for name in choice.unused]
    chosen = {describe_files(groups[name]): groups[name] for name in choice[:2] if name is not None}
    remarks += warn_of_folds(*chosen.values()) if len(chosen) == 2 else []
    if kind == ".tar":
        return tar_splits(folder, chosen, config, remarks, in_tars)
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


def says_train(path: str) -> bool:
    return split_of_path(path) == TRAIN


def estimate_size(folder: Path, paths: Sequence[str]) -> float:
    """Return the size of files in bytes, estimated from some of them."""
    sample = [paths[i] for i in np.linspace(0, len(paths) - 1, min(len(paths), SIZED_FILES)).astype(int)]
    sizes = [os.path.getsize(folder / path) for path in sample if os.path.exists(folder / path)]
    return sum(sizes) / len(sample) * len(paths)
