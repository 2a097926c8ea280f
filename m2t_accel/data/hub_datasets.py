"""Data sets from the Hub, and files loaded by `datasets`."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import datasets
from datasets import Dataset

from m2t_accel.config.data import ImageSettings
from m2t_accel.config.fields import ConfigurationError, one_line
from m2t_accel.data.parquet import ParquetShards
from m2t_accel.data.splits import parquet_splits


def load_hub(config: ImageSettings) -> dict[str, Dataset] | dict[str, ParquetShards]:
    """The splits of a dataset on the Hub, downloaded to the cache or, with `--streaming`, where they are."""
    if not config.streaming:
        return call_datasets(config, config.dataset)
    with datasets_errors(config):
        files = datasets.load_dataset_builder(config.dataset).config.data_files
    splits = {str(name): list(paths) for name, paths in (files or {}).items()}
    other = next((path for paths in splits.values() for path in paths if not path.endswith(".parquet")), None)
    if other is not None or not splits:
        found = os.path.basename(other) if other else "no files"
        raise ConfigurationError(
            f"--dataset {config.dataset} is stored as {found}, and only parquet can be streamed: leave out --streaming"
        )
    return parquet_splits(splits, config)


def call_datasets(config: ImageSettings, *arguments: object, **options: object) -> dict[str, Dataset]:
    """`datasets.load_dataset`, its many ways to fail as one line."""
    with datasets_errors(config):
        return dict(datasets.load_dataset(*arguments, **options))


@contextlib.contextmanager
def datasets_errors(config: ImageSettings) -> Iterator[None]:
    verbosity = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # it writes of an error, at length, and then raises it
    try:
        yield
    except Exception as error:  # of datasets, huggingface_hub, pyarrow, fsspec, httpx: no common ancestor
        if isinstance(error, datasets.exceptions.DatasetGenerationError) and error.__cause__ is not None:
            error = error.__cause__  # what the wrapper says is only that something went wrong
        raise ConfigurationError(
            f"--dataset {config.dataset} cannot be loaded ({one_line(error)}); give a folder that exists, "
            "or a Hub id that you can reach (`hf auth login` for a gated one)"
        ) from error
    finally:
        datasets.logging.set_verbosity(verbosity)
