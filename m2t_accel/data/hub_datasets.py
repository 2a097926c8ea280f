"""Datasets from the Hub, and files that `datasets` loads."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import datasets
import huggingface_hub
import pyarrow
from datasets import Dataset, DatasetBuilder, SplitDict
from datasets.data_files import DataFilesDict, DataFilesList
from datasets.naming import camelcase_to_snakecase
from datasets.packaged_modules.parquet.parquet import Parquet
from pyarrow import parquet

from m2t_accel.config.data import ImageSettings
from m2t_accel.config.fields import ConfigurationError, did_you_mean, one_line
from m2t_accel.data.cache import file_fingerprint
from m2t_accel.data.folders import MAX_LISTED
from m2t_accel.data.hub_files import list_files
from m2t_accel.data.parquet import ParquetShards, known_columns, parquet_splits
from m2t_accel.data.splits import TRAIN, Choice, choose_splits
from m2t_accel.data.streams import HubStream

CACHE_ERRORS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENOSPC, errno.EDQUOT)


def load_hub(config: ImageSettings, remarks: list[str]) -> dict[str, Dataset | ParquetShards | HubStream]:
    """Return the training and the validation split of a dataset on the Hub, by their names there.

    Only these are downloaded to the cache or, with `--streaming`, left on the Hub.

    Args:
        config: names the dataset, and may name its configuration, revision and splits.
        remarks: list to which this adds notes for the user.

    Raises:
        ConfigurationError: it cannot be loaded, or has several configurations or no training split.
    """
    builder = find_builder(config)
    files, choice = find_splits(builder, config)
    chosen = [choice.train, *([choice.validation] if choice.validation else [])]
    if choice.unused:
        remarks.append(f"not used: {', '.join(choice.unused)}")
    if not config.streaming:
        return copy_splits(builder, {name: files.get(name, []) for name in chosen}, config, remarks)
    if not files:
        raise ConfigurationError(
            f"--dataset {config.dataset} is found in the cache, but the Hub cannot be reached: leave out --streaming"
        )
    files = {name: files[name] for name in chosen}
    if all(path.endswith(".parquet") for paths in files.values() for path in paths):
        return parquet_splits(files, config)
    return stream_splits(builder, files, config, remarks)


def find_splits(builder: DatasetBuilder, config: ImageSettings) -> tuple[dict[str, list[str]], Choice]:
    """Return the files of each split (none if the network is not reached), and the splits that are used.

    Raises:
        ConfigurationError: there are no files of images, or no training split.
    """
    files = {str(name): list(paths) for name, paths in (builder.config.data_files or {}).items()}
    names = list(files or builder.info.splits or ())  # a copy that is found without the network has no files
    if not names:
        raise ConfigurationError(f"--dataset {config.dataset} holds no files of a known kind, such as parquet")
    return files, choose_splits(names, config)


def size_of_copy(config: ImageSettings) -> int | None:
    """Return the bytes that a start without `--streaming` adds to the cache: the files, and the copy of their rows.

    0 if the copy is there; None if the Hub does not say how large the splits are. Nothing is downloaded.

    Raises:
        ConfigurationError: the dataset cannot be reached, or has several configurations or no training split.
    """
    builder = find_builder(config)
    _, choice = find_splits(builder, config)
    chosen = [choice.train, *([choice.validation] if choice.validation else [])]
    if os.path.exists(os.path.join(with_splits(builder, chosen).cache_dir, datasets.config.DATASET_INFO_FILENAME)):
        return 0
    known = builder.info.splits or {}
    sizes = [known[name].num_bytes for name in chosen if name in known]
    return 2 * sum(sizes) if len(sizes) == len(chosen) and all(sizes) else None


def copy_splits(
    builder: DatasetBuilder, files: Mapping[str, Sequence[str]], config: ImageSettings, remarks: list[str]
) -> dict[str, Dataset]:
    """Copy some splits into the cache of `datasets`, or find the copy there.

    `datasets` cannot copy parquet splits with different columns, nor class folders in zips. So parquet splits are
    copied one by one, and zips are only downloaded, because their images can be read in place.

    Args:
        builder: builder of the dataset.
        files: files by split, the training split first; none if the network is not reached.
        config: names the dataset, and may name the columns.
        remarks: list to which this adds notes for the user.

    Raises:
        ConfigurationError: they cannot be loaded, or the cache cannot be written.
    """
    together = with_splits(builder, list(files))
    with errors_in_one_line(config):
        try:
            together.download_and_prepare()
        except datasets.exceptions.DatasetGenerationError as error:
            is_damaged = isinstance(error.__cause__, ValueError | TypeError | pyarrow.ArrowException)
            paths = [path for part in files.values() for path in part]
            if not is_damaged or not paths:
                raise
            local = {name: datasets.DownloadManager().download(list(part)) for name, part in files.items()}
            if builder.name == "imagefolder" and "Invalid string class label" in str(error.__cause__):
                together.config.data_files = DataFilesDict({k: DataFilesList(part, []) for k, part in local.items()})
                return list_splits(together, list(files), config, remarks)
            if len(files) > 1 and all(path.endswith(".parquet") for path in paths):
                return copy_parquet(local, config)
            raise
        return {name: together.as_dataset(name) for name in files}


def list_splits(
    builder: DatasetBuilder, names: Sequence[str], config: ImageSettings, remarks: list[str]
) -> dict[str, Dataset]:
    """Return the addresses of the images of some splits, the training split first, with labels if there are some."""
    builder.config.decode_num_threads = 0  # the images are not decoded
    return {
        name: list_files(builder.as_streaming_dataset(name), config, [] if i else remarks)
        for i, name in enumerate(names)
    }


def stream_splits(
    builder: DatasetBuilder, files: Mapping[str, Sequence[str]], config: ImageSettings, remarks: list[str]
) -> dict[str, HubStream | Dataset]:
    """Return splits that are stored in another format than parquet, as `datasets` streams them.

    Image files, loose or in zips, are only listed, because each can be read by itself.

    Args:
        builder: builder of the dataset.
        files: files by split, the training split first.
        config: names the dataset, and may say how many images an epoch has.
        remarks: list to which this adds notes for the user.

    Raises:
        ConfigurationError: they cannot be read, or the number of training images is not known.
    """
    train, *_ = files
    if builder.name == "imagefolder":
        with errors_in_one_line(config):
            return list_splits(with_splits(builder, list(files)), list(files), config, remarks)
    known = {name: split.num_examples for name, split in (builder.info.splits or {}).items()}
    if config.images_per_epoch is not None:
        known[train] = config.images_per_epoch
    if not known.get(train):
        raise ConfigurationError(
            f"--dataset {config.dataset}: the Hub does not say how many images the split {train} has: give the length "
            "of an epoch, --images_per_epoch N"
        )
    with errors_in_one_line(config):
        builder = with_splits(builder, list(files))
        return {
            name: HubStream(
                builder.as_streaming_dataset(name),
                paths,
                known.get(name) or 1,
                config,
                remarks if name == train else [],
            )
            for name, paths in files.items()
        }


def find_builder(config: ImageSettings) -> DatasetBuilder:
    """Return the builder of a dataset on the Hub, in the configuration and revision that the flags name.

    Raises:
        ConfigurationError: the dataset cannot be reached, or it has several configurations and none of them is chosen.
    """
    dataset, name, revision = config.dataset, config.dataset_config, config.dataset_revision
    with errors_in_one_line(config):
        try:
            return datasets.load_dataset_builder(dataset, name, revision=revision)
        except ValueError:
            names = datasets.get_dataset_config_names(dataset, revision=revision)
            copy = newest_copy(config)
            if copy is not None and len(names) < 2:  # the Hub cannot be reached
                return datasets.load_dataset_builder(dataset, copy)
            if name in names or (name is None and len(names) < 2):
                raise
    raise configuration_error(names, config)


def newest_copy(config: ImageSettings) -> str | None:
    """Return the name of the folder, made by `with_splits`, that holds the newest copy of some splits."""
    owner, _, name = config.dataset.rpartition("/")
    folder = Path(datasets.config.HF_DATASETS_CACHE, f"{owner}___{camelcase_to_snakecase(name)}")
    copies = folder.glob(f"*/*/*/{datasets.config.DATASET_INFO_FILENAME}")
    names = [path.parts[-4] for path in sorted(copies, key=os.path.getmtime)]
    return next((name for name in reversed(names) if name.startswith(f"{config.dataset_config or 'default'}-")), None)


def configuration_error(names: Sequence[str], config: ImageSettings) -> ConfigurationError:
    """Return the error for a dataset whose configuration is not chosen, or does not exist."""
    listed = ", ".join(names if len(names) <= MAX_LISTED else [*names[:MAX_LISTED], f"… ({len(names)} in all)"])
    if config.dataset_config is None:
        return ConfigurationError(
            f"--dataset {config.dataset} has the configurations {listed}: name one with --dataset_config"
        )
    return ConfigurationError(
        f"--dataset_config {config.dataset_config}: --dataset {config.dataset} has no such configuration"
        f"{did_you_mean(config.dataset_config, names)}; it has {listed or 'none'}"
    )


def with_splits(builder: DatasetBuilder, names: Sequence[str]) -> DatasetBuilder:
    """Return a builder of some splits of a dataset. Its copy is in a folder of its own, beside that of the whole.

    If the whole is in the cache already, or all splits are wanted, return the builder as it is.
    """
    files = builder.config.data_files or {}
    whole = os.path.join(builder.cache_dir, datasets.config.DATASET_INFO_FILENAME)
    if len(names) >= len(files) or os.path.exists(whole):
        return builder
    info = builder.info.copy()
    info.download_size = info.dataset_size = info.size_in_bytes = None  # those of the whole
    if info.splits is not None:
        info.splits = SplitDict({name: info.splits[name] for name in names if name in info.splits})
    part = type(builder)(
        config_name=builder.config.name,
        config_id=f"{builder.config.name}-{'+'.join(names)}",
        data_files=DataFilesDict({name: files[name] for name in names}),
        hash=builder.hash,
        info=info,
        base_path=builder.base_path,
        repo_id=builder.repo_id,
        dataset_name=builder.dataset_name,
    )
    part.info.config_name = part.config_id  # without the network, `datasets` looks for a folder of this name
    return part


def copy_parquet(splits: Mapping[str, Sequence[str]], config: ImageSettings) -> dict[str, Dataset]:
    """Copy local parquet files into the cache of `datasets`, or find the copies there.

    Each split has a copy of its own, because `datasets` would give all splits the columns and types of the first.

    Args:
        splits: absolute paths by split. `datasets` fails on a file without rows.
        config: names the dataset.

    Raises:
        ConfigurationError: the files of a split cannot be loaded together, or the cache cannot be written.
    """
    with errors_in_one_line(config):
        return {split: copy_split(files) for split, files in splits.items()}


def copy_split(files: Sequence[str]) -> Dataset:
    """Copy the parquet files of one split; see copy_parquet.

    `datasets` takes paths for glob patterns, expands `$HOME` and `~` in them, and splits them at `::`. So its reader
    gets links with plain names instead. The name of the copy depends on the paths, sizes and times of the files, so the
    next start finds the copy unless a file has changed.
    """
    key = json.dumps([file_fingerprint(file) for file in files])
    with tempfile.TemporaryDirectory(prefix="m2t_accel-") as links:
        plain = [re.sub(r"[^\w.-]", "_", os.path.basename(file)) for file in files]
        paths = [os.path.join(links, f"{i:05}-{name}") for i, name in enumerate(plain)]
        for file, path in zip(files, paths, strict=True):
            os.symlink(file, path)
        data_files = DataFilesDict({TRAIN: DataFilesList(paths, [])})
        schema, known = parquet.read_schema(files[0]), {}
        if len(features := known_columns(schema)) < len(schema):
            known = {"features": features, "columns": list(features)}
        config_id = f"default-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
        builder = Parquet(config_id=config_id, data_files=data_files, **known)
        builder.download_and_prepare()
        return builder.as_dataset(TRAIN)


@contextlib.contextmanager
def errors_in_one_line(config: ImageSettings) -> Iterator[None]:
    verbosity = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # it would log an error at length and then raise it
    try:
        yield
    except ConfigurationError:
        raise
    except Exception as error:  # datasets, huggingface_hub, pyarrow, fsspec and httpx have no common base class
        if isinstance(error, datasets.exceptions.DatasetGenerationError) and error.__cause__ is not None:
            error = error.__cause__  # the wrapper does not say what went wrong
        for cause in causes(error):
            if isinstance(cause, OSError) and (cache := failed_cache(cause)) is not None:
                variable = cache.variable if cache.variable in os.environ else "HF_HOME"
                raise ConfigurationError(
                    f"--dataset {config.dataset} cannot be copied into the cache {cache.folder} ({cause.strerror}): "
                    f"set {variable} to another folder, or read in place with --streaming"
                ) from error
        advice = "give a folder that exists, or a Hub id that you can reach (`hf auth login` for a gated one)"
        if os.path.exists(config.dataset):
            advice = "give a folder of files whose columns have the same types"
        raise ConfigurationError(
            f"--dataset {config.dataset} cannot be loaded ({one_line(error)}); {advice}"
        ) from error
    finally:
        datasets.logging.set_verbosity(verbosity)


class Cache(NamedTuple):
    """A folder that data sets are copied into, and the variable that names it, if it is not in HF_HOME."""

    folder: str
    variable: str


def failed_cache(error: OSError) -> Cache | None:
    """Return the cache that an error of the disk is about; None if it is about other files, such as the user's."""
    caches = [
        Cache(str(datasets.config.HF_DATASETS_CACHE), "HF_DATASETS_CACHE"),
        Cache(huggingface_hub.constants.HF_HUB_CACHE, "HF_HUB_CACHE"),
    ]
    if not isinstance(error.filename, str | os.PathLike):  # pyarrow names no file in it
        return caches[0] if error.errno in CACHE_ERRORS else None
    path = Path(error.filename)
    # The path may be a parent of the cache, which could not be created.
    return next((c for c in caches if path.is_relative_to(c.folder) or Path(c.folder).is_relative_to(path)), None)


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and the errors that led to it; `datasets` wraps those of the disk."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
