"""Linear evaluation of a frozen encoder."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from datasets import Dataset
from torch import Tensor

from m2t_accel.config.data import check_enough_images
from m2t_accel.config.evaluation import LinearProbeConfig
from m2t_accel.config.fields import ConfigurationError, one_line
from m2t_accel.data.loader import create_loader, dead_workers_in_one_line, read
from m2t_accel.data.order import ShuffledOrder, num_steps_per_epoch
from m2t_accel.data.photometry import flipped_view
from m2t_accel.data.requests import DeviceBatches
from m2t_accel.data.views import FlippedCrops
from m2t_accel.distributed.processes import broadcast_object, on_all_processes
from m2t_accel.evaluation.features import embed_images, fingerprint, gather_features, gather_rows, labels_of
from m2t_accel.evaluation.heads import Heads, classifier, folded, rate_factor, save_classifier
from m2t_accel.evaluation.setup import Evaluation, open_folder, say, start_evaluation, write_result
from m2t_accel.model import embed
from m2t_accel.progress import progress_bar

# Of the training split, to choose among learning rates. Always the same images.
CHOICE_FRACTION = 0.1
CHECKPOINT = "checkpoint.pt"


def evaluate_linear(config: LinearProbeConfig) -> dict[str, object]:
    """Train linear classifiers on the frozen encoder, and measure the best on the validation split, seen once.

    Writes result.json, config.yaml and classifier/, a stock transformers model, and prints a line. After each epoch
    there is a checkpoint, from which the same command goes on. A collective call; the result comes back.

    Raises:
        ConfigurationError: the launch, the encoder, the images or the folder do not allow it.
    """
    evaluation = start_evaluation(config)
    config, accelerator = evaluation.config, evaluation.accelerator
    train, held_out = split_for_choice(evaluation.images.train, len(config.learning_rates))
    check_enough_images(len(train), config)
    result = open_folder(evaluation)
    if result is None:
        accelerator.print(introduction(evaluation, train, held_out))
        with dead_workers_in_one_line():
            result = train_and_measure(evaluation, train, held_out)
    say(result, evaluation)
    return result


def split_for_choice(images: Dataset, num_rates: int) -> tuple[Dataset, Dataset | None]:
    """The images to train on and, where there are several learning rates, those to choose among them with."""
    if num_rates == 1:
        return images, None
    order = np.random.default_rng(1).permutation(len(images))  # apart from what load_images may have held out
    number = max(1, round(CHOICE_FRACTION * len(images)))
    return images.select(np.sort(order[number:])), images.select(np.sort(order[:number]))


def introduction(evaluation: Evaluation, train: Dataset, held_out: Dataset | None) -> str:
    config = evaluation.config
    rates = ", ".join(f"{rate:g}" for rate in config.learning_rates)
    lines = [
        evaluation.loaded.note,
        evaluation.images.note,
        f"protocol {config.protocol}: {config.epochs} epochs of {len(train):,} images in batches of "
        f"{config.batch_size}, learning rate {rates} for each 256, {config.schedule}",
    ]
    if held_out is not None:
        lines.append(
            f"{len(config.learning_rates)} heads; the best on {len(held_out):,} other training images is chosen"
        )
    if config.features == "cached":
        lines.append("--features cached: of centre crops, computed once. This is quick, and not the protocol")
    return "\n".join(lines)


def train_and_measure(evaluation: Evaluation, train: Dataset, held_out: Dataset | None) -> dict[str, object]:
    """Train the heads, choose one, measure it, and write the classifier and the result."""
    config, accelerator, images = evaluation.config, evaluation.accelerator, evaluation.images
    without_classifier = why_no_classifier(evaluation)
    if without_classifier is not None:
        accelerator.print(f"no classifier/ will be written: {without_classifier}")
    started = time.perf_counter()
    heads, broken, before = train_heads(evaluation, train)
    chosen, told = 0, {}
    if held_out is not None:
        samples, classes, _ = ranked(evaluation, held_out, heads.heads)
        labels = torch.from_numpy(labels_of(held_out)).to(samples.device)[samples]
        accuracies = (classes[:, :, 0] == labels[:, None]).double().mean(dim=0)
        chosen = int(accuracies.argmax())
        told["held_out_top1"] = dict(zip(map(str, config.learning_rates), accuracies.tolist(), strict=True))
        told["chosen_learning_rate"] = config.learning_rates[chosen]
    head = heads.heads[chosen]
    samples, classes, digests = ranked(evaluation, images.validation, torch.nn.ModuleList([head]))
    labels = torch.from_numpy(labels_of(images.validation)).to(samples.device)[samples]
    data = {
        "train": {"images": len(train)},
        "test": {"images": len(samples), "fingerprint": fingerprint(digests, labels)},
        "undecodable": len(broken) + len(images.validation) - len(samples),
    }
    seconds = before + time.perf_counter() - started

    def finish() -> dict[str, object] | None:
        if not accelerator.is_main_process:
            return None
        figures = accuracy(classes[:, 0], labels, len(images.class_names))
        if without_classifier is None:
            write_classifier(evaluation, head)
        result = write_result(evaluation, figures, data, seconds, **told)
        (Path(config.output_dir) / CHECKPOINT).unlink(missing_ok=True)
        return result

    return broadcast_object(on_all_processes(accelerator, finish))


def accuracy(classes: Tensor, labels: Tensor, num_classes: int) -> dict[str, float]:
    """Top-1 and top-5 of ranked classes (N, 5) and labels (N,)."""
    from m2t_accel.evaluation.metrics import TopKAccuracy  # late: `evaluate` takes 7 seconds to import

    return TopKAccuracy(num_classes).compute(predictions=classes.tolist(), references=labels.tolist())


def why_no_classifier(evaluation: Evaluation) -> str | None:
    """Why encoder and head cannot be one model of transformers, or None; better known before the training."""
    try:
        linear = torch.nn.Linear(evaluation.num_features, len(evaluation.images.class_names))
        classifier(evaluation.encoder, linear, evaluation.images.class_names)
    except ConfigurationError as error:
        return str(error)
    return None


def train_heads(evaluation: Evaluation, train: Dataset) -> tuple[Heads, set[int], float]:
    """The heads, trained, which images could not be decoded, and the seconds of earlier runs.

    Every process trains all heads, alike.

    The processes share the work of the encoder. Its features are gathered, which is less to send than the gradients of
    one head, and every process takes the same step on the whole batch.
    """
    config, accelerator = evaluation.config, evaluation.accelerator
    source = CachedFeatures(evaluation, train) if config.features == "cached" else AugmentedFeatures(evaluation, train)
    set_seed(config.seed)  # whatever was made before
    heads = Heads(evaluation.num_features, len(evaluation.images.class_names), config.learning_rates).to(
        accelerator.device
    )
    steps_per_epoch = num_steps_per_epoch(source.num_images, config.batch_size)
    total_steps = config.epochs * steps_per_epoch
    checkpoint = Path(config.output_dir) / CHECKPOINT
    first_step, before = load_checkpoint(checkpoint, heads, source.broken, evaluation)
    started = time.perf_counter() - before
    bar = progress_bar("step", total_steps, initial=first_step, disable=not accelerator.is_main_process)
    with contextlib.closing(bar):
        losses = []
        for step, (features, labels) in enumerate(source.batches(first_step), first_step):
            factor = rate_factor(config.schedule, step, total_steps) * config.batch_size / 256
            losses.append(heads.train_step(features, labels, factor))
            bar.update()
            if (step + 1) % steps_per_epoch == 0:
                mean = torch.stack(losses).mean(dim=0).tolist()
                losses = []
                bar.set_postfix_str("loss " + " ".join(f"{loss:.3f}" for loss in mean), refresh=False)
                if step + 1 < total_steps:
                    seconds = time.perf_counter() - started
                    save_checkpoint(checkpoint, heads, step + 1, source.broken, seconds, evaluation)
    return heads.eval(), source.broken, before


class AugmentedFeatures:
    """Features of a new crop of each image in each epoch."""

    def __init__(self, evaluation: Evaluation, train: Dataset) -> None:
        self.evaluation = evaluation
        self.train = train
        self.num_images = len(train)
        self.broken: set[int] = set()  # of this process

    @torch.no_grad()
    def batches(self, first_step: int) -> Iterator[tuple[Tensor, Tensor]]:
        """For each step to come the features (batch_size, C) and labels of the whole batch, on every process alike."""
        config, accelerator = self.evaluation.config, self.evaluation.accelerator
        requests = DeviceBatches(self.train, config, accelerator.num_processes, accelerator.process_index, first_step)
        labels = torch.from_numpy(labels_of(self.train))
        parts: list[tuple[Tensor, Tensor]] = []
        loader = create_loader(FlippedCrops(self.train, config), requests, config, accelerator.device)
        for batch in read(loader, accelerator.device):
            self.broken |= {image.sample for image in batch.bad}
            views = flipped_view(batch.crops, batch.photometry, config)
            with accelerator.autocast():
                features = embed(self.evaluation.encoder, views).float()
            parts.append((features, labels[batch.samples].to(accelerator.device, non_blocking=True)))
            if len(parts) == len(requests.devices):
                yield tuple(whole_batch(torch.stack(rows), accelerator) for rows in zip(*parts, strict=True))
                parts = []


def whole_batch(rows: Tensor, accelerator: Accelerator) -> Tensor:
    """This process's sub-batches (turns, n, …) as the whole batch, in the order of the virtual devices."""
    rows = accelerator.gather(rows).unflatten(0, (accelerator.num_processes, -1))
    return rows.transpose(0, 1).flatten(0, 2)  # processes take the devices in turn


