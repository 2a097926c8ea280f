"""Fine-tuning: the whole network trained with the labels of all images, or of a few of each class."""

from __future__ import annotations

import contextlib
import json
import math
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed
from datasets import Dataset
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import SGD

from m2t_accel.config.data import check_enough_images
from m2t_accel.config.evaluation import FinetuneConfig
from m2t_accel.config.fields import ConfigurationError
from m2t_accel.data.loader import create_loader, dead_workers_in_one_line, read
from m2t_accel.data.order import num_steps_per_epoch
from m2t_accel.data.photometry import flipped_view
from m2t_accel.data.requests import DeviceBatches
from m2t_accel.data.views import FlippedCrops
from m2t_accel.distributed.processes import broadcast_object, on_all_processes
from m2t_accel.evaluation.features import fingerprint, labels_of
from m2t_accel.evaluation.heads import body_of, classifier, save_classifier
from m2t_accel.evaluation.linear import accuracy, ranked
from m2t_accel.evaluation.setup import Evaluation, open_folder, say, start_evaluation, write_result
from m2t_accel.files import write_text
from m2t_accel.optim import set_learning_rate
from m2t_accel.progress import progress_bar

STATISTICS_MOMENTUM = 0.1  # of BatchNorm's running statistics, as torch's default


def evaluate_finetuned(config: FinetuneConfig) -> dict[str, object]:
    """Train the whole network with labels and measure it on the validation split, seen once.

    Writes result.json, config.yaml, subset.json (the images whose labels were used) and classifier/, a stock
    transformers model, and prints a line. A collective call; the result comes back.

    Raises:
        ConfigurationError: the launch, the encoder, the images or the folder do not allow it, or the loss is no
            longer finite.
    """
    evaluation = start_evaluation(config)
    config, accelerator, images = evaluation.config, evaluation.accelerator, evaluation.images
    chosen = balanced_subset(labels_of(images.train), config.labels, config.seed)
    train = images.train.select(chosen)
    check_enough_images(len(train), config)
    result = open_folder(evaluation)
    if result is None:
        accelerator.print(
            f"{evaluation.loaded.note}\n{images.note}\nprotocol {config.protocol}: {config.epochs} epochs of "
            f"{len(train):,} images, {config.labels:.3g} of each class, in batches of {config.batch_size}"
        )
        if accelerator.is_main_process:
            text = json.dumps({"seed": config.seed, "labels": config.labels, "samples": chosen.tolist()})
            write_text(Path(config.output_dir) / "subset.json", text + "\n")
        with dead_workers_in_one_line():
            result = train_and_measure(evaluation, train)
    say(result, evaluation)
    return result


def balanced_subset(labels: np.ndarray, share: float, seed: int) -> np.ndarray:
    """The samples (n,) of a share of the images of each class, at least one: the same for the same labels and seed."""
    if share == 1:
        return np.arange(len(labels))
    chosen = []
    for label in np.unique(labels):
        samples = np.flatnonzero(labels == label)
        order = np.random.default_rng((seed, int(label))).permutation(len(samples))
        chosen.append(samples[order[: max(1, round(share * len(samples)))]])
    return np.sort(np.concatenate(chosen))


def train_and_measure(evaluation: Evaluation, train: Dataset) -> dict[str, object]:
    config, accelerator, images = evaluation.config, evaluation.accelerator, evaluation.images
    started = time.perf_counter()
    set_seed(config.seed)
    linear = nn.Linear(evaluation.num_features, len(images.class_names))
    nn.init.zeros_(linear.bias)
    model = classifier(evaluation.encoder, linear, images.class_names)
    num_broken = train_model(model, train, evaluation)
    model.eval().requires_grad_(False)
    last = [layer for layer in model.modules() if isinstance(layer, nn.Linear)][-1]
    found = ranked(evaluation._replace(encoder=body_of(model)), images.validation, [last])
    samples, classes, digests = found
    labels = torch.from_numpy(labels_of(images.validation)).to(samples.device)[samples]
    data = {
        "train": {"images": len(train)},
        "test": {"images": len(samples), "fingerprint": fingerprint(digests, labels)},
        "undecodable": num_broken + len(images.validation) - len(samples),
    }
    seconds = time.perf_counter() - started

    def finish() -> dict[str, object] | None:
        if not accelerator.is_main_process:
            return None
        figures = accuracy(classes[:, 0], labels, len(images.class_names))
        save_classifier(model, config, Path(config.output_dir) / "classifier")
        return write_result(evaluation, figures, data, seconds)

    return broadcast_object(on_all_processes(accelerator, finish))


