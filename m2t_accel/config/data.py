"""Settings of the data: the images, their crops in training and evaluation, and the batches.

This module imports no torch.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from typing import ClassVar

import yaml

from m2t_accel.config.fields import (
    ConfigurationError,
    check_all_limits,
    convert_all,
    count,
    fields_by_heading,
    is_hub_id,
    setting,
)

MAX_IMAGE_PIXELS = 89_478_485  # above it PIL warns; decoded, these are 268 MB


@dataclass(frozen=True, kw_only=True)
class ImageSettings:
    """Settings of the images, and of their crop in evaluation.

    Raises:
        ConfigurationError: a value is out of range, or `dataset` is missing.
    """

    streaming: ClassVar[bool] = False  # only pretraining has these two settings
    images_per_epoch: ClassVar[int | None] = None
    max_images = None  # only trainings have this setting; a ClassVar would hide it from them

    dataset: str | None = setting(
        None,
        "`digits`, a Hub id, or a folder of class folders, images, parquet files or tars",
        heading="the run",
    )

    image_size: int = setting(224, "width and height of a view, in pixels", at_least=8, heading="views")
    image_mean: tuple[float, float, float] = setting(
        (0.485, 0.456, 0.406), "mean of each channel, from 0 to 1", at_least=0, at_most=1
    )
    image_std: tuple[float, float, float] = setting(
        (0.229, 0.224, 0.225), "standard deviation of each channel, from 0 to 1", above=0
    )
    evaluation_crop: float = setting(
        0.875, "side of the centre crop in evaluation, as a share of the image's shorter side", above=0, at_most=1
    )

    dataset_config: str | None = setting(None, "configuration of a Hub dataset that has several", heading="data")
    dataset_revision: str | None = setting(None, "branch, tag or commit of a Hub dataset")
    train_split: str | None = setting(
        None, "split to train on: its name on the Hub, or its folder (default: found by name)"
    )
    validation_split: str | None = setting(
        None, "split to evaluate on: its name on the Hub, or its folder (default: found by name)"
    )
    image_column: str | None = setting(None, "column of the images (default: found by type, then by name)")
    label_column: str | None = setting(None, "column of the labels (default: found by name)")
    validation_fraction: float = setting(
        0.1, "share of labelled training images to hold out if there is no validation split", at_least=0, at_most=0.5
    )
    max_image_pixels: int = setting(
        MAX_IMAGE_PIXELS,
        "an image of more pixels (width × height in its header) counts as broken",
        at_least=1,
        at_most=2**30,  # limit of OpenCV
    )
    num_workers: int | None = setting(
        None, "processes per device that decode images (default: the spare cores, at most 8)", at_least=0
    )

    def __post_init__(self) -> None:
        # From Python, "tensorboard" or [0.2, 1] may stand for a tuple, as in YAML.
        tuples = {item.name: getattr(self, item.name) for item in fields(self) if str(item.type).startswith("tuple")}
        given = {name: value for name, value in tuples.items() if isinstance(value, str | list)}
        for name, value in convert_all(type(self), given).items() if given else ():
            object.__setattr__(self, name, value)
        check_all_limits(self)
        if self.dataset is None:
            raise ConfigurationError(
                "--dataset is needed: a folder of class folders (in train/ and val/, or not), images, parquet "
                "files or tars, or a Hub id such as ILSVRC/imagenet-1k"
            )
        for name in ("train_split", "validation_split"):  # the first line of a run names folders as `val/`
            if getattr(self, name) is not None:
                object.__setattr__(self, name, os.path.normpath(getattr(self, name)))
        for name, other in (("image_column", "label_column"), ("train_split", "validation_split")):
            value = getattr(self, name)
            if value is not None and value == getattr(self, other):
                raise ConfigurationError(f"--{name} and --{other} are both {value}: they must differ")

    def to_yaml(self) -> str:
        """Return the settings as YAML, in the order of `--help`; `--config` reads it."""
        items = [item for group in fields_by_heading(type(self)).values() for item in group]
        values = {item.name: getattr(self, item.name) for item in items}
        plain = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
        return yaml.safe_dump(plain, sort_keys=False, default_flow_style=None)

    @property
    def evaluates(self) -> bool:
        """Return whether labelled images will be used for evaluation."""
        return True

    @property
    def uses_labels(self) -> bool:
        """Return whether labels will be used if there are some."""
        return self.evaluates

    @property
    def or_no_evaluation(self) -> str:
        """Return the end of an advice about images for evaluation: pretraining also works without them."""
        return ", or type --evaluate_every 0" if hasattr(self, "evaluate_every") else ""


@dataclass(frozen=True, kw_only=True)
class TrainingSettings(ImageSettings):
    """Settings of the batches and crops in training.

    Raises:
        ConfigurationError: a value is out of range or missing, or two values contradict each other.
    """

    seed: int = setting(
        0, "seed of the weights, the order and the views", at_least=0, at_most=2**32 - 1, heading="the run"
    )
    deterministic: bool = setting(
        False, "compute the same to the last bit in each run on the same GPUs, which is slower; CPUs always do"
    )

    epochs: int = setting(100, "passes over the images", at_least=1, heading="training")
    max_steps: int | None = setting(
        None,
        "optimizer steps of the whole run, for a short try; the schedules span them (default: those of epochs)",
        at_least=1,
    )
    batch_size: int = setting(1024, "images per optimizer step, over all devices", at_least=2, at_most=2**20)
    device_batch_size: int | None = setting(
        None,
        "images that pass the network and its BatchNorm together; the number of virtual devices is "
        "batch_size / device_batch_size (default: batch_size)",
        at_least=2,
    )

    crop_scale: tuple[float, float] = setting(
        (0.08, 1.0), "smallest and largest area of a crop, as a share of the image", above=0, heading="views"
    )
    crop_ratio: tuple[float, float] = setting((3 / 4, 4 / 3), "smallest and largest width / height of a crop", above=0)
    rotation: float = setting(0.0, "largest rotation of a crop, in degrees", at_least=0, at_most=180)
    flip_probability: float = setting(0.5, "probability of a horizontal flip", at_least=0, at_most=1)

    max_images: int | None = setting(
        None, "train on only this many images, evenly spread, for a short try", at_least=2, heading="data"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ordered(self, "crop_scale", "crop_ratio")
        device_batch_size = self.device_batch_size or self.batch_size
        if self.batch_size % device_batch_size:
            divisors = [n for n in range(2, self.batch_size + 1) if self.batch_size % n == 0]
            nearest = min(divisors, key=lambda n: abs(n - device_batch_size))
            below = self.batch_size // device_batch_size * device_batch_size
            choices = " or ".join(str(n) for n in (below, below + device_batch_size) if n)
            raise ConfigurationError(
                f"--batch_size {self.batch_size} is not a multiple of --device_batch_size {device_batch_size}: "
                f"use --batch_size {choices}, or --device_batch_size {nearest}"
            )
        # Assigned although the dataclass is frozen, so that config.yaml contains the number that was used.
        object.__setattr__(self, "device_batch_size", device_batch_size)

    def total_steps(self, steps_per_epoch: int) -> int:
        """Return the optimizer steps of the whole run."""
        return self.epochs * steps_per_epoch if self.max_steps is None else self.max_steps

    @property
    def length(self) -> str:
        """Return the length of the run in words."""
        return count(self.epochs, "epoch") if self.max_steps is None else count(self.max_steps, "step")

    @property
    def num_virtual_devices(self) -> int:
        """Return the number of sub-batches of an optimizer step; each passes the encoder by itself."""
        return self.batch_size // self.device_batch_size


def check_ordered(config: object, *names: str) -> None:
    """Check that no range (low, high) ends below its start.

    Args:
        names: names of the settings that are ranges.

    Raises:
        ConfigurationError: a range ends below its start.
    """
    for name in names:
        low, high = getattr(config, name)
        if low > high:
            raise ConfigurationError(f"--{name} {low} {high}: the first must not exceed the second")


def check_dataset(dataset: str) -> None:
    """Check that a dataset is `digits`, exists as a folder, or has the form of a Hub id.

    Raises:
        ConfigurationError: the dataset is none of these.
    """
    if dataset != "digits" and not os.path.exists(dataset) and not is_hub_id(dataset):
        raise ConfigurationError(
            f"--dataset {dataset}: no such file or folder; give `digits`, a folder that exists, or a Hub id USER/NAME"
        )


def public_name(dataset: str) -> str:
    """Return the Hub id of a dataset, or the name of its folder; the working directory is the run's."""
    if is_hub_id(dataset) and not os.path.exists(dataset):
        return dataset
    return os.path.basename(os.path.abspath(dataset))  # absolute, because `.` has no name


