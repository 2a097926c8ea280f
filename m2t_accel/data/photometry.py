"""Photometric operations on a batch of views: colour jitter, blur, grayscale, flip, solarize and normalisation.

They are a pure function of the crops and of the parameters that m2t_accel.data.crops drew for them. This module has two
implementations: one in torch over the whole batch, compiled for GPUs, and one in OpenCV image by image, which is 25
times faster on a CPU. Unlike PIL, neither rounds between two operations.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from m2t_accel.config.data import ImageSettings
from m2t_accel.config.fields import one_line
from m2t_accel.config.pretrain import PretrainConfig
from m2t_accel.data.crops import BRIGHTNESS, CONTRAST, HUE, SATURATION, Photometry

LUMA = (0.299, 0.587, 0.114)  # weights of gray by ITU-R 601, as in PIL and torchvision


def photometry(crops: Tensor, parameters: Photometry, config: PretrainConfig) -> Tensor:
    """Turn crops (N, H, W, 3) uint8 into normalised views (N, 3, H, W) float32, channels last in memory.

    Apply colour jitter (in each view's own order), blur, grayscale, flip, solarize and normalisation. An operation that
    the configuration never uses costs nothing.
    """
    if crops.device.type == "cpu":
        return photometry_one_by_one(crops, parameters, config)
    implementation = photometry_compiled() if is_compiled(crops.device) else photometry_batched
    return implementation(crops, parameters, config)


def is_compiled(device: torch.device) -> bool:
    """Return whether `photometry` compiles itself for this device; not if a run must repeat to the last bit."""
    return device.type == "cuda" and not torch.are_deterministic_algorithms_enabled()


def evaluation_view(crops: Tensor, config: ImageSettings) -> Tensor:
    """Normalise central views (N, H, W, 3) uint8: (N, 3, H, W) float32 out."""
    return normalise(crops.permute(0, 3, 1, 2).float() / 255, config)


def flipped_view(crops: Tensor, flip: Tensor, config: ImageSettings) -> Tensor:
    """Mirror crops (N, H, W, 3) uint8 where `flip` (N,) bool is true, and normalise: (N, 3, H, W) float32 out."""
    return evaluation_view(torch.where(per_image(flip), crops.flip(2), crops), config)


def uses_jitter(config: PretrainConfig) -> bool:
    """Return whether the configuration ever changes colours by jitter."""
    strengths = (config.brightness, config.contrast, config.saturation, config.hue)
    return config.jitter_probability > 0 and any(strengths)


def photometry_batched(crops: Tensor, parameters: Photometry, config: PretrainConfig) -> Tensor:
    """Compute `photometry` in torch on any device; no control flow depends on the parameters' values."""
    images = crops.permute(0, 3, 1, 2).float() / 255
    if uses_jitter(config):
        images = color_jitter(images, parameters.factors, parameters.order, with_hue=config.hue > 0)
    if any(config.blur_probability):
        images = gaussian_blur(images, parameters.sigma, radius=math.ceil(3 * config.blur_sigma[1]))
    if config.grayscale_probability:
        images = torch.where(per_image(parameters.grayscale), gray(images), images)
    if config.flip_probability:
        images = torch.where(per_image(parameters.flip), images.flip(3), images)
    if any(config.solarize_probability):
        # Invert values of at least 128 of 255. Folding at 127.5 needs no threshold that rounding could cross.
        images = torch.where(per_image(parameters.solarize), 0.5 - (images - 0.5).abs(), images)
    return normalise(images, config)


@functools.cache
def photometry_compiled() -> Callable[[Tensor, Photometry, PretrainConfig], Tensor]:
    """Return `photometry_batched`, compiled to a sixth of the kernels if this machine can compile for its GPU.

    Its first call takes up to a minute. The compiler chooses kernels by their speed on this machine, so the last bits
    may differ between two runs.
    """
    from torch._dynamo.exc import TorchDynamoException  # its import takes seconds

    try:
        torch.compile(torch.neg)(torch.zeros(1, device="cuda"))
    except TorchDynamoException as error:  # no C compiler, or a GPU that is too old
        warnings.warn(f"colours are computed without torch.compile, which is slower: {one_line(error)}", stacklevel=3)
        return photometry_batched
    return torch.compile(photometry_batched, dynamic=False)  # all batches of a run have one size


def normalise(images: Tensor, config: ImageSettings) -> Tensor:
    # Plain numbers instead of a tensor: copying a tensor to a GPU would wait for all work queued there.
    channels = zip(images.unbind(dim=1), config.image_mean, config.image_std, strict=True)
    channels = [(channel - mean) / std for channel, mean, std in channels]
    return torch.stack(channels, dim=-1).permute(0, 3, 1, 2)


def per_image(values: Tensor) -> Tensor:
    """Reshape (N,) to (N, 1, 1, 1)."""
    return values.view(-1, 1, 1, 1)


def gray(images: Tensor) -> Tensor:
    """Return the luma (N, 1, H, W) of images (N, 3, H, W)."""
    red, green, blue = images.split(1, dim=1)
    return LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue


def color_jitter(images: Tensor, factors: Tensor, order: Tensor, with_hue: bool) -> Tensor:
    """Change brightness, contrast, saturation and hue of (N, 3, H, W) in [0, 1], each image in its own order.

    Brightness, contrast and saturation all blend the image with another one, so one pass can apply a different one of
    them to each image. Three passes apply those before the hue, one the hue of all images, and three those after it.
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
    """Blend each image with black, with its mean gray or with its gray values, as selected by `operation` (N,)."""
    factor = torch.where(needed, factors.gather(1, operation[:, None]).squeeze(1), 1.0)
    luma = gray(images)
    other = torch.where(per_image(operation) == CONTRAST, luma.mean(dim=(2, 3), keepdim=True), luma)
    other = torch.where(per_image(operation) == BRIGHTNESS, 0.0, other)
    return torch.lerp(other.expand_as(images), images, per_image(factor)).clamp(0, 1)


def shift_hue(images: Tensor, shift: Tensor) -> Tensor:
    """Rotate the hue of (N, 3, H, W) in [0, 1] by `shift` (N,), in full turns: the exact rotation in HSV."""
    red, green, blue = images.unbind(dim=1)
    value = images.amax(dim=1)
    chroma = value - images.amin(dim=1)
    safe = torch.where(chroma > 0, chroma, 1.0)
    hue = torch.where(
        value == red,
        (green - blue) / safe,
        torch.where(value == green, (blue - red) / safe + 2, (red - green) / safe + 4),
    )  # in sixths of a turn; arbitrary where chroma is 0
    hue = hue + 6 * shift.view(-1, 1, 1)
    channels = []
    for offset in (5, 3, 1):
        k = torch.remainder(hue + offset, 6)
        channels.append(value - chroma * torch.minimum(k, 4 - k).clamp(0, 1))
    return torch.stack(channels, dim=1)


def gaussian_blur(images: Tensor, sigma: Tensor, radius: int) -> Tensor:
    """Blur each of (N, 3, H, W) with its own sigma (N,), in pixels, mirroring the edges; sigma 0 changes nothing."""
    num_images, _, height, width = images.shape
    radius = min(radius, height - 1, width - 1)  # mirroring needs more pixels than the radius
    offsets = torch.arange(-radius, radius + 1, device=images.device, dtype=images.dtype)
    # The floor avoids 0 / 0; at sigma 0 every weight but the centre's then underflows to exactly 0.
    kernel = torch.exp(-0.5 * (offsets / sigma.clamp(min=1e-3)[:, None]) ** 2)
    kernel = (kernel / kernel.sum(dim=1, keepdim=True)).repeat_interleave(3, dim=0)
    planes = images.reshape(1, num_images * 3, height, width)
    planes = functional.pad(planes, (radius, radius, radius, radius), mode="reflect")
    if torch.compiler.is_compiling():
        # The compiler makes one kernel of each sum. cuDNN's grouped convolutions took two thirds of the photometry.
        kernel = kernel.view(1, num_images * 3, 1, 1, -1)
        planes = sum(planes[..., i : i + width] * kernel[..., i] for i in range(2 * radius + 1))
        planes = sum(planes[..., i : i + height, :] * kernel[..., i] for i in range(2 * radius + 1))
        return planes.view(num_images, 3, height, width)
    planes = functional.conv2d(planes, kernel[:, None, None, :], groups=num_images * 3)
    planes = functional.conv2d(planes, kernel[:, None, :, None], groups=num_images * 3)
    return planes.view(num_images, 3, height, width)


def photometry_one_by_one(crops: Tensor, parameters: Photometry, config: PretrainConfig) -> Tensor:
    """Compute `photometry` with OpenCV on one CPU core. The kernel of a blur ends at three sigma."""
    views = torch.empty(crops.shape, dtype=torch.float32)
    _, height, width, _ = crops.shape
    has_jitter = uses_jitter(config)
    # Colours are 0 to 255 until normalisation. Two buffers take turns, because OpenCV copies when it works in place.
    image, other = np.empty((2, height, width, 3), np.float32)
    flip, factors, order, grayscale, sigma, solarize = (values.tolist() for values in parameters)
    for i, (crop, view) in enumerate(zip(crops.numpy(), views.numpy(), strict=True)):
        crop = cv2.flip(crop, 1) if flip[i] else crop
        torch.from_numpy(image).copy_(torch.from_numpy(crop))  # 1.5 times as fast as a copy by numpy
        pending = IDENTITY  # colour map not yet applied; a blur commutes with it
        if has_jitter:
            image, other, pending = jitter_one(image, other, factors[i], order[i])
        if sigma[i]:
            size = 2 * min(math.ceil(3 * sigma[i]), height - 1, width - 1) + 1
            cv2.GaussianBlur(image, (size, size), sigma[i], other, borderType=cv2.BORDER_REFLECT_101)
            image, other = other, image
        if grayscale[i]:
            pending = compose(pending, TO_GRAY)
        if solarize[i]:
            cv2.transform(image, pending, other)
            image, other, pending = other, image, FOLDED
            cv2.absdiff(image, (127.5, 127.5, 127.5, 0.0), image)
        cv2.transform(image, compose(pending, normalisation(config.image_mean, config.image_std)), view)
    return views.permute(0, 3, 1, 2)


def jitter_one(
    image: np.ndarray, other: np.ndarray, factors: list[float], order: list[int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Apply colour jitter to an image (H, W, 3) float32, 0 to 255, with `other` as a buffer of its shape.

    A factor of at most 1 keeps colours in range without clipping, so its map is not applied but composed with the next.

    Returns:
        The image, the buffer (the two may have been swapped), and the colour map that is still to be applied.
    """
    pending = IDENTITY
    for operation in order:
        factor = factors[operation]
        if operation == HUE:
            if factor:
                # A map that scales or shifts all channels by the same amount does not change the hue, so it may wait.
                if mixes_channels(pending):
                    cv2.transform(image, pending, other)
                    image, other, pending = other, image, IDENTITY
                turn = IDENTITY.copy()
                turn[0, 3] = 360 * (factor % 1)  # positive: OpenCV 5.0 gets some negative hues wrong
                cv2.cvtColor(image, cv2.COLOR_RGB2HSV, other)  # exact for float32; hue in degrees
                cv2.transform(other, turn, image)
                cv2.cvtColor(image, cv2.COLOR_HSV2RGB, other)
                image, other = other, image
            continue
        if factor == 1:
            continue
        matrix = factor * IDENTITY
        if operation == CONTRAST:
            mean = pending[:, :3] @ cv2.sumElems(image)[:3] / (image.size / 3) + pending[:, 3]
            matrix[:, 3] = (1 - factor) * np.dot(mean, LUMA)
        elif operation == SATURATION:
            matrix += (1 - factor) * TO_GRAY
        pending = matrix if pending is IDENTITY else compose(pending, matrix)
        if factor > 1:
            cv2.transform(image, pending, other)
            image, other, pending = other, image, IDENTITY
            cv2.threshold(image, 255, 0, cv2.THRESH_TRUNC, image)
            if operation != BRIGHTNESS:
                cv2.threshold(image, 0, 0, cv2.THRESH_TOZERO, image)
    return image, other, pending


# Colour maps (3, 4): the weights of red, green, blue and 1 in each output channel.
IDENTITY = np.eye(3, 4, dtype=np.float32)
TO_GRAY = np.tile(np.array([*LUMA, 0.0], np.float32), (3, 1))
FOLDED = np.hstack([-np.eye(3), np.full((3, 1), 127.5)]).astype(np.float32)  # solarizes, given the distance to 127.5


def mixes_channels(colours: np.ndarray) -> bool:
    """Return whether a colour map makes a channel depend on another one."""
    return colours[0, 1] != 0  # one entry is enough: before normalisation maps differ from scale and shift only by gray


def compose(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return the colour map that applies `first`, then `second`."""
    if first is IDENTITY:
        return second
    both = second[:, :3] @ first
    both[:, 3] += second[:, 3]
    return both


@functools.cache
def normalisation(mean: tuple[float, ...], std: tuple[float, ...]) -> np.ndarray:
    """Return the colour map that normalises colours of 0 to 255."""
    matrix = IDENTITY.copy()
    matrix[:, 3] = -255 * np.array(mean)
    return matrix / (255 * np.array(std, np.float32)[:, None])
