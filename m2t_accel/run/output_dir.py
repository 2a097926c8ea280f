"""Check the output folder of a run. This module imports no torch, so that the check is instant."""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import yaml

from m2t_accel.config.fields import ConfigurationError, plain_text
from m2t_accel.config.pretrain import PretrainConfig

# Settings that may change when a run resumes, because the result does not depend on them, or only through rounding or
# images that are not decoded. The images themselves are compared by their fingerprint.
MAY_CHANGE = (
    *("output_dir", "resume", "dataset", "num_workers", "log_every", "push_to_hub", "hub_private_repo", "report_to"),
    *("checkpoint_every", "keep", "stop_on_collapse", "collective_timeout", "max_bad_fraction"),
    *("max_image_pixels", "deterministic"),
)
RUN_FILES = ("config.yaml", "metrics.jsonl", "training.json", "encoder", "checkpoints")
COMPLETE = "training.json"  # written last; a run that has it is complete unless `missing_files` finds something

# Files of a complete run of an earlier version, whose training.json does not list them.
FILES = ("config.yaml", "encoder/README.md", "encoder/model.safetensors", "encoder/preprocessor_config.json")


def read_training(folder: Path) -> dict[str, object] | None:
    """Return the content of a run's training.json; None if there is none, or it cannot be read."""
    try:
        content = json.loads((folder / COMPLETE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def list_files(folder: Path) -> dict[str, int | None]:
    """Return the files that a complete run leaves, for training.json, and the sizes of the weights."""
    paths = [folder / "config.yaml", folder / "metrics.jsonl", folder / "curves.png"]
    paths += sorted((folder / "encoder").iterdir())
    return {
        str(path.relative_to(folder)): path.stat().st_size if path.suffix == ".safetensors" else None
        for path in paths
        if path.is_file()
    }


def missing_files(folder: Path, training: Mapping[str, object]) -> list[str]:
    """Return the files of a complete run that are missing, and the weights that have another size."""
    missing = []
    for name, size in training.get("files", dict.fromkeys(FILES)).items():
        path = folder / name
        if not path.is_file():
            missing.append(name)
        elif size is not None and path.stat().st_size != size:
            missing.append(f"{name} ({path.stat().st_size:,} bytes instead of {size:,})")
    return missing


def check_same_settings(config: PretrainConfig, saved: Mapping[str, object], where: str, more_epochs: bool) -> None:
    """Check that a run with these settings may resume the run that the saved settings belong to.

    Args:
        config: settings of the run.
        saved: settings of the earlier run, by name.
        where: the flag and the folder of the earlier run, for the message.
        more_epochs: whether `config` may ask for more epochs or steps than `saved`.

    Raises:
        ConfigurationError: some settings differ; the message lists them.
    """
    different, longer = {}, True
    length = "epochs" if config.max_steps is None else "max_steps"
    for item in dataclasses.fields(config):
        new = getattr(config, item.name)
        if item.name in MAY_CHANGE or (item.name == "evaluate_every" and new is None):
            continue
        if item.name == "encoder" and new == config.init_from:  # the source's; the earlier run has its name
            continue
        old = saved.get(item.name, item.default)  # runs of earlier versions lack newer settings
        old = tuple(old) if isinstance(old, list) else old
        grows = item.name == length and None not in (old, new) and new > old
        if old != new and not (more_epochs and grows):
            longer &= grows
            different[item.name] = f"{item.name} was {plain_text(old)}, now {plain_text(new)}"
    if different:
        hint = ""
        if longer:
            hint = (
                "; to train for longer, which changes the schedules after the checkpoint, name it: "
                f"--resume {config.output_dir}/checkpoints/step-N"
            )
        raise ConfigurationError(
            f"{where} belongs to a run with other settings ({'; '.join(different.values())}): give the same settings, "
            f"or another --output_dir{hint}"
        )


def check_output_dir(config: PretrainConfig) -> None:
    """Check that the output folder can be written, and is new or holds the same run. Write nothing.

    Raises:
        ConfigurationError: the folder cannot be written, or holds another run.
    """
    output_dir = config.output_dir
    folder = os.path.abspath(output_dir)
    found = [name for name in RUN_FILES if os.path.exists(os.path.join(folder, name))]
    recorded = (read_training(Path(folder)) or {}).get("config")
    # Without a config.yaml the settings are those of training.json or of a checkpoint, which `find_start` checks.
    has_settings = bool(recorded) or "config.yaml" in found
    is_run = bool(found) and (has_settings or any(Path(folder).glob("checkpoints/step-*/manifest.json")))
    if found and (config.resume == "never" or not is_run):
        raise ConfigurationError(
            f"--output_dir {output_dir} already holds a run ({found[0]}): give another folder, or remove this one"
            + (", or continue its run with --resume auto" if is_run else "")
        )
    if recorded:
        check_same_settings(config, recorded, f"--output_dir {output_dir}", more_epochs=config.resume != "auto")
    if "config.yaml" in found:
        try:
            with open(os.path.join(folder, "config.yaml"), encoding="utf-8") as file:
                saved = yaml.safe_load(file)
        except (OSError, ValueError, yaml.YAMLError):
            saved = None
        if not isinstance(saved, dict):
            raise ConfigurationError(
                f"--output_dir {output_dir} holds a config.yaml that is not a run's: give another folder"
            )
        changed = [
            f"{name} was {plain_text(value)}, now {plain_text(saved.get(name))}"
            for name, value in (recorded or {}).items()
            if name not in MAY_CHANGE and saved.get(name) != value
        ]
        if changed:
            raise ConfigurationError(
                f"--output_dir {output_dir}: its config.yaml has been changed since the run ended "
                f"({'; '.join(changed)}): remove that file, and the same command writes it again"
            )
        check_same_settings(config, saved, f"--output_dir {output_dir}", more_epochs=config.resume != "auto")
    parent = folder
    while not os.path.exists(parent):
        parent = os.path.dirname(parent)
    try:
        # An unnamed file tests whether writing works, which permissions alone do not show, and leaves nothing behind.
        tempfile.TemporaryFile(dir=parent).close()
    except OSError as error:
        raise ConfigurationError(
            f"--output_dir {output_dir} cannot be written: no file can be made in {parent} ({error.strerror})"
        ) from None
    if max(len(part.encode()) for part in folder.split(os.sep)) > 255:
        raise ConfigurationError(f"--output_dir {output_dir}: a name in it is longer than 255 bytes")
