"""The two views of an image: geometry per image where the bytes are, photometry per batch where the model is.

Every random number of a view comes from one generator seeded by (seed, epoch, sample, view), so a view does
not depend on workers, processes, batch order or on where a run was resumed.

Source of the views: BYOL (arXiv 2006.07733), appendix B, as arXiv 2101.07525 uses them.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from m2t_accel.recipes import PretrainConfig

VIEW_STREAM = 1  # apart from the stream of the epoch's order in m2t_accel.data

# Where each random number stands among the uniforms of a view. New ones go to the end: the rest stay as they are.
CROP_ATTEMPTS = 10
SCALE = slice(0, CROP_ATTEMPTS)
RATIO = slice(CROP_ATTEMPTS, 2 * CROP_ATTEMPTS)
TOP, LEFT, ANGLE, FLIP, JITTER = range(20, 25)
FACTORS, ORDER = slice(25, 29), slice(29, 33)
GRAYSCALE, BLUR, SIGMA, SOLARIZE = range(33, 37)
NUM_UNIFORMS = 37

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
LUMA = (0.299, 0.587, 0.114)  # ITU-R 601, as PIL and torchvision weigh gray


class Photometry(NamedTuple):
    """The photometric parameters of N views; `identity` values leave an image as it is."""

    flip: Tensor  # (N,) bool
    factors: Tensor  # (N, 4) float: brightness, contrast, saturation (identity 1) and hue shift (identity 0)
    order: Tensor  # (N, 4) int: which of the four comes at each place
    grayscale: Tensor  # (N,) bool
    sigma: Tensor  # (N,) float, pixels; 0 is no blur
    solarize: Tensor  # (N,) bool


def draw_uniforms(seed: int, epoch: int, sample: int, view: int) -> np.ndarray:
    """All random numbers of one view, uniform in [0, 1): (NUM_UNIFORMS,) float64."""
    return np.random.default_rng((VIEW_STREAM, seed, epoch, sample, view)).random(NUM_UNIFORMS)


class Crop(NamedTuple):
    """A box in an image, in pixels, turned about its centre by `angle` degrees."""

    top: float
    left: float
    height: float
    width: float
    angle: float


def draw_crop(uniforms: np.ndarray, height: int, width: int, config: PretrainConfig) -> Crop:
    """A random resized crop of an image of that size, in whole pixels, as torchvision's RandomResizedCrop.

    Ten attempts at an area and a ratio that fit, else the largest central box of a permitted ratio. With
    `is_turned(config)` the first attempt stands, is turned, may reach over the edge, and is not rounded.
    """
    areas = height * width * between(uniforms[SCALE], *config.crop_scale)
    ratios = np.exp(between(uniforms[RATIO], *np.log(config.crop_ratio)))
    if is_turned(config):
        crop_width, crop_height = math.sqrt(areas[0] * ratios[0]), math.sqrt(areas[0] / ratios[0])
        top, left = uniforms[TOP] * (height - crop_height), uniforms[LEFT] * (width - crop_width)
        return Crop(top, left, crop_height, crop_width, between(uniforms[ANGLE], -config.rotation, config.rotation))
    widths, heights = np.rint(np.sqrt(areas * ratios)), np.rint(np.sqrt(areas / ratios))
    fits = (widths >= 1) & (widths <= width) & (heights >= 1) & (heights <= height)
    if fits.any():
        first = fits.argmax()
        crop_width, crop_height = int(widths[first]), int(heights[first])
        top = int(uniforms[TOP] * (height - crop_height + 1))
        left = int(uniforms[LEFT] * (width - crop_width + 1))
    else:
        ratio = min(max(width / height, config.crop_ratio[0]), config.crop_ratio[1])
        crop_width = max(1, min(width, round(height * ratio)))
        crop_height = max(1, min(height, round(width / ratio)))
        top, left = (height - crop_height) // 2, (width - crop_width) // 2
    return Crop(top, left, crop_height, crop_width, 0.0)


def is_turned(config: PretrainConfig) -> bool:
    """Whether crops are turned or reach over the edge, so that whole pixels do not do."""
    return config.rotation > 0 or config.crop_scale[1] > 1


def view_crop(image: np.ndarray, uniforms: np.ndarray, config: PretrainConfig) -> np.ndarray:
    """A random crop of an image (H, W, 3) uint8, as a view (size, size, 3) uint8."""
    crop = draw_crop(uniforms, *image.shape[:2], config)
    return (cut_turned if is_turned(config) else cut)(image, crop, config.image_size)


def cut(image: np.ndarray, crop: Crop, size: int) -> np.ndarray:
    """A crop in whole pixels of an image (H, W, 3) uint8, resized to (size, size, 3) uint8."""
    return resize(image[crop.top : crop.top + crop.height, crop.left : crop.left + crop.width], size, size)


def cut_turned(image: np.ndarray, crop: Crop, size: int) -> np.ndarray:
    """A turned crop of an image (H, W, 3) uint8 as (size, size, 3) uint8; beyond its edge, the edge's pixels."""
    height, width = image.shape[:2]
    if min(crop.height, crop.width) > size:  # the warp below takes four pixels for one and would alias
        shrink = size / min(crop.height, crop.width)
        image = resize(image, max(1, round(height * shrink)), max(1, round(width * shrink)))
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
    return cv2.warpAffine(image, matrix, (size, size), flags=flags, borderMode=cv2.BORDER_REPLICATE)


def resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """(H, W, 3) uint8 in, (height, width, 3) uint8 out: torch's antialiased bilinear resize, bit for bit torchvision's.

    Two 224-pixel crops of an ImageNet photograph take 0.21 ms so on one core; cv2.resize takes 0.67 with
    INTER_AREA, 0.19 with INTER_LINEAR, which aliases; PIL 1.0.
    """
    # Of a dense channels-last tensor it takes 0.21 ms, of a view into the photograph 0.33.
    pixels = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None]
    resized = functional.interpolate(pixels, (height, width), mode="bilinear", antialias=True)
    return resized[0].permute(1, 2, 0).numpy()


def central_view(image: np.ndarray, size: int, share: float) -> np.ndarray:
    """The view of evaluation: (H, W, 3) uint8 in, the shorter side resized to size / share, the centre out."""
    height, width = image.shape[:2]
    shorter = int(size / share)
    longer = int(shorter * max(height, width) / min(height, width))
    target = (shorter, longer) if height <= width else (longer, shorter)
    if target != (height, width):
        image = resize(image, *target)
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
        keys[:, HUE] = 1.0  # last, where `photometry` leaves it out
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


def photometry(crops: Tensor, parameters: Photometry, config: PretrainConfig) -> Tensor:
    """Crops (N, H, W, 3) uint8 as normalised views (N, 3, H, W) float32, channels last in memory.

    Colour jitter (in each view's own order), blur, grayscale, flip, solarize, normalise. A pure function of
    its arguments; an operation that the configuration never uses costs nothing.
    """
    images = crops.permute(0, 3, 1, 2).float() / 255
    if config.jitter_probability and (config.brightness or config.contrast or config.saturation or config.hue):
        images = color_jitter(images, parameters.factors, parameters.order, with_hue=config.hue > 0)
    if any(config.blur_probability):
        images = gaussian_blur(images, parameters.sigma, radius=math.ceil(3 * config.blur_sigma[1]))
    if config.grayscale_probability:
        images = torch.where(per_image(parameters.grayscale), gray(images), images)
    if config.flip_probability:
        images = torch.where(per_image(parameters.flip), images.flip(3), images)
    if any(config.solarize_probability):
        # The threshold is 128 of 255; half a level lower, rounding before cannot tip a pixel of exactly 128.
        inverted = per_image(parameters.solarize) & (images >= 127.5 / 255)
        images = torch.where(inverted, 1 - images, images)
    return normalise(images, config)


def evaluation_view(crops: Tensor, config: PretrainConfig) -> Tensor:
    """Central views (N, H, W, 3) uint8 as normalised images (N, 3, H, W) float32."""
    return normalise(crops.permute(0, 3, 1, 2).float() / 255, config)


def normalise(images: Tensor, config: PretrainConfig) -> Tensor:
    mean, std = (per_channel(values, images.device) for values in (config.image_mean, config.image_std))
    return ((images - mean) / std).contiguous(memory_format=torch.channels_last)


