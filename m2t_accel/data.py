"""Batches of views: which process reads what is m2t_accel.order's; here it is read, decoded and cut.

Workers (m2t_accel.loader) decode an image once and cut both of its crops (uint8); the photometric parameters travel
beside them and are applied on the training device (m2t_accel.photometry).
"""

from __future__ import annotations

import contextlib
import hashlib
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from m2t_accel.augment import (
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
from m2t_accel.buffers import Buffers, new_memory
from m2t_accel.data_settings import ImageSettings, TrainingSettings
from m2t_accel.decode import DecodeError, decode_bytes, decode_part, plain_jpeg_size, read_bytes
from m2t_accel.order import Pool, PooledOrder, Segment, ShuffledOrder, steps_per_epoch
from m2t_accel.shards import HELD, Reader, Shards

MAX_PATH = 4096  # Linux's
MAX_READERS = 16  # threads of a process that read pieces ahead; each waits for a disk or a network


class Request(NamedTuple):
    """What a worker is asked for: the views of some samples in an epoch."""

    epoch: int
    samples: np.ndarray  # (N,) int64
    images: list[Mapping[str, object]] | None  # N undecoded images, where the main process has read them
    buffer: int | None = None  # the number of a buffer for their pixels; without one, new memory is taken


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


# --- which sub-batches, and their bytes


class DeviceBatches:
    """The requests of one process, from an optimizer step of the run to its end, one for each sub-batch.

    Global batch k of an epoch has a sub-batch for each virtual device; the processes take them in turn. So
    what a global batch holds, and what each BatchNorm sees, does not depend on the number of processes, and
    `first_step` is all that a resumed run needs to know.
    """

    def __init__(
        self,
        images: Dataset | Shards,
        config: TrainingSettings,
        num_processes: int,
        process_index: int,
        first_step: int = 0,
    ) -> None:
        self.images = images
        self.config = config
        self.devices = range(process_index, config.num_virtual_devices, num_processes)
        self.steps_an_epoch = steps_per_epoch(len(images), config.batch_size)
        self.first_step = first_step

    def __len__(self) -> int:
        return (self.config.epochs * self.steps_an_epoch - self.first_step) * len(self.devices)

    def __iter__(self) -> Iterator[Request]:
        return self.read_ahead() if isinstance(self.images, Shards) else self.shuffled()

    def places(self) -> Iterator[tuple[int, int]]:
        """(epoch, step of the epoch) of each step to come."""
        for step in range(self.first_step, self.config.epochs * self.steps_an_epoch):
            yield divmod(step, self.steps_an_epoch)

    def shuffled(self) -> Iterator[Request]:
        order = ShuffledOrder(len(self.images), self.config)
        for epoch, step in self.places():
            for device in self.devices:
                yield Request(epoch, order.sub_batch(epoch, step * self.config.num_virtual_devices + device), None)

    def read_ahead(self) -> Iterator[Request]:
        """The requests with their images, read pool by pool; while one is used the next is read."""
        order, size = PooledOrder(self.images.piece_sizes, self.config), self.config.device_batch_size
        readers = ThreadPoolExecutor(min(MAX_READERS, 2 * len(self.devices) + 2), thread_name_prefix="reader")
        coming: deque[list[PoolInReading]] = deque()
        try:
            pools = self.pools(order, readers)
            coming.extend(next(pools, None) for _ in range(2))
            now = None
            for epoch, step in self.places():
                place = step % order.pool_batches
                if now is None or place == 0:
                    now = samples = images = None  # free the old pools before the new ones are put together
                    now = [pool.result() for pool in coming.popleft()]
                    coming.append(next(pools, None))
                for samples, images in now:
                    chosen = slice(place * size, (place + 1) * size)
                    yield Request(epoch, samples[chosen], images[chosen])
        finally:
            readers.shutdown(wait=False, cancel_futures=True)

    def pools(self, order: PooledOrder, readers: ThreadPoolExecutor) -> Iterator[list[PoolInReading]]:
        """For each stretch of steps to come the pools of this process's virtual devices, their reading begun."""
        may_hold = HELD // len(self.devices)
        done, stretches = None, {device: Stretch(self.images, readers, may_hold) for device in self.devices}
        for epoch, step in self.places():
            index = step // order.pool_batches
            if (epoch, index) != done:
                done = (epoch, index)
                yield [
                    PoolInReading(order.pool(epoch, device, index), stretch) for device, stretch in stretches.items()
                ]


class Stretch:
    """What the pools of a virtual device read, one after the other: a piece that two of them share is read once."""

    def __init__(self, shards: Shards, readers: ThreadPoolExecutor, may_hold: int) -> None:
        self.shards = shards
        self.readers = readers
        self.may_hold = may_hold  # bytes, between two pools
        self.read: Reader | None = None
        self.last: Future | None = None  # of this reader, which is asked by one thread at a time
        self.end: tuple[int, int] | None = None  # the piece and the row that it has come to

    def submit(self, segment: Segment) -> Future:
        """Begin to read a segment: its samples (n,) and their undecoded images."""
        if self.end != (segment.piece, segment.first):
            self.read, self.last = self.shards.open(segment.piece, self.may_hold), None
        self.last = self.readers.submit(read_after, self.last, self.read, segment.first, segment.stop)
        self.end = (segment.piece, segment.stop)
        return self.last


def read_after(before: Future | None, read: Reader, first: int, stop: int) -> tuple[np.ndarray, list]:
    """Read a segment when the one before it has been: it was begun earlier, so no thread waits for one to come."""
    if before is not None:
        # Not wait(), which never ends for one that is cancelled at the end of a run while this one begins.
        with contextlib.suppress(CancelledError):
            before.exception()
    return read(first, stop)


class PoolInReading:
    """A pool whose segments are being read."""

    def __init__(self, pool: Pool, stretch: Stretch) -> None:
        self.shuffle = pool.shuffle
        self.parts = [stretch.submit(segment) for segment in pool.segments]

    def result(self) -> tuple[np.ndarray, list[Mapping[str, object]]]:
        """Wait for it: the samples (n,) and their undecoded images, in the pool's order."""
        parts = [part.result() for part in self.parts]
        samples = np.concatenate([samples for samples, _ in parts])
        images = [image for _, images in parts for image in images]
        return samples[self.shuffle], [images[i] for i in self.shuffle]


# --- what a worker does


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
