"""The two views of an image: their random numbers, and the crops. The colours are those of m2t_accel.photometry.

Every random number of a view comes from one generator seeded by (seed, epoch, sample, view), so a view does
not depend on workers, processes, batch order or on where a run was resumed.

Source of the views: BYOL (arXiv 2006.07733), appendix B, as arXiv 2101.07525 uses them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor

from m2t_accel.config.data import TrainingSettings
from m2t_accel.config.pretrain import PretrainConfig
from m2t_accel.data import random_numbers

VIEW_STREAM = 1  # apart from the stream of the epoch's order in m2t_accel.order

# Where each random number stands among the uniforms of a view. New ones go to the end: the rest stay as they are.
CROP_ATTEMPTS = 10
SCALE = slice(0, CROP_ATTEMPTS)
RATIO = slice(CROP_ATTEMPTS, 2 * CROP_ATTEMPTS)
TOP, LEFT, ANGLE, FLIP, JITTER = range(20, 25)
FACTORS, ORDER = slice(25, 29), slice(29, 33)
GRAYSCALE, BLUR, SIGMA, SOLARIZE = range(33, 37)
NUM_UNIFORMS = 37
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
MAX_ASPECT = 32  # of an image that evaluation resizes whole


class Photometry(NamedTuple):
    """The photometric parameters of N views; `identity` values leave an image as it is."""

    flip: Tensor  # (N,) bool
    factors: Tensor  # (N, 4) float: brightness, contrast, saturation (identity 1) and hue shift (identity 0)
    order: Tensor  # (N, 4) int: which of the four comes at each place
    grayscale: Tensor  # (N,) bool
    sigma: Tensor  # (N,) float, pixels; 0 is no blur
    solarize: Tensor  # (N,) bool


def draw_uniforms(seed: int, epoch: int, samples: np.ndarray, view: int) -> np.ndarray:
    """All random numbers of one view of samples (N,), uniform in [0, 1): (N, NUM_UNIFORMS) float64."""
    return random_numbers.uniforms(random_numbers.keys_of(VIEW_STREAM, seed, epoch, samples, view), NUM_UNIFORMS)


class Crop(NamedTuple):
    """A box in an image, in pixels, turned about its centre by `angle` degrees."""

    top: float
    left: float
    height: float
    width: float
    angle: float


def draw_crop(uniforms: np.ndarray, height: int, width: int, config: TrainingSettings) -> Crop:
    """A random resized crop of an image of that size, in whole pixels, as torchvision's RandomResizedCrop.

    Ten attempts at an area and a ratio that fit, else the largest central box of a permitted ratio. With
    `is_turned(config)` the first attempt stands, is turned, may reach over the edge, and is not rounded.
    """
    area = height * width
    low, high = (math.log(ratio) for ratio in config.crop_ratio)
    turned = is_turned(config)
    for scale, log_ratio in zip(uniforms[SCALE].tolist(), uniforms[RATIO].tolist(), strict=True):
        target, ratio = area * between(scale, *config.crop_scale), math.exp(between(log_ratio, low, high))
        crop_width, crop_height = math.sqrt(target * ratio), math.sqrt(target / ratio)
        if turned:
            top, left = uniforms[TOP] * (height - crop_height), uniforms[LEFT] * (width - crop_width)
            return Crop(top, left, crop_height, crop_width, between(uniforms[ANGLE], -config.rotation, config.rotation))
        crop_width, crop_height = round(crop_width), round(crop_height)
        if 1 <= crop_width <= width and 1 <= crop_height <= height:
            top = int(uniforms[TOP] * (height - crop_height + 1))
            left = int(uniforms[LEFT] * (width - crop_width + 1))
            return Crop(top, left, crop_height, crop_width, 0.0)
    ratio = min(max(width / height, config.crop_ratio[0]), config.crop_ratio[1])
    crop_width = max(1, min(width, round(height * ratio)))
    crop_height = max(1, min(height, round(width / ratio)))
    return Crop((height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width, 0.0)


def is_turned(config: TrainingSettings) -> bool:
    """Whether crops are turned or reach over the edge, so that whole pixels do not do."""
    return config.rotation > 0 or config.crop_scale[1] > 1


def around(crops: Sequence[Crop]) -> tuple[int, int, int, int]:
    """Top, left, bottom and right of the box that holds crops in whole pixels."""
    bottom, right = (max(crop.top + crop.height for crop in crops), max(crop.left + crop.width for crop in crops))
    return min(crop.top for crop in crops), min(crop.left for crop in crops), bottom, right


def cut(image: np.ndarray, crop: Crop, out: np.ndarray) -> np.ndarray:
    """A crop in whole pixels of an image (H, W, 3) uint8, resized to fill `out` (size, size, 3) uint8."""
    return resize(image[crop.top : crop.top + crop.height, crop.left : crop.left + crop.width], out)


def cut_turned(image: np.ndarray, crop: Crop, out: np.ndarray) -> np.ndarray:
    """A turned crop of an image (H, W, 3) uint8, filling `out` (size, size, 3); beyond its edge, the edge's pixels."""
    height, width = image.shape[:2]
    size = len(out)
    if min(crop.height, crop.width) > size:  # the warp below takes four pixels for one and would alias
        shrink = size / min(crop.height, crop.width)
        image = resize(image, np.empty((max(1, round(height * shrink)), max(1, round(width * shrink)), 3), np.uint8))
    # What the crop's pixels are in the image as it is now.
    scale_y, scale_x = image.shape[0] / height, image.shape[1] / width
    crop_height, crop_width = crop.height * scale_y, crop.width * scale_x
    # Pixel centres of the view, about its centre, to pixel centres of the image.
    cosine, sine = math.cos(math.radians(crop.angle)), math.sin(math.radians(crop.angle))
    step_x, step_y = crop_width / size, crop_height / size
    matrix = np.array([[cosine * step_x, -sine * step_y, 0.0], [sine * step_x, cosine * step_y, 0.0]])
    centre = np.array([crop.left * scale_x + crop_width / 2 - 0.5, crop.top * scale_y + crop_height / 2 - 0.5])
    matrix[:, 2] = centre - matrix[:, :2] @ np.array([(size - 1) / 2, (size - 1) / 2])
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    return cv2.warpAffine(image, matrix, (size, size), dst=out, flags=flags, borderMode=cv2.BORDER_REPLICATE)


