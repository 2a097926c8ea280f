"""The cost of an optimizer step on paper: operations, bytes, the least time on some GPUs, and what is sent.

The step of pretraining runs on tensors without memory, in bf16, and every operator is counted.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Mapping
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from m2t_accel.benchmark.variants import STEPS_PER_EPOCH
from m2t_accel.config.pretrain import PretrainConfig
from m2t_accel.config.recipes import RECIPES
from m2t_accel.data.crops import Photometry
from m2t_accel.data.photometry import photometry_batched
from m2t_accel.momentum_norm import momentum_layers
from m2t_accel.pretrain import create_step
from m2t_accel.step import TrainingStep


class Device(NamedTuple):
    """The published peaks of a GPU."""

    flops: float  # floating-point operations per second of its matrix units in 16 bits, dense
    bandwidth: float  # bytes per second of its memory


# Source: NVIDIA's data sheets of the H100 (SXM, 80 GB), A100 (SXM, 80 GB) and V100 (SXM2, fp16 instead of bf16).
DEVICES = {"H100": Device(989e12, 3.35e12), "A100": Device(312e12, 2.039e12), "V100": Device(125e12, 0.9e12)}

SHOWN = 10  # operators that the table lists
AGREEMENT = 3 * 8  # bytes: the three whole numbers of `reach_agreement`


class Cost(NamedTuple):
    """Operations and bytes of one call of an operator."""

    flops: int
    bytes: int


class Counter(TorchDispatchMode):
    """Record the operations of every operator, and the bytes that it reads and writes. Views cost nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.costs: dict[str, list[Cost]] = defaultdict(list)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if func.namespace != "aten" or func.is_view or name.startswith(("empty", "new_empty", "_unsafe_view")):
            return output
        written = args[0] if output is None else output  # an operator on lists in place writes the first of them
        if name == "_fused_sgd_":
            written = args[0], args[2]  # weights and momentum
        tensors = [each for each in tree_leaves((args, kwargs, written)) if isinstance(each, Tensor)]
        count = flop_registry.get(func.overloadpacket)
        flops = 0 if count is None else count(*args, **kwargs, out_val=output)
        self.costs[name].append(Cost(flops, sum(each.numel() * each.element_size() for each in tensors)))
        return output


def estimate_step(config: PretrainConfig) -> dict[str, object]:
    """Count one step with one sub-batch in bf16. Return its figures, and what the processes of each recipe send."""
    config = dataclasses.replace(config, batch_size=config.device_batch_size)
    training = create_step(config, Accelerator(cpu=True, mixed_precision="bf16"))
    counter = count(training, config)
    costs = [cost for calls in counter.costs.values() for cost in calls]
    num_images = config.device_batch_size
    flops, num_bytes = sum(cost.flops for cost in costs), sum(cost.bytes for cost in costs)
    least = {}
    for name, device in DEVICES.items():
        by_operator = sum(max(cost.flops / device.flops, cost.bytes / device.bandwidth) for cost in costs)
        computation = flops / device.flops
        least[name] = {
            "ms": 1000 * by_operator,
            "images_per_second": num_images / by_operator,
            "ms_of_computation": 1000 * computation,
            "images_per_second_of_computation": num_images / computation,
        }
    gradients = sum(each.numel() * each.element_size() for each in training.student.parameters() if each.requires_grad)
    statistics = sum(layer.collected.nbytes for layer in momentum_layers(training.teacher))
    return {
        "encoder": config.encoder,
        "image_size": config.image_size,
        "device_batch_size": num_images,
        "flops": flops,
        "bytes": num_bytes,
        "operators": {
            name: {"calls": len(calls), "flops": sum(c.flops for c in calls), "bytes": sum(c.bytes for c in calls)}
            for name, calls in counter.costs.items()
        },
        "least": least,
        "bytes_to_average": {"gradients": gradients, "statistics": statistics, "agreement": AGREEMENT},
    }


def count(training: TrainingStep, config: PretrainConfig) -> Counter:
    """Run a step on tensors without memory, and count its operators."""
    num_views, size = 2 * config.device_batch_size, config.image_size
    now = config.schedule(config.epochs * STEPS_PER_EPOCH // 2, STEPS_PER_EPOCH)
    with FakeTensorMode(allow_non_fake_inputs=True):
        training.begin(now)
        crops = torch.empty(num_views, size, size, 3, dtype=torch.uint8)
        parameters = Photometry(
            flip=torch.empty(num_views, dtype=torch.bool),
            factors=torch.empty(num_views, 4),
            order=torch.empty(num_views, 4, dtype=torch.int64),
            grayscale=torch.empty(num_views, dtype=torch.bool),
            sigma=torch.empty(num_views),
            solarize=torch.empty(num_views, dtype=torch.bool),
        )
        with Counter() as counter:
            views = photometry_batched(crops, parameters, config).to(training.view_dtype)
            training.forward_backward(*views.chunk(2))
            training.update(now)
    return counter


def table(result: Mapping[str, object]) -> str:
    """Format the result as text."""
    images = result["device_batch_size"]
    lines = [
        f"{result['encoder']}, a step of {images} images of {result['image_size']} pixels, bf16, operator by operator",
        f"{result['flops'] / 1e9 / images:.1f} GFLOP and {result['bytes'] / 1e9 / images:.2f} GB of memory traffic "
        "for an image",
        "",
        f"{'operator':<30}{'calls':>7}{'GFLOP':>9}{'MB':>9}   an image",
    ]
    largest = sorted(result["operators"].items(), key=lambda item: -item[1]["bytes"])
    for name, each in largest[:SHOWN]:
        lines.append(
            f"{name:<30}{each['calls']:7}{each['flops'] / 1e9 / images:9.2f}{each['bytes'] / 1e6 / images:9.1f}"
        )
    calls, rest = (sum(each[key] for _, each in largest[SHOWN:]) for key in ("calls", "bytes"))
    lines += [
        f"{'others':<30}{calls:7}{'':9}{rest / 1e6 / images:9.1f}",
        "",
        "least time of the step by the peaks of the data sheets",
        f"{'GPU':<6}{'eager':>12}{'images/s':>10}{'arithmetic':>14}{'images/s':>10}",
    ]
    for name, each in result["least"].items():
        lines.append(
            f"{name:<6}{each['ms']:9.1f} ms{each['images_per_second']:10,.0f}{each['ms_of_computation']:11.1f} ms"
            f"{each['images_per_second_of_computation']:10,.0f}"
        )
    sent = result["bytes_to_average"]
    lines += [
        "",
        f"averaged over the processes each step: {sent['gradients'] / 1e6:.1f} MB of gradients, "
        f"{sent['statistics'] / 1e6:.2f} MB of statistics, {sent['agreement']} bytes of agreement",
        "a ring all-reduce sends and receives 2 (n - 1) / n times as much on each of n processes:",
    ]
    for name, recipe in RECIPES.items():
        settings = recipe.settings
        processes = settings["batch_size"] // settings.get("device_batch_size", settings["batch_size"])
        if processes > 1 and name.endswith("-100ep"):  # those of more epochs send the same
            share = 2 * (processes - 1) / processes
            lines.append(f"  {name:<24}{processes:4} processes {share * sum(sent.values()) / 1e6:8.1f} MB")
    return "\n".join(lines)
