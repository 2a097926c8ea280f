"""How a run is doing, measured and told as it goes: kNN of the teacher, spread of its embeddings, report, curves."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from datasets import Dataset
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from m2t_accel.data import BadImage, CentralViews, create_loader, read
from m2t_accel.model import embed
from m2t_accel.photometry import evaluation_view
from m2t_accel.recipes import PretrainConfig
from m2t_accel.settings import ConfigurationError
from m2t_accel.sources import ImageData

# kNN during training is a sign of health, not a result: on large sets an even sample is enough for it.
MAX_KNN_BANK = 50_000
MAX_KNN_QUERIES = 10_000
KNN_NEIGHBOURS = 20
KNN_TEMPERATURE = 0.07
EVALUATION_BATCH_SIZE = 128
MIN_BAD_ALLOWED = 10  # undecodable images, whatever their share
MAX_BAD_TOLD = 10  # of them on the screen; all are in bad_images.jsonl


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
    """kNN accuracy of an encoder on the held-out images."""

    def __init__(self, data: ImageData, config: PretrainConfig, accelerator: Accelerator) -> None:
        self.config = config
        self.accelerator = accelerator
        self.num_classes = len(data.class_names)
        self.told = False
        self.parts = []
        for images, limit in ((data.bank, MAX_KNN_BANK), (data.validation, MAX_KNN_QUERIES)):
            if len(images) > limit:
                images = images.select(np.linspace(0, len(images) - 1, limit).astype(int))
            labels = torch.tensor(images.with_format("numpy")["label"][:], device=accelerator.device)
            self.parts.append((images, labels))

    def measure(self, encoder: nn.Module) -> float:
        """Top-1 accuracy in evaluation mode, from 0 to 1, of what can be decoded; the same on every process."""
        (bank_images, bank_labels_all), (query_images, query_labels_all) = self.parts
        bank, decoded = embed_images(encoder, bank_images, self.config, self.accelerator)
        bank, bank_labels = bank[decoded], bank_labels_all[decoded]
        queries, decoded = embed_images(encoder, query_images, self.config, self.accelerator)
        queries, query_labels = queries[decoded], query_labels_all[decoded]
        if not len(bank) or not len(queries):
            raise ConfigurationError(
                f"--dataset {self.config.dataset}: of the images that kNN is measured with, none can be decoded; "
                "use --evaluate_every 0"
            )
        num_broken = len(bank_labels_all) - len(bank_labels) + len(query_labels_all) - len(query_labels)
        if num_broken and not self.told:
            self.told = True
            self.accelerator.print(f"kNN is measured without {num_broken} images that cannot be decoded")
        return knn_accuracy(bank, bank_labels, queries, query_labels, self.num_classes)


@torch.no_grad()
def embed_images(
    encoder: nn.Module, images: Dataset, config: PretrainConfig, accelerator: Accelerator
) -> tuple[Tensor, Tensor]:
    """Features (N, C) float32 of N images in their order, in evaluation mode, computed by all processes together.

    And which of them could be decoded, (N,) bool.

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
    features, decoded = [], []
    for samples, (crops, bad) in zip(batches, read(loader), strict=True):
        inputs = evaluation_view(crops.to(accelerator.device), config).to(parameter.dtype)
        with accelerator.autocast():
            features.append(embed(encoder, inputs).float())
        broken = {image.sample: image for image in bad}
        decoded.append(torch.tensor([sample not in broken for sample in samples], device=accelerator.device))
    encoder.train(was_training)
    return tuple(accelerator.gather(torch.cat(parts))[: len(images)] for parts in (features, decoded))


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


class BadImages:
    """The images of a run that cannot be decoded: each is told of once and written to bad_images.jsonl."""

    def __init__(self, config: PretrainConfig, num_images: int) -> None:
        self.file = Path(config.output_dir) / "bad_images.jsonl"
        self.config = config
        self.num_images = num_images
        self.known: dict[int, BadImage] = {}

    def add(self, images: Sequence[BadImage]) -> list[BadImage]:
        """Take in what all processes have met; what is new comes back, in the order of the samples."""
        new = {image.sample: image for image in images if image.sample not in self.known}
        self.known |= new
        return [new[sample] for sample in sorted(new)]

    def write(self, new: Sequence[BadImage]) -> Iterator[str]:
        """Write them down; a line for people about each of the first ten, and about the others together."""
        with self.file.open("a", encoding="utf-8") as file:
            for image in new:
                file.write(json.dumps(image._asdict()) + "\n")
        told = max(0, MAX_BAD_TOLD - (len(self.known) - len(new)))
        for image in new[:told]:
            yield f"cannot be decoded, another image is shown instead: {image.path} ({image.reason})"
        if new[told:]:
            yield f"{len(new[told:])} more images cannot be decoded, {len(self.known)} in all: see {self.file}"

    def check(self) -> None:
        """Stop where there are too many.

        Raises:
            ConfigurationError: there are more than --max_bad_fraction allows.
        """
        allowed = max(MIN_BAD_ALLOWED, int(self.config.max_bad_fraction * self.num_images))
        if len(self.known) > allowed:
            raise ConfigurationError(
                f"{len(self.known)} of {self.num_images:,} images cannot be decoded, more than the {allowed} that "
                f"--max_bad_fraction {self.config.max_bad_fraction:g} allows (ten always are): they are listed in "
                f"{self.file}; repair or remove them, or give a larger --max_bad_fraction"
            )