def resize(image: np.ndarray, out: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 to fill `out` (h, w, 3) uint8: torch's antialiased bilinear resize, bit for bit torchvision's.

    Two 224-pixel crops of an ImageNet photograph take 0.17 ms so on one core; cv2.resize takes 0.7 with
    INTER_AREA, 0.12 with INTER_LINEAR, which aliases; PIL 1.0.
    """
    # Given its output it keeps the pixels' channels together; what torch would allocate has them apart, and to
    # bring them together again takes as long as the resize.
    size = out.shape[:2]
    torch.ops.aten._upsample_bilinear2d_aa.out(channels_first(image), size, False, None, None, out=channels_first(out))
    return out


def channels_first(image: np.ndarray) -> Tensor:
    """(H, W, 3) as a tensor (1, 3, H, W) over the same memory."""
    return torch.from_numpy(image[None]).permute(0, 3, 1, 2)


def central_view(image: np.ndarray, size: int, share: float) -> np.ndarray:
    """The view of evaluation: (H, W, 3) uint8 in, the shorter side resized to size / share, the centre out."""
    height, width = image.shape[:2]
    shorter = int(size / share)
    longest = MAX_ASPECT * min(height, width)
    if max(height, width) > longest:  # of a strip only the middle is seen, and the whole enlarged would take gigabytes
        top, left = max(0, height - longest) // 2, max(0, width - longest) // 2
        image = image[top : top + longest, left : left + longest]
        height, width = image.shape[:2]
    longer = int(shorter * max(height, width) / min(height, width))
    target = (shorter, longer) if height <= width else (longer, shorter)
    if target != (height, width):
        image = resize(image, np.empty((*target, 3), np.uint8))
    top, left = (target[0] - size) // 2, (target[1] - size) // 2
    return image[top : top + size, left : left + size]


def between(uniform, low, high):
    """Uniform numbers of [0, 1) as numbers of [low, high)."""
    return low + uniform * (high - low)


def photometry_parameters(uniforms: np.ndarray, views: np.ndarray, config: PretrainConfig) -> Photometry:
    """The parameters of N views from their uniforms (N, NUM_UNIFORMS); `views` (N,) holds 0 or 1 each."""
    strengths = np.array([config.brightness, config.contrast, config.saturation, config.hue])
    identity = np.array([1.0, 1.0, 1.0, 0.0])
    lowest = np.array([0.0, 0.0, 0.0, -0.5])
    factors = between(uniforms[:, FACTORS], np.maximum(identity - strengths, lowest), identity + strengths)
    factors = np.where((uniforms[:, JITTER] < config.jitter_probability)[:, None], factors, identity)
    keys = uniforms[:, ORDER].copy()
    if not config.hue:
        keys[:, HUE] = 1.0  # last, where m2t_accel.photometry leaves it out
    blurred = uniforms[:, BLUR] < np.array(config.blur_probability)[views]
    sigma = np.where(blurred, between(uniforms[:, SIGMA], *config.blur_sigma), 0.0)
    return Photometry(
        flip=torch.from_numpy(uniforms[:, FLIP] < config.flip_probability),
        factors=torch.from_numpy(factors.astype(np.float32)),
        order=torch.from_numpy(keys.argsort(axis=1)),
        grayscale=torch.from_numpy(uniforms[:, GRAYSCALE] < config.grayscale_probability),
        sigma=torch.from_numpy(sigma.astype(np.float32)),
        solarize=torch.from_numpy(uniforms[:, SOLARIZE] < np.array(config.solarize_probability)[views]),
    )
