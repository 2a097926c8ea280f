"""What a run is: its settings, checked, and the published recipes. This module imports no torch."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import yaml

from m2t_accel.data_settings import TrainingSettings, check_dataset, check_ordered, check_push
from m2t_accel.settings import ConfigurationError, convert_all, did_you_mean, is_hub_id, setting

# Encoders by name: arguments of transformers.ResNetConfig. All but the last are the standard ResNets.
ENCODERS: Mapping[str, Mapping[str, object]] = {
    "resnet18": {"depths": [2, 2, 2, 2], "hidden_sizes": [64, 128, 256, 512], "layer_type": "basic"},
    "resnet34": {"depths": [3, 4, 6, 3], "hidden_sizes": [64, 128, 256, 512], "layer_type": "basic"},
    "resnet50": {"depths": [3, 4, 6, 3], "hidden_sizes": [256, 512, 1024, 2048], "layer_type": "bottleneck"},
    "resnet101": {
        "depths": [3, 4, 23, 3],
        "hidden_sizes": [256, 512, 1024, 2048],
        "layer_type": "bottleneck",
    },
    "resnet152": {
        "depths": [3, 8, 36, 3],
        "hidden_sizes": [256, 512, 1024, 2048],
        "layer_type": "bottleneck",
    },
    "resnet10-quarter": {
        "depths": [1, 1, 1, 1],
        "hidden_sizes": [16, 32, 64, 128],
        "embedding_size": 16,
        "layer_type": "basic",
    },
}


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(TrainingSettings):
    """All settings of a pretraining run, checked. The defaults are the ImageNet ones.

    Raises:
        ConfigurationError: a value out of range, or values that do not fit one another.
    """

    recipe: str = setting("digits", "name of a recipe; `list` prints them all", heading="the run")
    output_dir: str | None = setting(None, "folder of the run (default: runs/RECIPE)")
    resume: str = setting(
        "auto",
        "auto: go on from the newest whole checkpoint in output_dir, if there is one; never; or a checkpoint's folder",
    )

    encoder: str = setting(
        "resnet50",
        f"{', '.join(ENCODERS)}, a transformers config folder or a Hub id (weights start random)",
        heading="student and teacher",
    )
    hidden_size: int = setting(4096, "hidden width of projector and predictor", at_least=2)
    projection_size: int = setting(256, "output width of projector and predictor", at_least=2)
    weight_momentum: float = setting(
        0.99, "the teacher's weight momentum at step 0; rises to 1 by a cosine", at_least=0, at_most=1
    )

    optimizer: str = setting("sgd", "sgd or lars", choices=("sgd", "lars"), heading="training")
    learning_rate_per_256: float = setting(0.05, "peak learning rate for each 256 images of batch_size", above=0)
    warmup_epochs: float = setting(10.0, "epochs of linear warmup from 1e-6, then cosine to 0", at_least=0)
    weight_decay: float = setting(1e-4, "weight decay", at_least=0)
    optimizer_momentum: float = setting(0.9, "momentum of SGD or LARS", at_least=0, below=1)

    jitter_probability: float = setting(0.8, "chance of colour jitter", at_least=0, at_most=1, heading="views")
    brightness: float = setting(0.4, "strength of jitter: factor 1 ± this", at_least=0, at_most=1)
    contrast: float = setting(0.4, "strength of jitter: factor 1 ± this", at_least=0, at_most=1)
    saturation: float = setting(0.2, "strength of jitter: factor 1 ± this", at_least=0, at_most=1)
    hue: float = setting(0.1, "strength of jitter: ± this share of the circle", at_least=0, at_most=0.5)
    grayscale_probability: float = setting(0.2, "chance of losing all colour", at_least=0, at_most=1)
    blur_probability: tuple[float, float] = setting(
        (1.0, 0.1), "chance of Gaussian blur, view 1 and view 2", at_least=0, at_most=1
    )
    blur_sigma: tuple[float, float] = setting((0.1, 2.0), "range of the blur's sigma, in pixels", above=0)
    solarize_probability: tuple[float, float] = setting(
        (0.0, 0.2), "chance of solarization, view 1 and view 2", at_least=0, at_most=1
    )

    streaming: bool = setting(
        False, "read parquet files and tars piece by piece from where they are, without a copy", heading="data"
    )
    max_bad_fraction: float = setting(
        0.001, "share of images that may be undecodable before the run stops; ten always may", at_least=0, at_most=1
    )

    checkpoint_every: tuple[str, ...] = setting(
        ("15min",),
        "when to save: such as 500steps, 1epoch or 15min, several if you like; or never, that is, only at the end and "
        "when the run is stopped",
        heading="checkpoints",
    )
    keep: tuple[int, int] = setting(
        (3, 0), "checkpoints that are kept: the last N, and for good every Mth (0: none)", at_least=0
    )
    stop_on_collapse: bool = setting(
        False, "end the run where the teacher's embeddings fall into one point, instead of a warning"
    )
    collective_timeout: float = setting(
        10.0, "minutes that a process waits for the others in a step, before it takes them for lost", above=0
    )

    log_every: int = setting(10, "steps between lines of metrics.jsonl", at_least=1, heading="reports")
    evaluate_every: int | None = setting(
        None,
        "epochs between kNN evaluations, 0 for never, and nothing is held out (default: about ten in a run, where "
        "labels are)",
        at_least=0,
    )
    push_to_hub: str | None = setting(None, "where on the Hub the run is published when it ends: USER/NAME")
    tracker: str = setting("none", "none or tensorboard", choices=("none", "tensorboard"))

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ordered(self, "blur_sigma")
        if self.warmup_epochs >= self.epochs:
            raise ConfigurationError(
                f"--warmup_epochs {self.warmup_epochs:g} must be less than --epochs {self.epochs}: "
                f"add --warmup_epochs {self.epochs / 10:g}"
            )
        if self.keep[0] < 1:
            raise ConfigurationError(f"--keep {self.keep[0]} {self.keep[1]}: at least the last one must be kept")
        read_triggers(self.checkpoint_every)
        object.__setattr__(self, "output_dir", self.output_dir or f"runs/{self.recipe}")

    @property
    def evaluates(self) -> bool:
        return self.evaluate_every != 0

    @property
    def saves_every(self) -> Mapping[str, float]:
        """Steps, epochs and minutes between checkpoints, by unit, where they are given."""
        return read_triggers(self.checkpoint_every)

    @property
    def learning_rate(self) -> float:
        """Peak learning rate of the whole batch."""
        return self.learning_rate_per_256 * self.batch_size / 256


@dataclass(frozen=True)
class Recipe:
    """A named set of settings, and what it gave where it was published."""

    settings: Mapping[str, object]
    hardware: str
    hours: float | None = None  # of the published run
    top1: float | None = None  # published linear evaluation on ImageNet, in per cent


def published(hardware: str, epochs: int, hours: float, top1: float, **settings: object) -> Recipe:
    return Recipe({"epochs": epochs, "weight_decay": 1e-4, **settings}, hardware, hours, top1)


LARGE_BATCH = {"batch_size": 4096, "optimizer": "lars", "weight_decay": 1e-6}

# Source: arXiv 2101.07525, its tables, and its published code. Days there are hours here.
RECIPES: Mapping[str, Recipe] = {
    **{
        f"8xV100-b1024-{epochs}ep": published(
            "8 V100", epochs, hours, top1, batch_size=1024, device_batch_size=128, learning_rate_per_256=0.05
        )
        for epochs, hours, top1 in ((100, 43.2, 70.7), (200, 86.4, 72.7), (300, 132.0, 73.8))
    },
    **{
        f"8x2080Ti-b256-{epochs}ep": published(
            "8 2080 Ti", epochs, hours, top1, batch_size=256, device_batch_size=32, learning_rate_per_256=0.05
        )
        for epochs, hours, top1 in ((100, 60.0, 70.4), (200, 120.0, 72.3), (300, 180.0, 72.9))
    },
    **{
        f"32xV100-b4096-{epochs}ep": published(
            "32 V100", epochs, hours, top1, device_batch_size=128, learning_rate_per_256=rate, **LARGE_BATCH
        )
        for epochs, hours, top1, rate in (
            (100, 11.0, 70.3, 0.45),
            (200, 22.0, 72.5, 0.45),
            (300, 33.0, 73.7, 0.3),
        )
    },
    **{
        f"128x2080Ti-b4096-{epochs}ep": published(
            "128 2080 Ti",
            epochs,
            hours,
            top1,
            device_batch_size=32,
            learning_rate_per_256=rate,
            **LARGE_BATCH,
        )
        for epochs, hours, top1, rate in (
            (100, 5.0, 69.0, 0.45),
            (200, 10.0, 71.5, 0.45),
            (300, 15.0, 72.3, 0.3),
        )
    },
    "digits": Recipe(
        {
            "dataset": "digits",
            "encoder": "resnet10-quarter",
            "hidden_size": 512,
            "projection_size": 128,
            "weight_momentum": 0.95,  # 1760 steps are few: 0.99 follows too slowly for them
            "epochs": 80,
            "batch_size": 64,
            "learning_rate_per_256": 0.4,
            "warmup_epochs": 8.0,
            "weight_decay": 5e-4,
            "image_size": 32,
            "crop_scale": (0.4, 1.2),
            "rotation": 15.0,
            "flip_probability": 0.0,
            "saturation": 0.0,
            "hue": 0.0,
            "grayscale_probability": 0.0,
            "blur_probability": (0.0, 0.0),
            "solarize_probability": (0.0, 0.0),
            "image_mean": (0.305, 0.305, 0.305),
            "image_std": (0.377, 0.377, 0.377),
            "evaluation_crop": 1.0,
        },
        "2 CPU cores",
    ),
    "cifar10": Recipe(
        {
            "dataset": "uoft-cs/cifar10",
            "encoder": "resnet18",
            "epochs": 200,
            "batch_size": 256,
            "learning_rate_per_256": 0.2,
            "weight_decay": 5e-4,
            # 7x7 stride 2 and a max-pool leave 16x16 of 64 pixels: enlarged crops stand in for a 3x3 stem.
            "image_size": 64,
            "crop_scale": (0.2, 1.0),
            "blur_probability": (0.0, 0.0),
            "image_mean": (0.491, 0.482, 0.447),
            "image_std": (0.247, 0.243, 0.262),
            "evaluation_crop": 1.0,
        },
        "1 GPU",
    ),
}


# --- from settings to a configuration


def build_config(given: Mapping[str, object]) -> PretrainConfig:
    """The configuration of the settings given over those of the recipe they name.

    Raises:
        ConfigurationError: an unknown recipe or setting, or a value that is not allowed.
    """
    converted = convert_all(PretrainConfig, given)
    recipe = converted.get("recipe", "digits")
    if recipe not in RECIPES:
        raise ConfigurationError(
            f"--recipe {recipe}: unknown{did_you_mean(recipe, RECIPES)}; `--recipe list` prints them all"
        )
    return PretrainConfig(**{**RECIPES[recipe].settings, **converted})


# --- checks of the machine that need nothing heavy


def check_inputs(config: PretrainConfig) -> None:
    """Check that the dataset and the encoder can be found, the tracker is installed, and the Hub knows who publishes.

    Raises:
        ConfigurationError: one of them is not.
    """
    check_dataset(config.dataset)
    if config.encoder not in ENCODERS and not os.path.exists(config.encoder) and not is_hub_id(config.encoder):
        raise ConfigurationError(
            f"--encoder {config.encoder}: unknown{did_you_mean(config.encoder, ENCODERS)}; give one of "
            f"{', '.join(ENCODERS)}, a folder with a transformers config.json, or a Hub id USER/NAME"
        )
    check_push(config.push_to_hub)
    # Accelerate leaves out a tracker that is not installed, in silence.
    if config.tracker != "none" and importlib.util.find_spec(config.tracker) is None:
        raise ConfigurationError(
            f"--tracker {config.tracker} is not installed: type `pip install {config.tracker}`, or leave the flag out"
        )


def read_triggers(words: Sequence[str]) -> dict[str, float]:
    """Numbers by unit, of words such as `500steps`, `1epoch`, `15min`.

    Raises:
        ConfigurationError: a word is none of them, or two have the same unit.
    """
    triggers: dict[str, float] = {}
    for word in words if tuple(words) != ("never",) else ():
        match = re.fullmatch(r"(\d+(?:\.\d+)?)(step|epoch|min(?:ute)?)s?", word)
        unit = {"min": "minute"}.get(match[2], match[2]) if match else ""
        if not match or unit in triggers or not float(match[1]) or (unit == "step" and "." in match[1]):
            raise ConfigurationError(
                f"--checkpoint_every {' '.join(words)}: a number of steps, epochs or minutes is needed, such as "
                "500steps, 1epoch, 15min or several of them; or never"
            )
        triggers[unit] = float(match[1])
    return triggers


# --- a run that goes on

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
