"""The batches that workers make: images decoded and cropped into views."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from m2t_accel.config.data import ImageSettings, TrainingSettings
from m2t_accel.data.buffers import Buffers
from m2t_accel.data.crops import (
    FLIP,
    NUM_UNIFORMS,
    Crop,
    Photometry,
    bounding_box,
    central_view,
    cut,
    cut_rotated,
    draw_crop,
    draw_uniforms,
    is_rotated,
    photometry_parameters,
)
from m2t_accel.data.decode import DecodeError, check_size, decode_bytes, decode_part, read_bytes
from m2t_accel.data.headers import plain_jpeg_size
from m2t_accel.data.requests import Request
from m2t_accel.data.shards import Shards

MAX_PATH = 4096  # characters; Linux allows no longer path


class BadImage(NamedTuple):
    """An image that cannot be decoded."""

    sample: int
    path: str
    reason: str


class ViewBatch(NamedTuple):
    """Views of N images before photometry: view 1 of all images, then view 2 of all; or one view, before the flip."""

    crops: Tensor  # (2 N, H, W, 3) uint8, or (N, H, W, 3)
    photometry: Photometry | Tensor  # parameters of 2 N views, or flips (N,) bool
    samples: Tensor  # (N,) int64: the sample shown at each place
    bad: tuple[BadImage, ...] = ()  # images replaced by others


def read_rows(images: Dataset, samples: Sequence[int]) -> list[dict[str, object]]:
    """Return the undecoded images of some rows in the form that m2t_accel.data.decode takes."""
    columns = images[[int(sample) for sample in samples]]
    rows = columns["image"]
    if "offset" in columns:
        places = zip(columns["offset"], columns["size"], strict=True)
        rows = [{**row, "offset": offset, "size": size} for row, (offset, size) in zip(rows, places, strict=True)]
    return [row or {"bytes": None, "path": None} for row in rows]


def decode_for_crops(
    image: Mapping[str, object], uniforms: np.ndarray, config: TrainingSettings
) -> tuple[np.ndarray, list[Crop]]:
    """Draw the crops of an undecoded image, and decode the pixels that they need.

    Where the header of the file gives the size, draw the crops before decoding, and decode only the part that holds
    them.

    Args:
        uniforms: (views, NUM_UNIFORMS) random numbers.

    Returns:
        The decoded pixels, and the crops in them.
    """
    content = read_bytes(image)
    size = None if is_rotated(config) else plain_jpeg_size(content)
    if size is None:
        pixels = decode_bytes(content, config.max_image_pixels)
        return pixels, [draw_crop(view, *pixels.shape[:2], config) for view in uniforms]
    check_size(*size, config.max_image_pixels)
    crops = [draw_crop(view, *size, config) for view in uniforms]
    top, left, bottom, right = bounding_box(crops)
    crops = [crop._replace(top=crop.top - top, left=crop.left - left) for crop in crops]
    return decode_part(content, top, left, bottom, right, config.max_image_pixels), crops


class TwoViews:
    """A map-style torch dataset that answers a Request with a ViewBatch of two views."""

    num_views = 2

    def __init__(self, images: Dataset | Shards, config: TrainingSettings) -> None:
        self.images = images
        self.config = config
        self.buffers: Buffers | None = None

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, request: Request) -> ViewBatch:
        """Return the views of a batch.

        An image that cannot be decoded is replaced by the next decodable one of the batch, cropped and coloured with
        the random numbers of the original place. So an epoch remains a function of the seed and the files.
        """
        num_images = len(request.samples)
        crops = memory_for(request, self.crops_shape(num_images), self.buffers)
        uniforms = np.stack(
            [draw_uniforms(self.config.seed, request.epoch, request.samples, view) for view in range(self.num_views)]
        )  # (views, N, NUM_UNIFORMS)
        images = read_rows(self.images, request.samples) if request.images is None else request.images
        # An array, because slicing it costs a tenth of slicing a tensor.
        places = crops.numpy().reshape(self.num_views, num_images, *crops.shape[1:])
        shown, bad = request.samples.copy(), {}
        for i, image in enumerate(images):
            try:
                self.cut(image, uniforms[:, i], places[:, i])
            except DecodeError as error:
                bad[i] = BadImage(int(shown[i]), describe_image(image, shown[i]), str(error))
        for i in bad if len(bad) < num_images else ():
            other = next(j % num_images for j in range(i + 1, i + num_images) if j % num_images not in bad)
            try:
                self.cut(images[other], uniforms[:, i], places[:, i])
            except DecodeError:  # the other image is damaged, but not where its own crops lie
                places[:, i] = places[:, other]
            shown[i] = request.samples[other]
        return ViewBatch(
            crops=crops if request.buffer is None else self.buffers.hand_over(request.buffer, len(crops)),
            photometry=self.parameters(uniforms),
            samples=torch.from_numpy(shown),
            bad=tuple(bad.values()),
        )

    def crops_shape(self, num_images: int) -> tuple[int, ...]:
        """Return the shape of the crops of a batch."""
        return (self.num_views * num_images, self.config.image_size, self.config.image_size, 3)

    def cut(self, image: Mapping[str, object], uniforms: np.ndarray, crops: np.ndarray) -> None:
        """Decode an image and write its crops into `crops` (views, H, W, 3)."""
        pixels, drawn = decode_for_crops(image, uniforms, self.config)
        for crop, out in zip(drawn, crops, strict=True):
            (cut_rotated if is_rotated(self.config) else cut)(pixels, crop, out)

    def parameters(self, uniforms: np.ndarray) -> Photometry | Tensor:
        """Return the photometric parameters of the views, for the device; uniforms: (views, N, NUM_UNIFORMS)."""
        views = np.repeat([0, 1], uniforms.shape[1])
        return photometry_parameters(uniforms.reshape(-1, NUM_UNIFORMS), views, self.config)


class FlippedCrops(TwoViews):
    """A variant of TwoViews with one crop per image, changed only by a flip; for training with labels."""

    num_views = 1

    def parameters(self, uniforms: np.ndarray) -> Tensor:
        """Return whether each view is to be flipped: (N,) bool."""
        return torch.from_numpy(uniforms[0, :, FLIP] < self.config.flip_probability)


class CentralBatch(NamedTuple):
    """The central views of N images for evaluation; views of images that cannot be decoded are black."""

    crops: Tensor  # (N, H, W, 3) uint8
    digests: Tensor  # (N,) int64: the start of the SHA-256 of each file
    bad: list[BadImage]


class CentralViews:
    """A map-style torch dataset that answers a Request with a CentralBatch."""

    def __init__(self, images: Dataset, config: ImageSettings) -> None:
        self.images = images
        self.config = config
        self.buffers: Buffers | None = None

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, request: Request) -> CentralBatch:
        size, bad = self.config.image_size, []
        crops = memory_for(request, self.crops_shape(len(request.samples)), self.buffers)
        digests, places = np.zeros(len(request.samples), np.int64), crops.numpy()
        for i, row in enumerate(read_rows(self.images, request.samples)):
            try:
                content = read_bytes(row)
                digests[i] = file_digest(content)
                pixels = decode_bytes(content, self.config.max_image_pixels)
                places[i] = central_view(pixels, size, self.config.evaluation_crop)
            except DecodeError as error:
                sample, places[i] = int(request.samples[i]), 0
                bad.append(BadImage(sample, describe_image(row, sample), str(error)))
        return CentralBatch(
            crops if request.buffer is None else self.buffers.hand_over(request.buffer, len(crops)),
            torch.from_numpy(digests),
            bad,
        )

    def crops_shape(self, num_images: int) -> tuple[int, ...]:
        """Return the shape of the crops of a batch."""
        return (num_images, self.config.image_size, self.config.image_size, 3)


def file_digest(content: bytes) -> int:
    """Return the start of the SHA-256 of a file as a signed integer of 64 bits."""
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "big", signed=True)


def memory_for(request: Request, shape: tuple[int, ...], buffers: Buffers | None) -> Tensor:
    """Return memory for the crops of a request: its buffer or, if it has none, new memory."""
    return torch.empty(shape, dtype=torch.uint8) if request.buffer is None else buffers[request.buffer][: shape[0]]


def describe_image(image: Mapping[str, object], sample: int) -> str:
    """Return a phrase for messages that says where the image of a sample is."""
    where = image["path"] or f"image {sample:,} ({len(image['bytes'] or b''):,} bytes, without a path)"
    if len(where) > MAX_PATH:  # not really a path
        where = f"{where[:100]} … ({len(where):,} characters)"
    return f"{where}, {image['size']} bytes at {image['offset']}" if image.get("offset") is not None else where
