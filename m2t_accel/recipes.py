"""What a run is: its settings, checked, and the published recipes. This module imports no torch."""

from __future__ import annotations

import importlib.util
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass

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
        object.__setattr__(self, "output_dir", self.output_dir or f"runs/{self.recipe}")

    @property
    def evaluates(self) -> bool:
        return self.evaluate_every != 0

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


def check_output_dir(output_dir: str) -> None:
    """Check, writing nothing, that a run can be written to the folder and that it holds none yet.

    Raises:
        ConfigurationError: it cannot, or it does.
    """
    folder = os.path.abspath(output_dir)
    for name in ("config.yaml", "metrics.jsonl", "training.json", "encoder", "checkpoints"):
        if os.path.exists(os.path.join(folder, name)):
            raise ConfigurationError(
                f"--output_dir {output_dir} holds another run ({name}): give another folder, or remove that one"
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
