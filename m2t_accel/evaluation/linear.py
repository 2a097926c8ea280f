"""Linear probe: linear classifiers trained on the features of a frozen encoder."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedModel

from m2t_accel.config.data import check_enough_images
from m2t_accel.config.evaluation import LinearProbeConfig
from m2t_accel.config.fields import ConfigurationError
from m2t_accel.data.loader import create_loader, read, upload
from m2t_accel.data.order import ShuffledOrder, num_steps_per_epoch
from m2t_accel.data.photometry import flipped_view
from m2t_accel.data.requests import DeviceBatches
from m2t_accel.data.views import FlippedCrops
from m2t_accel.distributed.device import device_errors_in_one_line, kernel_search
from m2t_accel.distributed.processes import on_all_processes
from m2t_accel.evaluation.features import embed_images, gather_features, left_out, read_labels, sample_labels
from m2t_accel.evaluation.heads import Heads, build_classifier, fold_batch_norm, last_linear, rate_factor
from m2t_accel.evaluation.setup import Evaluation, start_evaluation
from m2t_accel.evaluation.supervised import Checkpoint, Trained, rank_classes, train_and_measure
from m2t_accel.model import embed
from m2t_accel.progress import progress_bar

HELD_OUT_SHARE = 0.1  # of the training images, to choose a learning rate; always the same images


@device_errors_in_one_line
def evaluate_linear(config: LinearProbeConfig) -> dict[str, object]:
    """Train linear classifiers on the frozen encoder, and measure the best on the validation split.

    A collective call. Write result.json, config.yaml and classifier/ (a stock transformers model), print a summary and
    return the result. A checkpoint is written after each epoch; an interrupted probe resumes from it.

    Raises:
        ConfigurationError: the launch, the encoder, the images or the output folder is not usable, or no loss is finite
            any longer.
    """
    evaluation = start_evaluation(config)
    train, held_out = split_held_out(evaluation.images.train, len(config.learning_rates))
    return train_and_measure(evaluation, train, lambda checkpoint: train_probe(evaluation, train, held_out, checkpoint))


def split_held_out(images: Dataset, num_rates: int) -> tuple[Dataset, Dataset | None]:
    """Return the images to train on and, for several learning rates, the images that decide which one is chosen."""
    if num_rates == 1:
        return images, None
    order = np.random.default_rng(1).permutation(len(images))  # load_images uses another seed
    number = max(1, round(HELD_OUT_SHARE * len(images)))
    return images.select(np.sort(order[number:])), images.select(np.sort(order[:number]))


def train_probe(evaluation: Evaluation, train: Dataset, held_out: Dataset | None, checkpoint: Checkpoint) -> Trained:
    """Train a head for each learning rate, and choose the one with the best accuracy on `held_out`."""
    config, accelerator = evaluation.config, evaluation.accelerator
    accelerator.print("\n".join(introduction(evaluation, train, held_out)))
    class_names = evaluation.images.class_names
    try:
        model = build_classifier(evaluation.encoder, nn.Linear(evaluation.num_features, len(class_names)), class_names)
    except ConfigurationError as error:
        model = None
        accelerator.print(f"no classifier/ will be written: {error}")
    heads, broken = train_heads(evaluation, train, checkpoint)
    chosen, protocol = 0, {}
    if held_out is not None:
        found = rank_classes(evaluation.encoder, heads.heads, held_out, evaluation)
        accuracies = (found.classes[:, :, 0] == found.labels[:, None]).double().mean(dim=0)
        chosen = int(accuracies.argmax())
        protocol = {
            "held_out_top1": dict(zip(map(str, config.learning_rates), accuracies.tolist(), strict=True)),
            "chosen_learning_rate": config.learning_rates[chosen],
        }
    head = heads.heads[chosen]
    if model is not None:
        on_all_processes(accelerator, lambda: insert_head(model, head, evaluation))
    return Trained(evaluation.encoder, head, model, broken, protocol)


def introduction(evaluation: Evaluation, train: Dataset, held_out: Dataset | None) -> list[str]:
    config = evaluation.config
    rates = ", ".join(f"{rate:g}" for rate in config.learning_rates)
    lines = [
        f"protocol {config.protocol}: {config.length} of {len(train):,} images in batches of "
        f"{config.batch_size}, learning rate {rates} per 256 images, {config.schedule}"
    ]
    if held_out is not None:
        lines.append(
            f"{len(config.learning_rates)} heads; the best on {len(held_out):,} other training images is chosen"
        )
    if config.features == "cached":
        lines.append("--features cached: features of the centre crops, computed once: quick, but not the protocol")
    return lines


def insert_head(model: PreTrainedModel, head: nn.Sequential, evaluation: Evaluation) -> None:
    """Copy a trained head into a classifier with the same encoder.

    Raises:
        ConfigurationError: the logits of the classifier differ from those of encoder and head.
    """
    size, device = evaluation.config.image_size, evaluation.accelerator.device
    last_linear(model).load_state_dict(fold_batch_norm(head).state_dict())
    model.to(device)
    images = torch.rand(4, 3, size, size, device=device)
    with torch.no_grad(), kernel_search(False):
        expected = head(embed(evaluation.encoder, images))
        difference = (model(pixel_values=images).logits - expected).abs().max().item()
    if not difference <= 1e-4 * max(1.0, expected.abs().max().item()):
        raise ConfigurationError(
            f"the classifier made of encoder and head gives logits that differ by {difference:.2g}: no result was "
            f"written, and the training is saved in {evaluation.config.output_dir}. The same script and flags after "
            "`accelerate launch --config_file accelerate_configs/cpu.yaml` only measure again"
        )


def train_heads(evaluation: Evaluation, train: Dataset, checkpoint: Checkpoint) -> tuple[Heads, set[int]]:
    """Train one head for each learning rate, the same on every process. A collective call.

    The processes share the work of the encoder. They exchange its features, which are smaller than the gradients of one
    head, and every process takes the same step on the whole batch.

    Returns:
        The heads, and the images that this process could not decode.

    Raises:
        ConfigurationError: in an epoch the mean loss of no head is finite.
    """
    config, accelerator = evaluation.config, evaluation.accelerator
    source = CachedFeatures(evaluation, train) if config.features == "cached" else AugmentedFeatures(evaluation, train)
    set_seed(config.seed)  # the number of models created before must not change the heads
    heads = Heads(evaluation.num_features, len(evaluation.images.class_names), config.learning_rates).to(
        accelerator.device
    )
    steps_per_epoch = num_steps_per_epoch(source.num_images, config.batch_size)
    total_steps = config.total_steps(steps_per_epoch)
    first_step = 0
    if (state := checkpoint.load(source.broken, total_steps)) is not None:
        heads.load_state_dict(state["heads"])
        heads.optimizer.load_state_dict(state["optimizer"])
        first_step = state["step"]
    started = time.perf_counter() - checkpoint.seconds
    bar = progress_bar("step", total_steps, initial=first_step, disable=not accelerator.is_main_process)
    with contextlib.closing(bar):
        losses = []
        for step, (features, labels) in enumerate(source.batches(first_step), first_step):
            factor = rate_factor(config.schedule, step, total_steps) * config.batch_size / 256
            losses.append(heads.train_step(features, labels, factor))
            bar.update()
            if (step + 1) % steps_per_epoch == 0 or step + 1 == total_steps:
                mean = torch.stack(losses).mean(dim=0).tolist()
                losses = []
                bar.set_postfix_str("loss " + " ".join(f"{loss:.3f}" for loss in mean), refresh=False)
                if not any(map(math.isfinite, mean)):
                    raise ConfigurationError(
                        f"the loss is {mean[0]} in epoch {step // steps_per_epoch + 1}: the encoder overflows in "
                        f"{evaluation.precision}, or --learning_rates {min(config.learning_rates):g} is too high: type "
                        "`accelerate launch --mixed_precision no …` or a lower rate, with another --output_dir"
                    )
                state = {"step": step + 1, "seconds": time.perf_counter() - started}
                state |= {"heads": heads.state_dict(), "optimizer": heads.optimizer.state_dict()}
                checkpoint.save(state, source.broken)
    return heads.eval(), source.broken


class AugmentedFeatures:
    """Features of a new random crop of each image in each epoch."""

    def __init__(self, evaluation: Evaluation, train: Dataset) -> None:
        self.evaluation = evaluation
        self.train = train
        self.num_images = len(train)
        self.broken: set[int] = set()  # images that this process could not decode

    @torch.no_grad()
    def batches(self, first_step: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield features (batch_size, C) and labels (batch_size,) of each step from `first_step` on.

        Every process receives the whole batch.
        """
        config, accelerator = self.evaluation.config, self.evaluation.accelerator
        requests = DeviceBatches(self.train, config, accelerator.num_processes, accelerator.process_index, first_step)
        labels = torch.from_numpy(read_labels(self.train))
        parts: list[tuple[Tensor, Tensor]] = []
        loader = create_loader(FlippedCrops(self.train, config), requests, config, accelerator.device)
        for batch in read(loader, accelerator.device):
            self.broken |= {image.sample for image in batch.bad}
            views = flipped_view(batch.crops, batch.photometry, config)
            with accelerator.autocast():
                features = embed(self.evaluation.encoder, views).float()
            parts.append((features, upload(labels[batch.samples], accelerator.device)))
            if len(parts) == len(requests.devices):
                yield tuple(gather_batch(torch.stack(rows), accelerator) for rows in zip(*parts, strict=True))
                parts = []