class Report:
    """What a run shows and writes while it trains: a progress bar, metrics.jsonl and a tracker.

    `add` and `tick` cost the device nothing; `averages` waits for it and is a collective call.
    """

    def __init__(self, config: PretrainConfig, accelerator: Accelerator, total_steps: int, num_images: int) -> None:
        self.bad_images = BadImages(config, num_images)
        self.accelerator = accelerator
        self.config = config
        self.metrics = Path(config.output_dir) / "metrics.jsonl"
        self.num_steps = 0
        self.sums: list[Tensor] = []
        self.bad: list[BadImage] = []
        self.started = self.last = time.perf_counter()
        self.bar = None
        if config.tracker != "none":
            settings = {k: str(v) if isinstance(v, tuple) or v is None else v for k, v in vars(config).items()}
            accelerator.init_trackers("tracker", config=settings)
        if accelerator.is_main_process:
            # A log file gets a line every half minute, a terminal a bar that moves.
            interval = 0.5 if sys.stderr.isatty() else 30.0
            self.bar = tqdm(total=total_steps, unit="step", mininterval=interval, dynamic_ncols=True)

    def add(self, loss: Tensor, spread: Tensor, bad: Sequence[BadImage]) -> None:
        """Take in a sub-batch."""
        self.sums.append(torch.stack([loss, spread]))
        self.bad += bad

    def tick(self) -> None:
        """Count an optimizer step."""
        self.num_steps += 1
        if self.bar is not None:
            self.bar.update()

    def averages(self) -> dict[str, float]:
        """Loss and spread averaged over all sub-batches of all processes since the last call, and the speed.

        Raises:
            ConfigurationError: the loss is not finite, or too many images are bad; the same on every process.
        """
        mean = torch.stack(self.sums).mean(dim=0)
        share_bad = mean.new_tensor([float(len(self.bad) > 0)])
        loss, spread, share_bad = self.accelerator.reduce(torch.cat([mean, share_bad]), reduction="mean").tolist()
        if share_bad > 0:
            new = self.bad_images.add(gather_object(self.bad))
            self.bad.clear()
            if self.accelerator.is_main_process:
                for line in self.bad_images.write(new):
                    self.bar.write(line)
            self.bad_images.check()
        if not math.isfinite(loss):
            raise ConfigurationError(
                f"the loss is {loss} in the last {self.num_steps} steps, and no encoder is written: try a "
                f"--learning_rate_per_256 below {self.config.learning_rate_per_256:g}, or more --warmup_epochs"
            )
        speed = self.num_steps * self.config.batch_size / (time.perf_counter() - self.last)
        self.sums.clear()
        self.num_steps = 0
        if self.bar is not None:
            self.bar.set_postfix_str(f"loss {loss:.3f}, {speed:,.0f} images/s", refresh=False)
        return {"loss": loss, "embedding_std": spread, "images_per_second": speed}

    def write(self, step: int, epoch: float, values: dict[str, float]) -> None:
        """Write one line of metrics; the clock of the speed starts again, so evaluations do not count."""
        if self.accelerator.is_main_process:
            line = {"step": step, "epoch": round(epoch, 6), **values, "seconds": round(self.seconds(), 3)}
            with self.metrics.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            if "knn_top1" in values:
                self.bar.write(f"epoch {epoch:g}: teacher kNN top-1 {100 * values['knn_top1']:.2f} %")
        if self.config.tracker != "none":
            self.accelerator.log({"epoch": epoch, **values}, step=step)
        self.last = time.perf_counter()

    def seconds(self) -> float:
        """Seconds since the report was opened."""
        return time.perf_counter() - self.started

    def close(self) -> None:
        """End the bar and the tracker, whether the run ended well or not."""
        if self.bar is not None:
            self.bar.close()
        if self.config.tracker != "none":
            for tracker in self.accelerator.trackers:
                tracker.finish()


def duration(seconds: float) -> str:
    """Such as 45 s, 12 min 3 s, 5 h 12 min."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
