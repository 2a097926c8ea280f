"""Datasets from the Hub, and files that `datasets` loads."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import datasets
from datasets import Dataset

from m2t_accel.config.data import ImageSettings
from m2t_accel.config.fields import ConfigurationError, one_line
from m2t_accel.data.parquet import ParquetShards, parquet_splits


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


@contextlib.contextmanager
def errors_in_one_line(config: ImageSettings) -> Iterator[None]:
    verbosity = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # it would log an error at length and then raise it
    try:
        yield
    except Exception as error:  # datasets, huggingface_hub, pyarrow, fsspec and httpx have no common base class
        if isinstance(error, datasets.exceptions.DatasetGenerationError) and error.__cause__ is not None:
            error = error.__cause__  # the wrapper does not say what went wrong
        raise ConfigurationError(
            f"--dataset {config.dataset} cannot be loaded ({one_line(error)}); give a folder that exists, "
            "or a Hub id that you can reach (`hf auth login` for a gated one)"
        ) from error
    finally:
        datasets.logging.set_verbosity(verbosity)
