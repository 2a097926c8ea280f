"""Fine-tuning: train the whole network with the labels of all images, or of a few images of each class."""

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
from accelerate.utils import set_seed
from datasets import Dataset
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import SGD

from m2t_accel.config.evaluation import FinetuneConfig
from m2t_accel.config.fields import ConfigurationError
from m2t_accel.data.loader import create_loader, read, upload
from m2t_accel.data.order import num_steps_per_epoch
from m2t_accel.data.photometry import flipped_view
from m2t_accel.data.requests import DeviceBatches
from m2t_accel.data.views import FlippedCrops
from m2t_accel.distributed.device import device_errors_in_one_line
from m2t_accel.evaluation.features import read_labels
from m2t_accel.evaluation.heads import build_classifier, encoder_of, last_linear
from m2t_accel.evaluation.setup import Evaluation, start_evaluation
from m2t_accel.evaluation.supervised import Checkpoint, Trained, train_and_measure
from m2t_accel.files import write_text
from m2t_accel.optim import set_learning_rate
from m2t_accel.progress import progress_bar
from m2t_accel.schedules import cosine

STATISTICS_MOMENTUM = 0.1  # of BatchNorm's running statistics, torch's default


@device_errors_in_one_line
def evaluate_finetuned(config: FinetuneConfig) -> dict[str, object]:
    """Train the whole network with labels, and measure it on the validation split. A collective call.

    Write result.json, config.yaml, subset.json (the images whose labels were used) and classifier/ (a stock
    transformers model). Print a summary and return the result. A checkpoint is written after each epoch; an interrupted
    fine-tuning resumes from it.

    Raises:
        ConfigurationError: the launch, the encoder, the images or the output folder is not usable, or the loss is no
            longer finite.
    """
    evaluation = start_evaluation(config)
    chosen = balanced_subset(read_labels(evaluation.images.train), config.labels, config.seed)
    train = evaluation.images.train.select(chosen)
    check_share(len(train), len(evaluation.images.train), config)
    return train_and_measure(evaluation, train, lambda checkpoint: train_network(evaluation, train, chosen, checkpoint))


