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

import datasets
from datasets import Dataset
from datasets.data_files import DataFilesDict, DataFilesList
from datasets.packaged_modules.parquet.parquet import Parquet

from m2t_accel.config.data import ImageSettings
from m2t_accel.config.fields import ConfigurationError, one_line
from m2t_accel.data.cache import file_fingerprint
from m2t_accel.data.parquet import ParquetShards, parquet_splits

CACHE_ERRORS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENOSPC, errno.EDQUOT)


def load_hub(config: ImageSettings) -> dict[str, Dataset] | dict[str, ParquetShards]:
    """Return the splits of a dataset on the Hub: downloaded to the cache or, with `--streaming`, left on the Hub.

    Raises:
        ConfigurationError: it cannot be loaded, or `--streaming` is given and it is not stored as parquet.
    """
    if not config.streaming:
        return load_by_datasets(config, config.dataset)
    with errors_in_one_line(config):
        files = datasets.load_dataset_builder(config.dataset).config.data_files
    splits = {str(name): list(paths) for name, paths in (files or {}).items()}
    other = next((path for paths in splits.values() for path in paths if not path.endswith(".parquet")), None)
    if other is not None or not splits:
        found = os.path.basename(other) if other else "no files"
        raise ConfigurationError(
            f"--dataset {config.dataset} is stored as {found}, and only parquet can be streamed: leave out --streaming"
        )
    return parquet_splits(splits, config)


def load_by_datasets(config: ImageSettings, *arguments: object, **options: object) -> dict[str, Dataset]:
    """Return the splits that `datasets.load_dataset` loads.

    Raises:
        ConfigurationError: they cannot be loaded.
    """
    with errors_in_one_line(config):
        return dict(datasets.load_dataset(*arguments, **options))


def copy_parquet(splits: Mapping[str, Sequence[str]], config: ImageSettings) -> dict[str, Dataset]:
    """Copy local parquet files into the cache of `datasets`, or find the copy there.

    `datasets` takes paths for glob patterns, expands `$HOME` and `~` in them, and splits them at `::`. So its reader
    gets links with plain names instead. The name of the copy depends on the paths, sizes and times of the files, so the
    next start finds the copy unless a file has changed.

    Args:
        splits: absolute paths by split. `datasets` fails on a file without rows.
        config: names the dataset.

    Raises:
        ConfigurationError: the files cannot be loaded together, or the cache cannot be written.
    """
    key = json.dumps([[file_fingerprint(file) for file in files] for files in splits.values()])
    with tempfile.TemporaryDirectory(prefix="m2t_accel-") as links, errors_in_one_line(config):
        data_files = DataFilesDict()
        for number, (split, files) in enumerate(splits.items()):
            plain = [re.sub(r"[^\w.-]", "_", os.path.basename(file)) for file in files]
            paths = [os.path.join(links, f"{number}-{i:05}-{name}") for i, name in enumerate(plain)]
            for file, path in zip(files, paths, strict=True):
                os.symlink(file, path)
            shown = split if re.fullmatch(r"\w+", split) and split != "all" else f"split{number}"
            data_files[shown] = DataFilesList(paths, [])
        builder = Parquet(config_id=f"default-{hashlib.sha256(key.encode()).hexdigest()[:16]}", data_files=data_files)
        builder.download_and_prepare()
        return dict(zip(splits, (builder.as_dataset(name) for name in data_files), strict=True))


@contextlib.contextmanager
def errors_in_one_line(config: ImageSettings) -> Iterator[None]:
    verbosity = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # it would log an error at length and then raise it
    try:
        yield
    except Exception as error:  # datasets, huggingface_hub, pyarrow, fsspec and httpx have no common base class
        if isinstance(error, datasets.exceptions.DatasetGenerationError) and error.__cause__ is not None:
            error = error.__cause__  # the wrapper does not say what went wrong
        full = next((cause for cause in causes(error) if getattr(cause, "errno", None) in CACHE_ERRORS), None)
        if full is not None:
            raise ConfigurationError(
                f"--dataset {config.dataset} cannot be copied into the cache {datasets.config.HF_DATASETS_CACHE} "
                f"({os.strerror(full.errno)}): set HF_HOME to another folder, or read in place with --streaming"
            ) from error
        raise ConfigurationError(
            f"--dataset {config.dataset} cannot be loaded ({one_line(error)}); give a folder that exists, "
            "or a Hub id that you can reach (`hf auth login` for a gated one)"
        ) from error
    finally:
        datasets.logging.set_verbosity(verbosity)


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and the errors that led to it; `datasets` wraps those of the disk."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
