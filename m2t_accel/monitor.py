"""How a run is doing, measured as it goes: kNN accuracy of the teacher, spread of its embeddings, curves."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from datasets import Dataset
from torch import Tensor, nn
from torch.nn import functional

from m2t_accel.augment import evaluation_view
from m2t_accel.data import CentralViews, ImageData, create_loader
from m2t_accel.model import embed
from m2t_accel.recipes import PretrainConfig

# kNN during training is a sign of health, not a result: on large sets an even sample is enough for it.
MAX_KNN_BANK = 50_000
MAX_KNN_QUERIES = 10_000
KNN_NEIGHBOURS = 20
KNN_TEMPERATURE = 0.07
EVALUATION_BATCH_SIZE = 128


def embedding_std(embeddings: Tensor) -> Tensor:
    """How far unit-norm embeddings (N, C) spread: 1 evenly over the sphere, 0 all in one point (collapse).

    The mean over the dimensions of the standard deviation over the batch, times √C. Source: SimSiam
    (arXiv 2011.10566), section 4.1, there without the factor.
    """
    return embeddings.std(dim=0).mean() * math.sqrt(embeddings.shape[1])


def knn_accuracy(
    bank: Tensor, bank_labels: Tensor, queries: Tensor, labels: Tensor, num_classes: int, chunk: int = 1024
) -> float:
    """Share of the queries that a vote of their 20 nearest in the bank, weighted by exp(cosine / 0.07), gets right.

    bank (M, C) and queries (N, C): features of any norm; labels (M,) and (N,) int64.
    Source: Wu et al. (arXiv 1805.01978), section 3.4.
    """
    bank, queries = functional.normalize(bank, dim=1), functional.normalize(queries, dim=1)
    num_correct = 0
    for start in range(0, len(queries), chunk):
        similarity = queries[start : start + chunk] @ bank.T
        nearest, indices = similarity.topk(min(KNN_NEIGHBOURS, len(bank)), dim=1)
        votes = torch.zeros(len(nearest), num_classes, dtype=nearest.dtype, device=nearest.device)
        votes.scatter_add_(1, bank_labels[indices], (nearest / KNN_TEMPERATURE).exp())
        num_correct += (votes.argmax(dim=1) == labels[start : start + chunk]).sum().item()
    return num_correct / len(queries)


class KnnMonitor:
    """kNN accuracy of an encoder on the held-out images; the loaders stay for all evaluations of a run."""

    def __init__(self, data: ImageData, config: PretrainConfig, accelerator: Accelerator) -> None:
        self.config = config
        self.accelerator = accelerator
        self.num_classes = len(data.class_names)
        self.parts = []
        for images, limit in ((data.train, MAX_KNN_BANK), (data.validation, MAX_KNN_QUERIES)):
            if len(images) > limit:
                images = images.select(np.linspace(0, len(images) - 1, limit).astype(int))
            labels = torch.tensor(images.with_format("numpy")["label"][:], device=accelerator.device)
            self.parts.append((images, labels))

    def measure(self, encoder: nn.Module) -> float:
        """Top-1 accuracy in evaluation mode, from 0 to 1; the same on every process."""
        (bank_images, bank_labels), (query_images, query_labels) = self.parts
        bank = embed_images(encoder, bank_images, self.config, self.accelerator)
        queries = embed_images(encoder, query_images, self.config, self.accelerator)
        return knn_accuracy(bank, bank_labels, queries, query_labels, self.num_classes)


@torch.no_grad()
def embed_images(encoder: nn.Module, images: Dataset, config: PretrainConfig, accelerator: Accelerator) -> Tensor:
    """Features (N, C) float32 of N images in their order, in evaluation mode, computed by all processes together.

    A collective call; every process gets all features. The encoder is left in the mode it came in.
    """
    # Each process takes a run of images; the last ones are filled up to the same length, and cut after the gather.
    share = math.ceil(len(images) / accelerator.num_processes)
    mine = [min(share * accelerator.process_index + i, len(images) - 1) for i in range(share)]
    batches = [mine[start : start + EVALUATION_BATCH_SIZE] for start in range(0, share, EVALUATION_BATCH_SIZE)]
    loader = create_loader(CentralViews(images, config), batches, config)
    parameter = next(encoder.parameters())
    was_training = encoder.training
    encoder.eval()
    features = []
    for crops in loader:
        inputs = evaluation_view(crops.to(accelerator.device), config).to(parameter.dtype)
        with accelerator.autocast():
            features.append(embed(encoder, inputs).float())
    encoder.train(was_training)
    return accelerator.gather(torch.cat(features))[: len(images)]


def read_metrics(path: Path) -> Iterator[dict[str, float]]:
    """The lines of a metrics.jsonl."""
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)


def draw_curves(metrics: Path, picture: Path, title: str) -> None:
    """Draw what metrics.jsonl holds as one picture: loss, kNN, spread of the embeddings, and the schedules."""
    from matplotlib.figure import Figure  # late: a second of import that only the end of a run needs

    rows = list(read_metrics(metrics))

    def series(name: str) -> tuple[list[float], list[float]]:
        points = [(row["epoch"], row[name]) for row in rows if name in row]
        return [epoch for epoch, _ in points], [value for _, value in points]

    figure = Figure(figsize=(10, 6.5), layout="constrained")
    figure.suptitle(title)
    loss, knn, spread, rates = figure.subplots(2, 2).flat
    loss.plot(*series("loss"))
    loss.set_title("loss (0 aligned, 4 unrelated)")
    epochs, accuracies = series("knn_top1")
    if accuracies:
        knn.plot(epochs, [100 * accuracy for accuracy in accuracies], marker="o", markersize=4)
        knn.set_title(f"teacher kNN top-1 (%): {100 * accuracies[0]:.1f} → {100 * accuracies[-1]:.1f}")
    else:
        knn.set_title("teacher kNN: not measured")
        knn.set_axis_off()
    spread.plot(*series("embedding_std"))
    spread.set_ylim(0, 1.1)
    spread.set_title("embedding standard deviation × √C (0 is collapse)")
    rates.plot(*series("weight_momentum"), label="weight momentum")
    rates.plot(*series("statistics_momentum"), label="statistics momentum")
    epochs, values = series("learning_rate")
    peak = max(values, default=1.0)
    rates.plot(epochs, [value / peak for value in values], label=f"learning rate / {peak:.3g}")
    rates.set_title("schedules")
    rates.legend(loc="center right")
    for axes in (loss, knn, spread, rates):
        axes.set_xlabel("epoch")
        axes.grid(alpha=0.3)
    figure.savefig(picture, dpi=110)
