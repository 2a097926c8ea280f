"""Linear classifiers on the features of a frozen encoder, and classifiers of transformers made from them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import SGD
from transformers import AutoModelForImageClassification, PreTrainedModel

from m2t_accel.config.data import ImageSettings
from m2t_accel.config.fields import ConfigurationError
from m2t_accel.files import atomic_write, let_others_read
from m2t_accel.hub.folder import image_processor
from m2t_accel.hub.tensor_names import first_names
from m2t_accel.model import quiet_transformers
from m2t_accel.schedules import cosine


class Heads(nn.Module):
    """Independent linear classifiers, each followed by BatchNorm1d, one for each learning rate.

    Weights start as N(0, 0.01), biases as 0. The optimizer is SGD with momentum 0.9 and no weight decay.
    Source: arXiv 2101.07525 and its published code. Deviation: in the published code each of eight GPUs normalises its
    share of the batch. This class normalises the whole batch, so the result does not depend on the number of GPUs.
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
            # All heads start with the same weights, so only their learning rates differ.
            linear.load_state_dict(self.heads[0][0].state_dict())
        groups = [{"params": list(head.parameters())} for head in self.heads]
        self.optimizer = SGD(groups, lr=1.0, momentum=0.9)

    def forward(self, features: Tensor) -> Tensor:
        """Return the logits (heads, N, classes) of features (N, C)."""
        return torch.stack([head(features) for head in self.heads])

    def train_step(self, features: Tensor, labels: Tensor, factor: float) -> Tensor:
        """Take one optimizer step of every head, and return the losses (heads,).

        Args:
            features: (N, C) float32.
            labels: (N,) int64.
            factor: multiplies the learning rate of each head.
        """
        for group, rate in zip(self.optimizer.param_groups, self.learning_rates, strict=True):
            group["lr"] = rate * factor
        losses = torch.stack([functional.cross_entropy(head(features), labels) for head in self.heads])
        self.optimizer.zero_grad()
        losses.sum().backward()
        self.optimizer.step()
        return losses.detach()


def rate_factor(schedule: str, step: int, total_steps: int) -> float:
    """Return the learning rate of a step as a share of its peak.

    The schedule "cosine" falls from 1 to 0. The schedule "steps" is 1 at first, 0.1 after 60 % of the run and 0.01
    after 80 % (epochs 60 and 80 of 100).
    """
    if schedule == "cosine":
        return cosine(step, total_steps)
    return 0.1 ** sum(step * 100 >= share * total_steps for share in (60, 80))


def fold_batch_norm(head: nn.Sequential) -> nn.Linear:
    """Return one Linear that computes what the head's Linear and BatchNorm1d compute in evaluation mode."""
    linear, norm = head
    scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    folded = nn.Linear(linear.in_features, linear.out_features, device=linear.weight.device, dtype=linear.weight.dtype)
    with torch.no_grad():
        folded.weight.copy_(linear.weight * scale[:, None])
        folded.bias.copy_((linear.bias - norm.running_mean) * scale + norm.bias)
    return folded


def build_classifier(encoder: PreTrainedModel, linear: nn.Linear, class_names: Sequence[str]) -> PreTrainedModel:
    """Return encoder and linear layer as a stock image classifier of transformers, with the names of the classes.

    For a ResNetModel this is a ResNetForImageClassification, which `pipeline("image-classification")` runs.

    Raises:
        ConfigurationError: transformers has no classifier for it that ends in one linear layer on its features.
    """
    config = copy.deepcopy(encoder.config)
    config.id2label = dict(enumerate(class_names))
    config.label2id = {name: i for i, name in enumerate(class_names)}
    try:
        model = AutoModelForImageClassification.from_config(config)
    except ValueError:
        raise ConfigurationError(f"transformers has no image classifier with a {type(encoder).__name__}") from None
    body, last = encoder_of(model), last_linear(model)
    if last is None or last.weight.shape != linear.weight.shape or type(body) is not type(encoder):
        raise ConfigurationError(f"{type(model).__name__} does not end in one linear layer on the features")
    # A ViTModel's features come from its pooler, which the encoder in a ViTForImageClassification lacks.
    other = sorted(body.state_dict().keys() ^ encoder.state_dict().keys())
    if other:
        raise ConfigurationError(
            f"{type(model).__name__} computes other features than {type(encoder).__name__}, because only one of them "
            f"has {first_names(other)}"
        )
    body.load_state_dict(encoder.state_dict(), strict=True)
    last.load_state_dict(linear.state_dict())
    return model.eval()


def encoder_of(classifier: PreTrainedModel) -> PreTrainedModel | None:
    return getattr(classifier, classifier.base_model_prefix, None)


def last_linear(classifier: PreTrainedModel) -> nn.Linear | None:
    return ([None] + [layer for layer in classifier.modules() if isinstance(layer, nn.Linear)])[-1]


def save_classifier(classifier: PreTrainedModel, config: ImageSettings, folder: Path) -> None:
    """Write a classifier and its image processor atomically; they replace an earlier classifier."""
    with atomic_write(folder) as temporary:
        with quiet_transformers():
            classifier.save_pretrained(temporary)
        for path in temporary.glob("*.safetensors"):
            let_others_read(path)
        image_processor(config).save_pretrained(temporary)
