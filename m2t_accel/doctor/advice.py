"""Advice on the settings of a run that has so many hours: batch, learning rate, momentum and epochs, with reasons."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Sequence
from typing import NamedTuple

from m2t_accel.config.fields import count
from m2t_accel.config.pretrain import PretrainConfig
from m2t_accel.config.recipes import RECIPES, build_config
from m2t_accel.data.order import num_steps_per_epoch
from m2t_accel.doctor.findings import rate as in_words
from m2t_accel.doctor.plan import published

BATCHES = (1024, 256)  # published with SGD, the preferred first
LARGE_BATCH, LARGE_PROCESSES = 4096, 32  # published with LARS, on at least so many devices
PUBLISHED_STEPS = 31_250  # of the shortest published run: 100 epochs of ImageNet in batches of 4096
MIN_STEPS = 4_400  # below it, the published weight momentum follows the student too slowly
DIGITS_MOMENTUM = 44.0  # (1 - weight momentum) × steps of the recipe digits
LOWEST_MOMENTUM = 0.9


class Advice(NamedTuple):
    """Settings for a run, a sentence about each, warnings, and the command to type."""

    config: PretrainConfig
    reasons: list[tuple[str, str]]  # name of the setting with its value, and the reason
    warnings: list[str]
    command: str


def advise(
    config: PretrainConfig,
    num_images: int,
    hours: float,
    images_per_second: float,
    num_processes: int,
    launcher: Sequence[str],
    overhead: float = 0.0,
) -> Advice:
    """Return settings for a run of so many hours on the devices that were measured.

    Encoder, size of the views and everything that the user has chosen about the images stay.

    Args:
        num_images: images to train on.
        images_per_second: what was measured, with the evaluations left out.
        num_processes: devices of the launch.
        launcher: words before the settings, such as `python scripts/pretrain.py`.
        overhead: seconds of the start and the evaluations.

    Source: learning rate in proportion to the batch (arXiv 1706.02677), in the published recipes of arXiv 2101.07525.
        Weight momentum to the power of the ratio of the batches (arXiv 2307.13813); a rule of thumb.
    """
    reasons: list[tuple[str, str]] = []
    warnings: list[str] = []
    high_epochs = int(published("epochs")[1])
    seen = max(0.0, hours * 3600 - overhead) * images_per_second
    possible = int(seen / num_images)
    epochs = max(1, min(high_epochs, possible))
    if is_small(config):
        settings, name = dict(RECIPES[config.recipe].settings), config.recipe
        batch, per_device, optimizer = config.batch_size, config.device_batch_size, config.optimizer
        rate, momentum = config.learning_rate_per_256, config.weight_momentum
        reasons.append((f"recipe {name}", "it was made for these images; only its length is changed"))
    else:
        batch, why = choose_batch(num_images, epochs, num_processes)
        per_device, why_device = choose_device_batch(config, batch, num_processes)
        optimizer, name = choose_recipe(batch, epochs, num_processes)
        settings = dict(RECIPES[name].settings)
        rate = settings["learning_rate_per_256"]
        momentum, why_momentum = choose_momentum(num_images, batch, epochs)
        reasons += [
            (f"recipe {name}", "the published one of this optimizer that is nearest in batch and epochs"),
            (f"batch_size {batch}", why),
            (f"device_batch_size {per_device}", why_device),
            (f"learning_rate_per_256 {rate:g}", describe_rate(optimizer, rate, batch)),
            (f"weight_momentum {momentum:g}", why_momentum),
        ]
    if possible > high_epochs:
        why = f"the largest published number; {possible:,} would fit into {hours:g} h"
    else:
        why = f"{in_words(images_per_second)} show {seen:,.0f} images in {hours:g} h, {num_images:,} in each epoch"
    reasons.append((f"epochs {epochs}", why))
    if is_small(config):
        warmup, why = round(epochs * config.warmup_epochs / config.epochs, 2), "the same share of the run"
    else:
        warmup, why = round(min(10.0, epochs / 10), 2), "10 as published, but at most a tenth of the run"
    reasons.append((f"warmup_epochs {warmup:g}", why))
    if not is_small(config):
        warnings += outside_of_the_published(num_images, batch, epochs, possible)
    advised = dataclasses.replace(
        config,
        recipe=name,
        output_dir=None if config.output_dir == f"runs/{config.recipe}" else config.output_dir,
        batch_size=batch,
        device_batch_size=per_device,
        optimizer=optimizer,
        weight_decay=settings.get("weight_decay", config.weight_decay),
        learning_rate_per_256=rate,
        weight_momentum=momentum,
        epochs=epochs,
        warmup_epochs=warmup,
        max_steps=None,
    )
    return Advice(advised, reasons, warnings, shlex.join([*launcher, *flags(advised)]))


def outside_of_the_published(num_images: int, batch: int, epochs: int, possible: int) -> list[str]:
    """Return warnings about a run that is shorter than every published one, or has another batch."""
    warnings = []
    (low, high), (smallest, largest) = map(published, ("epochs", "batch_size"))
    steps = epochs * num_steps_per_epoch(num_images, batch)
    others = "start from other weights (--init_from)"
    if epochs < low:
        fit = "not even one epoch fits" if possible < 1 else f"only {count(epochs, 'epoch')} fit{'s' * (epochs == 1)}"
        warnings.append(f"{fit}, fewer than the published {low} to {high}: add hours or devices, or {others}")
    elif steps < MIN_STEPS:
        warnings.append(
            f"{count(steps, 'step')} are few (published: {PUBLISHED_STEPS:,} and more): with so few images, {others}"
        )
    if not smallest <= batch <= largest:
        warnings.append(f"a batch of {batch} is outside of the published {smallest} to {largest}")
    return warnings


def is_small(config: PretrainConfig) -> bool:
    """Return whether the recipe is one that was made for the dataset of the run."""
    return RECIPES[config.recipe].settings.get("dataset") == config.dataset


def choose_batch(num_images: int, epochs: int, num_processes: int) -> tuple[int, str]:
    """Return the batch, and the reason: the largest published one that leaves as many steps as published runs have."""
    smallest = 2 * num_processes
    if num_images < max(BATCHES[-1], smallest):
        batch = max(2, 2 ** (num_images.bit_length() - 1))
        batch = max(batch // num_processes * num_processes, smallest)
        return batch, f"there are only {num_images:,} images"
    candidates = ((LARGE_BATCH,) if num_processes >= LARGE_PROCESSES else ()) + BATCHES
    for batch in candidates:
        steps = epochs * (num_images // batch)
        if steps >= PUBLISHED_STEPS and batch % num_processes == 0:
            return batch, f"it leaves {steps:,} steps; the shortest published run has {PUBLISHED_STEPS:,}"
    batch = next((b for b in reversed(candidates) if b % num_processes == 0), num_processes * 32)
    return batch, "the smallest published one, because larger ones would leave even fewer steps"


def choose_device_batch(config: PretrainConfig, batch: int, num_processes: int) -> tuple[int, str]:
    """Return the sub-batch, and the reason: at most the given one, whose memory was measured."""
    share = batch // num_processes
    sizes = [size for size in (128, 32) if size <= min(share, config.device_batch_size) and share % size == 0]
    if sizes:
        return sizes[0], f"published, and no more than the given {config.device_batch_size}"
    size = max(
        size for size in range(1, share + 1) if share % size == 0 and (size <= config.device_batch_size or size == 1)
    )
    return max(size, 2) if share > 1 else share, "the largest one up to the given one that divides the batch"


def choose_recipe(batch: int, epochs: int, num_processes: int) -> tuple[str, str]:
    """Return the optimizer, and the name of the published recipe nearest to a batch and a number of epochs."""
    optimizer = "lars" if batch >= LARGE_BATCH else "sgd"

    def distance(name: str) -> tuple[float, float, float]:
        settings = RECIPES[name].settings
        devices = settings["batch_size"] // settings["device_batch_size"]
        return abs(settings["batch_size"] - batch), abs(settings["epochs"] - epochs), abs(devices - num_processes)

    names = [
        name
        for name, recipe in RECIPES.items()
        if recipe.top1 is not None and recipe.settings["optimizer"] == optimizer
    ]
    return optimizer, min(names, key=distance)


def choose_momentum(num_images: int, batch: int, epochs: int) -> tuple[float, str]:
    """Return the teacher's weight momentum at step 0, and the reason."""
    steps = max(1, epochs * num_steps_per_epoch(num_images, batch))
    low, high = published("batch_size")
    base = PretrainConfig.weight_momentum
    if steps < MIN_STEPS:
        momentum = round(max(LOWEST_MOMENTUM, 1 - DIGITS_MOMENTUM / steps), 4)
        return momentum, (
            f"in only {steps:,} steps, {base:g} would follow the student too slowly; this keeps the ratio of the "
            "recipe digits (0.95 in 880 steps)"
        )
    if low <= batch <= high:
        return base, f"published for every batch from {low} to {high}"
    momentum = round(base ** (batch / (low if batch < low else high)), 4)
    return momentum, f"{base:g} to the power of the ratio of the batches, a rule of thumb (arXiv 2307.13813)"


def describe_rate(optimizer: str, rate: float, batch: int) -> str:
    """Return the reason for a learning rate."""
    return (
        f"published with {optimizer}; the rate grows with the batch (arXiv 1706.02677), to {rate * batch / 256:g} here"
    )


def flags(config: PretrainConfig) -> list[str]:
    """Return the flags that make these settings from their recipe."""
    bare = build_config({"recipe": config.recipe, "dataset": config.dataset})
    words = ["--recipe", config.recipe, "--dataset", config.dataset]
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if value == getattr(bare, item.name) or value is None or item.name in ("recipe", "dataset"):
            continue
        values = value if isinstance(value, tuple) else (value,)
        words += [f"--{item.name}", *(str(each).lower() if isinstance(each, bool) else f"{each}" for each in values)]
    return words
