"""Checkpoints of the published code, and state dicts of torchvision's and timm's ResNets, as encoder folders."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch
import torchvision
from huggingface_hub import ModelCard, ModelCardData
from torch import nn

from m2t_accel.config.data import ImageSettings
from m2t_accel.config.fields import ConfigurationError, did_you_mean
from m2t_accel.hub.encoders import LoadedEncoder, in_groups, read_state, resnet
from m2t_accel.hub.export import compare, standard_name
from m2t_accel.hub.folder import image_processor
from m2t_accel.model import quiet_transformers

IMAGE_SIZE = 224  # of the published code, with ImageNet's mean and standard deviation, as are our defaults


def import_reference(checkpoint: Path, network: str, output: Path) -> list[str]:
    """Write the encoder of a checkpoint as a folder that AutoModel loads; what was done comes back in lines.

    A checkpoint of the published code (`last_epoch_ckpt.pth.tar`) has its state under `model`, the names
    `teacher_encoder.…` and `student_encoder.…`, with `module.` before them where it trained with
    DistributedDataParallel; below those, torchvision's names, and the projector as `fc`. `network` says whose encoder
    is taken, teacher or student; of a state dict without them it is not asked.

    Every tensor of the encoder must be there, in its shape; each one that is not used is named.

    Raises:
        ConfigurationError: the file holds no such encoder, or the folder is there and not empty, or cannot be written.
    """
    if not checkpoint.is_file():
        raise ConfigurationError(f"{checkpoint}: no such file; give a checkpoint such as last_epoch_ckpt.pth.tar")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigurationError(f"--output {output} exists and is not empty: give another folder")
    try:
        state = read_state(checkpoint)
        state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
        prefix = f"{network}_encoder."
        of_published_code = any(name.split(".")[0].endswith("_encoder") for name in state)
        if of_published_code and not any(name.startswith(prefix) for name in state):
            tops = sorted({name.split(".")[0] for name in state})
            raise ConfigurationError(f"it has no {prefix}…{did_you_mean(prefix, tops)}; there are {', '.join(tops)}")
        others = [name for name in state if of_published_code and not name.startswith(prefix)]
        if of_published_code:
            state = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
        model, unused = resnet({name: tensor.float() for name, tensor in state.items()})
    except ConfigurationError as error:
        raise ConfigurationError(f"{checkpoint}: {error}") from None
    settings = ImageSettings(dataset="imagenet", image_size=IMAGE_SIZE)
    view = (settings.image_size, settings.evaluation_crop, settings.image_mean, settings.image_std)
    encoder = LoadedEncoder(model, *view, network, str(checkpoint))
    origin = f"the {network} of a checkpoint of the published code" if of_published_code else "a ResNet's state dict"
    lines = [f"{checkpoint.name}: {origin}", compared(encoder, state)]
    not_used = [f"{network}_encoder.{name}" if of_published_code else name for name in unused] + others
    if not_used:
        lines.append(
            f"{len(not_used)} tensors are not used: {in_groups(others)}{', ' if others and unused else ''}"
            + ", ".join(unused)
        )
    if of_published_code:
        model.config.momentum2_teacher = {"network": network}
    temporary = output.with_name(f".{output.name}.{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
        with quiet_transformers():
            model.save_pretrained(temporary)
        image_processor(settings).save_pretrained(temporary)
        card(checkpoint.name, origin).save(temporary / "README.md")
        if output.exists():
            output.rmdir()
        os.replace(temporary, output)
    except OSError as error:
        raise ConfigurationError(f"--output {output} cannot be written ({error.strerror})") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    lines.append(f"{output}: {IMAGE_SIZE} pixels, ImageNet's mean and deviation, as the published code has them")
    lines.append(f'Load it:  from transformers import AutoModel; AutoModel.from_pretrained("{output}")')
    return lines


def compared(encoder: LoadedEncoder, state: dict[str, torch.Tensor]) -> str:
    """A line about the encoder's features beside those of torchvision's network of that name, with the file's weights.

    Raises:
        ConfigurationError: they differ by more than rounding.
    """
    try:
        name = standard_name(encoder.model)
    except ConfigurationError as error:
        return f"not compared: {error}"
    theirs = torchvision.models.get_model(name).eval()
    wanted = theirs.state_dict().keys() - {"fc.weight", "fc.bias"}
    theirs.load_state_dict({key: tensor for key, tensor in state.items() if key in wanted}, strict=False)
    theirs.fc = nn.Identity()
    return f"{name}: features differ from torchvision's by {compare(encoder, theirs):.1g}"


def card(name: str, origin: str) -> ModelCard:
    """A short card: where the weights come from, and how to load them."""
    data = ModelCardData(
        library_name="transformers", pipeline_tag="image-feature-extraction", tags=["self-supervised-learning"]
    )
    return ModelCard(
        f"""---
{data.to_yaml()}
---

# An image encoder

Made from `{name}`, {origin}. The published code is that of Momentum² Teacher
([arXiv 2101.07525](https://arxiv.org/abs/2101.07525)). What the weights may be used for is for their author to say.

```python
from transformers import AutoImageProcessor, AutoModel

processor = AutoImageProcessor.from_pretrained("PATH_OR_ID")
encoder = AutoModel.from_pretrained("PATH_OR_ID")
features = encoder(**processor(image, return_tensors="pt")).pooler_output.flatten(1)
```
"""
    )
