"""The published recipes, and the function that makes the configuration of a run from a recipe and given settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from m2t_accel.config.fields import ConfigurationError, convert_all, did_you_mean
from m2t_accel.config.pretrain import PretrainConfig


@dataclass(frozen=True)
class Recipe:
    """A named set of settings, with the hardware, time and accuracy that were published for it."""

    settings: Mapping[str, object]
    hardware: str
    hours: float | None = None  # training time of the published run
    top1: float | None = None  # published accuracy of the linear probe on ImageNet, in per cent


SGD = {"optimizer": "sgd", "weight_decay": 1e-4}
LARS = {"optimizer": "lars", "weight_decay": 1e-6}
CIFAR10_VIEWS = {
    "dataset": "uoft-cs/cifar10",
    # The stem of a stock ResNet (7x7, stride 2, then a max-pool) reduces 64 pixels to 16, as a stem of 3x3 and stride 2
    # does with 32. So crops are enlarged, and the encoder stays one that everybody can load.
    "image_size": 64,
    "crop_scale": (0.2, 1.0),
    "blur_probability": (0.0, 0.0),
    "image_mean": (0.491, 0.482, 0.447),
    "image_std": (0.247, 0.243, 0.262),
    "evaluation_crop": 1.0,
}


def published(
    hardware: str,
    optimizer: Mapping[str, object],
    batch_size: int,
    device_batch_size: int,
    *columns: tuple[float, float, float],
) -> dict[str, Recipe]:
    """Return the recipes that were published for one kind of hardware.

    Args:
        hardware: number and name of the GPUs; part of the recipes' names.
        optimizer: settings of the optimizer.
        batch_size: images per step.
        device_batch_size: images per GPU.
        columns: learning rates per 256 images, hours, and top-1 in per cent, for 100, 200 and 300 epochs.
    """
    name = f"{hardware.replace(' ', 'x', 1).replace(' ', '')}-b{batch_size}"
    sizes = {"batch_size": batch_size, "device_batch_size": device_batch_size}
    return {
        f"{name}-{epochs}ep": Recipe(
            {"epochs": epochs, "learning_rate_per_256": rate, **sizes, **optimizer}, hardware, hours, top1
        )
        for epochs, rate, hours, top1 in zip((100, 200, 300), *columns, strict=True)
    }


# Source: the tables and the published code of arXiv 2101.07525; its days are converted to hours.
RECIPES: Mapping[str, Recipe] = {
    **published("8 V100", SGD, 1024, 128, (0.05, 0.05, 0.05), (43.2, 86.4, 132.0), (70.7, 72.7, 73.8)),
    **published("8 2080 Ti", SGD, 256, 32, (0.05, 0.05, 0.05), (60.0, 120.0, 180.0), (70.4, 72.3, 72.9)),
    **published("32 V100", LARS, 4096, 128, (0.45, 0.45, 0.3), (11.0, 22.0, 33.0), (70.3, 72.5, 73.7)),
    **published("128 2080 Ti", LARS, 4096, 32, (0.45, 0.45, 0.3), (5.0, 10.0, 15.0), (69.0, 71.5, 72.3)),
    "digits": Recipe(
        {
            "dataset": "digits",
            "encoder": "resnet10-quarter",
            "hidden_size": 512,
            "projection_size": 128,
            "weight_momentum": 0.95,  # in only 880 steps, 0.99 would follow the student too slowly
            "epochs": 40,
            "batch_size": 64,
            "learning_rate_per_256": 0.4,
            "warmup_epochs": 13.0,
            # Weights before a BatchNorm learn at a rate of learning rate / norm², and weight decay keeps the norm
            # small. With 5e-4, 40 epochs reach 1 to 2 % less.
            "weight_decay": 4e-3,
            "image_size": 24,
            "crop_scale": (0.5, 1.2),
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
    "cifar10-small": Recipe(
        {
            **CIFAR10_VIEWS,
            "image_size": 48,  # 0.6 of the time that 64 take
            "encoder": "resnet10-half",
            "hidden_size": 512,
            "projection_size": 128,
            "weight_momentum": 0.98,  # in only 4,680 steps, 0.99 would follow the student too slowly
            "epochs": 12,
            "batch_size": 128,
            "learning_rate_per_256": 0.12,  # two epochs with 0.2 and 0.4 reach 43.0 and 40.8 % kNN, from 38.2
            "warmup_epochs": 0.5,
            "weight_decay": 5e-4,
        },
        "2 CPU cores",
    ),
    "cifar10": Recipe(
        {
            **CIFAR10_VIEWS,
            "encoder": "resnet18",
            "epochs": 200,
            "batch_size": 256,
            "learning_rate_per_256": 0.2,
            "weight_decay": 5e-4,
        },
        "1 GPU",
    ),
}


def build_config(given: Mapping[str, object]) -> PretrainConfig:
    """Return the configuration of a run: the settings of the named recipe, overridden by the given settings.

    Raises:
        ConfigurationError: a recipe or setting is unknown, or a value is not allowed.
    """
    if "tracker" in given:  # the name of an earlier version, in the config.yaml of its runs
        given = {"report_to" if name == "tracker" else name: value for name, value in given.items()}
    converted = convert_all(PretrainConfig, given)
    recipe = converted.get("recipe", "digits")
    if recipe not in RECIPES:
        raise ConfigurationError(
            f"--recipe {recipe}: unknown{did_you_mean(recipe, RECIPES)}; `--recipe list` prints them all"
        )
    if converted.get("init_from") is not None:  # the architecture is the source's, not the recipe's
        converted.setdefault("encoder", converted["init_from"])
    return PretrainConfig(**{**RECIPES[recipe].settings, **converted})
