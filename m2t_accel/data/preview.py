"""A picture of the views that the model will see: images, pairs of their views, and the parameters of the views."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from datasets import Dataset

from m2t_accel.config.data import check_enough_images
from m2t_accel.config.fields import ConfigurationError, count
from m2t_accel.config.pretrain import PretrainConfig
from m2t_accel.data.crops import BRIGHTNESS, CONTRAST, HUE, SATURATION, Crop, Photometry, draw_crop, draw_uniforms
from m2t_accel.data.decode import DecodeError, decode_bytes, describe_dark, largest_deep_value, read_bytes
from m2t_accel.data.order import PooledOrder, ShuffledOrder
from m2t_accel.data.photometry import photometry
from m2t_accel.data.requests import Request
from m2t_accel.data.shards import Shards
from m2t_accel.data.sources import load_images
from m2t_accel.data.streams import HubStream
from m2t_accel.data.views import TwoViews, describe_image, read_rows
from m2t_accel.pictures import plain_words, save_picture, thumbnail

NUM_PAIRS = 12
MAX_SIDE = 512  # pixels; larger originals are drawn smaller
MAX_BATCHES = 100  # sub-batches searched for images that can be decoded
NAMES = {BRIGHTNESS: "brightness", CONTRAST: "contrast", SATURATION: "saturation"}


class ViewPair(NamedTuple):
    """An image of the first epoch, with its two views."""

    name: str  # of the file, or of the sample
    size: tuple[int, int]  # (H, W) of the original
    image: np.ndarray  # (H, W, 3) uint8, at most MAX_SIDE pixels long
    crops: tuple[Crop, Crop]  # in the original
    views: tuple[np.ndarray, np.ndarray]  # (S, S, 3) float32, 0 to 1
    parameters: tuple[str, str]  # of the colours of each view, in words
    largest: int | None  # value, if the file has more than 8 bits per value


def collect_pairs(images: Dataset | Shards | HubStream, config: PretrainConfig) -> tuple[list[ViewPair], list[str]]:
    """Return a dozen images of the first epoch with their views, and a line for each that cannot be decoded."""
    config = dataclasses.replace(config, batch_size=2, device_batch_size=2, evaluate_every=0)  # two are enough to draw
    shown, broken = [], []
    for sample, image in first_images(images, config):
        try:
            content = read_bytes(image)
            pixels = decode_bytes(content, config.max_image_pixels)
            size, largest = pixels.shape[:2], largest_deep_value(content, pixels)
            # Twelve large photographs and their drawings would take gigabytes.
            pixels = pixels if max(size) <= MAX_SIDE else thumbnail(pixels, MAX_SIDE)
            shown.append((sample, image, size, pixels, largest))
        except DecodeError as error:
            broken.append(f"cannot be decoded: {describe_image(image, sample)} ({error})")
        if len(shown) == NUM_PAIRS:
            break
    if not shown:
        return [], broken
    samples = np.array([sample for sample, *_ in shown])
    batch = TwoViews(images, config).__getitems__(Request(0, samples, [image for _, image, *_ in shown]))
    views = photometry(batch.crops, batch.photometry, config)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (config.image_mean, config.image_std))
    pixels = (views * std + mean).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    pairs = []
    for i, (sample, image, size, original, largest) in enumerate(shown):
        uniforms = [draw_uniforms(config.seed, 0, np.array([sample]), view)[0] for view in range(2)]
        rows = [i, len(shown) + i]
        parameters = [Photometry(*(values[row] for values in batch.photometry)) for row in rows]
        pairs.append(
            ViewPair(
                Path(str(image["path"] or f"sample {sample}")).name,
                size,
                original,
                tuple(draw_crop(numbers, *size, config) for numbers in uniforms),
                tuple(pixels[row] for row in rows),
                tuple(map(describe_parameters, parameters)),
                largest,
            )
        )
    return pairs, broken


@plain_words()
def draw_preview(config: PretrainConfig, picture: Path) -> list[str]:
    """Draw a dozen images of the first epoch, their crops and their two views. Return lines to print.

    Raises:
        ConfigurationError: no image can be decoded, or the picture cannot be written or would be one of the images.
    """
    from matplotlib.figure import Figure  # late: importing matplotlib takes about 1 s

    if os.path.exists(config.dataset) and picture.resolve().is_relative_to(Path(config.dataset).resolve()):
        raise ConfigurationError(
            f"--output {picture} is in --dataset {config.dataset}, and would be trained on: give a file elsewhere"
        )
    # Two images are enough for a batch, and none are held out for evaluation.
    config = dataclasses.replace(config, batch_size=2, device_batch_size=2, evaluate_every=0)
    data = load_images(config)
    check_enough_images(len(data.train), config)
    pairs, broken = collect_pairs(data.train, config)
    lines = [data.introduction, *broken]
    if dark := describe_dark(pair.largest for pair in pairs):
        lines.append(f"warning: {dark}")
    if not pairs:
        raise ConfigurationError(f"--dataset {config.dataset}: {lines[-1]}; all other images tried fail too")

    columns, rows = 2, -(-len(pairs) // 2)
    figure = Figure(figsize=(13.5, 2.45 * rows + 0.5), layout="constrained")
    figure.suptitle(f"{config.dataset}, recipe {config.recipe}, seed {config.seed}: image, view 1, view 2", fontsize=11)
    axes = figure.subplots(rows, 3 * columns, squeeze=False).reshape(-1, 3)
    for panel in axes.flat:
        panel.set_axis_off()
    for panels, pair in zip(axes, pairs, strict=False):
        height, width = pair.size
        panels[0].imshow(pair.image, extent=(-0.5, width - 0.5, height - 0.5, -0.5))
        panels[0].set_title(pair.name[-28:], fontsize=7)
        for view in range(2):
            panels[0].plot(*outline(pair.crops[view]).T, color=f"C{view}", linewidth=1.5, clip_on=False)
            panels[1 + view].imshow(pair.views[view])
            panels[1 + view].set_title(pair.parameters[view], fontsize=6, color=f"C{view}")
    try:
        picture.parent.mkdir(parents=True, exist_ok=True)
        save_picture(figure, picture, dpi=120)
    except (OSError, ValueError) as error:  # ValueError: no format has this suffix
        raise ConfigurationError(f"--output {picture} cannot be written ({error})") from None
    lines.append(f"{count(len(pairs), 'pair')} of views: {picture}")
    return lines


def first_images(
    images: Dataset | Shards | HubStream, config: PretrainConfig
) -> Iterator[tuple[int, Mapping[str, object]]]:
    """Yield the first samples of epoch 0 and their undecoded images."""
    if isinstance(images, HubStream):
        samples, rows = images.first_rows(3 * NUM_PAIRS)
        yield from zip(samples.tolist(), (row["image"] for row in rows), strict=True)
        return
    if isinstance(images, Shards):
        pooled = PooledOrder(images.piece_sizes, config)
        pooled.set_epoch(0)
        for piece in pooled.order:
            samples, rows = images.open(int(piece))(0, min(3, int(images.piece_sizes[piece])))
            yield from zip(samples.tolist(), rows, strict=True)
        return
    shuffled = ShuffledOrder(len(images), config)
    for index in range(min(len(images) // config.device_batch_size, MAX_BATCHES)):
        samples = shuffled.sub_batch(0, index)
        yield from zip(samples.tolist(), read_rows(images, samples), strict=True)


def outline(crop: Crop) -> np.ndarray:
    """Return the closed outline (5, 2) of a crop in the pixels of its image, x first."""
    corners = np.array([(-1, -1), (1, -1), (1, 1), (-1, 1), (-1, -1)]) / 2 * (crop.width, crop.height)
    cosine, sine = np.cos(np.radians(crop.angle)), np.sin(np.radians(crop.angle))
    corners = corners @ np.array([[cosine, sine], [-sine, cosine]])
    centre = np.array([crop.left + crop.width / 2 - 0.5, crop.top + crop.height / 2 - 0.5])
    return corners + centre


def describe_parameters(parameters: Photometry) -> str:
    """Return the photometric parameters of one view as short lines, in the order in which they are applied."""
    factors, words = parameters.factors.tolist(), []
    for operation in parameters.order.tolist():
        factor = factors[operation]
        if operation == HUE and factor:
            words.append(f"hue {360 * factor:+.0f}°")
        elif operation != HUE and factor != 1:
            words.append(f"{NAMES[operation]} ×{factor:.2f}")
    if parameters.sigma:
        words.append(f"blur {parameters.sigma:.2f} px")
    words += [name for name in ("grayscale", "flip", "solarize") if getattr(parameters, name)]
    lines = [", ".join(words[i : i + 2]) for i in range(0, len(words), 2)]
    return "\n".join(lines or ["unchanged"])
