"""Who reads which image, and when: the order of an epoch, the two crops of an image, and batches of them.

Workers decode an image once and cut both of its crops (uint8); the photometric parameters travel beside them
and are applied on the training device (`m2t_accel.augment`).
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from datasets import Dataset
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from m2t_accel.augment import (
    NUM_UNIFORMS,
    Photometry,
    central_view,
    draw_uniforms,
    photometry_parameters,
    view_crop,
)
from m2t_accel.recipes import PretrainConfig

ORDER_STREAM = 0  # apart from the stream of the views in m2t_accel.augment


def epoch_order(num_images: int, seed: int, epoch: int) -> np.ndarray:
    """The order of one epoch: a permutation of range(num_images), (num_images,) int64."""
    return np.random.default_rng((ORDER_STREAM, seed, epoch)).permutation(num_images)


def steps_per_epoch(num_images: int, batch_size: int) -> int:
    """Optimizer steps of one epoch; the last, partial batch is dropped."""
    return num_images // batch_size


class DeviceBatches:
    """The sub-batches that one process reads in an epoch, as lists of (epoch, sample).

    Global batch k is the k-th slice of the epoch's order, cut into sub-batches of `device_batch_size`, one for
    each virtual device; the processes take them in turn. So what a global batch holds, and what each
    BatchNorm sees, does not depend on the number of processes. Set `epoch` before each pass.
    """

    def __init__(self, num_images: int, config: PretrainConfig, num_processes: int, process_index: int) -> None:
        self.num_images = num_images
        self.config = config
        self.num_processes = num_processes
        self.process_index = process_index
        self.epoch = 0

    def __len__(self) -> int:
        steps = steps_per_epoch(self.num_images, self.config.batch_size)
        return steps * self.config.num_virtual_devices // self.num_processes

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = epoch_order(self.num_images, self.config.seed, self.epoch)
        size = self.config.device_batch_size
        num_sub_batches = len(self) * self.num_processes
        for sub_batch in range(self.process_index, num_sub_batches, self.num_processes):
            samples = order[sub_batch * size : (sub_batch + 1) * size]
            yield [(self.epoch, int(sample)) for sample in samples]


def decode_image(image: dict[str, object]) -> np.ndarray:
    """An undecoded {"bytes", "path"} as (H, W, 3) uint8 RGB, turned upright by its EXIF orientation."""
    content = image["bytes"]
    if content is None:
        content = Path(image["path"]).read_bytes()
    pixels = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR_RGB) if content else None
    if pixels is None:  # formats that OpenCV was built without
        pixels = np.array(Image.open(io.BytesIO(content)).convert("RGB"))
    return pixels


class ViewBatch(NamedTuple):
    """Two views of N images, not yet coloured: view 1 of all images, then view 2 of all."""

    crops: Tensor  # (2 N, H, W, 3) uint8
    photometry: Photometry  # of 2 N views
    samples: Tensor  # (N,) int64


class TwoViews:
    """A map-style torch dataset whose batch, asked for by (epoch, sample) pairs, is a ViewBatch."""

    def __init__(self, images: Dataset, config: PretrainConfig) -> None:
        self.images = images.select_columns("image")
        self.config = config

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, keys: Sequence[tuple[int, int]]) -> ViewBatch:
        size, num_images = self.config.image_size, len(keys)
        crops = np.empty((2, num_images, size, size, 3), np.uint8)
        uniforms = np.empty((2, num_images, NUM_UNIFORMS))
        rows = self.images[[sample for _, sample in keys]]["image"]
        for i, ((epoch, sample), row) in enumerate(zip(keys, rows, strict=True)):
            image = decode_image(row)
            for view in range(2):
                uniforms[view, i] = draw_uniforms(self.config.seed, epoch, sample, view)
                crops[view, i] = view_crop(image, uniforms[view, i], self.config)
        views = np.repeat([0, 1], num_images)
        return ViewBatch(
            crops=torch.from_numpy(crops.reshape(-1, size, size, 3)),
            photometry=photometry_parameters(uniforms.reshape(-1, NUM_UNIFORMS), views, self.config),
            samples=torch.tensor([sample for _, sample in keys]),
        )


class CentralViews:
    """A map-style torch dataset whose batch, asked for by samples, is their evaluation crops (N, H, W, 3) uint8."""

    def __init__(self, images: Dataset, config: PretrainConfig) -> None:
        self.images = images.select_columns("image")
        self.config = config

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, samples: Sequence[int]) -> Tensor:
        size, share = self.config.image_size, self.config.evaluation_crop
        rows = self.images[list(samples)]["image"]
        return torch.from_numpy(np.stack([central_view(decode_image(row), size, share) for row in rows]))


def create_loader(
    dataset: TwoViews | CentralViews,
    batches,
    config: PretrainConfig,
    pin_memory: bool = False,
    persistent: bool = False,
) -> DataLoader:
    """A DataLoader of whole batches, in the order of `batches` (an iterable of lists of keys).

    It is not given to `accelerator.prepare`, which would split the batches a second time: `batches` holds
    this process's own.
    """
    num_workers = default_num_workers() if config.num_workers is None else config.num_workers
    cv2.setNumThreads(0)  # the workers are the parallelism; OpenCV's threads would fight over the cores
    return DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=as_it_is,
        num_workers=num_workers,
        pin_memory=pin_memory,
        persistent_workers=persistent and num_workers > 0,
        prefetch_factor=4 if num_workers > 0 else None,
        worker_init_fn=quiet_worker,
        generator=torch.Generator(),  # its own: the global one must not depend on how often a loader started
    )


def as_it_is(batch):
    return batch


def quiet_worker(worker: int) -> None:
    cv2.setNumThreads(0)
    torch.set_num_threads(1)


def default_num_workers() -> int:
    """Cores that training leaves free, shared by the processes of this machine; at most 8 each."""
    num_local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", "1")))
    return max(0, min(8, len(os.sched_getaffinity(0)) // num_local_processes - 1))
