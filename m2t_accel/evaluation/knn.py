"""Weighted kNN evaluation of an encoder."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from accelerate import Accelerator
from datasets import Dataset
from torch import Tensor, nn
from torch.nn import functional

from m2t_accel.config.data import ImageSettings
from m2t_accel.config.evaluation import KnnConfig
from m2t_accel.config.fields import ConfigurationError
from m2t_accel.data.loader import dead_workers_in_one_line
from m2t_accel.evaluation.features import (
    BATCH_SIZE,
    Features,
    embed_images,
    fingerprint,
    gather_features,
    gather_rows,
    labels_of,
)
from m2t_accel.evaluation.setup import open_folder, say, start_evaluation, write_result

MAX_BLOCK = 8192  # of a bank, that meets queries at once; with as many queries 268 MB of similarities
MIN_BLOCKS = 16  # of a bank, so that several processes have a share of it
KNN_TEMPERATURE = 0.07  # Source: Wu et al. (arXiv 1805.01978), section 3.4


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


def evaluate_knn(config: KnnConfig) -> dict[str, object]:
    """Weighted kNN accuracy of the encoder on the validation split; writes result.json and prints a line.

    A collective call. Its result comes back.

    Raises:
        ConfigurationError: the launch, the encoder, the images or the folder do not allow it.
    """
    evaluation = start_evaluation(config)
    accelerator, images = evaluation.accelerator, evaluation.images
    result = open_folder(evaluation)
    if result is None:
        accelerator.print(f"{evaluation.loaded.note}\n{images.note}")
        started = time.perf_counter()
        with dead_workers_in_one_line():
            found = measure_knn(
                evaluation.encoder,
                images.bank,
                images.validation,
                len(images.class_names),
                evaluation.config,
                accelerator,
                config.k,
                config.temperature,
            )
        bank, test = found.fingerprints
        data = {
            "bank": {"images": found.num_bank, "fingerprint": bank},
            "test": {"images": found.num_queries, "fingerprint": test},
            "undecodable": found.num_broken,
        }
        figures = {f"top1_k{k}": share for k, share in found.accuracies.items()}
        result = write_result(evaluation, figures, data, time.perf_counter() - started)
    say(result, evaluation)
    return result
