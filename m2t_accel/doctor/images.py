"""The images: their number, classes, sizes, damage, order in a stream, and what is held out of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from datasets import Dataset

from m2t_accel.config.data import TrainingSettings, check_enough_images
from m2t_accel.config.fields import count
from m2t_accel.config.pretrain import PretrainConfig
from m2t_accel.config.recipes import RECIPES
from m2t_accel.data.decode import DecodeError, decode_bytes, describe_dark, largest_deep_value, read_bytes
from m2t_accel.data.order import num_pool_batches
from m2t_accel.data.shards import Shards
from m2t_accel.data.sources import ImageData
from m2t_accel.data.streams import SAMPLED_SHARDS, HubStream, StreamedOrder
from m2t_accel.data.views import describe_image, read_rows
from m2t_accel.distributed.launch import num_cores
from m2t_accel.doctor.findings import BAD, DOUBTFUL, GOOD, Finding, listed
from m2t_accel.evaluation.features import read_labels
from m2t_accel.run.report import MIN_BAD_ALLOWED, settle_evaluation

SAMPLE = 200  # images that are decoded
SAMPLED_PIECES = 16  # of images that are read in pieces
MOST_NAMED = 3  # damaged images that are named
UNBALANCED = 10.0  # times as many images in the largest class as in the smallest
POORLY_MIXED = 0.5  # share of the classes that a shuffled sub-batch would show


class Sample(NamedTuple):
    """Some decoded images: height and width of the good ones, the place and the reason of the others."""

    sizes: np.ndarray  # (N, 2) int64
    bad: list[tuple[str, str]]
    number: int  # all that were read
    is_everything: bool  # whether these are all images
    largest: Sequence[int | None] = ()  # value of each good image, if its file has more than 8 bits per value


def check_found(config: PretrainConfig, data: ImageData) -> Iterator[Finding]:
    """Yield what was found, warnings about it, and whether it suffices for a batch."""
    yield Finding(GOOD, "images", data.note)
    for warning in data.warnings:
        yield Finding(DOUBTFUL, "images", warning.removeprefix("warning: "))
    check_enough_images(len(data.train), config)
    if config.recipe == "digits" and config.dataset != "digits":
        yield Finding(
            DOUBTFUL,
            "recipe",
            f"digits is for 8-pixel digits (views of {config.image_size} pixels, no flip, no colour): for photographs "
            "give --recipe 8x2080Ti-b256-100ep or another of --recipe list",
        )


def check_classes(data: ImageData) -> Iterator[Finding]:
    """Yield the number of images in the classes, if there are labels."""
    labelled = data.bank
    if data.class_names is None or labelled is None:
        yield Finding(DOUBTFUL, "classes", "no labels, so no kNN shows whether the run learns; loss and spread do not")
        return
    labels = read_labels(labelled)
    counts = np.bincount(labels, minlength=len(data.class_names))
    present = counts[counts > 0]
    smallest = f"{present.min():,} to " if present.min() < present.max() else ""
    text = f"{count(len(present), 'class')} of {smallest}{count(int(present.max()), 'image')}"
    if len(labels) < len(data.train):
        text += f" in a sample of {len(labels):,}"
    if missing := [data.class_names[i] for i in np.flatnonzero(counts == 0)]:
        text += f"; without images: {listed(missing, MOST_NAMED)}"
    if present.max() > UNBALANCED * present.min():
        small, large = data.class_names[int(np.where(counts > 0, counts, counts.max()).argmin())], counts.argmax()
        text += f"; {data.class_names[int(large)]} is the largest, {small} the smallest, and kNN prefers large classes"
        yield Finding(DOUBTFUL, "classes", text)
    else:
        yield Finding(GOOD, "classes", text)


def check_held_out(config: PretrainConfig, data: ImageData) -> Iterator[Finding]:
    """Yield what is held out for kNN, and how often it is measured; nothing if there is no batch to train on."""
    if len(data.train) < config.batch_size:
        return
    settled = settle_evaluation(config, data)
    if not settled.evaluate_every:
        reason = "--evaluate_every 0" if config.evaluate_every == 0 else data.lacks
        yield Finding(DOUBTFUL, "held out", f"nothing, and no kNN is measured: {reason}")
        return
    every = "every epoch" if settled.evaluate_every == 1 else f"every {settled.evaluate_every} epochs"
    yield Finding(GOOD, "held out", f"{count(len(data.validation), 'image')} for kNN {every}")


def choose_images(
    images: Dataset | Shards | HubStream, number: int = SAMPLE, seed: int = 0
) -> tuple[list[int], list[Mapping[str, object]]]:
    """Return the numbers and the undecoded rows of some images.

    They are one of each of `number` equal parts, drawn by the seed; of pieces and shards that are read in order, the
    first images of some that are evenly spread.
    """
    if isinstance(images, HubStream):
        samples, rows = images.first_rows(number)
        return samples.tolist(), [row["image"] for row in rows]
    if isinstance(images, Shards):
        filled = np.flatnonzero(images.piece_sizes)
        pieces = filled[np.unique(np.linspace(0, len(filled) - 1, SAMPLED_PIECES).astype(int))]
        each = -(-number // len(pieces))
        samples, rows = [], []
        for piece in pieces.tolist():
            found, images_of_piece = images.open(piece)(0, min(each, int(images.piece_sizes[piece])))
            samples += found.tolist()
            rows += images_of_piece
        return samples, rows
    number = min(number, len(images))
    starts = np.arange(number) * len(images) // number
    ends = np.arange(1, number + 1) * len(images) // number
    samples = np.random.default_rng(seed).integers(starts, ends).tolist()
    return samples, read_rows(images, samples)


def decode_sample(images: Dataset | Shards | HubStream, max_pixels: int) -> Sample:
    """Decode some of the images, on all cores."""
    samples, rows = choose_images(images)

    def decode(place: tuple[int, Mapping[str, object]]) -> tuple[int, int, int | None] | tuple[str, str]:
        sample, row = place
        try:
            content = read_bytes(row)
            pixels = decode_bytes(content, max_pixels)
            return *pixels.shape[:2], largest_deep_value(content, pixels)
        except DecodeError as error:
            return describe_image(row, sample), str(error)

    with ThreadPoolExecutor(num_cores()) as threads:
        found = list(threads.map(decode, zip(samples, rows, strict=True)))
    bad = [each for each in found if isinstance(each[0], str)]
    good = [each for each in found if not isinstance(each[0], str)]
    sizes = np.array([each[:2] for each in good], np.int64).reshape(-1, 2)
    return Sample(sizes, bad, len(found), len(found) == len(images), [largest for *_, largest in good])


def check_damage(config: PretrainConfig, data: ImageData, sample: Sample) -> Iterator[Finding]:
    """Yield whether more images are damaged than a run allows, judged by a sample."""
    if not sample.bad:
        yield Finding(GOOD, "damage", f"{count(sample.number, 'image')} decoded, none is damaged")
        return
    named = listed([f"{path} ({reason})" for path, reason in sample.bad], MOST_NAMED)
    text = f"{len(sample.bad)} of {count(sample.number, 'image')} cannot be decoded: {named}"
    allowed = max(MIN_BAD_ALLOWED, int(config.max_bad_fraction * len(data.train)))
    share = len(sample.bad) / sample.number
    # Two standard deviations fewer than the sample says, unless it is everything.
    surely = len(sample.bad) if sample.is_everything else len(sample.bad) - 2 * math.sqrt(len(sample.bad))
    if surely / sample.number * len(data.train) > allowed:
        most = min(1.0, math.ceil(120 * share) / 100)
        yield Finding(
            BAD,
            "damage",
            f"{text}; the run would stop at {allowed + 1:,} (--max_bad_fraction {config.max_bad_fraction:g}): repair "
            f"or remove them, or accept them with --max_bad_fraction {most:g}",
        )
    else:
        yield Finding(DOUBTFUL, "damage", f"{text}; the run allows {allowed:,} in all, and shows others instead")


def check_sizes(config: PretrainConfig, sample: Sample) -> Iterator[Finding]:
    """Yield the sizes of the images, and whether most views are enlargements of their crops."""
    if not len(sample.sizes):
        return
    heights, widths = sample.sizes.T
    middle = np.median(sample.sizes, axis=0).astype(int)
    text = f"{middle[1]} × {middle[0]} pixels"
    if len(np.unique(sample.sizes, axis=0)) > 1:
        text += f" in the median (width {widths.min()} to {widths.max()}, height {heights.min()} to {heights.max()})"
    sides = np.sqrt(np.mean(config.crop_scale) * heights * widths)  # of a square with the area of an average crop
    share = np.mean(sides < config.image_size)
    if share <= 0.5:
        yield Finding(GOOD, "sizes", f"{text}; an average crop has {np.median(sides):.0f} pixels a side")
        return
    text += (
        f"; views of {config.image_size} pixels enlarge the average crop ({np.median(sides):.0f} pixels a side) of "
        f"{share:.0%} of the images"
    )
    if RECIPES[config.recipe].settings.get("dataset") == config.dataset:
        yield Finding(GOOD, "sizes", f"{text}, as this recipe intends")
        return
    smaller = max(32, int(np.median(sides)) // 32 * 32)
    advice = f": --image_size {smaller} costs less and shows as much" if smaller < config.image_size else ""
    yield Finding(DOUBTFUL, "sizes", text + advice)


def check_values(sample: Sample) -> Iterator[Finding]:
    """Yield that many images of more than 8 bits are nearly black; nothing if they are not."""
    if dark := describe_dark(sample.largest):
        yield Finding(DOUBTFUL, "values", dark)


def check_order(config: PretrainConfig, data: ImageData) -> Iterator[Finding]:
    """Yield whether a stream has enough pieces for the virtual devices, and mixes the classes."""
    images, devices = data.train, config.num_virtual_devices
    if isinstance(images, Dataset) or not config.streaming:  # streamed here only because it is not copied yet
        yield Finding(GOOD, "order", "all images are shuffled in each epoch")
        return
    if isinstance(images, HubStream):
        remarks, found = list(StreamedOrder(images, config).describe()), count(images.num_shards, "shard")
    else:
        number = np.count_nonzero(images.piece_sizes)
        found, remarks = count(number, "piece"), []
        if number < devices:
            remarks.append(
                f"{found} (row groups, runs of a tar) for {devices} virtual devices: several read the same one"
            )
    for remark in remarks:
        yield Finding(DOUBTFUL, "shards", f"{remark}; write more and smaller ones")
    if not remarks:
        yield Finding(
            GOOD, "shards", f"{found} for {count(devices, 'virtual device')}; the processes read them, not the workers"
        )
    if data.bank is None:
        yield Finding(DOUBTFUL, "order", "no labels are read, so whether the shards are sorted by class is not known")
        return
    labels = read_labels(data.bank)
    seen, fair = classes_of_a_sub_batch(labels, images, config)
    text = (
        f"a sub-batch of {config.device_batch_size} images shows about {seen:.0f} classes, of shuffled ones {fair:.0f}"
    )
    if seen < POORLY_MIXED * fair:
        text = (
            f"the shards are sorted by class: {text}: shuffle the images before you write the shards, or leave out "
            "--streaming"
        )
        yield Finding(DOUBTFUL, "order", text)
    else:
        yield Finding(GOOD, "order", text)


def classes_of_a_sub_batch(
    labels: np.ndarray, images: Shards | HubStream, config: TrainingSettings
) -> tuple[float, float]:
    """Return the expected number of classes in a sub-batch of a stream, and in one of shuffled images.

    A pool consists of runs of neighbours. If the labels of neighbours are independent, each image is a run of its own.
    Else a run is as long as the labels stay the same, or as a piece.

    Args:
        labels: (N,) labels of images, or of a sample of them, neighbours beside each other.
        images: the images.
        config: settings of the batches.
    """
    shares = np.bincount(labels) / len(labels)
    shares = shares[shares > 0]
    same, by_chance = np.mean(labels[1:] == labels[:-1]) if len(labels) > 1 else 0.0, np.sum(shares**2)
    pool, size = num_pool_batches(config.batch_size) * config.device_batch_size, config.device_batch_size
    # A share of (1 - same) / (1 - by_chance) of the neighbours is drawn anew; its inverse is the length of a run.
    run = (1 - by_chance) / max(1 - same, 1 / len(labels)) if len(shares) > 1 else 1.0
    if isinstance(images, HubStream):
        read = len(labels) / min(SAMPLED_SHARDS, images.num_shards)  # rows that the sample has of a shard
        if run > 0.9 * read:  # the shard may go on with the same class
            run = max(run, len(images) / images.num_shards)
    else:
        run = min(run, float(images.piece_sizes[images.piece_sizes > 0].mean()))
    num_runs = 1 + (pool - 1) / max(run, 1.0)  # a pool starts anywhere in a run
    in_pool = np.sum(1 - (1 - shares) ** num_runs)  # classes of a pool
    return in_pool * (1 - (1 - 1 / max(in_pool, 1.0)) ** size), float(np.sum(1 - (1 - shares) ** size))
