"""Features of images by an encoder, in the same batches on any number of processes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from datasets import Dataset
from torch import Tensor, nn

from m2t_accel.config.data import ImageSettings
from m2t_accel.data.loader import create_loader, read
from m2t_accel.data.photometry import evaluation_view
from m2t_accel.data.views import CentralViews
from m2t_accel.model import embed

BATCH_SIZE = 128  # images that go through the encoder together


class Features(NamedTuple):
    """Features of N images."""

    samples: Tensor  # (N,) int64: which images they are of; those that cannot be decoded are left out
    features: Tensor  # (N, C) float32
    digests: Tensor  # (N,) int64: of the images' files


@torch.no_grad()
def embed_images(
    encoder: nn.Module,
    images: Dataset,
    config: ImageSettings,
    accelerator: Accelerator,
    batches_a_turn: int = 1,
    after_batch: Callable[[], None] | None = None,
) -> Iterator[Features]:
    """Features of this process's batches of central views, in evaluation mode, on its device.

    The processes take so many batches in turn. The encoder is left in the mode it came in. `after_batch` is called
    equally often by every process, so it may be a collective call; what it raises ends the work.
    """
    batches = batches_of(accelerator.process_index, len(images), accelerator.num_processes, batches_a_turn)
    most = len(batches_of(0, len(images), accelerator.num_processes, batches_a_turn))
    parameter = next(encoder.parameters())
    was_training = encoder.training
    encoder.eval()
    try:
        for samples, batch in zip(
            batches, read(create_loader(CentralViews(images, config), batches, config)), strict=True
        ):
            inputs = evaluation_view(batch.crops.to(accelerator.device), config).to(parameter.dtype)
            with accelerator.autocast():
                features = embed(encoder, inputs).float()
            broken = {image.sample for image in batch.bad}
            good = torch.tensor([i for i, sample in enumerate(samples) if sample not in broken], dtype=torch.int64)
            if after_batch is not None:
                after_batch()
            yield Features(torch.tensor(samples)[good], features[good.to(features.device)], batch.digests[good])
        for _ in range(most - len(batches) if after_batch is not None else 0):
            after_batch()
    finally:
        encoder.train(was_training)


def batches_of(process_index: int, num_images: int, num_processes: int, batches_a_turn: int) -> list[list[int]]:
    """The batches of one process, as the numbers of their images; the first process has the most."""
    turn = batches_a_turn * BATCH_SIZE
    starts = range(process_index * turn, num_images, num_processes * turn)
    turns = [range(first, min(first + turn, num_images)) for first in starts]
    return [list(part[start : start + BATCH_SIZE]) for part in turns for start in range(0, len(part), BATCH_SIZE)]


def gather_features(parts: Sequence[Features], accelerator: Accelerator) -> Features:
    """The features of all processes, in the order of their samples, on each process's device; a collective call."""
    width = torch.tensor([part.features.shape[1] for part in parts[:1]] or [0], device=accelerator.device)
    no_number = torch.empty(0, dtype=torch.int64)
    # A process may have had no batch, and must hand over something of the right width all the same.
    nothing = Features(no_number, torch.empty(0, int(accelerator.gather(width).max()), dtype=torch.float32), no_number)
    rows = [torch.cat([part.to(accelerator.device) for part in column]) for column in zip(nothing, *parts, strict=True)]
    return Features(*gather_rows(rows, accelerator))


def gather_rows(columns: Sequence[Tensor], accelerator: Accelerator) -> list[Tensor]:
    """The rows of all processes, by the numbers in the first column, on each process's device; a collective call."""
    columns = [column.to(accelerator.device) for column in columns]
    if accelerator.num_processes > 1:
        # Of different lengths: what fills them up has the number -1.
        columns = [accelerator.gather(accelerator.pad_across_processes(column, pad_index=-1)) for column in columns]
    order = columns[0].argsort()
    order = order[(columns[0] < 0).sum() :]
    return [column[order] for column in columns]


def fingerprint(digests: Tensor, labels: Tensor) -> str:
    """A name for a set of labelled images: the same for the same files in any order, folder or kind of shard."""
    rows = np.stack([digests.cpu().numpy(), labels.cpu().numpy()], axis=1)
    rows = rows[np.lexsort(rows.T)].astype("<i8")
    return hashlib.sha256(rows.tobytes()).hexdigest()[:16]


def labels_of(images: Dataset) -> np.ndarray:
    """The labels (N,) int64 of labelled images."""
    # Not numpy's format, which takes 7 s for a million images that are selected of others, where Arrow's takes 2.
    return images.with_format("arrow")["label"][:].to_numpy().astype(np.int64)
