"""The random numbers of the two views of an image, and the crops; m2t_accel.data.photometry changes the colours.

One generator seeded by (seed, epoch, sample, view) yields every random number of a view. So a view does not depend on
workers, processes, the order of a batch or the step at which a run was resumed.

Source: the views of BYOL (arXiv 2006.07733, appendix B), as arXiv 2101.07525 uses them.
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

VIEW_STREAM = 1  # differs from the streams of m2t_accel.data.order

# The index of each random number among the uniforms of a view. Append new ones, so that the others keep their values.
CROP_ATTEMPTS = 10
SCALE = slice(0, CROP_ATTEMPTS)
RATIO = slice(CROP_ATTEMPTS, 2 * CROP_ATTEMPTS)
TOP, LEFT, ANGLE, FLIP, JITTER = range(20, 25)
FACTORS, ORDER = slice(25, 29), slice(29, 33)
GRAYSCALE, BLUR, SIGMA, SOLARIZE = range(33, 37)
NUM_UNIFORMS = 37
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
MAX_ASPECT = 32  # evaluation crops images of a larger aspect ratio before it resizes them


class Photometry(NamedTuple):
    """The photometric parameters of N views. Identity values leave an image unchanged."""

    flip: Tensor  # (N,) bool
    factors: Tensor  # (N, 4) float: brightness, contrast, saturation (identity 1) and hue shift (identity 0)
    order: Tensor  # (N, 4) int: the index of the factor applied first, second, third and fourth
    grayscale: Tensor  # (N,) bool
    sigma: Tensor  # (N,) float, pixels; 0 is no blur
    solarize: Tensor  # (N,) bool


def draw_uniforms(seed: int, epoch: int, samples: np.ndarray, view: int) -> np.ndarray:
    """Draw all random numbers of one view of samples (N,): (N, NUM_UNIFORMS) float64, uniform in [0, 1)."""
    return random_numbers.uniforms(random_numbers.derive_keys(VIEW_STREAM, seed, epoch, samples, view), NUM_UNIFORMS)


class Crop(NamedTuple):
    """A box in an image, in pixels, rotated about its centre by `angle` degrees."""

    top: float
    left: float
    height: float
    width: float
    angle: float


def draw_crop(uniforms: np.ndarray, height: int, width: int, config: TrainingSettings) -> Crop:
    """Draw a random resized crop of an image of this size, in whole pixels, as torchvision's RandomResizedCrop does.

    Draw area and aspect ratio up to ten times, until they fit; else take the largest central box with an allowed ratio.
    With `is_rotated(config)`, take the first attempt: rotated, not rounded, and possibly reaching beyond the edge.
    """
    area = height * width
    low, high = (math.log(ratio) for ratio in config.crop_ratio)
    rotated = is_rotated(config)
    for scale, log_ratio in zip(uniforms[SCALE].tolist(), uniforms[RATIO].tolist(), strict=True):
        target, ratio = area * between(scale, *config.crop_scale), math.exp(between(log_ratio, low, high))
        crop_width, crop_height = math.sqrt(target * ratio), math.sqrt(target / ratio)
        if rotated:
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


def is_rotated(config: TrainingSettings) -> bool:
    """Return whether crops are rotated or reach beyond the edge, and so are not boxes of whole pixels."""
    return config.rotation > 0 or config.crop_scale[1] > 1


def bounding_box(crops: Sequence[Crop]) -> tuple[int, int, int, int]:
    """Return top, left, bottom and right of the smallest box that holds all crops, in whole pixels."""
    bottom, right = (max(crop.top + crop.height for crop in crops), max(crop.left + crop.width for crop in crops))
    return min(crop.top for crop in crops), min(crop.left for crop in crops), bottom, right


def cut(image: np.ndarray, crop: Crop, out: np.ndarray) -> np.ndarray:
    """Resize a crop in whole pixels of an image (H, W, 3) uint8 into `out` (size, size, 3) uint8."""
    return resize(image[crop.top : crop.top + crop.height, crop.left : crop.left + crop.width], out)


def cut_rotated(image: np.ndarray, crop: Crop, out: np.ndarray) -> np.ndarray:
    """Warp a rotated crop of an image (H, W, 3) uint8 into `out` (size, size, 3), repeating pixels beyond the edge."""
    height, width = image.shape[:2]
    size = len(out)
    if min(crop.height, crop.width) > size:  # the warp interpolates between four pixels and would alias
        shrink = size / min(crop.height, crop.width)
        image = resize(image, np.empty((max(1, round(height * shrink)), max(1, round(width * shrink)), 3), np.uint8))
    # The crop in pixels of the image, which may have been shrunk above.
    scale_y, scale_x = image.shape[0] / height, image.shape[1] / width
    crop_height, crop_width = crop.height * scale_y, crop.width * scale_x
    # The matrix maps pixel centres of the view to pixel centres of the image.
    cosine, sine = math.cos(math.radians(crop.angle)), math.sin(math.radians(crop.angle))
    step_x, step_y = crop_width / size, crop_height / size
    matrix = np.array([[cosine * step_x, -sine * step_y, 0.0], [sine * step_x, cosine * step_y, 0.0]])
    centre = np.array([crop.left * scale_x + crop_width / 2 - 0.5, crop.top * scale_y + crop_height / 2 - 0.5])
    matrix[:, 2] = centre - matrix[:, :2] @ np.array([(size - 1) / 2, (size - 1) / 2])
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    return cv2.warpAffine(image, matrix, (size, size), dst=out, flags=flags, borderMode=cv2.BORDER_REPLICATE)


def resize(image: np.ndarray, out: np.ndarray) -> np.ndarray:
    """Resize (H, W, 3) uint8 into `out` (h, w, 3) uint8: antialiased and bilinear, bit for bit as torchvision.

    Two 224-pixel crops of an ImageNet photograph take 0.17 ms on one core. cv2.resize takes 0.7 ms with INTER_AREA and
    0.12 ms with INTER_LINEAR, which aliases; PIL takes 1.0 ms.
    """
    # With `out` given, the channels of a pixel stay together. torch would allocate an output of separate channels, and
    # interleaving them again takes as long as the resize.
    size = out.shape[:2]
    torch.ops.aten._upsample_bilinear2d_aa.out(channels_first(image), size, False, None, None, out=channels_first(out))
    return out


def channels_first(image: np.ndarray) -> Tensor:
    """Return an image (H, W, 3) as a tensor (1, 3, H, W) over the same memory."""
    return torch.from_numpy(image[None]).permute(0, 3, 1, 2)


def central_view(image: np.ndarray, size: int, share: float) -> np.ndarray:
    """Return the view (size, size, 3) uint8 that evaluation uses, of an image (H, W, 3) uint8.

    The shorter side is resized to size / share, and the central square is cropped.
    """
    height, width = image.shape[:2]
    shorter = int(size / share)
    longest = MAX_ASPECT * min(height, width)
    if max(height, width) > longest:  # enlarging a whole strip would take gigabytes
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
    """Scale uniform numbers in [0, 1) to [low, high)."""
    return low + uniform * (high - low)


def photometry_parameters(uniforms: np.ndarray, views: np.ndarray, config: PretrainConfig) -> Photometry:
    """Compute the parameters of N views from their uniforms (N, NUM_UNIFORMS); `views` (N,) holds 0 or 1 for each."""
    strengths = np.array([config.brightness, config.contrast, config.saturation, config.hue])
    identity = np.array([1.0, 1.0, 1.0, 0.0])
    lowest = np.array([0.0, 0.0, 0.0, -0.5])
    factors = between(uniforms[:, FACTORS], np.maximum(identity - strengths, lowest), identity + strengths)
    factors = np.where((uniforms[:, JITTER] < config.jitter_probability)[:, None], factors, identity)
    keys = uniforms[:, ORDER].copy()
    if not config.hue:
        keys[:, HUE] = 1.0  # last, so that m2t_accel.data.photometry can leave it out
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
