"""Check the output folder of a run. This module imports no torch, so that the check is instant."""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections.abc import Mapping

import yaml

from m2t_accel.config.fields import ConfigurationError, plain_text
from m2t_accel.config.pretrain import PretrainConfig

# Settings that may change when a run resumes, because the result does not depend on them. The images themselves are
# compared by their fingerprint.
MAY_CHANGE = (
    *("output_dir", "resume", "dataset", "num_workers", "log_every", "push_to_hub", "hub_private_repo", "report_to"),
    *("checkpoint_every", "keep", "stop_on_collapse", "collective_timeout", "max_bad_fraction"),
)
RUN_FILES = ("config.yaml", "metrics.jsonl", "training.json", "encoder", "checkpoints")


def check_same_settings(config: PretrainConfig, saved: Mapping[str, object], where: str, more_epochs: bool) -> None:
    """Check that a run with these settings may resume the run that the saved settings belong to.

    Args:
        config: settings of the run.
        saved: settings of the earlier run, by name.
        where: the flag and the folder of the earlier run, for the message.
        more_epochs: whether `config` may ask for more epochs than `saved`.

    Raises:
        ConfigurationError: some settings differ; the message lists them.
    """
    different = {}
    for item in dataclasses.fields(config):
        new = getattr(config, item.name)
        if item.name in MAY_CHANGE or (item.name == "evaluate_every" and new is None):
            continue
        if item.name == "encoder" and new == config.init_from:  # the source's; the earlier run has its name
            continue
        old = saved.get(item.name, item.default)  # runs of earlier versions lack newer settings
        old = tuple(old) if isinstance(old, list) else old
        if old != new and not (item.name == "epochs" and more_epochs and new > old):
            different[item.name] = f"{item.name} was {plain_text(old)}, now {plain_text(new)}"
    if different:
        hint = ""
        if list(different) == ["epochs"] and config.epochs > saved.get("epochs", 0):
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
    if found and (config.resume == "never" or "config.yaml" not in found):
        raise ConfigurationError(
            f"--output_dir {output_dir} already holds a run ({found[0]}): give another folder, or remove this one"
            + (", or continue its run with --resume auto" if "config.yaml" in found else "")
        )
    if found:
        try:
            with open(os.path.join(folder, "config.yaml"), encoding="utf-8") as file:
                saved = yaml.safe_load(file)
        except (OSError, ValueError, yaml.YAMLError):
            saved = None
        if not isinstance(saved, dict):
            raise ConfigurationError(
                f"--output_dir {output_dir} holds a config.yaml that is not a run's: give another folder"
            )
        check_same_settings(config, saved, f"--output_dir {output_dir}", more_epochs=config.resume != "auto")
    if config.resume not in ("auto", "never") and not os.path.isdir(config.resume):
        raise ConfigurationError(
            f"--resume {config.resume}: no such folder; give auto, never, or a checkpoint such as "
            f"{output_dir}/checkpoints/step-N"
        )
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