def balanced_subset(labels: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Return the sample numbers of a share of the images of each class, at least one of each, in ascending order.

    The choice depends on labels, share and seed only; a larger share contains the smaller one.

    Args:
        labels: (N,).
    """
    if share == 1:
        return np.arange(len(labels))
    chosen = []
    for label in np.unique(labels):
        samples = np.flatnonzero(labels == label)
        order = np.random.default_rng((seed, int(label))).permutation(len(samples))
        chosen.append(samples[order[: max(1, round(share * len(samples)))]])
    return np.sort(np.concatenate(chosen))


def check_share(num_chosen: int, num_images: int, config: FinetuneConfig) -> None:
    """Check that a share of the images is enough for one batch.

    Raises:
        ConfigurationError: the share is smaller than one batch.
    """
    if config.labels == 1 or num_chosen >= config.batch_size:
        return
    batch_size = min(32, num_chosen // 2 * 2)
    smaller = f"--batch_size {batch_size} --device_batch_size {batch_size}, or " if batch_size >= 8 else ""
    raise ConfigurationError(
        f"--labels {config.labels:g} (--protocol {config.protocol}) trains on {num_chosen:,} of the {num_images:,} "
        f"images of --dataset {config.dataset}, fewer than one batch of {config.batch_size}: use {smaller}"
        "a larger share of --labels (1: all)"
    )


def train_network(evaluation: Evaluation, train: Dataset, chosen: np.ndarray, checkpoint: Checkpoint) -> Trained:
    """Train the encoder and a new linear layer on `train`, and write subset.json with the `chosen` sample numbers."""
    config, accelerator, class_names = evaluation.config, evaluation.accelerator, evaluation.images.class_names
    accelerator.print(
        f"protocol {config.protocol}: {config.length} of {len(train):,} images, {100 * config.labels:.3g} % of "
        f"each class, in batches of {config.batch_size}"
    )
    if accelerator.is_main_process:
        text = json.dumps({"seed": config.seed, "labels": config.labels, "samples": chosen.tolist()})
        write_text(Path(config.output_dir) / "subset.json", text + "\n")
    set_seed(config.seed)
    linear = nn.Linear(evaluation.num_features, len(class_names))
    nn.init.zeros_(linear.bias)
    model = build_classifier(evaluation.encoder, linear, class_names)
    broken = train_model(model, train, evaluation, checkpoint)
    model.eval().requires_grad_(False)
    return Trained(encoder_of(model), last_linear(model), model, broken)


def train_model(model: nn.Module, train: Dataset, evaluation: Evaluation, checkpoint: Checkpoint) -> set[int]:
    """Train the model in place, from the checkpoint if there is one.

    Gradients and statistics are averaged over the virtual devices, so every number of processes computes the same up
    to rounding.

    Returns:
        The images that this process could not decode.

    Raises:
        ConfigurationError: the mean loss of an epoch is not finite.
    """
    config, accelerator = evaluation.config, evaluation.accelerator
    model.requires_grad_(True).train().to(accelerator.device, memory_format=torch.channels_last)
    learning_rate = config.learning_rate_per_256 * config.batch_size / 256
    optimizer = SGD(model.parameters(), lr=learning_rate, momentum=0.9, nesterov=True, weight_decay=config.weight_decay)
    steps_per_epoch = num_steps_per_epoch(len(train), config.batch_size)
    total_steps = config.total_steps(steps_per_epoch)
    broken, first_step = set(), 0
    if (state := checkpoint.load(broken, total_steps)) is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        if accelerator.scaler is not None and state["scaler"] is not None:
            accelerator.scaler.load_state_dict(state["scaler"])
        first_step = state["step"]
        seed_epoch(config, first_step)
    started = time.perf_counter() - checkpoint.seconds
    statistics = RunningStatistics(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        prepared, optimizer = accelerator.prepare(model, optimizer)
    labels = torch.from_numpy(read_labels(train))
    batches = DeviceBatches(train, config, accelerator.num_processes, accelerator.process_index, first_step)
    loader = create_loader(FlippedCrops(train, config), batches, config, accelerator.device)
    bar = progress_bar("step", total_steps, initial=first_step, disable=not accelerator.is_main_process)
    losses, step = [], first_step
    with contextlib.closing(bar):
        for batch in read(loader, accelerator.device):
            broken |= {image.sample for image in batch.bad}
            set_learning_rate(optimizer, learning_rate * cosine(step, total_steps))
            targets = upload(labels[batch.samples], accelerator.device)
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
            if step % steps_per_epoch == 0 or step == total_steps:
                mean = accelerator.reduce(torch.stack(losses).mean(), reduction="mean").item()
                losses.clear()
                bar.set_postfix_str(f"loss {mean:.3f}", refresh=False)
                if not math.isfinite(mean):
                    raise ConfigurationError(
                        f"the loss is {mean} in epoch {step // steps_per_epoch}: try a --learning_rate_per_256 below "
                        f"{config.learning_rate_per_256:g}, in another --output_dir"
                    )
                state = {"step": step, "seconds": time.perf_counter() - started}
                state |= {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
                state |= {"scaler": accelerator.scaler.state_dict() if accelerator.scaler is not None else None}
                checkpoint.save(state, broken)
                seed_epoch(config, step)
    return broken


def seed_epoch(config: FinetuneConfig, step: int) -> None:
    """Seed the generators that a network may use, as for dropout, so that a resumed training draws the same numbers."""
    set_seed((config.seed + step) % 2**32)


class RunningStatistics:
    """Running statistics of BatchNorm, updated once per optimizer step by the average over all virtual devices.

    torch itself updates them after each sub-batch of a process, so they would differ between processes.
    """

    def __init__(self, model: nn.Module) -> None:
        self.layers = [layer for layer in model.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]
        self.history = [buffer.clone() for buffer in self.buffers()]
        self.sums: list[Tensor] = []
        self.count = 0
        for layer in self.layers:
            layer.momentum = 1.0  # after a forward, its buffers hold the statistics of that sub-batch alone

    def buffers(self) -> list[Tensor]:
        # Asked for each time: Accelerate gives the layers other tensors when it prepares a model for two CPU processes.
        return [buffer for layer in self.layers for buffer in (layer.running_mean, layer.running_var)]

    def add(self) -> None:
        """Add the statistics of the last forward."""
        if self.count == 0:
            self.sums = [buffer.clone() for buffer in self.buffers()]
        else:
            torch._foreach_add_(self.sums, self.buffers())
        self.count += 1

    def commit(self, accelerator: Accelerator) -> None:
        """Update the running statistics by the average since the last call. A collective call."""
        if not self.layers:
            return
        flat = torch.cat([total.flatten() for total in self.sums]) / self.count
        average = accelerator.reduce(flat, reduction="mean").split([total.numel() for total in self.sums])
        torch._foreach_lerp_(self.history, average, STATISTICS_MOMENTUM)
        torch._foreach_copy_(self.buffers(), self.history)
        self.sums, self.count = [], 0
