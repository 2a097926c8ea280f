"""The published recipes, and the configuration of a run from a recipe and the settings given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from m2t_accel.config.fields import ConfigurationError, convert_all, did_you_mean
from m2t_accel.config.pretrain import PretrainConfig


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