class CachedFeatures:
    """Features of the centre crops, computed once, in a new order in each epoch."""

    def __init__(self, evaluation: Evaluation, train: Dataset) -> None:
        config, accelerator = evaluation.config, evaluation.accelerator
        found = gather_features(list(embed_images(evaluation.encoder, train, config, accelerator)), accelerator)
        self.config = config
        self.features = found.features
        self.labels = torch.from_numpy(labels_of(train)).to(found.samples.device)[found.samples]
        self.num_images = len(found.samples)
        check_enough_images(self.num_images, config)
        self.broken = set(range(len(train))) - set(found.samples.tolist())

    def batches(self, first_step: int) -> Iterator[tuple[Tensor, Tensor]]:
        """As AugmentedFeatures.batches."""
        order = ShuffledOrder(self.num_images, self.config)
        steps_per_epoch = num_steps_per_epoch(self.num_images, self.config.batch_size)
        for step in range(first_step, self.config.epochs * steps_per_epoch):
            epoch, place = divmod(step, steps_per_epoch)
            devices = range(place * self.config.num_virtual_devices, (place + 1) * self.config.num_virtual_devices)
            samples = np.concatenate([order.sub_batch(epoch, device) for device in devices])
            rows = torch.from_numpy(samples).to(self.features.device)
            yield self.features[rows], self.labels[rows]


