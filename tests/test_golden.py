"""Replay recorded trajectories of the published code, in float64: the method's proof by independent means.

`tests/golden/README.md` says what the files hold. M2T_GOLDEN_DIR names another folder of such files.
"""

import dataclasses
import json
import math
import os
import re
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from transformers import ResNetConfig, ResNetModel

from m2t_accel.model import Student, Teacher
from m2t_accel.optim import create_optimizer
from m2t_accel.schedules import schedule
from m2t_accel.step import TrainingStep

GOLDEN_DIR = Path(os.environ.get("M2T_GOLDEN_DIR", Path(__file__).parent / "golden"))
GOLDEN_FILES = sorted(GOLDEN_DIR.glob("*.json"))
WIDTHS = {"basic": [64, 128, 256, 512], "bottleneck": [256, 512, 1024, 2048]}


def published_name(name: str) -> str:
    """The published code's name (torchvision's, with `fc` for the heads) of a parameter of Student or Teacher."""
    heads = {"projector.0": "fc.0", "projector.1": "fc.1", "projector.3": "fc.3"}
    heads |= {"predictor.0": "fc.4", "predictor.1": "fc.5", "predictor.3": "fc.7"}
    for ours, published in heads.items():
        if name.startswith(ours + "."):
            return published + name.removeprefix(ours)
    name = name.removeprefix("encoder.")
    name = name.replace("embedder.embedder.convolution", "conv1").replace("embedder.embedder.normalization", "bn1")
    name = re.sub(r"encoder\.stages\.(\d)\.layers\.(\d+)\.", lambda m: f"layer{int(m[1]) + 1}.{m[2]}.", name)
    name = re.sub(r"\.layer\.(\d)\.convolution", lambda m: f".conv{int(m[1]) + 1}", name)
    name = re.sub(r"\.layer\.(\d)\.normalization", lambda m: f".bn{int(m[1]) + 1}", name)
    return name.replace("shortcut.convolution", "downsample.0").replace("shortcut.normalization", "downsample.1")


def initial_value(name: str, shape: torch.Size) -> torch.Tensor:
    z = torch.from_numpy(np.random.RandomState(zlib.crc32(name.encode())).standard_normal(tuple(shape)))
    if len(shape) == 4:
        return z * math.sqrt(2 / (shape[0] * shape[2] * shape[3]))
    if len(shape) == 2:
        return z / math.sqrt(shape[1])
    return 1 + 0.1 * z if name.endswith("weight") else 0.1 * z


def replay(
    spec: dict, statistics_scale: float = 1.0, num_steps: int | None = None
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Train by the trainer's own step. Return the trajectory, and sum and norm of each final tensor."""
    encoder = ResNetModel(
        ResNetConfig(depths=spec["depths"], hidden_sizes=WIDTHS[spec["layer_type"]], layer_type=spec["layer_type"])
    )
    student = Student(encoder, WIDTHS[spec["layer_type"]][-1], spec["hidden_size"], spec["projection_size"]).double()
    student.train()
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            parameter.copy_(initial_value(published_name(name), parameter.shape))
    optimizer = create_optimizer(
        student, spec["optimizer"], spec["learning_rate"], momentum=0.9, weight_decay=spec["weight_decay"]
    )
    training = TrainingStep(student, Teacher(student), optimizer, Accelerator(cpu=True))
    total_steps = spec["steps_per_epoch"] * spec["epochs"]
    warmup_steps = spec["steps_per_epoch"] * spec["warmup_epochs"]
    trajectory = {"loss": [], "learning_rate": [], "teacher_momentum": [], "statistics_momentum": []}
    base_momentum = spec["teacher_momentum"]
    shape = (spec["batch_size"], 3, spec["image_size"], spec["image_size"])
    for step in range(num_steps or total_steps):
        now = schedule(step, total_steps, warmup_steps, spec["learning_rate"], base_momentum)
        random = np.random.RandomState(1000 + step)
        view_1, view_2 = (torch.from_numpy(random.standard_normal(shape)) for _ in range(2))
        training.begin(dataclasses.replace(now, statistics_momentum=now.statistics_momentum * statistics_scale))
        result = training.forward_backward(view_1, view_2)
        training.update(now)
        trajectory["loss"].append(result.loss.item())
        trajectory["learning_rate"].append(now.learning_rate)
        trajectory["statistics_momentum"].append(now.statistics_momentum)
        # The recording holds the momentum of the update before this step: ours after step k is its at k + 1.
        previous = schedule(step - 1, total_steps, warmup_steps, spec["learning_rate"], base_momentum)
        trajectory["teacher_momentum"].append(previous.weight_momentum)
    final = {}
    for owner, module in (("student", training.student), ("teacher", training.teacher)):
        tensors = dict(module.named_parameters())
        if owner == "teacher":
            tensors |= {n: b for n, b in module.named_buffers() if n.rsplit(".")[-1] in ("running_mean", "running_var")}
        for name, tensor in tensors.items():
            final[f"{owner}.{published_name(name)}"] = [tensor.sum().item(), tensor.norm().item()]
    return trajectory, final


def test_there_are_recordings():
    assert GOLDEN_FILES, f"no *.json in {GOLDEN_DIR}"


@pytest.mark.parametrize("path", GOLDEN_FILES, ids=lambda path: path.stem)
def test_replay(path):
    golden = json.loads(path.read_text())
    trajectory, final = replay(golden["spec"])
    for key, values in golden["trajectory"].items():
        tolerance = 1e-9 if key == "loss" else 1e-12
        np.testing.assert_allclose(trajectory[key], values, rtol=0, atol=tolerance, err_msg=key)
    assert final.keys() == golden["final"].keys()
    for name, values in golden["final"].items():
        np.testing.assert_allclose(final[name], values, rtol=0, atol=1e-8, err_msg=name)


def test_a_planted_defect_is_caught():
    """The bounds are tight enough to see a statistics momentum that is wrong by one part in a million."""
    golden = json.loads((Path(__file__).parent / "golden" / "sgd.json").read_text())
    trajectory, _ = replay(golden["spec"], statistics_scale=1 - 1e-6, num_steps=4)
    assert np.abs(np.subtract(trajectory["loss"], golden["trajectory"]["loss"][:4])).max() > 1e-8
