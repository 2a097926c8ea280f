"""Features of images by an encoder, and the vote of their nearest neighbours.

Images go through the encoder in the same batches on any number of processes, so that a figure is the same to its
last digit.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from datasets import Dataset
from torch import Tensor, nn
from torch.nn import functional

from m2t_accel.data import CentralViews
from m2t_accel.data_settings import ImageSettings
from m2t_accel.loader import create_loader, read
from m2t_accel.model import embed
from m2t_accel.photometry import evaluation_view
from m2t_accel.settings import ConfigurationError

BATCH_SIZE = 128  # images that go through the encoder together
MAX_BLOCK = 8192  # of a bank, that meets queries at once; with as many queries 268 MB of similarities
MIN_BLOCKS = 16  # of a bank, so that several processes have a share of it
KNN_TEMPERATURE = 0.07  # Source: Wu et al. (arXiv 1805.01978), section 3.4


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


# --- nearest neighbours


class KnnResult(NamedTuple):
    """Of a vote: the share of the queries that it got right, for each k, and who voted on whom."""

    accuracies: dict[int, float]
    num_bank: int
    num_queries: int
    num_broken: int  # images of both that cannot be decoded, and are left out
    fingerprints: tuple[str, str]  # of bank and queries


def measure_knn(
    encoder: nn.Module,
    bank: Dataset,
    queries: Dataset,
    num_classes: int,
    config: ImageSettings,
    accelerator: Accelerator,
    ks: Sequence[int] = (20,),
    temperature: float = KNN_TEMPERATURE,
    after_batch: Callable[[], None] | None = None,
) -> KnnResult:
    """Weighted kNN accuracy of an encoder: labelled `queries` by labelled `bank`; a collective call.

    Each process holds its share of the bank's features, in the main memory, and all those of the queries.
    `after_batch` is as in `embed_images`.

    Raises:
        ConfigurationError: none of the images can be decoded; the same on every process.
    """
    size = block_size(len(bank))
    blocks = list(joined(embed_images(encoder, bank, config, accelerator, size // BATCH_SIZE, after_batch), size))
    found = gather_features(
        list(embed_images(encoder, queries, config, accelerator, after_batch=after_batch)), accelerator
    )
    no_number = torch.empty(0, dtype=torch.int64)
    voters, voter_digests = gather_rows(
        [torch.cat([no_number, *column]) for column in zip(*((b.samples, b.digests) for b in blocks), strict=True)]
        or [no_number, no_number],
        accelerator,
    )
    if not len(voters) or not len(found.samples):
        raise ConfigurationError(f"--dataset {config.dataset}: of the images to measure kNN with, none can be decoded")
    similarities, samples = merged(*nearest(blocks, found.features, max(ks)), accelerator)
    bank_labels, query_labels = (torch.from_numpy(labels_of(images)).to(samples.device) for images in (bank, queries))
    labels = query_labels[found.samples]
    return KnnResult(
        {k: vote(similarities, bank_labels[samples], labels, num_classes, k, temperature) for k in ks},
        len(voters),
        len(found.samples),
        len(bank) + len(queries) - len(voters) - len(found.samples),
        (fingerprint(voter_digests, bank_labels[voters]), fingerprint(found.digests, labels)),
    )


def labels_of(images: Dataset) -> np.ndarray:
    """The labels (N,) int64 of labelled images."""
    # Not numpy's format, which takes 7 s for a million images that are selected of others, where Arrow's takes 2.
    return images.with_format("arrow")["label"][:].to_numpy().astype(np.int64)


def block_size(num_images: int) -> int:
    """Images of a bank that meet the queries at once: whole batches, and the same on any number of processes."""
    return max(BATCH_SIZE, min(MAX_BLOCK, num_images // MIN_BLOCKS // BATCH_SIZE * BATCH_SIZE))


def joined(parts: Iterable[Features], size: int) -> Iterator[Features]:
    """The features of batches as those of blocks, in the main memory."""
    waiting: list[Features] = []
    for part in parts:
        if not len(part.samples):
            continue
        if waiting and part.samples[0] // size != waiting[0].samples[0] // size:
            yield Features(*(torch.cat(rows) for rows in zip(*waiting, strict=True)))
            waiting = []
        waiting.append(Features(*(rows.cpu() for rows in part)))
    if waiting:
        yield Features(*(torch.cat(rows) for rows in zip(*waiting, strict=True)))


def nearest(blocks: Iterable[Features], queries: Tensor, k: int, chunk: int = 2048) -> tuple[Tensor, Tensor]:
    """The k most similar of a bank to each query (N, C): cosines (N, k), falling, and the bank's samples (N, k).

    Where the bank has fewer than k, the rest have the cosine -inf, and the sample 0. Memory: the results, a block and
    its similarities to `chunk` queries.
    """
    queries = functional.normalize(queries, dim=1)
    similarities = queries.new_full((len(queries), k), -torch.inf)
    samples = torch.zeros(len(queries), k, dtype=torch.int64, device=queries.device)
    for block in blocks:
        bank = functional.normalize(block.features.to(queries.device), dim=1).T
        numbers = block.samples.to(queries.device)
        for start in range(0, len(queries), chunk):
            rows = slice(start, start + chunk)
            best, places = (queries[rows] @ bank).topk(min(k, len(numbers)), dim=1)
            similarities[rows], samples[rows] = best_of(
                torch.cat([similarities[rows], best], dim=1), torch.cat([samples[rows], numbers[places]], dim=1), k
            )
    return similarities, samples


def best_of(similarities: Tensor, samples: Tensor, k: int) -> tuple[Tensor, Tensor]:
    best, places = similarities.topk(k, dim=1)
    return best, samples.gather(1, places)


def merged(similarities: Tensor, samples: Tensor, accelerator: Accelerator) -> tuple[Tensor, Tensor]:
    """The nearest among the shares of all processes; a collective call."""
    if accelerator.num_processes == 1:
        return similarities, samples
    k = similarities.shape[1]
    parts = []
    for rows in zip(similarities.split(MAX_BLOCK), samples.split(MAX_BLOCK), strict=True):
        # (processes · n, k) to (n, processes · k)
        shares = (
            accelerator.gather(part.contiguous())
            .unflatten(0, (accelerator.num_processes, -1))
            .transpose(0, 1)
            .flatten(1)
            for part in rows
        )
        parts.append(best_of(*shares, k))
    return tuple(torch.cat(rows) for rows in zip(*parts, strict=True))


def vote(
    similarities: Tensor, neighbour_labels: Tensor, labels: Tensor, num_classes: int, k: int, temperature: float
) -> float:
    """Share of the queries that a vote of their k nearest, weighted by exp(cosine / temperature), gets right.

    similarities and neighbour_labels (N, K), falling, K at least k; labels (N,).
    Source: Wu et al. (arXiv 1805.01978), section 3.4.
    """
    num_correct = 0
    for start in range(0, len(labels), MAX_BLOCK):
        rows = slice(start, start + MAX_BLOCK)
        weights = (similarities[rows, :k] / temperature).exp()
        votes = weights.new_zeros(len(weights), num_classes)
        votes.scatter_add_(1, neighbour_labels[rows, :k], weights)
        num_correct += (votes.argmax(dim=1) == labels[rows]).sum().item()
    return num_correct / len(labels)