def gather_batch(rows: Tensor, accelerator: Accelerator) -> Tensor:
    """Return the rows of all virtual devices in order, from this process's rows (devices, n, …). A collective call."""
    rows = accelerator.gather(rows).unflatten(0, (accelerator.num_processes, -1))
    return rows.transpose(0, 1).flatten(0, 2)  # the processes take the virtual devices in turn


class CachedFeatures:
    """Features of the centre crops, computed once, in a new order in each epoch."""

    def __init__(self, evaluation: Evaluation, train: Dataset) -> None:
        config, accelerator = evaluation.config, evaluation.accelerator
        batches = embed_images(evaluation.encoder, train, config, accelerator)
        found = gather_features(batches, len(train), accelerator, accelerator.device)
        self.config = config
        self.features = found.features
        self.labels = sample_labels(train, found.samples)
        self.num_images = len(found.samples)
        check_enough_images(self.num_images, config)
        self.broken = left_out(train, found.samples)

    def batches(self, first_step: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the same as `AugmentedFeatures.batches`."""
        order = ShuffledOrder(self.num_images, self.config)
        steps_per_epoch = num_steps_per_epoch(self.num_images, self.config.batch_size)
        for step in range(first_step, self.config.total_steps(steps_per_epoch)):
            epoch, place = divmod(step, steps_per_epoch)
            devices = range(place * self.config.num_virtual_devices, (place + 1) * self.config.num_virtual_devices)
            samples = np.concatenate([order.sub_batch(epoch, device) for device in devices])
            rows = upload(torch.from_numpy(samples), self.features.device)
            yield self.features[rows], self.labels[rows]
