"""A picture of what the model will see: images, and pairs of their views with the parameters that made them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from m2t_accel.config.data import check_enough_images
from m2t_accel.config.fields import ConfigurationError
from m2t_accel.config.pretrain import PretrainConfig
from m2t_accel.data.crops import BRIGHTNESS, CONTRAST, HUE, SATURATION, draw_crop, draw_uniforms
from m2t_accel.data.decode import DecodeError, decode_image
from m2t_accel.data.order import PooledOrder, ShuffledOrder
from m2t_accel.data.photometry import photometry
from m2t_accel.data.requests import Request
from m2t_accel.data.shards import Shards
from m2t_accel.data.sources import load_images
from m2t_accel.data.views import TwoViews, describe, read_rows
from m2t_accel.pictures import plain_words, thumbnail

NUM_PAIRS = 12
ORIGINAL = 512  # pixels, the longer side of an original at most
MAX_LOOKED_AT = 100  # sub-batches, where many images cannot be decoded
NAMES = {BRIGHTNESS: "brightness", CONTRAST: "contrast", SATURATION: "saturation"}


@plain_words()
def draw_preview(config: PretrainConfig, picture: Path) -> list[str]:
    """Draw a dozen images of the first epoch, their crops and their two views; lines for people come back.

    Raises:
        ConfigurationError: none of the images can be decoded.
    """
    # Two are enough to look at, and nothing is held out.
    config = dataclasses.replace(config, batch_size=2, device_batch_size=2, evaluate_every=0)
    data = load_images(config)
    check_enough_images(len(data.train), config)
    lines = [data.note]
    shown = []
    for sample, image in first_images(data.train, config):
        try:
            pixels = decode_image(image)
            size = pixels.shape[:2]
            # Of twelve large photographs the pixels, and what is drawn of them, would take gigabytes.
            shown.append((sample, image, size, pixels if max(size) <= ORIGINAL else thumbnail(pixels, ORIGINAL)))
        except DecodeError as error:
            lines.append(f"cannot be decoded: {describe(image, sample)} ({error})")
        if len(shown) == NUM_PAIRS:
            break
    if not shown:
        raise ConfigurationError(f"--dataset {config.dataset}: {lines[-1]}, and so are the others looked at")
    samples = np.array([sample for sample, *_ in shown])
    batch = TwoViews(data.train, config).__getitems__(Request(0, samples, [image for _, image, _, _ in shown]))
    views = photometry(batch.crops, batch.photometry, config)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (config.image_mean, config.image_std))
    pixels = (views * std + mean).clamp(0, 1).permute(0, 2, 3, 1).numpy()

    columns, rows = 2, -(-len(shown) // 2)
    figure = Figure(figsize=(13.5, 2.45 * rows + 0.5), layout="constrained")
    figure.suptitle(f"{config.dataset}, recipe {config.recipe}, seed {config.seed}: image, view 1, view 2", fontsize=11)
    axes = figure.subplots(rows, 3 * columns, squeeze=False).reshape(-1, 3)
    for place in axes.flat:
        place.set_axis_off()
    for i, (sample, image, (height, width), original) in enumerate(shown):
        axes[i, 0].imshow(original, extent=(-0.5, width - 0.5, height - 0.5, -0.5))
        axes[i, 0].set_title(Path(str(image["path"] or f"sample {sample}")).name[-28:], fontsize=7)
        for view in range(2):
            at = view * len(shown) + i
            uniforms = draw_uniforms(config.seed, 0, np.array([sample]), view)[0]
            outline(axes[i, 0], draw_crop(uniforms, height, width, config), f"C{view}")
            axes[i, 1 + view].imshow(pixels[at])
            parameters = type(batch.photometry)(*(values[at] for values in batch.photometry))
            axes[i, 1 + view].set_title(in_words(parameters), fontsize=6, color=f"C{view}")
    try:
        picture.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(picture, dpi=120)
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"--output {picture} cannot be written ({error})") from None
    lines.append(f"{len(shown)} pairs of views: {picture}")
    return lines


def first_images(images: object, config: PretrainConfig):
    """The samples of an epoch and their undecoded images, from the first on."""
    if isinstance(images, Shards):
        pooled = PooledOrder(images.piece_sizes, config)
        pooled.set_epoch(0)
        for piece in pooled.order:
            samples, rows = images.open(int(piece))(0, min(3, int(images.piece_sizes[piece])))
            yield from zip(samples.tolist(), rows, strict=True)
        return
    shuffled = ShuffledOrder(len(images), config)
    for index in range(min(len(images) // config.device_batch_size, MAX_LOOKED_AT)):
        samples = shuffled.sub_batch(0, index)
        yield from zip(samples.tolist(), read_rows(images, samples), strict=True)


def outline(axes: Axes, crop, color: str) -> None:
    """Draw where a crop lies in its image."""
    corners = np.array([(-1, -1), (1, -1), (1, 1), (-1, 1), (-1, -1)]) / 2 * (crop.width, crop.height)
    cosine, sine = np.cos(np.radians(crop.angle)), np.sin(np.radians(crop.angle))
    corners = corners @ np.array([[cosine, sine], [-sine, cosine]])
    centre = (crop.left + crop.width / 2 - 0.5, crop.top + crop.height / 2 - 0.5)
    axes.plot(*(corners + centre).T, color=color, linewidth=1.5, clip_on=False)


def in_words(parameters) -> str:
    """The photometric parameters of a view, in the order in which they are applied, over a few short lines."""
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
    return "\n".join(lines or ["as it is"])
