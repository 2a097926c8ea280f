"""Linear classifiers on the features of a frozen encoder: several trained side by side, one folded into its model."""

from __future__ import annotations

import copy
import math
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import SGD
from transformers import AutoModelForImageClassification, PreTrainedModel

from m2t_accel.config.data import ImageSettings
from m2t_accel.config.fields import ConfigurationError
from m2t_accel.hub.folder import image_processor
from m2t_accel.model import quiet_transformers


class Heads(nn.Module):
    """Linear classifiers with a BatchNorm1d after them, one for each learning rate, which do not know of each other.

    Weights start as N(0, 0.01), biases as 0; SGD with momentum 0.9, no weight decay.
    Source: arXiv 2101.07525 and its published code. There, each of eight GPUs normalises its share of the batch; here
    BatchNorm sees the whole, so that the result does not depend on their number.
    """

    def __init__(self, num_features: int, num_classes: int, learning_rates: Sequence[float]) -> None:
        super().__init__()
        self.learning_rates = tuple(learning_rates)
        self.heads = nn.ModuleList(
            nn.Sequential(nn.Linear(num_features, num_classes), nn.BatchNorm1d(num_classes)) for _ in learning_rates
        )
        for linear, _ in self.heads:
            nn.init.normal_(linear.weight, std=0.01)
            nn.init.zeros_(linear.bias)
            # All begin alike, and differ by their rates alone.
            linear.load_state_dict(self.heads[0][0].state_dict())
        groups = [{"params": list(head.parameters())} for head in self.heads]
        self.optimizer = SGD(groups, lr=1.0, momentum=0.9)

    def forward(self, features: Tensor) -> Tensor:
        """Features (N, C) in, logits (heads, N, classes) out."""
        return torch.stack([head(features) for head in self.heads])

    def train_step(self, features: Tensor, labels: Tensor, factor: float) -> Tensor:
        """One step of every head, its learning rate times `factor`; the losses (heads,) out.

        Features (N, C) float32, labels (N,) int64.
        """
        for group, rate in zip(self.optimizer.param_groups, self.learning_rates, strict=True):
            group["lr"] = rate * factor
        losses = torch.stack([functional.cross_entropy(head(features), labels) for head in self.heads])
        self.optimizer.zero_grad()
        losses.sum().backward()
        self.optimizer.step()
        return losses.detach()


def rate_factor(schedule: str, step: int, total_steps: int) -> float:
    """The learning rate of a step, as a share of its peak.

    cosine: (1 + cos(π step / total_steps)) / 2; steps: 1, a tenth after 60 % and a hundredth after 80 % of the run,
    which is after 60 and 80 of 100 epochs.
    """
    if schedule == "cosine":
        return (1 + math.cos(math.pi * step / total_steps)) / 2
    return 0.1 ** sum(step * 100 >= share * total_steps for share in (60, 80))


def folded(head: nn.Sequential) -> nn.Linear:
    """A Linear that computes in evaluation what Linear and BatchNorm1d do one after the other."""
    linear, norm = head
    scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    both = nn.Linear(linear.in_features, linear.out_features, device=linear.weight.device, dtype=linear.weight.dtype)
    with torch.no_grad():
        both.weight.copy_(linear.weight * scale[:, None])
        both.bias.copy_((linear.bias - norm.running_mean) * scale + norm.bias)
    return both


def classifier(encoder: PreTrainedModel, linear: nn.Linear, class_names: Sequence[str]) -> PreTrainedModel:
    """The encoder with a linear layer on its features, as transformers' own model for classification, with label names.

    Of a ResNetModel that is a ResNetForImageClassification, which `pipeline("image-classification")` runs.

    Raises:
        ConfigurationError: transformers has no classifier of this encoder that ends in one linear layer on features.
    """
    config = copy.deepcopy(encoder.config)
    config.id2label = dict(enumerate(class_names))
    config.label2id = {name: i for i, name in enumerate(class_names)}
    try:
        model = AutoModelForImageClassification.from_config(config)
    except ValueError:
        raise ConfigurationError(f"transformers has no image classifier with a {type(encoder).__name__}") from None
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    body = body_of(model)
    if not layers or layers[-1].weight.shape != linear.weight.shape or type(body) is not type(encoder):
        raise ConfigurationError(f"{type(model).__name__} does not end in one linear layer on the features")
    body.load_state_dict(encoder.state_dict(), strict=True)
    layers[-1].load_state_dict(linear.state_dict())
    return model.eval()


def body_of(model: PreTrainedModel) -> PreTrainedModel | None:
    """The encoder of a model for classification."""
    return getattr(model, model.base_model_prefix, None)


def save_classifier(model: PreTrainedModel, config: ImageSettings, folder: Path) -> None:
    """Write a classifier and its image processor, whole or not at all; what was there before is replaced."""
    temporary = folder.with_name(f".{folder.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    with quiet_transformers():
        model.save_pretrained(temporary)
    image_processor(config).save_pretrained(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)
