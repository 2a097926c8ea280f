"""The names of a ResNet's tensors in transformers, torchvision (timm's are the same) and detectron2."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from m2t_accel.config.fields import ConfigurationError

# transformers' names, whose `{0}` `{1}` `{2}` count from 0, and torchvision's, whose stages and layers count from 1.
STEM = {"embedder.embedder.convolution": "conv1", "embedder.embedder.normalization": "bn1"}
SHORTCUT = {"convolution": "downsample.0", "normalization": "downsample.1"}
LAYER = {"convolution": "conv", "normalization": "bn"}


def torchvision_name(name: str) -> str:
    """The torchvision name of a tensor of transformers' ResNetModel.

    Raises:
        KeyError: ResNetModel has no such tensor.
    """
    module, _, tensor = name.rpartition(".")
    if module in STEM:
        return f"{STEM[module]}.{tensor}"
    parts = re.fullmatch(r"encoder\.stages\.(\d+)\.layers\.(\d+)\.(?:layer\.(\d+)|shortcut)\.(\w+)", module)
    if parts is None or parts[4] not in LAYER:
        raise KeyError(name)
    inner = SHORTCUT[parts[4]] if parts[3] is None else f"{LAYER[parts[4]]}{int(parts[3]) + 1}"
    return f"layer{int(parts[1]) + 1}.{parts[2]}.{inner}.{tensor}"


def detectron2_name(name: str) -> str:
    """The detectron2 name of a tensor of torchvision's ResNet.

    Source: detectron2's tools/convert-torchvision-to-d2.py.
    """
    if not name.startswith("layer"):
        name = f"stem.{name}"
    name = re.sub(r"^layer(\d+)", lambda stage: f"res{int(stage[1]) + 1}", name)
    name = name.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")
    return re.sub(r"\bbn(\d)\b", r"conv\1.norm", name)


def to_torchvision(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state of a transformers ResNetModel under torchvision's names."""
    return {torchvision_name(name): tensor for name, tensor in state.items()}


def resnet_config(state: Mapping[str, Tensor]) -> dict[str, object]:
    """The arguments of transformers' ResNetConfig for a state under torchvision's names, told by its shapes.

    Raises:
        ConfigurationError: it is not of a ResNet, or of one that ResNetModel cannot be (wide, grouped, another stem).
    """
    stem = state.get("conv1.weight")
    if stem is None or "layer1.0.conv1.weight" not in state:
        raise ConfigurationError(
            "no ResNet under torchvision's names (conv1.weight, layer1.0.conv1.weight, …): its first names are "
            + ", ".join(list(state)[:3])
        )
    if tuple(stem.shape[1:]) != (3, 7, 7):
        raise ConfigurationError(f"a ResNet whose stem has the shape {tuple(stem.shape)}: (N, 3, 7, 7) is needed")
    places = {parts[1]: [] for parts in map(re.compile(r"layer(\d+)\.").match, state) if parts}
    for name in state:
        parts = re.match(r"layer(\d+)\.(\d+)\.conv1\.weight$", name)
        if parts:
            places[parts[1]].append(int(parts[2]))
    is_bottleneck = "layer1.0.conv3.weight" in state
    last = "conv3" if is_bottleneck else "conv2"
    depths, hidden_sizes = [], []
    for stage in sorted(places, key=int):
        first = f"layer{stage}.0"
        if f"{first}.{last}.weight" not in state or sorted(places[stage]) != list(range(len(places[stage]))):
            raise ConfigurationError(
                f"a ResNet whose layer{stage} is not whole: its blocks are {sorted(places[stage])}"
            )
        depths.append(len(places[stage]))
        hidden_sizes.append(state[f"{first}.{last}.weight"].shape[0])
        width = state[f"{first}.conv1.weight"].shape[0]
        inner = state[f"{first}.conv2.weight"].shape
        if (is_bottleneck and width * 4 != hidden_sizes[-1]) or inner[1] != width:
            raise ConfigurationError(
                f"a wide or grouped ResNet (layer{stage}.0.conv2.weight is {tuple(inner)}): only plain ones can be "
                "transformers' ResNetModel"
            )
    return {
        "depths": depths,
        "hidden_sizes": hidden_sizes,
        "embedding_size": stem.shape[0],
        "layer_type": "bottleneck" if is_bottleneck else "basic",
    }


def from_torchvision(
    state: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], list[str]]:
    """A state under torchvision's names as that of a ResNetModel, and the names that it has no use for.

    expected: the state of the ResNetModel that it is for.

    Raises:
        ConfigurationError: a tensor is missing or has another shape.
    """
    mapped, unused = {}, set(state)
    for name, tensor in expected.items():
        other = torchvision_name(name)
        if other not in state:
            if name.endswith("num_batches_tracked"):  # older files have none, and nothing depends on it
                mapped[name] = tensor
                continue
            raise ConfigurationError(f"the tensor {other} is missing")
        if state[other].shape != tensor.shape:
            raise ConfigurationError(
                f"the tensor {other} has the shape {tuple(state[other].shape)}, {tuple(tensor.shape)} is needed"
            )
        mapped[name] = state[other]
        unused.discard(other)
    return mapped, [name for name in state if name in unused]
