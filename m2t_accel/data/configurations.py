"""The configurations and splits that the README.md of a copied Hub repository lists."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from datasets.data_files import sanitize_patterns
from datasets.utils.metadata import MetadataConfigs
from fsspec.utils import glob_translate
from huggingface_hub import DatasetCardData, metadata_load

from m2t_accel.config.data import ImageSettings
from m2t_accel.config.fields import ConfigurationError, one_line
from m2t_accel.data.hub_datasets import configuration_error


def configured_files(folder: Path, files: Sequence[str], config: ImageSettings) -> dict[str, list[str]] | None:
    """Return the files of each split, as README.md lists them; None if it lists none.

    Args:
        folder: folder of the copy.
        files: paths relative to it.
        config: may name the configuration.

    Raises:
        ConfigurationError: the lists cannot be read, or there are several configurations and none of them is chosen.
    """
    try:
        metadata = metadata_load(folder / "README.md") if (folder / "README.md").is_file() else None
        configs = MetadataConfigs.from_dataset_card_data(DatasetCardData(**metadata)) if metadata else {}
        name = config.dataset_config or ("default" if len(configs) > 1 and "default" in configs else None)
        if name not in configs:
            if name is not None or len(configs) > 1:
                raise configuration_error(list(configs), config)
            name = next(iter(configs), None)
        patterns = sanitize_patterns(configs[name]["data_files"]) if name and "data_files" in configs[name] else {}
    except ConfigurationError:
        raise
    except Exception as error:  # of YAML, or of anything that is not as the Hub's documentation says
        raise ConfigurationError(
            f"{folder}/README.md lists no configurations that can be read ({one_line(error)})"
        ) from None
    found = {
        split: [path for path in files if any(re.match(glob_translate(pattern), path) for pattern in globs)]
        for split, globs in patterns.items()
    }
    return {split: paths for split, paths in found.items() if paths} or None
