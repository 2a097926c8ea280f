"""Read a study: a file with the settings of its runs, and a grid of those that vary. This module imports no torch."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import yaml

from m2t_accel.config.command_line import read_yaml
from m2t_accel.config.data import ImageSettings
from m2t_accel.config.evaluation import LinearProbeConfig, build_linear_probe
from m2t_accel.config.fields import ConfigurationError, convert_all, did_you_mean, fields_by_heading, plain_text
from m2t_accel.config.pretrain import PretrainConfig, check_inputs
from m2t_accel.config.recipes import build_config
from m2t_accel.run.output_dir import MAY_CHANGE, check_output_dir

KEYS = ("title", "settings", "grid", "linear_probe")
CHOSEN = ("output_dir", "resume", "push_to_hub", "hub_private_repo")  # by the study, or not for a run of a study
CHOSEN_OF_PROBE = ("encoder", "output_dir", "random_weights", "push_to_hub", "hub_private_repo")
# Runs that differ in none of these have the same random weights, measured on the same images.
OF_RANDOM_WEIGHTS = {"seed", "encoder", "max_images", *(item.name for item in dataclasses.fields(ImageSettings))}


@dataclass(frozen=True)
class StudyRun:
    """A run of a study."""

    name: str  # of its folder
    varied: Mapping[str, object]  # its values of the settings in the grid
    given: Mapping[str, object]  # the settings of its command, without --output_dir
    config: PretrainConfig
    probe: Mapping[str, object] | None  # the settings of its linear probe's command; None: it has none

    @property
    def folder(self) -> Path:
        return Path(self.config.output_dir)

    @property
    def cell(self) -> dict[str, object]:
        """Return its place in the grid, without the seed."""
        return {name: value for name, value in self.varied.items() if name != "seed"}

    @property
    def of_random_weights(self) -> dict[str, object]:
        """Return the settings in the grid that its random weights and their figures depend on."""
        return {name: value for name, value in self.varied.items() if name in OF_RANDOM_WEIGHTS}

    @cached_property
    def settings(self) -> dict[str, object]:
        """Return all settings that decide what the run computes, as in YAML."""
        return {name: value for name, value in plain_settings(self.config).items() if name not in MAY_CHANGE}

    def probe_config(self, random_weights: bool = False) -> LinearProbeConfig:
        """Return the configuration of its linear probe."""
        return build_linear_probe({**self.probe, "random_weights": random_weights})


@dataclass(frozen=True)
class Study:
    """A study, checked, with its runs in the order of the grid."""

    title: str
    grid: Mapping[str, list[object]]
    linear_probe: Mapping[str, object] | None
    runs: list[StudyRun] = field(default_factory=list)


def plain_settings(config: ImageSettings) -> dict[str, object]:
    """Return all settings of a configuration as YAML would hold them."""
    return yaml.safe_load(config.to_yaml())


def read_study(file: str, flags: Mapping[str, object], runs_dir: Path) -> Study:
    """Read the file of a study, and check everything that can be checked before its first run. Write nothing.

    Args:
        file: YAML with the keys `title`, `settings`, `grid` and `linear_probe`.
        flags: settings of every run that replace those of the file.
        runs_dir: folder of the runs' folders.

    Raises:
        ConfigurationError: a key, setting or value is wrong, the images are missing, or runs_dir holds another study.
    """
    content = read_yaml(file, "STUDY")
    try:
        study = build_study(content, flags, runs_dir, Path(file).resolve().parent.name)
    except ConfigurationError as error:
        raise ConfigurationError(f"{file}: {error}") from None
    for run in study.runs:
        check_inputs(run.config)
        try:
            check_output_dir(run.config)
        except ConfigurationError as error:
            raise ConfigurationError(f"--runs_dir {runs_dir} cannot take this study: {error}") from None
    return study


def build_study(content: Mapping[str, object], flags: Mapping[str, object], runs_dir: Path, name: str) -> Study:
    """Return the study with this content; `name` is the title of one that has none."""
    for key in content:
        if key not in KEYS:
            raise ConfigurationError(f"unknown key {key}{did_you_mean(key, KEYS)}; one of {', '.join(KEYS)}")
    parts = {key: content.get(key) for key in KEYS[1:]}
    for key, part in parts.items():
        if part is not None and not (isinstance(part, dict) and all(isinstance(name, str) for name in part)):
            raise ConfigurationError(f"{key}: needs lines `name: value`")
    settings, grid, linear_probe = ({**(parts["settings"] or {}), **flags}, parts["grid"] or {}, parts["linear_probe"])
    for names, chosen in (((*settings, *grid), CHOSEN), (linear_probe or {}, CHOSEN_OF_PROBE)):
        for setting in names:
            if setting in chosen:
                raise ConfigurationError(f"{setting}: the study gives it to each run: leave it out")
    for setting, values in grid.items():
        if setting in settings:
            raise ConfigurationError(f"{setting} is in the grid and also one of the settings of all runs: give it once")
        if not isinstance(values, list) or not values:
            raise ConfigurationError(f"grid: {setting} needs a list of values, such as [0, 1]")
    study = Study(str(content.get("title") or name), grid, linear_probe)
    for values in itertools.product(*grid.values()):
        study.runs.append(plan_run(settings, dict(zip(grid, values, strict=True)), linear_probe, runs_dir))
    for first, second in itertools.combinations(study.runs, 2):
        if first.name == second.name:
            raise ConfigurationError(f"grid: {first.name} would be the name of two runs: give each value once")
    return study


def plan_run(
    settings: Mapping[str, object], varied: Mapping[str, object], linear_probe: Mapping | None, runs_dir: Path
) -> StudyRun:
    """Return one run of a study: its settings, those of the grid among them, and its linear probe."""
    given = convert_all(PretrainConfig, {**settings, **varied})  # text may hold several values: a flag for each
    name = "_".join(f"{setting}-{plain_text(value)}" for setting, value in varied.items()) or "run"
    name = re.sub(r"[^\w.-]+", "-", name)
    config = build_config({**given, "output_dir": str(runs_dir / name)})
    values = plain_settings(config)
    probe = None
    if linear_probe is not None:
        probe = {"encoder": config.output_dir, "dataset": config.dataset, "seed": config.seed}
        for item in fields_by_heading(LinearProbeConfig)["data"]:  # the same images
            if getattr(config, item.name) != item.default:
                probe[item.name] = values[item.name]
        probe |= convert_all(LinearProbeConfig, linear_probe)
        build_linear_probe(probe)
    return StudyRun(name, {setting: values[setting] for setting in varied}, given, config, probe)


def flag_words(settings: Mapping[str, object]) -> Iterator[str]:
    """Yield settings as the words of a command line."""
    for name, value in settings.items():
        yield f"--{name}"
        for part in value if isinstance(value, list | tuple) else [value]:
            yield str(part).lower() if part is None or isinstance(part, bool) else str(part)
