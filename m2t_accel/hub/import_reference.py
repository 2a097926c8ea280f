"""Convert checkpoints of the published code, and torchvision or timm ResNets, to encoder folders."""

from __future__ import annotations

from pathlib import Path

import torch
from huggingface_hub import ModelCardData

from m2t_accel.config.data import ImageSettings
from m2t_accel.config.fields import ConfigurationError, count, write_errors_in_one_line
from m2t_accel.files import atomic_write
from m2t_accel.hub.card import loading_code
from m2t_accel.hub.encoders import LoadedEncoder, count_by_module, load_resnet, read_state, select_network
from m2t_accel.hub.export import feature_difference, standard_name, torchvision_features
from m2t_accel.hub.folder import save_encoder

# The published code uses 224 pixels, and ImageNet's mean and deviation, which are the defaults.
SETTINGS = ImageSettings(dataset="imagenet", image_size=224)


def import_reference(checkpoint: Path, network: str, output: Path) -> list[str]:
    """Write the encoder of a checkpoint as a folder that AutoModel loads. Return lines for the user.

    A checkpoint of the published code (`last_epoch_ckpt.pth.tar`) holds its tensors under `model`, with the names
    `teacher_encoder.…` and `student_encoder.…`. The rest of each name is torchvision's; `fc` is the projector.

    Every tensor of the encoder must be present, in its shape. The lines name each tensor that is not used.

    Args:
        network: "teacher" or "student": the encoder to take from a checkpoint of the published code. Other state
            dicts have only one encoder.

    Raises:
        ConfigurationError: the file holds no such encoder, or the folder exists and is not empty, or cannot be written.
    """
    if not checkpoint.is_file():
        raise ConfigurationError(f"{checkpoint}: no such file; give a checkpoint such as last_epoch_ckpt.pth.tar")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigurationError(f"--output {output} exists and is not empty: give another folder")
    try:
        state, others, is_published_code = select_network(read_state(checkpoint), network)
        state = {name: tensor.float() for name, tensor in state.items()}
        model, unused = load_resnet(state)
    except ConfigurationError as error:
        raise ConfigurationError(f"{checkpoint}: {error}") from None
    preprocessing = (SETTINGS.image_size, SETTINGS.evaluation_crop, SETTINGS.image_mean, SETTINGS.image_std)
    encoder = LoadedEncoder(model, *preprocessing, network, str(checkpoint))
    origin = f"the {network} of a checkpoint of the published code" if is_published_code else "a ResNet's state dict"
    used = {name: tensor for name, tensor in state.items() if name not in unused}
    lines = [f"{checkpoint.name}: {origin}", compare_with_torchvision(encoder, used)]
    if unused or others:
        names = ", ".join([*([count_by_module(others)] if others else []), *unused])
        lines.append(f"{count(len(unused) + len(others), 'tensor')} not used: {names}")
    if is_published_code:
        model.config.momentum2_teacher = {"network": network}
    with write_errors_in_one_line("output", output):
        output.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(output) as temporary:
            save_encoder(model, SETTINGS, short_card(checkpoint.name, origin), temporary)
    lines.append(f"{output}: {SETTINGS.image_size} pixels, ImageNet's mean and deviation, as in the published code")
    lines.append(f'Load it:  from transformers import AutoModel; AutoModel.from_pretrained("{output}")')
    return lines


def compare_with_torchvision(encoder: LoadedEncoder, state: dict[str, torch.Tensor]) -> str:
    """Return a line on the difference to the features of torchvision's network with the same weights.

    Args:
        state: the encoder's tensors in the file, under torchvision's names.

    Raises:
        ConfigurationError: the features differ by more than rounding.
    """
    try:
        name = standard_name(encoder.model)
    except ConfigurationError as error:
        return f"not compared: {error}"
    difference = feature_difference(encoder, torchvision_features(name, state))
    return f"{name}: features differ from torchvision's by {difference:.1g}"


def short_card(name: str, origin: str) -> str:
    """Return a README.md that says where the weights come from and how to load them."""
    data = ModelCardData(
        library_name="transformers", pipeline_tag="image-feature-extraction", tags=["self-supervised-learning"]
    )
    return f"""---
{data.to_yaml()}
---

# An image encoder

Made from `{name}`, {origin}. The published code is that of Momentum² Teacher
([arXiv 2101.07525](https://arxiv.org/abs/2101.07525)). The author of the weights decides how they may be used.

{loading_code("PATH_OR_ID")}
"""
