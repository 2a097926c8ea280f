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
from m2t_accel.config.fields import count, write_errors_in_one_line
from m2t_accel.distributed.device import device_errors_in_one_line
from m2t_accel.evaluation.features import (
    BATCH_SIZE,
    Features,
    embed_images,
    fingerprint,
    gather_features,
    gather_rows,
    left_out,
    none_decoded,
    not_finite,
    print_broken,
    read_labels,
    sample_labels,
)
from m2t_accel.evaluation.setup import run_once, start_evaluation, write_result

MAX_BLOCK = 8192  # bank images compared at once; 268 MB of similarities with as many queries
MIN_BLOCKS = 16  # blocks of a bank, so that several processes can share it


class KnnResult(NamedTuple):
    """Result of a kNN evaluation."""

    accuracies: dict[int, float]  # share of the queries classified correctly, for each number of neighbours that vote
    num_bank: int
    num_queries: int
    broken: tuple[set[int], set[int]]  # numbers of the images of bank and queries that cannot be decoded: left out
    fingerprints: tuple[str, str]  # of bank and queries
    samples: Tensor  # (N,) the queries' numbers
    neighbours: Tensor  # (N, k) numbers of the nearest images in the bank, the nearest first, for the largest k
    similarities: Tensor  # (N, k) their cosines


