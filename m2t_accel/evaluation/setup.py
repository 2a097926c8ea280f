"""Start and finish an evaluation: load the encoder and the images, then write the result."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn

from m2t_accel.config.data import TrainingSettings, check_dataset, public_name
from m2t_accel.config.evaluation import EvaluationSettings, check_encoder
from m2t_accel.config.fields import ConfigurationError, count
from m2t_accel.data.loader import dead_workers_in_one_line
from m2t_accel.data.sources import ImageData, identifying_parts, load_images
from m2t_accel.distributed.device import kernel_search
from m2t_accel.distributed.interruption import end_with_launcher
from m2t_accel.distributed.launch import command, hardware, limit_threads, start_accelerator
from m2t_accel.distributed.processes import broadcast_object, check_same_images, on_all_processes
from m2t_accel.evaluation.features import read_labels
from m2t_accel.files import write_text
from m2t_accel.hub.encoders import LoadedEncoder, load_encoder, random_weights, weights_fingerprint
from m2t_accel.model import embed
from m2t_accel.pages.run_page import refresh_run_page

PACKAGES = ("m2t_accel", "torch", "torchvision", "transformers", "accelerate", "datasets", "opencv-python-headless")

# Files that an evaluation may write beside result.json, which lists those that it has written.
RESULT_FILES = ("classifier/*", "subset.json", "features.*", "map.png", "neighbours.png")

# Settings that may differ between two runs of the same evaluation.
IGNORED_SETTINGS = ("output_dir", "num_workers", "deterministic", "push_to_hub", "hub_private_repo")


class Evaluation(NamedTuple):
    """An evaluation that is loaded and checked, and has written nothing yet."""

    config: EvaluationSettings  # settings of the view that were not given are those of the encoder
    accelerator: Accelerator
    encoder: nn.Module  # frozen, in evaluation mode, on the device
    loaded: LoadedEncoder
    weights: str  # fingerprint of the encoder's weights
    num_features: int
    images: ImageData  # labelled and with a validation split, unless the evaluation needs no labels

    @property
    def precision(self) -> str:
        """Return the precision in which the encoder computes."""
        mixed = self.accelerator.mixed_precision
        return "float32" if mixed == "no" else mixed

    @property
    def sources(self) -> str:
        """Return a hash of the names, sizes, order and labels of the images. Their contents are not read."""
        digest = hashlib.sha256(self.images.fingerprint.encode())
        if self.images.validation is not None:
            for part in identifying_parts(self.images.validation):
                digest.update(part if isinstance(part, np.ndarray) else part.encode())
        for images in (self.images.train, self.images.validation):
            if images is not None and "label" in images.features:
                digest.update(read_labels(images).tobytes())
        return digest.hexdigest()[:16]


def start_evaluation(config: EvaluationSettings) -> Evaluation:
    """Load the encoder and the images. A collective call.

    Raises:
        ConfigurationError: the launch, the encoder or the images are not usable; the same on every process.
    """
    accelerator = start_accelerator(config if isinstance(config, TrainingSettings) else None)
    end_with_launcher()
    on_all_processes(accelerator, lambda: (check_dataset(config.dataset), check_encoder(config.encoder)))
    loaded = on_all_processes(accelerator, lambda: load_encoder(config.encoder))
    config = dataclasses.replace(
        config, **{k: v for k, v in loaded.preprocessing.items() if getattr(config, k) is None}
    )
    limit_threads(config.image_size)
    images = on_all_processes(accelerator, lambda: load_images(config))
    check_same_images(accelerator, images.note, images.fingerprint)
    if images.lacks and config.evaluates:
        raise ConfigurationError(
            f"--dataset {config.dataset} cannot be used to measure an encoder: it has {images.lacks}"
        )
    set_seed(getattr(config, "seed", 0))
    encoder = random_weights(loaded.model) if config.random_weights else loaded.model
    encoder.requires_grad_(False).eval().to(accelerator.device, memory_format=torch.channels_last)
    num_features = on_all_processes(accelerator, lambda: count_features(encoder, config, accelerator.device))
    return Evaluation(config, accelerator, encoder, loaded, weights_fingerprint(encoder), num_features, images)


def count_features(encoder: nn.Module, config: EvaluationSettings, device: torch.device) -> int:
    """Return the number of features that an encoder gives for an image.

    Raises:
        ConfigurationError: the features of a blank image are not finite.
    """
    with torch.no_grad(), kernel_search(False):
        features = embed(encoder, torch.zeros(1, 3, config.image_size, config.image_size, device=device))
    if not features.isfinite().all():
        raise ConfigurationError(
            f"--encoder {config.encoder}: its features are not finite, so its weights are damaged: give another encoder"
        )
    return features.shape[1]


def run_once(evaluation: Evaluation, measure: Callable[[], dict[str, object]]) -> dict[str, object]:
    """Return and print the stored result of an evaluation or, if it has none, the result of `measure`.

    A collective call.

    Raises:
        ConfigurationError: the output folder is not usable, or a worker of the loader died.
    """
    result = open_folder(evaluation)
    if result is None:
        evaluation.accelerator.print(f"{evaluation.loaded.note}\n{evaluation.images.introduction}")
        with dead_workers_in_one_line():
            result = measure()
    evaluation.accelerator.print("\n".join(describe(result, Path(evaluation.config.output_dir))))
    return result


def open_folder(evaluation: Evaluation) -> dict[str, object] | None:
    """Create the output folder with config.yaml. If it already holds the result of this evaluation, return the result.

    A collective call. If the folder lacks files that the evaluation has written, name them and return None.

    Raises:
        ConfigurationError: the folder holds another evaluation, or cannot be written; the same on every process.
    """
    is_main = evaluation.accelerator.is_main_process
    result = on_all_processes(evaluation.accelerator, lambda: open_on_main(evaluation) if is_main else None)
    return broadcast_object(result)


def open_on_main(evaluation: Evaluation) -> dict[str, object] | None:
    config, folder = evaluation.config, Path(evaluation.config.output_dir)
    config_file, result_file = folder / "config.yaml", folder / "result.json"
    try:
        result = json.loads(result_file.read_text()) if result_file.exists() else None
        given = stored = yaml.safe_load(config.to_yaml())
        if config_file.exists():
            stored = yaml.safe_load(config_file.read_text())
        elif result is not None:
            stored = {**result["protocol"], **{name: result[name] for name in ("encoder", "dataset", "seed")}}
        # Evaluations of earlier versions lack newer settings.
        stored = {item.name: item.default for item in dataclasses.fields(config)} | stored
        changes = [name for name in given if name not in IGNORED_SETTINGS and stored[name] != given[name]]
        if result is not None:
            if result["weights"] != evaluation.weights:
                changes.append("the encoder's weights")
            if result["protocol"]["precision"] != evaluation.precision:
                changes.append(f"precision ({result['protocol']['precision']}, now {evaluation.precision})")
            if "sources" in result and result["sources"] != evaluation.sources:  # earlier versions did not record it
                changes.append("the images or their labels")
        missing = [name for name in (result or {}).get("files", ()) if not (folder / name).is_file()]
        if not changes and not config_file.exists():
            folder.mkdir(parents=True, exist_ok=True)
            # An evaluation that is repeated with --config config.yaml must not be published over this one.
            unpublished = {"push_to_hub": None} if hasattr(config, "push_to_hub") else {}
            write_text(config_file, dataclasses.replace(config, **unpublished).to_yaml())
    except OSError as error:
        raise ConfigurationError(f"--output_dir {folder} cannot be written ({error.strerror})") from None
    except (ValueError, AttributeError, KeyError, TypeError, yaml.YAMLError):
        raise ConfigurationError(
            f"--output_dir {folder} holds a config.yaml or result.json that is not an evaluation's: give another folder"
        ) from None
    if changes:
        raise ConfigurationError(
            f"--output_dir {folder} holds another evaluation, which differs in {', '.join(changes)}: give another "
            "folder, or remove this one"
        )
    if missing:
        print(f"missing in {folder}: {', '.join(missing)}; the evaluation is repeated", flush=True)
    return None if missing else result


def write_result(
    evaluation: Evaluation, figures: Mapping[str, float], data: Mapping[str, object], seconds: float, **more: object
) -> dict[str, object]:
    """Return the result: the figures and everything they depend on. The main process also writes it to result.json.

    Args:
        figures: shares from 0 to 1, by name.
        data: number of images and fingerprint of each part (bank, train, test), by the contents of the files.
        more: further entries of the result's `protocol`.
    """
    config, accelerator = evaluation.config, evaluation.accelerator
    settings = {k: list(v) if isinstance(v, tuple) else v for k, v in vars(config).items()}
    result = {
        "evaluation": config.evaluation,
        "figures": dict(figures),
        "encoder": config.encoder,
        "weights": evaluation.weights,
        "dataset": config.dataset,
        "dataset_name": public_name(config.dataset),
        "data": dict(data),
        "sources": evaluation.sources,
        "protocol": {
            **{k: v for k, v in settings.items() if k not in (*IGNORED_SETTINGS, "encoder", "dataset", "seed")},
            "network": "random weights" if config.random_weights else evaluation.loaded.network,
            "batch_norm": "running statistics",
            "interpolation": "bilinear, antialiased",
            "precision": evaluation.precision,
            **more,
        },
        "seed": settings.get("seed"),
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in PACKAGES},
        "hardware": hardware(accelerator),
        "seconds": round(seconds, 1),
        "files": sorted(
            str(path.relative_to(config.output_dir))
            for pattern in RESULT_FILES
            for path in Path(config.output_dir).glob(pattern)
        ),
        "command": command(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    if accelerator.is_main_process:
        write_text(Path(config.output_dir) / "result.json", json.dumps(result, indent=2, ensure_ascii=False) + "\n")
        refresh_run_page(Path(config.output_dir).parent)
    return result


def describe(result: Mapping[str, object], folder: Path) -> list[str]:
    """Return lines for the user: the figures, the file of the protocol, and how to load the classifier."""
    figures = ", ".join(f"{name} {100 * share:.2f} %" for name, share in result["figures"].items())
    network = " with random weights" if result["protocol"]["random_weights"] else ""
    broken = result["data"]["undecodable"]
    note = f" ({count(broken, 'image')} cannot be decoded, and left out)" if broken else ""
    lines = [
        f"{result['encoder']}{network}, {result['evaluation']} on {result['dataset']}: {figures}{note}",
        f"Protocol: {folder / 'result.json'}",
    ]
    if (folder / "classifier").is_dir():
        lines.append(
            f"Load it:  from transformers import pipeline; pipeline('image-classification', '{folder}/classifier')"
        )
    return lines