@functools.cache
def per_channel(values: tuple[float, float, float], device: torch.device) -> Tensor:
    """(3, 1, 1) on the device; kept, because a copy to a GPU waits for all that the GPU has yet to do."""
    return torch.tensor(values, dtype=torch.float32, device=device).view(3, 1, 1)


def per_image(values: Tensor) -> Tensor:
    """(N,) as (N, 1, 1, 1)."""
    return values.view(-1, 1, 1, 1)


def gray(images: Tensor) -> Tensor:
    """(N, 3, H, W) in, luma (N, 1, H, W) out."""
    return (images * per_channel(LUMA, images.device)).sum(dim=1, keepdim=True)


def color_jitter(images: Tensor, factors: Tensor, order: Tensor, with_hue: bool) -> Tensor:
    """Brightness, contrast, saturation and hue of (N, 3, H, W) in [0, 1], each image in its own order.

    Brightness, contrast and saturation are all blends of the image with another one, so one pass serves any
    of them: three passes for what comes before the hue, the hue for all at once, three for what comes after.
    A pass that an image does not need has factor 1.
    """
    place_of_hue = (order == HUE).int().argmax(dim=1)
    for place in range(3):
        images = blend(images, factors, order[:, place], needed=place < place_of_hue)
    if with_hue:
        images = shift_hue(images, factors[:, HUE])
        for place in range(1, 4):
            images = blend(images, factors, order[:, place], needed=place > place_of_hue)
    return images


def blend(images: Tensor, factors: Tensor, operation: Tensor, needed: Tensor) -> Tensor:
    """Move each image away from (or towards) black, its mean gray or its gray: one operation (N,) for each."""
    factor = torch.where(needed, factors.gather(1, operation[:, None]).squeeze(1), 1.0)
    luma = gray(images)
    other = torch.where(per_image(operation) == CONTRAST, luma.mean(dim=(2, 3), keepdim=True), luma)
    other = torch.where(per_image(operation) == BRIGHTNESS, 0.0, other)
    return torch.lerp(other.expand_as(images), images, per_image(factor)).clamp(0, 1)


def shift_hue(images: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue of (N, 3, H, W) in [0, 1] by `shift` (N,), in circles: the exact HSV rotation."""
    red, green, blue = images.unbind(dim=1)
    value = images.amax(dim=1)
    chroma = value - images.amin(dim=1)
    safe = torch.where(chroma > 0, chroma, 1.0)
    hue = torch.where(
        value == red,
        (green - blue) / safe,
        torch.where(value == green, (blue - red) / safe + 2, (red - green) / safe + 4),
    )  # in sixths of the circle; any value where chroma is 0
    hue = hue + 6 * shift.view(-1, 1, 1)
    channels = []
    for offset in (5, 3, 1):
        k = torch.remainder(hue + offset, 6)
        channels.append(value - chroma * torch.minimum(k, 4 - k).clamp(0, 1))
    return torch.stack(channels, dim=1)


def gaussian_blur(images: Tensor, sigma: Tensor, radius: int) -> Tensor:
    """Blur each of (N, 3, H, W) by its own sigma (N,), in pixels, edges mirrored; sigma 0 changes nothing."""
    num_images, _, height, width = images.shape
    radius = min(radius, height - 1, width - 1)  # mirroring needs more pixels than the radius
    offsets = torch.arange(-radius, radius + 1, device=images.device, dtype=images.dtype)
    # At sigma 0 the floor makes every weight but the centre's underflow to 0 exactly.
    kernel = torch.exp(-0.5 * (offsets / sigma.clamp(min=1e-3)[:, None]) ** 2)
    kernel = (kernel / kernel.sum(dim=1, keepdim=True)).repeat_interleave(3, dim=0)
    planes = images.reshape(1, num_images * 3, height, width)
    planes = functional.pad(planes, (radius, radius, radius, radius), mode="reflect")
    planes = functional.conv2d(planes, kernel[:, None, None, :], groups=num_images * 3)
    planes = functional.conv2d(planes, kernel[:, None, :, None], groups=num_images * 3)
    return planes.view(num_images, 3, height, width)