def measure_knn(
    encoder: nn.Module,
    bank: Dataset,
    queries: Dataset,
    num_classes: int,
    config: ImageSettings,
    accelerator: Accelerator,
    ks: Sequence[int] = (20,),
    temperature: float = KnnConfig.temperature,
    after_batch: Callable[[], None] | None = None,
) -> KnnResult:
    """Classify labelled `queries` by their nearest neighbours in the labelled `bank`. A collective call.

    If the bank has fewer than k images, all of them vote, and the result names their number instead of k.
    Each process keeps its share of the bank's features in main memory, and the features of all queries on its device.

    Args:
        after_batch: see `embed_images`.

    Raises:
        ConfigurationError: no image of the bank or of the queries can be decoded, or features are not finite; the same
            on every process.
    """
    size = block_size(len(bank))
    blocks = list(join_blocks(embed_images(encoder, bank, config, accelerator, size // BATCH_SIZE, after_batch), size))
    batches = embed_images(encoder, queries, config, accelerator, after_batch=after_batch)
    found = gather_features(batches, len(queries), accelerator, accelerator.device)
    no_numbers = torch.empty(0, dtype=torch.int64)
    bank_columns = [(block.samples, block.digests) for block in blocks]
    bank_samples, bank_digests = gather_rows((no_numbers, no_numbers), bank_columns, accelerator)
    if not len(bank_samples):
        raise none_decoded("training images", bank, config)
    if not len(found.samples):
        raise none_decoded("validation images", queries, config)
    ks = list(dict.fromkeys(min(k, len(bank_samples)) for k in ks))
    similarities, neighbours = merge_shares(*find_nearest(blocks, found.features, max(ks)), accelerator)
    if similarities.isnan().any():  # a feature of the bank; topk takes NaN for the largest value
        raise not_finite(accelerator)
    labels = sample_labels(queries, found.samples)
    bank_labels = torch.from_numpy(read_labels(bank)).to(labels.device)
    return KnnResult(
        {k: knn_accuracy(similarities, bank_labels[neighbours], labels, num_classes, k, temperature) for k in ks},
        len(bank_samples),
        len(found.samples),
        (left_out(bank, bank_samples), left_out(queries, found.samples)),
        (fingerprint(bank_digests, bank_labels[bank_samples]), fingerprint(found.digests, labels)),
        found.samples,
        neighbours,
        similarities,
    )


def few_neighbours(k: int, num_bank: int) -> str:
    """Return a line for a bank with fewer than k images."""
    return f"kNN: only {count(num_bank, 'image')} to search for neighbours, so these {num_bank} vote instead of k = {k}"


def block_size(num_images: int) -> int:
    """Return the number of bank images to compare at once: whole batches, the same on any number of processes."""
    return max(BATCH_SIZE, min(MAX_BLOCK, num_images // MIN_BLOCKS // BATCH_SIZE * BATCH_SIZE))


def join_blocks(batches: Iterable[Features], size: int) -> Iterator[Features]:
    """Join the features of batches into blocks of `size` images, in main memory.

    A whole block is copied at once, because each copy waits for the device.
    """
    block: list[Features] = []
    for batch in batches:
        if not len(batch.samples):
            continue
        if block and batch.samples[0] // size != block[0].samples[0] // size:
            yield Features(*(torch.cat(rows).cpu() for rows in zip(*block, strict=True)))
            block = []
        block.append(batch)
    if block:
        yield Features(*(torch.cat(rows).cpu() for rows in zip(*block, strict=True)))


def find_nearest(blocks: Iterable[Features], queries: Tensor, k: int, chunk: int = 2048) -> tuple[Tensor, Tensor]:
    """Find the k images of a bank that are most similar to each query.

    This takes memory for the results, for one block, and for the similarities of the block to `chunk` queries.

    Args:
        queries: features (N, C).

    Returns:
        The cosines (N, k) in descending order, and the sample numbers (N, k). If the bank has fewer than k images, the
        rest of the cosines is -inf and the rest of the sample numbers is 0.
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
            similarities[rows], samples[rows] = most_similar(
                torch.cat([similarities[rows], best], dim=1), torch.cat([samples[rows], numbers[places]], dim=1), k
            )
    return similarities, samples


def most_similar(similarities: Tensor, samples: Tensor, k: int) -> tuple[Tensor, Tensor]:
    best, places = similarities.topk(k, dim=1)
    return best, samples.gather(1, places)


def merge_shares(similarities: Tensor, samples: Tensor, accelerator: Accelerator) -> tuple[Tensor, Tensor]:
    """Return the nearest images (N, k) among those that each process found in its share. A collective call."""
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
        parts.append(most_similar(*shares, k))
    return tuple(torch.cat(rows) for rows in zip(*parts, strict=True))


def knn_accuracy(
    similarities: Tensor, neighbour_labels: Tensor, labels: Tensor, num_classes: int, k: int, temperature: float
) -> float:
    """Return the share of the queries that their k nearest neighbours classify correctly.

    Each neighbour votes for its label with the weight exp(cosine / temperature).
    Source: Wu et al. (arXiv 1805.01978), section 3.4.

    Args:
        similarities: cosines (N, K) in descending order; K is at least k.
        neighbour_labels: (N, K).
        labels: (N,).
    """
    num_correct = torch.zeros((), dtype=torch.int64, device=labels.device)
    for start in range(0, len(labels), MAX_BLOCK):
        rows = slice(start, start + MAX_BLOCK)
        # Divided by the weight of the nearest neighbour, because exp(cosine / 0.01) overflows float32.
        weights = ((similarities[rows, :k] - similarities[rows, :1]) / temperature).exp()
        votes = weights.new_zeros(len(weights), num_classes)
        votes.scatter_add_(1, neighbour_labels[rows, :k], weights)
        num_correct += (votes.argmax(dim=1) == labels[rows]).sum()
    return num_correct.item() / len(labels)


@device_errors_in_one_line
def evaluate_knn(config: KnnConfig) -> dict[str, object]:
    """Measure the kNN accuracy of an encoder on the validation split. A collective call.

    Write result.json and config.yaml, print a summary and return the result.

    Raises:
        ConfigurationError: the launch, the encoder or the images are not usable, or the result cannot be written.
    """
    evaluation = start_evaluation(config)
    images = evaluation.images

    def measure() -> dict[str, object]:
        started = time.perf_counter()
        if max(config.k) > len(images.bank):
            evaluation.accelerator.print(few_neighbours(max(config.k), len(images.bank)))
        found = measure_knn(
            evaluation.encoder,
            images.bank,
            images.validation,
            len(images.class_names),
            evaluation.config,
            evaluation.accelerator,
            config.k,
            config.temperature,
        )
        bank, test = found.fingerprints
        data = {
            "bank": {"images": found.num_bank, "fingerprint": bank},
            "test": {"images": found.num_queries, "fingerprint": test},
            "undecodable": sum(map(len, found.broken)),
        }
        parts = list(zip((images.bank, images.validation), found.broken, strict=True))
        print_broken(parts, evaluation.config, evaluation.accelerator)
        figures = {f"top1_k{k}": share for k, share in found.accuracies.items()}
        with write_errors_in_one_line("output_dir", config.output_dir):
            return write_result(evaluation, figures, data, time.perf_counter() - started)

    return run_once(evaluation, measure)