def check_push(repo_id: str | None) -> None:
    """Check that a push to the Hub at the end of the run has a valid name and a login.

    Raises:
        ConfigurationError: the name does not have the form USER/NAME, or there is no token.
    """
    if repo_id is None:
        return
    if not is_hub_id(repo_id):
        raise ConfigurationError(f"--push_to_hub {repo_id}: not a name on the Hub; give USER/NAME")
    from huggingface_hub import get_token  # late: only few runs need it

    if get_token() is None:
        raise ConfigurationError(f"--push_to_hub {repo_id} needs a login: type `hf auth login`, or set HF_TOKEN")


def check_num_processes(config: TrainingSettings, num_processes: int) -> None:
    """Check that every process gets the same number of virtual devices.

    Raises:
        ConfigurationError: it does not; the message lists the numbers of processes and the batch sizes that work.
    """
    devices = config.num_virtual_devices
    if devices % num_processes == 0:
        return
    counts = ", ".join(str(n) for n in range(1, devices + 1) if devices % n == 0)
    counts += " processes" if devices > 1 else " process"
    chunk = config.device_batch_size * num_processes
    below = config.batch_size // chunk * chunk
    batches = " or ".join(str(n) for n in (below, below + chunk) if n)
    smaller = f", or --device_batch_size {config.batch_size // num_processes}"
    fits = config.batch_size % num_processes == 0 and config.batch_size // num_processes >= 2
    raise ConfigurationError(
        f"{num_processes} processes cannot share --batch_size {config.batch_size} in sub-batches of "
        f"--device_batch_size {config.device_batch_size}: use {counts}, "
        f"or --batch_size {batches}{smaller if fits else ''}"
    )


def check_enough_images(num_images: int, config: TrainingSettings) -> None:
    """Check that there are enough images for one batch.

    Raises:
        ConfigurationError: the images are fewer than one batch.
    """
    if num_images < 2:
        raise ConfigurationError(f"--dataset {config.dataset} has one image to train on: at least two are needed")
    if num_images < config.batch_size:
        smaller = f"use --batch_size {num_images // 2 * 2} --device_batch_size {num_images // 2 * 2} or smaller"
        raise ConfigurationError(
            f"--dataset {config.dataset} has {num_images} images to train on, fewer than one batch of "
            f"{config.batch_size}: {smaller}"
        )
