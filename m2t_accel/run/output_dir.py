"""Checks of a run's output folder that need no torch: they run before anything heavy is imported."""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections.abc import Mapping

import yaml

from m2t_accel.config.fields import ConfigurationError
from m2t_accel.config.pretrain import PretrainConfig

# Settings that may change while a run goes on: they do not say what is computed. The images are compared themselves.
FREE = (
    *("output_dir", "resume", "dataset", "num_workers", "log_every", "push_to_hub", "tracker"),
    *("checkpoint_every", "keep", "stop_on_collapse", "collective_timeout", "max_bad_fraction"),
)
RUN_FILES = ("config.yaml", "metrics.jsonl", "training.json", "encoder", "checkpoints")


def check_same_settings(config: PretrainConfig, saved: Mapping[str, object], where: str, grown: bool) -> None:
    """Check that a run with these settings may go on with what those of `saved` have computed.

    grown: more epochs are allowed.

    Raises:
        ConfigurationError: it may not; the message lists the settings that differ.
    """
    others = []
    for item in dataclasses.fields(config):
        mine = getattr(config, item.name)
        if item.name in FREE or (item.name == "evaluate_every" and mine is None):
            continue
        theirs = saved.get(item.name, item.default)  # a setting that is younger than the run
        theirs = tuple(theirs) if isinstance(theirs, list) else theirs
        if theirs != mine and not (item.name == "epochs" and grown and mine > theirs):
            others.append(f"{item.name} {in_words(theirs)} there, {in_words(mine)} here")
    if others:
        more = ""
        if [other.split()[0] for other in others] == ["epochs"] and config.epochs > saved.get("epochs", 0):
            more = (
                "; to go on for longer, which changes the schedules from there on, name the checkpoint: "
                f"--resume {config.output_dir}/checkpoints/step-N"
            )
        raise ConfigurationError(
            f"{where} is of a run with other settings ({'; '.join(others)}): give the same, or another "
            f"--output_dir{more}"
        )


def in_words(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def check_output_dir(config: PretrainConfig) -> None:
    """Check, writing nothing, that the run can be written to its folder, which is new or holds the same run.

    Raises:
        ConfigurationError: it cannot, or the folder holds another.
    """
    output_dir = config.output_dir
    folder = os.path.abspath(output_dir)
    there = [name for name in RUN_FILES if os.path.exists(os.path.join(folder, name))]
    if there and (config.resume == "never" or "config.yaml" not in there):
        raise ConfigurationError(
            f"--output_dir {output_dir} holds another run ({there[0]}): give another folder, or remove that one"
            + (", or go on with it by --resume auto" if "config.yaml" in there else "")
        )
    if there:
        try:
            with open(os.path.join(folder, "config.yaml"), encoding="utf-8") as file:
                saved = yaml.safe_load(file)
            known = isinstance(saved, dict)
        except (OSError, ValueError, yaml.YAMLError):
            known = False
        if not known:
            raise ConfigurationError(
                f"--output_dir {output_dir} holds a config.yaml that is not a run's: give another folder"
            )
        check_same_settings(config, saved, f"--output_dir {output_dir}", grown=config.resume != "auto")
    if config.resume not in ("auto", "never") and not os.path.isdir(config.resume):
        raise ConfigurationError(
            f"--resume {config.resume}: no such folder; give auto, never, or a checkpoint such as "
            f"{output_dir}/checkpoints/step-N"
        )
    parent = folder
    while not os.path.exists(parent):
        parent = os.path.dirname(parent)
    try:
        # A file without a name: it proves that writing works, whoever the user is, and leaves nothing behind.
        tempfile.TemporaryFile(dir=parent).close()
    except OSError as error:
        raise ConfigurationError(
            f"--output_dir {output_dir} cannot be written: {parent} takes no files ({error.strerror})"
        ) from None
    if max(len(part.encode()) for part in folder.split(os.sep)) > 255:
        raise ConfigurationError(f"--output_dir {output_dir}: a name in it is longer than 255 bytes")
