"""Tensor names of a ResNet in transformers, in torchvision and timm (which agree), and in detectron2."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from torch import Tensor

from m2t_accel.config.fields import ConfigurationError

# transformers' name on the left, torchvision's on the right. transformers counts stages and layers from 0,
# torchvision from 1.
STEM = {"embedder.embedder.convolution": "conv1", "embedder.embedder.normalization": "bn1"}
SHORTCUT = {"convolution": "downsample.0", "normalization": "downsample.1"}
LAYER = {"convolution": "conv", "normalization": "bn"}


def torchvision_name(name: str) -> str:
    """Return the torchvision name of a tensor of transformers' ResNetModel.

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
    """Return the detectron2 name of a tensor of torchvision's ResNet.

    Source: detectron2's tools/convert-torchvision-to-d2.py.
    """
    if not name.startswith("layer"):
        name = f"stem.{name}"
    name = re.sub(r"^layer(\d+)", lambda stage: f"res{int(stage[1]) + 1}", name)
    name = name.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")
    return re.sub(r"\bbn(\d)\b", r"conv\1.norm", name)


def to_torchvision(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors of a transformers ResNetModel to torchvision's names.

    Raises:
        KeyError: the state holds a tensor that ResNetModel does not have.
    """
    return {torchvision_name(name): tensor for name, tensor in state.items()}


def resnet_config(state: Mapping[str, Tensor]) -> dict[str, object]:
    """Infer the arguments of transformers' ResNetConfig from the shapes of a state dict with torchvision's names.

    Raises:
        ConfigurationError: the tensors are not a ResNet's, or ResNetModel has no such variant (wide, grouped, another
            stem).
    """
    stem = state.get("conv1.weight")
    if stem is None or "layer1.0.conv1.weight" not in state:
        raise ConfigurationError(
            "no ResNet under torchvision's names (conv1.weight, layer1.0.conv1.weight, …): its first names are "
            + ", ".join(list(state)[:3])
        )
    if tuple(stem.shape[1:]) != (3, 7, 7):
        raise ConfigurationError(f"a ResNet whose stem has the shape {tuple(stem.shape)}: (N, 3, 7, 7) is needed")
    blocks = {parts[1]: [] for parts in map(re.compile(r"layer(\d+)\.").match, state) if parts}
    for name in state:
        parts = re.match(r"layer(\d+)\.(\d+)\.conv1\.weight$", name)
        if parts:
            blocks[parts[1]].append(int(parts[2]))
    is_bottleneck = "layer1.0.conv3.weight" in state
    last = "conv3" if is_bottleneck else "conv2"
    depths, hidden_sizes = [], []
    for stage in sorted(blocks, key=int):
        first, numbers = f"layer{stage}.0", sorted(blocks[stage])
        if f"{first}.{last}.weight" not in state or numbers != list(range(len(numbers))):
            raise ConfigurationError(f"a ResNet with tensors of layer{stage} missing: its blocks are {numbers}")
        depths.append(len(numbers))
        hidden_sizes.append(state[f"{first}.{last}.weight"].shape[0])
        width = state[f"{first}.conv1.weight"].shape[0]
        inner = state[f"{first}.conv2.weight"].shape
        if (is_bottleneck and width * 4 != hidden_sizes[-1]) or inner[1] != width:
            raise ConfigurationError(
                f"a wide or grouped ResNet ({first}.conv2.weight has the shape {tuple(inner)}): transformers' "
                "ResNetModel has only plain ones"
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
    """Rename the tensors of a torchvision ResNet to transformers' names.

    Args:
        state: tensors under torchvision's names.
        expected: state dict of the ResNetModel that will load them.

    Returns:
        The renamed tensors, and the names in `state` that the model does not use.

    Raises:
        ConfigurationError: tensors are missing, or one has another shape.
    """
    renamed, unused = {}, dict.fromkeys(state)
    missing = []
    for name, tensor in expected.items():
        other = torchvision_name(name)
        if other not in state:
            if name.endswith("num_batches_tracked"):  # older files have none, and no result depends on it
                renamed[name] = tensor
            else:
                missing.append(other)
            continue
        if state[other].shape != tensor.shape:
            raise ConfigurationError(
                f"the tensor {other} has the shape {tuple(state[other].shape)}, {tuple(tensor.shape)} is needed"
            )
        renamed[name] = state[other]
        del unused[other]
    if missing:
        raise ConfigurationError(f"tensors are missing: {first_names(missing)}")
    return renamed, list(unused)


def first_names(names: Sequence[str]) -> str:
    """Return the first five names, and the number of the others."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
