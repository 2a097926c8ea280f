"""The batches that workers return: images decoded and cut into views."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from m2t_accel.config.data import ImageSettings, TrainingSettings
from m2t_accel.data.buffers import Buffers, new_memory
from m2t_accel.data.crops import (
    FLIP,
    NUM_UNIFORMS,
    Crop,
    Photometry,
    around,
    central_view,
    cut,
    cut_turned,
    draw_crop,
    draw_uniforms,
    is_turned,
    photometry_parameters,
)
from m2t_accel.data.decode import DecodeError, decode_bytes, decode_part, plain_jpeg_size, read_bytes
from m2t_accel.data.requests import Request
from m2t_accel.data.shards import Shards

MAX_PATH = 4096  # Linux's


class BadImage(NamedTuple):
    """An image that cannot be decoded."""

    sample: int
    path: str
    reason: str


class ViewBatch(NamedTuple):
    """Two views of N images, not yet coloured: view 1 of all images, then view 2 of all. Or one, not yet flipped."""

    crops: Tensor  # (2 N, H, W, 3) uint8, or (N, H, W, 3)
    photometry: Photometry | Tensor  # of 2 N views, or flips (N,) bool
    samples: Tensor  # (N,) int64: whose views they are
    bad: tuple[BadImage, ...] = ()  # those in whose place others are shown

    def __reduce__(self) -> tuple:
        """As arrays: a tensor would travel as a file descriptor of its own, which takes longer than its few bytes."""
        small = self.photometry
        small = small.numpy() if isinstance(small, Tensor) else [values.numpy() for values in small]
        return view_batch, (self.crops, small, self.samples.numpy(), self.bad)


def view_batch(crops: Tensor, small: np.ndarray | list[np.ndarray], samples: np.ndarray, bad: tuple) -> ViewBatch:
    small = Photometry(*map(torch.from_numpy, small)) if isinstance(small, list) else torch.from_numpy(small)
    return ViewBatch(crops, small, torch.from_numpy(samples), bad)


def read_rows(images: Dataset, samples: Sequence[int]) -> list[dict[str, object]]:
    """The undecoded images of some rows, as m2t_accel.decode takes them."""
    columns = images[[int(sample) for sample in samples]]
    rows = columns["image"]
    if "offset" in columns:
        places = zip(columns["offset"], columns["size"], strict=True)
        rows = [{**row, "offset": at, "size": size} for row, (at, size) in zip(rows, places, strict=True)]
    return [row or {"bytes": None, "path": None} for row in rows]


def decode_for_crops(
    image: Mapping[str, object], uniforms: np.ndarray, config: TrainingSettings
) -> tuple[np.ndarray, list[Crop]]:
    """The pixels of an undecoded image, or of the part of it that holds its crops, and the crops in them.

    uniforms: (views, NUM_UNIFORMS). Where the file's header tells its size the crops are drawn before it is decoded.
    """
    content = read_bytes(image)
    size = None if is_turned(config) else plain_jpeg_size(content)
    if size is None:
        pixels = decode_bytes(content)
        return pixels, [draw_crop(view, *pixels.shape[:2], config) for view in uniforms]
    crops = [draw_crop(view, *size, config) for view in uniforms]
    top, left, bottom, right = around(crops)
    crops = [crop._replace(top=crop.top - top, left=crop.left - left) for crop in crops]
    return decode_part(content, top, left, bottom, right), crops


class TwoViews:
    """A map-style torch dataset whose batch, asked for by a Request, is a ViewBatch."""

    num_views = 2

    def __init__(self, images: Dataset | Shards, config: TrainingSettings) -> None:
        self.images = images
        self.config = config
        self.buffers: Buffers | None = None

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, request: Request) -> ViewBatch:
        """An image that cannot be decoded is replaced by the next one of the batch that can, cut and coloured by the
        random numbers of the place: an epoch stays a function of the seed and the files.
        """
        num_images, new = len(request.samples), request.buffer is None
        crops = new_memory(self.crops_shape(num_images)) if new else self.buffers[request.buffer]
        draws = [
            draw_uniforms(self.config.seed, request.epoch, request.samples, view) for view in range(self.num_views)
        ]
        uniforms = np.stack(draws)  # (views, N, NUM_UNIFORMS)
        images = read_rows(self.images, request.samples) if request.images is None else request.images
        # As an array, a slice of which costs a tenth of a tensor's.
        places = crops.numpy().reshape(self.num_views, num_images, *crops.shape[1:])
        shown, bad = request.samples.copy(), []
        for i, image in enumerate(images):
            try:
                self.cut(image, uniforms[:, i], places[:, i])
            except DecodeError as error:
                bad.append((i, BadImage(int(shown[i]), describe(image, shown[i]), str(error))))
        broken = {i for i, _ in bad}
        if len(bad) < num_images:
            for i in broken:
                other = next(j % num_images for j in range(i + 1, i + num_images) if j % num_images not in broken)
                try:
                    self.cut(images[other], uniforms[:, i], places[:, i])
                except DecodeError:  # it is damaged where these crops lie, and its own do not
                    places[:, i] = places[:, other]
                shown[i] = request.samples[other]
        return ViewBatch(
            crops=crops if new else self.buffers.hand_over(request.buffer),
            photometry=self.parameters(uniforms),
            samples=torch.from_numpy(shown),
            bad=tuple(image for _, image in bad),
        )

    def crops_shape(self, num_images: int) -> tuple[int, ...]:
        return (self.num_views * num_images, self.config.image_size, self.config.image_size, 3)

    def cut(self, image: Mapping[str, object], uniforms: np.ndarray, crops: np.ndarray) -> None:
        """Decode an image and fill `crops` (views, H, W, 3) with its crops."""
        pixels, drawn = decode_for_crops(image, uniforms, self.config)
        for crop, out in zip(drawn, crops, strict=True):
            (cut_turned if is_turned(self.config) else cut)(pixels, crop, out)

    def parameters(self, uniforms: np.ndarray) -> Photometry | Tensor:
        """What is left to do on the device, of views with these random numbers (views, N, NUM_UNIFORMS)."""
        views = np.repeat([0, 1], uniforms.shape[1])
        return photometry_parameters(uniforms.reshape(-1, NUM_UNIFORMS), views, self.config)


class FlippedCrops(TwoViews):
    """As TwoViews, but of each image one crop, with no change but a flip; for training with labels."""

    num_views = 1

    def parameters(self, uniforms: np.ndarray) -> Tensor:
        return torch.from_numpy(uniforms[0, :, FLIP] < self.config.flip_probability)


class CentralBatch(NamedTuple):
    """What evaluation sees of N images; the crops of those that cannot be decoded are black."""

    crops: Tensor  # (N, H, W, 3) uint8
    digests: Tensor  # (N,) int64: of their files
    bad: list[BadImage]


class CentralViews:
    """A map-style torch dataset whose batch, asked for by samples, is a CentralBatch."""

    def __init__(self, images: Dataset, config: ImageSettings) -> None:
        self.images = images
        self.config = config

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, samples: Sequence[int]) -> CentralBatch:
        size, bad = self.config.image_size, []
        crops, digests = np.zeros((len(samples), size, size, 3), np.uint8), np.zeros(len(samples), np.int64)
        for i, row in enumerate(read_rows(self.images, samples)):
            try:
                content = read_bytes(row)
                digests[i] = int.from_bytes(hashlib.sha256(content).digest()[:8], "big", signed=True)
                crops[i] = central_view(decode_bytes(content), size, self.config.evaluation_crop)
            except DecodeError as error:
                bad.append(BadImage(int(samples[i]), describe(row, samples[i]), str(error)))
        return CentralBatch(torch.from_numpy(crops), torch.from_numpy(digests), bad)


def describe(image: Mapping[str, object], sample: int) -> str:
    """Where the image of a sample is, for people."""
    where = image["path"] or f"image {sample:,}, of {len(image['bytes'] or b''):,} bytes and without a path"
    if len(where) > MAX_PATH:  # it is no path at all
        where = f"{where[:100]} … ({len(where):,} characters)"
    return f"{where}, {image['size']} bytes at {image['offset']}" if image.get("offset") is not None else where
