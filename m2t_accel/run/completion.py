"""Finish a run: write the encoder and its card, the curves and training.json, and print where they are."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import transformers
import yaml
from transformers import PreTrainedModel

from m2t_accel import __version__
from m2t_accel.config.data import public_name
from m2t_accel.config.fields import without_paths
from m2t_accel.config.pretrain import PretrainConfig, initial_weights
from m2t_accel.data.sources import ImageData
from m2t_accel.distributed.launch import command
from m2t_accel.files import read_metrics, replace_folder, write_text
from m2t_accel.hub.card import model_card
from m2t_accel.hub.folder import save_encoder
from m2t_accel.model import plain_encoder
from m2t_accel.pictures import draw_curves
from m2t_accel.progress import duration
from m2t_accel.run.output_dir import COMPLETE, list_files
from m2t_accel.step import TrainingStep

VERSIONS = {"m2t_accel": __version__, "torch": torch.__version__, "transformers": transformers.__version__}


def finish(
    config: PretrainConfig,
    data: ImageData,
    step: TrainingStep,
    parts: Sequence[Mapping[str, object]],
    num_steps: int,
    seconds: float,
    write_page: Callable[[], None],
) -> None:
    """Write the encoder and its card, the curves, training.json and report.html. Print where they are.

    Args:
        parts: step, command, hardware and versions of each start of the run.
        num_steps: optimizer steps of the run.
        seconds: time that the run has taken in all its parts.
        write_page: function that writes report.html, or warns; it reads training.json.

    Raises:
        OSError: a file other than report.html cannot be written.
    """
    folder = Path(config.output_dir)
    rows = list(read_metrics(folder / "metrics.jsonl"))
    accuracies = [row["knn_top1"] for row in rows if "knn_top1" in row]
    images_seen = num_steps * config.batch_size
    # A start that trained nothing wrote files that were missing, maybe on another machine.
    trained = [part for part in parts if part["step"] < num_steps]
    training = {
        "dataset": public_name(config.dataset),
        "data": data.note,
        "images_seen": images_seen,
        "hardware": ", then ".join(dict.fromkeys(part["hardware"] for part in trained)),
        "seconds": round(seconds, 1),
        "time": duration(seconds),
        "command": command(),
        "versions": VERSIONS,
        "parts": list(parts),
    }
    partial = folder / ".encoder.partial"
    shutil.rmtree(partial, ignore_errors=True)
    encoder = plain_encoder(step.teacher.encoder, step.student.encoder)
    is_stock = isinstance(encoder, PreTrainedModel)
    card = model_card(config, training, accuracies, metrics=rows) if is_stock else weights_card(config)
    save_encoder(encoder, config, card, partial)
    replace_folder(partial, folder / "encoder")
    if rows:
        draw_curves(
            folder / "metrics.jsonl",
            folder / "curves.png",
            # Published with the run: the name alone, not the folders around it.
            title=f"{without_paths(config.encoder)} on {public_name(config.dataset)}, recipe {config.recipe}",
        )
    training |= {"config": yaml.safe_load(replace(config, resume="auto").to_yaml()), "files": list_files(folder)}
    write_text(folder / COMPLETE, json.dumps(training, indent=2, ensure_ascii=False) + "\n")
    write_page()
    lines = [f"\nTrained in {duration(seconds)}: {images_seen:,} images, {images_seen / seconds:,.0f} a second."]
    if accuracies:
        first, last = 100 * accuracies[0], 100 * accuracies[-1]
        lines.append(f"Teacher kNN top-1: {first:.2f} % {initial_weights(config)}, {last:.2f} % now.")
    if is_stock:
        load = f'from transformers import AutoModel; AutoModel.from_pretrained("{folder / "encoder"}")'
    else:
        load = f'from safetensors.torch import load_model; load_model(encoder, "{folder}/encoder/model.safetensors")'
    lines.append(f"Encoder:  {folder / 'encoder'}")
    if (folder / "report.html").exists():
        lines.append(f"Report:   {folder / 'report.html'}")
    lines.append(f"Load it:  {load}")
    if config.recipe == "digits":
        lines += [
            "Next:     your own images (no labels needed), on one GPU:",
            "          accelerate launch --config_file accelerate_configs/1gpu.yaml scripts/pretrain.py \\",
            "              --recipe 8x2080Ti-b256-100ep --dataset FOLDER --output_dir runs/mine",
        ]
    else:
        again = ["--config", f"{folder}/config.yaml", "--seed", str(config.seed + 1)]
        again += ["--output_dir", f"{folder}-seed{config.seed + 1}"]
        lines.append(f"Next:     the same with another seed: scripts/pretrain.py {shlex.join(again)}")
    print("\n".join(lines), flush=True)


def weights_card(config: PretrainConfig) -> str:
    """Return the README.md for the weights of an encoder that is not a transformers model."""
    return (
        f"# {config.encoder}\n\nWeights pretrained without labels by Momentum² Teacher (arXiv 2101.07525) with "
        "m2t_accel. The module is your own:\n\n```python\nfrom safetensors.torch import load_model\n\n"
        f'load_model(encoder, "model.safetensors")  # encoder: a {config.encoder}\n```\n'
    )
