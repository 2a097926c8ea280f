"""The configurations and splits that the README.md of a copied Hub repository lists."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Sequence
from pathlib import Path

from datasets.data_files import sanitize_patterns
from datasets.utils.metadata import MetadataConfigs
from fsspec.utils import glob_translate
from huggingface_hub import DatasetCardData, metadata_load

from m2t_accel.config.data import ImageSettings
from m2t_accel.config.fields import ConfigurationError, one_line
from m2t_accel.data.folders import MAX_LISTED
from m2t_accel.data.hub_datasets import configuration_error
from m2t_accel.data.splits import group_files


def configured_files(folder: Path, files: Sequence[str], config: ImageSettings) -> dict[str, list[str]] | None:
    """Return the files of each split, as README.md lists them; None if it lists none.

    Args:
        folder: folder of the copy.
        files: paths relative to it.
        config: may name the configuration.

    Raises:
        ConfigurationError: the lists cannot be read, there are several configurations and none of them is chosen, or
            the folder holds no file of the one that `--dataset_config` names.
    """
    try:
        metadata = metadata_load(folder / "README.md") if (folder / "README.md").is_file() else None
        configs = MetadataConfigs.from_dataset_card_data(DatasetCardData(**metadata)) if metadata else {}
        name = config.dataset_config or ("default" if len(configs) > 1 and "default" in configs else None)
        if name not in configs:
            if name is not None or len(configs) > 1:
                raise configuration_error(list(configs), config)
            name = next(iter(configs), None)
        fields = configs[name] if name is not None else {}
        patterns = sanitize_patterns(fields["data_files"]) if "data_files" in fields else None
        start = posixpath.join(posixpath.normpath(fields.get("data_dir") or ""), "").removeprefix("./")
    except ConfigurationError:
        raise
    except Exception as error:  # of YAML, or of anything that is not as the Hub's documentation says
        raise ConfigurationError(
            f"{folder}/README.md lists no configurations that can be read ({one_line(error)})"
        ) from None
    below = {path: path.removeprefix(start) for path in files if path.startswith(start)}
    if patterns is None:
        found = group_files(below, config) if start else {}
    else:
        found = {
            split: [path for path, rest in below.items() if any(re.match(glob_translate(glob), rest) for glob in globs)]
            for split, globs in patterns.items()
        }
    found = {split: paths for split, paths in found.items() if paths}
    if not found and config.dataset_config is not None and (start or patterns is not None):
        places = [start + glob for globs in patterns.values() for glob in globs] if patterns else [start]
        raise ConfigurationError(
            f"--dataset_config {name}: --dataset {config.dataset} holds none of its files, "
            f"{', '.join(places[:MAX_LISTED])}: download them, or name another configuration"
        )
    return found or None
