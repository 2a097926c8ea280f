"""What every evaluation shares: the encoder and its labelled images at the start, the result's file at the end."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn

from m2t_accel.config.data import TrainingSettings, check_dataset
from m2t_accel.config.evaluation import EvaluationSettings, check_encoder
from m2t_accel.config.fields import ConfigurationError
from m2t_accel.data.sources import ImageData, load_images
from m2t_accel.distributed.launch import command, hardware, start_accelerator
from m2t_accel.distributed.processes import broadcast_object, check_same_images, on_all_processes
from m2t_accel.files import write_text
from m2t_accel.hub.encoders import LoadedEncoder, load_encoder, random_weights, weights_fingerprint
from m2t_accel.model import embed

PACKAGES = ("m2t_accel", "torch", "torchvision", "transformers", "accelerate", "datasets", "opencv-python-headless")

# Settings that may differ between two runs of the same evaluation.
FREE = ("output_dir", "num_workers", "push_to_hub")


class Evaluation(NamedTuple):
    """An evaluation that may begin: everything found and checked, nothing written yet."""

    config: EvaluationSettings  # its views settled
    accelerator: Accelerator
    encoder: nn.Module  # frozen, in evaluation mode, on the device
    loaded: LoadedEncoder
    weights: str  # a fingerprint of the encoder's
    num_features: int
    images: ImageData  # with labels, and a validation split, where something is measured


def start_evaluation(config: EvaluationSettings) -> Evaluation:
    """Load the encoder and the labelled images; a collective call.

    Raises:
        ConfigurationError: the launch, the encoder or the images do not allow it; the same on every process.
    """
    accelerator = start_accelerator(config if isinstance(config, TrainingSettings) else None)
    on_all_processes(accelerator, lambda: (check_dataset(config.dataset), check_encoder(config.encoder)))
    loaded = on_all_processes(accelerator, lambda: load_encoder(config.encoder))
    view = {name: getattr(loaded, name) for name in ("image_size", "evaluation_crop", "image_mean", "image_std")}
    config = dataclasses.replace(config, **{k: v for k, v in view.items() if getattr(config, k) is None})
    images = on_all_processes(accelerator, lambda: load_images(config))
    check_same_images(accelerator, images.note, images.fingerprint)
    if images.lacks and config.evaluates:
        raise ConfigurationError(f"nothing can be measured on --dataset {config.dataset}: it has {images.lacks}")
    set_seed(getattr(config, "seed", 0))
    encoder = random_weights(loaded.model) if config.random_weights else loaded.model
    encoder.requires_grad_(False).eval().to(accelerator.device, memory_format=torch.channels_last)
    with torch.no_grad():
        blank = torch.zeros(1, 3, config.image_size, config.image_size, device=accelerator.device)
        num_features = embed(encoder, blank).shape[1]
    return Evaluation(config, accelerator, encoder, loaded, weights_fingerprint(encoder), num_features, images)


def open_folder(evaluation: Evaluation) -> dict[str, object] | None:
    """Make the folder of the result, with its config.yaml; or the result, if this very evaluation was done before.

    A collective call.

    Raises:
        ConfigurationError: it holds another evaluation, or cannot be written; the same on every process.
    """
    is_main = evaluation.accelerator.is_main_process
    result = on_all_processes(evaluation.accelerator, lambda: open_folder_here(evaluation) if is_main else None)
    return broadcast_object(result)


def open_folder_here(evaluation: Evaluation) -> dict[str, object] | None:
    config, folder = evaluation.config, Path(evaluation.config.output_dir)
    try:
        if not (folder / "config.yaml").exists():
            folder.mkdir(parents=True, exist_ok=True)
            write_text(folder / "config.yaml", config.to_yaml())
            return None
        there, wanted = (yaml.safe_load(text) for text in ((folder / "config.yaml").read_text(), config.to_yaml()))
        result = json.loads((folder / "result.json").read_text()) if (folder / "result.json").exists() else None
        other = [name for name in wanted if name not in FREE and there.get(name) != wanted[name]]
        if result is not None and result["weights"] != evaluation.weights:
            other.append("encoder's weights")
    except OSError as error:
        raise ConfigurationError(f"--output_dir {folder} cannot be written ({error.strerror})") from None
    except (ValueError, AttributeError, KeyError, TypeError, yaml.YAMLError):
        raise ConfigurationError(
            f"--output_dir {folder} holds a config.yaml or result.json that is not an evaluation's: give another folder"
        ) from None
    if other:
        raise ConfigurationError(
            f"--output_dir {folder} holds another evaluation (another {', '.join(other)}): give another folder, or "
            "remove that one"
        )
    return result


def write_result(
    evaluation: Evaluation, figures: Mapping[str, float], data: Mapping[str, object], seconds: float, **more: object
) -> dict[str, object]:
    """Write result.json, the figures with all that they depend on, by the first process; the same comes back.

    figures: shares from 0 to 1 by name; data: by its part (bank, train, test), how many images and their fingerprint.
    """
    config, accelerator = evaluation.config, evaluation.accelerator
    settings = {k: list(v) if isinstance(v, tuple) else v for k, v in vars(config).items()}
    result = {
        "evaluation": config.evaluation,
        "figures": dict(figures),
        "encoder": config.encoder,
        "weights": evaluation.weights,
        "dataset": config.dataset,
        "data": dict(data),
        "protocol": {
            **{k: v for k, v in settings.items() if k not in (*FREE, "encoder", "dataset", "seed")},
            "network": "random weights" if config.random_weights else evaluation.loaded.network,
            "batch_norm": "running statistics",
            "interpolation": "bilinear, antialiased",
            "precision": "float32" if accelerator.mixed_precision == "no" else accelerator.mixed_precision,
            **more,
        },
        "seed": settings.get("seed"),
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in PACKAGES},
        "hardware": hardware(accelerator),
        "seconds": round(seconds, 1),
        "command": command(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    if accelerator.is_main_process:
        write_text(Path(config.output_dir) / "result.json", json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    return result


def in_one_line(result: Mapping[str, object]) -> str:
    """A result for people, such as `runs/digits: knn of digits: top1_k20 98.06 %, top1_k200 95.00 %`."""
    figures = ", ".join(f"{name} {100 * share:.2f} %" for name, share in result["figures"].items())
    network = " with random weights" if result["protocol"]["random_weights"] else ""
    return f"{result['encoder']}{network}, {result['evaluation']} on {result['dataset']}: {figures}"


def say(result: dict[str, object], evaluation: Evaluation) -> None:
    """A line for people, and where the rest is."""
    broken = result["data"]["undecodable"]
    note = f" ({broken} images cannot be decoded, and are left out)" if broken else ""
    file = Path(evaluation.config.output_dir) / "result.json"
    lines = [f"{in_one_line(result)}{note}", f"Protocol: {file}"]
    if (file.parent / "classifier").is_dir():
        lines.append(
            f"Load it:  from transformers import pipeline; pipeline('image-classification', '{file.parent}/classifier')"
        )
    evaluation.accelerator.print("\n".join(lines))