def train_model(model: nn.Module, train: Dataset, evaluation: Evaluation) -> int:
    """Train the model in place; the number of images that could not be decoded comes back.

    Sub-batches, gradients and statistics are averaged over the virtual devices, so any number of processes computes
    the same, to rounding.
    """
    config, accelerator = evaluation.config, evaluation.accelerator
    model.requires_grad_(True).train().to(accelerator.device, memory_format=torch.channels_last)
    statistics = RunningStatistics(model)
    learning_rate = config.learning_rate_per_256 * config.batch_size / 256
    optimizer = SGD(model.parameters(), lr=learning_rate, momentum=0.9, nesterov=True, weight_decay=config.weight_decay)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        prepared, optimizer = accelerator.prepare(model, optimizer)
    labels = torch.from_numpy(labels_of(train))
    batches = DeviceBatches(train, config, accelerator.num_processes, accelerator.process_index)
    loader = create_loader(FlippedCrops(train, config), batches, config, accelerator.device)
    steps_per_epoch = num_steps_per_epoch(len(train), config.batch_size)
    total_steps = config.epochs * steps_per_epoch
    bar = progress_bar("step", total_steps, disable=not accelerator.is_main_process)
    broken, losses, step = set(), [], 0
    with contextlib.closing(bar):
        for batch in read(loader, accelerator.device):
            broken |= {image.sample for image in batch.bad}
            set_learning_rate(optimizer, learning_rate * (1 + math.cos(math.pi * step / total_steps)) / 2)
            targets = labels[batch.samples].to(accelerator.device, non_blocking=True)
            with accelerator.accumulate(prepared):
                logits = prepared(pixel_values=flipped_view(batch.crops, batch.photometry, config)).logits
                loss = functional.cross_entropy(logits.float(), targets)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            statistics.add()
            losses.append(loss.detach())
            if not accelerator.sync_gradients:
                continue
            statistics.commit(accelerator)
            step += 1
            bar.update()
            if step % steps_per_epoch == 0:
                mean = accelerator.reduce(torch.stack(losses).mean(), reduction="mean").item()
                losses.clear()
                bar.set_postfix_str(f"loss {mean:.3f}", refresh=False)
                if not math.isfinite(mean):
                    raise ConfigurationError(
                        f"the loss is {mean} in epoch {step // steps_per_epoch}: try a --learning_rate_per_256 below "
                        f"{config.learning_rate_per_256:g}"
                    )
    return len(set(gather_object(sorted(broken))))


class RunningStatistics:
    """The running statistics of a model's BatchNorm, moved once per optimizer step by the average over all sub-batches.

    As torch does it they would move once per sub-batch of a process, and differ by process.
    """

    def __init__(self, model: nn.Module) -> None:
        self.layers = [layer for layer in model.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]
        self.history = self.now()
        self.sums: list[Tensor] = []
        self.count = 0
        for layer in self.layers:
            layer.momentum = 1.0  # so that after a forward its buffers hold what that forward saw

    def now(self) -> list[Tensor]:
        return [buffer.clone() for layer in self.layers for buffer in (layer.running_mean, layer.running_var)]

    def add(self) -> None:
        """Take in the statistics of the last forward."""
        found = self.now()
        self.sums = [a + b for a, b in zip(self.sums, found, strict=True)] if self.sums else found
        self.count += 1

    def commit(self, accelerator: Accelerator) -> None:
        """Move the history, and put it into the layers; a collective call."""
        if not self.layers:
            return
        together = torch.cat([total.flatten() for total in self.sums]) / self.count
        average = accelerator.reduce(together, reduction="mean").split([total.numel() for total in self.sums])
        for history, new in zip(self.history, average, strict=True):
            history.lerp_(new.view_as(history), STATISTICS_MOMENTUM)
        for i, layer in enumerate(self.layers):
            layer.running_mean.copy_(self.history[2 * i])
            layer.running_var.copy_(self.history[2 * i + 1])
        self.sums, self.count = [], 0
