"""The run as a whole: its hours, end, cost and energy, and its settings beside the published ones."""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from typing import NamedTuple

from accelerate import Accelerator

from m2t_accel.config.fields import count
from m2t_accel.config.pretrain import PretrainConfig
from m2t_accel.config.recipes import RECIPES
from m2t_accel.data.order import num_steps_per_epoch
from m2t_accel.data.sources import ImageData
from m2t_accel.doctor.findings import BAD, DOUBTFUL, GOOD, Finding
from m2t_accel.doctor.speed import LoaderSpeed, StepSpeed
from m2t_accel.progress import duration
from m2t_accel.run.report import settle_evaluation

LONG = 30 * 24 * 3600  # seconds; a longer run is probably not meant
# Times the published learning rate. Digits at 20 and at 100 times its rate fell in 300 steps from a kNN of 89 % with
# random weights to 42 and 61 %.
DIVERGES = 20.0
MIN_SUB_BATCH = 16  # images, below which the statistics of a BatchNorm are very noisy


class Plan(NamedTuple):
    """The predicted course of a run from now on."""

    steps: int
    images: int
    evaluations: int
    seconds: float
    images_per_second: float  # while it trains
    start_seconds: float
    evaluation_seconds: float


def predict(
    config: PretrainConfig,
    data: ImageData,
    loader: LoaderSpeed,
    step: StepSpeed,
    evaluation_seconds: float | None,
    start_seconds: float,
    done: int,
) -> Plan:
    """Return the predicted course of a run.

    Args:
        start_seconds: from the start of the process to the first step.
        done: steps that a checkpoint holds.
    """
    config = settle_evaluation(config, data)
    steps_per_epoch = num_steps_per_epoch(len(data.train), config.batch_size)
    total = config.total_steps(steps_per_epoch)
    evaluations = 0
    if config.evaluate_every:
        every = config.evaluate_every * steps_per_epoch
        evaluations = len({*range(-(-done // every) * every, total, every), total})
    of_step = step.seconds_with_wait / (step.size * step.num_processes)
    of_image = max(of_step, 1 / loader.images_per_second)
    steps = max(0, total - done)
    images = steps * config.batch_size
    seconds = start_seconds + images * of_image + evaluations * (evaluation_seconds or 0)
    return Plan(steps, images, evaluations, seconds, 1 / of_image, start_seconds, evaluation_seconds or 0)


def long_duration(seconds: float) -> str:
    """Return a duration in words, in days if it is longer than two of them."""
    return duration(seconds) if seconds < 48 * 3600 else f"{seconds / 86400:,.1f} days"


def check_time(config: PretrainConfig, plan: Plan, step: StepSpeed, now: datetime.datetime) -> Iterator[Finding]:
    """Yield the time of the run, its end if it starts now, and the images it sees."""
    text = f"{long_duration(plan.seconds)}: {count(plan.steps, 'step')}, {plan.images:,} images"
    if plan.evaluations:
        text += f", {count(plan.evaluations, 'evaluation')} of {plan.evaluation_seconds:.1f} s"
    try:
        text += f"; ends on {now + datetime.timedelta(seconds=plan.seconds):%d %B %Y at %H:%M} if it starts now"
    except OverflowError:
        text += "; ends after the year 9999"
    is_whole = step.size == config.device_batch_size
    if not is_whole:
        text += f"; judged by {step.size} images at a time"
    if plan.seconds > LONG:
        text += ": type --hours N for settings that fit into N hours"
    if step.watts is None:
        text += "; energy not measured (no power can be read here)"
    yield Finding(GOOD if is_whole and plan.seconds <= LONG else DOUBTFUL, "time", text)


def check_hardware(config: PretrainConfig, accelerator: Accelerator | None) -> Iterator[Finding]:
    """Yield what cannot be told without the GPUs of the recipe."""
    recipe = RECIPES[config.recipe]
    if recipe.hours is None:
        return
    published = f"{recipe.hours:g} h on {recipe.hardware} are published for ImageNet and ResNet-50"
    number = int(recipe.hardware.split()[0])
    if accelerator is None or accelerator.device.type != "cuda":
        text = f"{published}; no GPU is used here, so neither their speed nor their memory could be measured"
        yield Finding(DOUBTFUL, "hardware", text)
    elif accelerator.num_processes < number:
        text = f"{published}; measured were {count(accelerator.num_processes, 'GPU')}, not {number}"
        yield Finding(DOUBTFUL, "hardware", text)
    else:
        yield Finding(GOOD, "hardware", published)


def check_cost(plan: Plan, step: StepSpeed, price_per_hour: float | None) -> Iterator[Finding]:
    """Yield the cost, if a price is given, and the energy, if the power could be read."""
    hours = plan.seconds / 3600
    if price_per_hour is not None:
        yield Finding(GOOD, "cost", f"{hours * price_per_hour:,.2f} at {price_per_hour:g} an hour for all machines")
    if step.watts is not None:
        yield Finding(GOOD, "energy", f"{hours * step.watts / 1000:,.2f} kWh at the {step.watts:,.0f} W measured here")


def published(name: str, optimizer: str | None = None) -> tuple[float, float]:
    """Return the smallest and the largest value of a setting in the published recipes, of one optimizer or all."""
    values = [
        recipe.settings[name]
        for recipe in RECIPES.values()
        if recipe.top1 is not None and optimizer in (None, recipe.settings["optimizer"])
    ]
    return min(values), max(values)


def check_learning_rate(config: PretrainConfig) -> Iterator[Finding]:
    """Yield the learning rate beside the recipe's and the published range of its optimizer."""
    rate, recipe = config.learning_rate_per_256, RECIPES[config.recipe]
    low, high = published("learning_rate_per_256", config.optimizer)
    text = f"{rate:g} per 256 images, {config.learning_rate:g} at its peak"
    own = recipe.settings.get("learning_rate_per_256")
    if recipe.settings.get("optimizer", "sgd") != config.optimizer:
        own = None
    if rate == own:
        yield Finding(GOOD, "learning rate", f"{text}, as in the recipe")
    elif low <= rate <= high:
        yield Finding(GOOD, "learning rate", f"{text}; published with {config.optimizer}: {low:g} to {high:g}")
    else:
        known = [value for value in (low, high, own) if value is not None]
        near = own if own is not None else min(known, key=lambda value: max(rate / value, value / rate))
        times = rate / max(known)
        range_text = f"{low:g}" if low == high else f"{low:g} to {high:g}"
        text += f"; published with {config.optimizer}: {range_text}"
        text += f", the recipe has {own:g}" if own not in (None, low, high) else ""
        if times >= DIVERGES:
            text += f"; at {times:,.0f} times as much a run does not learn: --learning_rate_per_256 {near:g}"
            yield Finding(BAD, "learning rate", text)
        else:
            yield Finding(DOUBTFUL, "learning rate", f"{text}: try --learning_rate_per_256 {near:g} first")


def check_settings(config: PretrainConfig) -> Iterator[Finding]:
    """Yield batch, length and warm-up beside the recipe's and the published ranges."""
    settings = RECIPES[config.recipe].settings
    low, high = published("batch_size")
    text = f"{config.batch_size} images"
    if config.batch_size == settings.get("batch_size"):
        yield Finding(GOOD, "batch", f"{text}, as in the recipe")
    elif low <= config.batch_size <= high:
        yield Finding(GOOD, "batch", f"{text}; published: {low} to {high}")
    else:
        text += f", outside of the published {low} to {high}: the learning rate and --weight_momentum may need changes"
        yield Finding(DOUBTFUL, "batch", text)
    if config.device_batch_size < MIN_SUB_BATCH:
        text = f"a BatchNorm sees {config.device_batch_size} images; published: 32 and 128: --device_batch_size 32"
        yield Finding(DOUBTFUL, "sub-batch", text)
    low, high = published("epochs")
    if config.max_steps is not None:
        yield Finding(DOUBTFUL, "length", f"{count(config.max_steps, 'step')}, a short try (--max_steps)")
    elif config.epochs == settings.get("epochs"):
        yield Finding(GOOD, "length", f"{count(config.epochs, 'epoch')}, as in the recipe")
    elif low <= config.epochs <= high:
        yield Finding(GOOD, "length", f"{count(config.epochs, 'epoch')}; published: {low} to {high}")
    else:
        text = f"{count(config.epochs, 'epoch')}, outside of the published {low} to {high}"
        yield Finding(DOUBTFUL, "length", text)
    share = config.warmup_epochs / config.epochs
    text = f"{config.warmup_epochs:g} of {count(config.epochs, 'epoch')}"
    own = settings.get("warmup_epochs", PretrainConfig.warmup_epochs), settings.get("epochs")
    if (config.warmup_epochs, config.epochs) == own:
        yield Finding(GOOD, "warm-up", f"{text}, as in the recipe")
    elif 0.02 <= share <= 0.2:
        yield Finding(GOOD, "warm-up", f"{text}; published: 10 of 100 to 300")
    else:
        text += f"; published: 10 of 100 to 300: try --warmup_epochs {config.epochs / 10:g}"
        yield Finding(DOUBTFUL, "warm-up", text)
