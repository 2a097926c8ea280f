"""Features of images by an encoder, in batches that do not depend on the number of processes."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from datasets import Dataset
from torch import Tensor, nn

from m2t_accel.config.data import ImageSettings
from m2t_accel.config.fields import ConfigurationError, count
from m2t_accel.data.decode import DecodeError, read_bytes
from m2t_accel.data.loader import create_loader, read, upload
from m2t_accel.data.photometry import evaluation_view
from m2t_accel.data.requests import Request
from m2t_accel.data.views import CentralViews, file_digest, read_rows
from m2t_accel.distributed.device import kernel_search
from m2t_accel.distributed.launch import num_cores
from m2t_accel.model import embed

BATCH_SIZE = 128  # images that go through the encoder together
GATHERED_BATCHES = 64  # batches of a process whose features are gathered together, 67 MB of ResNet-50's


class Features(NamedTuple):
    """Features of N images; images that cannot be decoded are left out."""

    samples: Tensor  # (N,) int64: the images' numbers in the dataset
    features: Tensor  # (N, C) float32
    digests: Tensor  # (N,) int64: hashes of the image files


@torch.no_grad()
def embed_images(
    encoder: nn.Module,
    images: Dataset,
    config: ImageSettings,
    accelerator: Accelerator,
    batches_per_turn: int = 1,
    after_batch: Callable[[], None] | None = None,
) -> Iterator[Features]:
    """Yield the features of this process's batches of centre crops, computed on its device in evaluation mode.

    At the end the encoder returns to the mode that it had before.

    Args:
        batches_per_turn: number of batches that a process takes before the next process has its turn.
        after_batch: called after each batch, equally often on every process, so it may be a collective call. It may
            raise.
    """
    batches = process_batches(accelerator.process_index, len(images), accelerator.num_processes, batches_per_turn)
    most_batches = len(process_batches(0, len(images), accelerator.num_processes, batches_per_turn))
    dtype = next(encoder.parameters()).dtype
    was_training = encoder.training
    encoder.eval()
    try:
        requests = [Request(0, np.array(samples), None) for samples in batches]
        loader = create_loader(CentralViews(images, config), requests, config, accelerator.device)
        for samples, batch in zip(batches, read(loader, accelerator.device), strict=True):
            inputs = evaluation_view(batch.crops, config).to(dtype)
            with accelerator.autocast(), kernel_search(len(samples) == BATCH_SIZE):
                features = embed(encoder, inputs).float()
            found = Features(torch.tensor(samples), features, batch.digests)
            if batch.bad:
                broken = {image.sample for image in batch.bad}
                good = torch.tensor([i for i, sample in enumerate(samples) if sample not in broken], dtype=torch.int64)
                found = Features(*(rows[upload(good, rows.device)] for rows in found))
            if after_batch is not None:
                after_batch()
            yield found
        if after_batch is not None:
            for _ in range(most_batches - len(batches)):
                after_batch()
    finally:
        encoder.train(was_training)


def none_decoded(what: str, images: Dataset, config: ImageSettings) -> ConfigurationError:
    """Return the error for images none of which can be decoded; it names the first and the reason."""
    first = first_broken([(images, {0})], config)
    return ConfigurationError(f"--dataset {config.dataset}: none of the {len(images):,} {what} can be decoded{first}")


def left_out(images: Dataset, samples: Tensor) -> set[int]:
    """Return the numbers of the images that are not among those decoded, `samples` (N,)."""
    return set(range(len(images))).difference(samples.tolist()) if len(samples) < len(images) else set()


def first_broken(parts: Iterable[tuple[Dataset, set[int]]], config: ImageSettings) -> str:
    """Return `, the first is PATH (REASON)` for the first image that cannot be decoded; empty if there is none.

    Args:
        parts: images, and the numbers of those that cannot be decoded.
    """
    for images, broken in parts:
        if broken:
            bad = CentralViews(images, config).__getitems__(Request(0, np.array([min(broken)]), None)).bad
            return f", the first is {bad[0].path} ({bad[0].reason})" if bad else ""
    return ""


def print_broken(parts: Sequence[tuple[Dataset, set[int]]], config: ImageSettings, accelerator: Accelerator) -> None:
    """Print the number of the images that cannot be decoded, and the first of them, on process 0.

    Args:
        parts: images, and the numbers of those that cannot be decoded.
    """
    number = sum(len(broken) for _, broken in parts)
    if number and accelerator.is_main_process:
        print(f"{count(number, 'image')} cannot be decoded, and left out{first_broken(parts, config)}", flush=True)


class NotFiniteError(ConfigurationError):
    """Features are NaN or infinite."""


def not_finite(accelerator: Accelerator) -> NotFiniteError:
    """Return the error for features that are NaN or infinite. Their neighbours and classes would be arbitrary."""
    precision = accelerator.mixed_precision
    overflow = (
        "" if precision == "no" else f", or {precision} overflows: type `accelerate launch --mixed_precision no …`"
    )
    return NotFiniteError(f"the encoder's features are not finite: its weights are damaged{overflow}")


def process_batches(process_index: int, num_images: int, num_processes: int, batches_per_turn: int) -> list[list[int]]:
    """Return the batches of one process as lists of sample numbers. No process has more batches than the first."""
    turn = batches_per_turn * BATCH_SIZE
    starts = range(process_index * turn, num_images, num_processes * turn)
    turns = [range(start, min(start + turn, num_images)) for start in starts]
    return [list(part[start : start + BATCH_SIZE]) for part in turns for start in range(0, len(part), BATCH_SIZE)]


def gather_features(
    batches: Iterable[Features], num_images: int, accelerator: Accelerator, device: torch.device
) -> Features:
    """Return the features of all processes, sorted by sample, in the memory of `device`. A collective call.

    They are gathered while they are computed, so they are in memory only once. A block of batches is copied at once,
    because each copy to main memory waits for the accelerator's device.

    Args:
        batches: this process's batches, as `embed_images` yields them if a process takes one batch in a turn.
        num_images: number of images, with those that cannot be decoded.

    Raises:
        ConfigurationError: the features are not finite; the same on every process.
    """
    batches = iter(batches)
    most_batches = len(process_batches(0, num_images, accelerator.num_processes, 1))
    no_numbers = torch.empty(0, dtype=torch.int64)
    found = None
    # Each process gathers equally often. One batch more than the most, so that `batches` comes to its end.
    for _ in range(0, most_batches + 1, GATHERED_BATCHES):
        block = list(itertools.islice(batches, GATHERED_BATCHES))
        if found is None:
            width = torch.tensor(block[0].features.shape[1] if block else 0, device=accelerator.device)
            empty = Features(no_numbers, torch.empty(0, int(accelerator.gather(width).max())), no_numbers)
            found = Features(*(rows.new_empty(num_images, *rows.shape[1:], device=device) for rows in empty))
            found.samples.fill_(-1)
        gathered = gather_rows(empty, block, accelerator)
        if not gathered[1].isfinite().all():
            raise not_finite(accelerator)
        columns = [rows.to(device) for rows in gathered]
        for rows, column in zip(found, columns, strict=True):
            rows[columns[0]] = column
    decoded = found.samples >= 0
    return found if decoded.all() else Features(*(rows[decoded] for rows in found))


def gather_rows(empty: Sequence[Tensor], parts: Iterable[Sequence[Tensor]], accelerator: Accelerator) -> list[Tensor]:
    """Return the rows of all processes, sorted by sample, on each process's device. A collective call.

    Args:
        empty: the columns without rows: the sample numbers, then any others. A process without parts sends these.
        parts: columns like those of `empty`, with rows.
    """
    device = accelerator.device
    columns = [torch.cat([rows.to(device) for rows in column]) for column in zip(empty, *parts, strict=True)]
    if accelerator.num_processes > 1:
        # Processes may have different numbers of rows. Rows added as padding have the sample number -1.
        columns = [accelerator.gather(accelerator.pad_across_processes(column, pad_index=-1)) for column in columns]
    order = columns[0].argsort()
    order = order[(columns[0] < 0).sum() :]
    return [column[order] for column in columns]


def fingerprint(digests: Tensor, labels: Tensor) -> str:
    """Return a name for a set of labelled images. It depends neither on their order nor on their folder or format."""
    rows = np.stack([digests.cpu().numpy(), labels.cpu().numpy()], axis=1)
    rows = rows[np.lexsort(rows.T)].astype("<i8")
    return hashlib.sha256(rows.tobytes()).hexdigest()[:16]


def fingerprint_of_files(images: Dataset, left_out: set[int], accelerator: Accelerator) -> str:
    """Return the fingerprint of labelled images without the samples `left_out`. A collective call.

    It equals the fingerprint of their features' digests. The files are read again, but not decoded.
    """

    def read_digests(samples: list[int]) -> tuple[Tensor, Tensor]:
        found = {}
        for sample, row in zip(samples, read_rows(images, samples), strict=True):
            with contextlib.suppress(DecodeError):  # it cannot be read any more
                found[sample] = file_digest(read_bytes(row))
        return torch.tensor(list(found), dtype=torch.int64), torch.tensor(list(found.values()), dtype=torch.int64)

    batches = process_batches(accelerator.process_index, len(images), accelerator.num_processes, 1)
    with ThreadPoolExecutor(num_cores()) as threads:  # reading and hashing need no interpreter lock
        parts = list(threads.map(read_digests, batches))
    no_numbers = torch.empty(0, dtype=torch.int64)
    samples, digests = gather_rows((no_numbers, no_numbers), parts, accelerator)
    kept = ~torch.isin(samples, torch.tensor(sorted(left_out), dtype=torch.int64, device=samples.device))
    return fingerprint(digests[kept], sample_labels(images, samples[kept]))


def read_labels(images: Dataset) -> np.ndarray:
    """Return the labels (N,) int64 of labelled images."""
    # For a selection of a million images numpy's format takes 7 s, Arrow's 2 s.
    return images.with_format("arrow")["label"][:].to_numpy().astype(np.int64)


def sample_labels(images: Dataset, samples: Tensor) -> Tensor:
    """Return the labels (N,) int64 of the images with these numbers (N,), on the device of `samples`."""
    return torch.from_numpy(read_labels(images)).to(samples.device)[samples]
