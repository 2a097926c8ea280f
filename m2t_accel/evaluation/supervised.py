"""Train a classifier and measure it on the validation split: shared by linear probe and fine-tuning."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import yaml
from datasets import Dataset
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel

from m2t_accel.config.data import check_enough_images
from m2t_accel.config.fields import ConfigurationError, one_line
from m2t_accel.distributed.processes import broadcast_object, gather_to_all, on_all_processes
from m2t_accel.evaluation.features import (
    embed_images,
    fingerprint,
    fingerprint_of_files,
    gather_rows,
    left_out,
    none_decoded,
    not_finite,
    print_broken,
    read_labels,
    sample_labels,
)
from m2t_accel.evaluation.heads import save_classifier
from m2t_accel.evaluation.setup import IGNORED_SETTINGS, Evaluation, run_once, write_result
from m2t_accel.files import atomic_write, flush

CHECKPOINT = "checkpoint.pt"


class Trained(NamedTuple):
    """A trained classifier."""

    encoder: nn.Module
    head: nn.Module  # features (N, C) in, logits (N, classes) out
    model: PreTrainedModel | None  # both in one stock transformers model, if transformers has one
    broken: set[int]  # training images that this process could not decode
    protocol: Mapping[str, object] = {}  # more entries of the result's protocol


class Ranking(NamedTuple):
    """The most likely classes of N images; images that cannot be decoded are left out."""

    classes: Tensor  # (N, heads, 5) int64, the most likely first; with fewer than 5 classes, all of them
    labels: Tensor  # (N,) int64
    digests: Tensor  # (N,) int64: hashes of the image files
    samples: Tensor  # (N,) int64: the images' numbers in the dataset


def train_and_measure(
    evaluation: Evaluation, train: Dataset, fit: Callable[[Checkpoint], Trained]
) -> dict[str, object]:
    """Train a classifier, measure it once on the validation split, and return the result. A collective call.

    Write result.json, config.yaml and classifier/ (a stock transformers model), and print a summary. Remove the
    checkpoint that `fit` has written.

    Args:
        train: the images that `fit` trains on.
        fit: trains the classifier, from the checkpoint if there is one.

    Raises:
        ConfigurationError: the images or the output folder is not usable.
    """
    config, accelerator, images = evaluation.config, evaluation.accelerator, evaluation.images
    check_enough_images(len(train), config)

    def measure() -> dict[str, object]:
        started = time.perf_counter()
        checkpoint = Checkpoint(evaluation, train)
        trained = fit(checkpoint)
        test = rank_classes(trained.encoder, [trained.head], images.validation, evaluation)
        broken = set().union(*gather_to_all(trained.broken))
        parts = [(train, broken), (images.validation, left_out(images.validation, test.samples))]
        print_broken(parts, evaluation.config, accelerator)
        data = {
            "train": {"images": len(train), "fingerprint": fingerprint_of_files(train, broken, accelerator)},
            "test": {"images": len(test.labels), "fingerprint": fingerprint(test.digests, test.labels)},
            "undecodable": len(broken) + len(images.validation) - len(test.labels),
        }
        seconds = checkpoint.seconds + time.perf_counter() - started
        is_mixed = checkpoint.precision != evaluation.precision
        protocol = {**trained.protocol, **({"training_precision": checkpoint.precision} if is_mixed else {})}

        def finish() -> dict[str, object] | None:
            if not accelerator.is_main_process:
                return None
            figures = accuracy(test.classes[:, 0], test.labels, len(images.class_names))
            try:
                if trained.model is not None:
                    save_classifier(trained.model, config, Path(config.output_dir) / "classifier")
                return write_result(evaluation, figures, data, seconds, **protocol)
            except (OSError, SafetensorError) as error:
                saved = "it has the saved training" if checkpoint.path.is_file() else "the training is not saved"
                raise ConfigurationError(
                    f"{config.output_dir} cannot be written ({getattr(error, 'strerror', None) or error}); {saved}: "
                    "make room, and type the same command again"
                ) from None

        return broadcast_object(on_all_processes(accelerator, finish))

    result = run_once(evaluation, measure)
    if accelerator.is_main_process:
        for path in (Path(config.output_dir) / CHECKPOINT, *Path(config.output_dir).glob(".checkpoint.*.pt")):
            path.unlink(missing_ok=True)
    return result


class Checkpoint:
    """The file that an interrupted training resumes from, in its output folder.

    Attributes:
        seconds: duration of the training in earlier runs.
        precision: precision of the training. A complete training may be measured in another one.
    """

    def __init__(self, evaluation: Evaluation, train: Dataset) -> None:
        self.path = Path(evaluation.config.output_dir) / CHECKPOINT
        self.accelerator = evaluation.accelerator
        self.seconds = 0.0
        self.precision = evaluation.precision
        settings = yaml.safe_load(evaluation.config.to_yaml())
        # The names and sizes of the files, and the labels. The contents are not read.
        images = hashlib.sha256(evaluation.images.fingerprint.encode() + read_labels(train).tobytes())
        self.owner = {
            "an encoder with other weights": evaluation.weights,
            "other images": images.hexdigest()[:16],
            "other settings": {k: v for k, v in settings.items() if k not in IGNORED_SETTINGS},
        }

    def save(self, state: Mapping[str, object], broken: set[int]) -> None:
        """Write the state of a training atomically, on the main process. A collective call.

        If the file cannot be written, print a warning; the training continues.

        Args:
            state: what `load` returns; `step` is the number of steps that are done, `seconds` the time that they took.
            broken: training images that this process could not decode.
        """
        broken = set().union(*gather_to_all(broken))
        if not self.accelerator.is_main_process:
            return
        try:
            with atomic_write(self.path) as temporary:
                own = {"owner": self.owner, "broken": sorted(broken), "precision": self.precision}
                torch.save({**own, **state}, temporary)
                flush(temporary)
        except (OSError, RuntimeError) as error:  # torch turns some errors of the disk into a RuntimeError
            print(f"warning: {self.path} cannot be written ({one_line(error)}); the next epoch tries again", flush=True)

    def load(self, broken: set[int], total_steps: int) -> dict[str, object] | None:
        """Return the saved state, or None if there is none, and add its broken images. A collective call.

        Raises:
            ConfigurationError: the checkpoint cannot be read, or belongs to another encoder, other images or settings,
                or has fewer than `total_steps` steps in another precision; the same on every process.
        """
        state = broadcast_object(on_all_processes(self.accelerator, lambda: self.read(total_steps)))
        if state is not None:
            broken |= set(state["broken"])
            self.seconds, self.precision = state["seconds"], state.get("precision", self.precision)
            self.accelerator.print(f"resumes after step {state['step']}, from {self.path}")
        return state

    def read(self, total_steps: int) -> dict[str, object] | None:
        if not (self.accelerator.is_main_process and self.path.exists()):
            return None
        try:
            state = torch.load(self.path, map_location="cpu", weights_only=True)
            other = [name for name, value in self.owner.items() if state["owner"][name] != value]
            precision = state.get("precision", self.precision)  # earlier versions did not record it
            is_complete = state["step"] >= total_steps
        except Exception as error:  # torch, zipfile and pickle raise many types
            raise ConfigurationError(
                f"{self.path} cannot be read ({one_line(error)}): remove it to start again"
            ) from None
        if other:
            raise ConfigurationError(f"{self.path} belongs to {' and '.join(other)}: remove it to start again")
        if precision != self.precision and not is_complete:
            mixed = "no" if precision == "float32" else precision
            raise ConfigurationError(
                f"{self.path} is of a training in {precision}, not {self.precision}: type `accelerate launch "
                f"--mixed_precision {mixed} …` to continue, or remove the file to start again"
            )
        return state


@torch.no_grad()
def rank_classes(encoder: nn.Module, heads: Sequence[nn.Module], images: Dataset, evaluation: Evaluation) -> Ranking:
    """Rank the classes of all images by each head, on every process. A collective call.

    Each image is counted once, on any number of processes.

    Raises:
        ConfigurationError: no image can be decoded, or features are not finite; the same on every process.
    """
    parts = []
    for samples, features, digests in embed_images(encoder, images, evaluation.config, evaluation.accelerator):
        logits = torch.stack([head(features) for head in heads], dim=1)
        ranked = logits.topk(min(5, logits.shape[2]), dim=2).indices
        # Numbers, because the padding of processes with fewer rows would turn booleans into numbers.
        parts.append((samples, ranked, digests, features.isfinite().all(dim=1).long()))
    no_numbers = torch.empty(0, dtype=torch.int64)
    no_classes = torch.empty(0, len(heads), min(5, len(evaluation.images.class_names)), dtype=torch.int64)
    empty = (no_numbers, no_classes, no_numbers, no_numbers)
    samples, classes, digests, finite = gather_rows(empty, parts, evaluation.accelerator)
    if not len(samples):
        raise none_decoded("validation images", images, evaluation.config)
    if not finite.all():
        raise not_finite(evaluation.accelerator)
    return Ranking(classes, sample_labels(images, samples), digests, samples)


def accuracy(classes: Tensor, labels: Tensor, num_classes: int) -> dict[str, float]:
    """Return top-1 and top-5 accuracy of ranked classes (N, 5) for labels (N,)."""
    from m2t_accel.evaluation.metrics import TopKAccuracy  # late: importing `evaluate` takes 7 seconds

    return TopKAccuracy(num_classes).compute(predictions=classes.tolist(), references=labels.tolist())