@torch.no_grad()
def ranked(evaluation: Evaluation, images: Dataset, heads: Sequence[torch.nn.Module]) -> list[Tensor]:
    """Of all images that can be decoded, on every process: samples (N,), their most likely classes (N, heads, 5) and
    their files' digests (N,). No image comes twice, whether or not the processes divide them.
    """
    columns = []
    for samples, features, digests in embed_images(
        evaluation.encoder, images, evaluation.config, evaluation.accelerator
    ):
        logits = torch.stack([head(features) for head in heads], dim=1)
        columns.append((samples, logits.topk(min(5, logits.shape[2]), dim=2).indices, digests))
    num_classes = len(evaluation.images.class_names)
    nothing = torch.empty(0, dtype=torch.int64)
    empty = (nothing, torch.empty(0, len(heads), min(5, num_classes), dtype=torch.int64), nothing)
    device = evaluation.accelerator.device
    rows = [torch.cat([part.to(device) for part in column]) for column in zip(empty, *columns, strict=True)]
    found = gather_rows(rows, evaluation.accelerator)
    if not len(found[0]):
        raise ConfigurationError(f"--dataset {evaluation.config.dataset}: no image to measure on can be decoded")
    return found


def save_checkpoint(
    path: Path, heads: Heads, step: int, broken: set[int], seconds: float, evaluation: Evaluation
) -> None:
    """Write the state after `step` steps, whole or not at all; of the first process."""
    if not evaluation.accelerator.is_main_process:
        return
    state = {"step": step, "weights": evaluation.weights, "broken": sorted(broken), "seconds": seconds}
    state |= {"heads": heads.state_dict(), "optimizer": heads.optimizer.state_dict()}
    temporary = path.with_name(f".{path.name}")
    torch.save(state, temporary)
    os.replace(temporary, path)


def load_checkpoint(path: Path, heads: Heads, broken: set[int], evaluation: Evaluation) -> tuple[int, float]:
    """Take up the state of a checkpoint, if there is one; its steps and seconds, else 0. A collective call.

    Raises:
        ConfigurationError: it cannot be read, or is of an encoder with other weights; the same on every process.
    """
    accelerator = evaluation.accelerator

    def load() -> dict[str, object] | None:
        if not (accelerator.is_main_process and path.exists()):
            return None
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            weights = state["weights"]
        except Exception as error:  # of torch, zipfile and pickle
            raise ConfigurationError(f"{path} cannot be read ({one_line(error)}): remove it to begin anew") from None
        if weights != evaluation.weights:
            raise ConfigurationError(f"{path} is of an encoder with other weights: remove it to begin anew")
        return state

    state = broadcast_object(on_all_processes(accelerator, load))
    if state is None:
        return 0, 0.0
    heads.load_state_dict(state["heads"])
    heads.optimizer.load_state_dict(state["optimizer"])
    broken |= set(state["broken"])
    accelerator.print(f"goes on after {state['step']} steps, from {path}")
    return state["step"], state["seconds"]


def write_classifier(evaluation: Evaluation, head: torch.nn.Sequential) -> None:
    """Write classifier/: the encoder and the head folded into one stock transformers model.

    Raises:
        ValueError: its logits are not those of encoder and head.
    """
    config, device = evaluation.config, evaluation.accelerator.device
    model = classifier(evaluation.encoder, folded(head), evaluation.images.class_names).to(device)
    images = torch.rand(4, 3, config.image_size, config.image_size, device=device)
    with torch.no_grad():
        wanted = head(embed(evaluation.encoder, images))
        difference = (model(pixel_values=images).logits - wanted).abs().max().item()
    if not difference <= 1e-4 * max(1.0, wanted.abs().max().item()):
        raise ValueError(f"the folded classifier's logits differ by {difference:.2g}")
    save_classifier(model, config, Path(config.output_dir) / "classifier")
