"""Train a classifier and measure it on the validation split: shared by linear probe and fine-tuning."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedModel

from m2t_accel.config.data import check_enough_images
from m2t_accel.distributed.processes import broadcast_object, gather_to_all, on_all_processes
from m2t_accel.evaluation.features import embed_images, fingerprint, gather_rows, none_decoded, sample_labels
from m2t_accel.evaluation.heads import save_classifier
from m2t_accel.evaluation.setup import Evaluation, run_once, write_result


class Trained(NamedTuple):
    """A trained classifier."""

    encoder: nn.Module
    head: nn.Module  # features (N, C) in, logits (N, classes) out
    model: PreTrainedModel | None  # both in one stock transformers model, if transformers has one
    broken: set[int]  # training images that this process could not decode
    seconds: float = 0.0  # of training in earlier runs
    protocol: Mapping[str, object] = {}  # more entries of the result's protocol


class Ranking(NamedTuple):
    """The most likely classes of N images; images that cannot be decoded are left out."""

    classes: Tensor  # (N, heads, 5) int64, the most likely first; with fewer than 5 classes, all of them
    labels: Tensor  # (N,) int64
    digests: Tensor  # (N,) int64: hashes of the image files


def train_and_measure(evaluation: Evaluation, train: Dataset, fit: Callable[[], Trained]) -> dict[str, object]:
    """Train a classifier, measure it once on the validation split, and return the result. A collective call.

    Write result.json, config.yaml and classifier/ (a stock transformers model), and print a summary.

    Args:
        train: the images that `fit` trains on.

    Raises:
        ConfigurationError: the images or the output folder is not usable.
    """
    config, accelerator, images = evaluation.config, evaluation.accelerator, evaluation.images
    check_enough_images(len(train), config)

    def measure() -> dict[str, object]:
        started = time.perf_counter()
        trained = fit()
        test = rank_classes(trained.encoder, [trained.head], images.validation, evaluation)
        num_broken = len(set().union(*gather_to_all(trained.broken)))
        data = {
            "train": {"images": len(train)},
            "test": {"images": len(test.labels), "fingerprint": fingerprint(test.digests, test.labels)},
            "undecodable": num_broken + len(images.validation) - len(test.labels),
        }
        seconds = trained.seconds + time.perf_counter() - started

        def finish() -> dict[str, object] | None:
            if not accelerator.is_main_process:
                return None
            figures = accuracy(test.classes[:, 0], test.labels, len(images.class_names))
            if trained.model is not None:
                save_classifier(trained.model, config, Path(config.output_dir) / "classifier")
            return write_result(evaluation, figures, data, seconds, **trained.protocol)

        return broadcast_object(on_all_processes(accelerator, finish))

    return run_once(evaluation, measure)


@torch.no_grad()
def rank_classes(encoder: nn.Module, heads: Sequence[nn.Module], images: Dataset, evaluation: Evaluation) -> Ranking:
    """Rank the classes of all images by each head, on every process. A collective call.

    Each image is counted once, on any number of processes.

    Raises:
        ConfigurationError: no image can be decoded; the same on every process.
    """
    parts = []
    for samples, features, digests in embed_images(encoder, images, evaluation.config, evaluation.accelerator):
        logits = torch.stack([head(features) for head in heads], dim=1)
        parts.append((samples, logits.topk(min(5, logits.shape[2]), dim=2).indices, digests))
    no_numbers = torch.empty(0, dtype=torch.int64)
    no_classes = torch.empty(0, len(heads), min(5, len(evaluation.images.class_names)), dtype=torch.int64)
    samples, classes, digests = gather_rows((no_numbers, no_classes, no_numbers), parts, evaluation.accelerator)
    if not len(samples):
        raise none_decoded("validation images", images, evaluation.config)
    return Ranking(classes, sample_labels(images, samples), digests)


def accuracy(classes: Tensor, labels: Tensor, num_classes: int) -> dict[str, float]:
    """Return top-1 and top-5 accuracy of ranked classes (N, 5) for labels (N,)."""
    from m2t_accel.evaluation.metrics import TopKAccuracy  # late: importing `evaluate` takes 7 seconds

    return TopKAccuracy(num_classes).compute(predictions=classes.tolist(), references=labels.tolist())
