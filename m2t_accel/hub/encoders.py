"""An encoder from wherever it is: a run, a transformers or timm model in a folder or on the Hub, a file of weights."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    AutoModel,
    BaseImageProcessor,
    PretrainedConfig,
    PreTrainedModel,
    ResNetConfig,
    ResNetModel,
)

from m2t_accel.config.fields import ConfigurationError, one_line
from m2t_accel.hub.tensor_names import from_torchvision, resnet_config
from m2t_accel.model import embed, quiet_transformers

WEIGHT_FILES = (".safetensors", ".pth", ".pt", ".bin", ".tar")
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class LoadedEncoder:
    """An encoder with weights, and how it sees images."""

    model: PreTrainedModel  # in evaluation mode, float32; its features are those of m2t_accel.model.embed
    image_size: int
    evaluation_crop: float
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]
    network: str  # teacher or student where the encoder says so, else `as loaded`
    note: str  # one line for people: what was loaded, and what was not used of it


@dataclass(frozen=True)
class View:
    """How an image processor shows an image: its shorter side resized to int(size / crop), the centre cropped."""

    size: int = 224
    crop: float = 0.875
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    remark: str = ""


def load_encoder(source: str) -> LoadedEncoder:
    """The encoder of a run's folder, of any folder or Hub id with a transformers or timm model, or of a file.

    Nothing in it is executed: no remote code, no pickle but for plain tensors. Weights that are missing are an error.

    Raises:
        ConfigurationError: there is none, or it cannot be loaded so.
    """
    path = Path(source)
    if path.is_file():
        return load_file_of_weights(path)
    if path.is_dir():
        path = next(
            (path / name for name in ("encoder", "classifier") if (path / name / "config.json").is_file()), path
        )
        if not (path / "config.json").is_file():
            raise ConfigurationError(
                f"--encoder {source}: the folder has no config.json, and no encoder/ with one: has the run ended?"
            )
        check_index(path)
        source = str(path)
    try:
        described, _ = PretrainedConfig.get_config_dict(source)
    except Exception as error:  # of huggingface_hub, httpx, json: no common ancestor
        raise ConfigurationError(
            f"--encoder {source}: its config.json cannot be read ({one_line(error)}); give a folder that exists, or a "
            "Hub id that you can reach (`hf auth login` for a gated one)"
        ) from error
    kind = described.get("model_type")
    if "architecture" in described and kind in (None, "timm_wrapper"):  # timm's, read by older and newer transformers
        return load_timm(source, described)
    if kind not in CONFIG_MAPPING:
        wish = ", and asks for code of its own, which is never run" if "auto_map" in described else ""
        raise ConfigurationError(
            f"--encoder {source}: model type {kind} is none of transformers'{wish}; give a transformers or timm ResNet"
        )
    return load_transformers(source, described)


def load_transformers(source: str, described: Mapping[str, object]) -> LoadedEncoder:
    try:
        with quiet_transformers():
            model, info = AutoModel.from_pretrained(
                source, trust_remote_code=False, dtype=torch.float32, output_loading_info=True
            )
    except Exception as error:  # a model can be wrong in any way that its code can trip over
        raise ConfigurationError(f"--encoder {source} cannot be loaded ({one_line(error)})") from error
    lacking = sorted(info["missing_keys"]) + sorted(str(key) for key in info.get("mismatched_keys", ()))
    if lacking:
        raise ConfigurationError(
            f"--encoder {source}: {len(lacking)} of its tensors are missing or have another shape, such as {lacking[0]}"
        )
    unused = sorted(info["unexpected_keys"])
    network = (described.get("momentum2_teacher") or {}).get("network", "as loaded")
    try:
        view = view_of(BaseImageProcessor.get_image_processor_dict(source)[0])
    except (OSError, ValueError):
        view = View(remark="without an image processor: 224 pixels and ImageNet's mean and deviation are assumed")
    return finished(model, view, network, source, unused)


def load_timm(source: str, described: Mapping[str, object]) -> LoadedEncoder:
    """A timm ResNet's files: config.json with `pretrained_cfg`, and weights under torchvision's names."""
    try:
        if os.path.isdir(source):
            file = Path(source) / "model.safetensors"
        else:
            file = Path(hf_hub_download(source, "model.safetensors"))
        model, unused = plain_resnet(read_state(file))
        told = described.get("pretrained_cfg") or described
        channels, size, width = told.get("input_size", (3, 224, 224))
        if channels != 3 or size != width:
            raise ConfigurationError(f"images of {told['input_size']} (three channels and a square are needed)")
        view = View(size, told.get("crop_pct", 0.875), tuple(told["mean"]), tuple(told["std"]))
    except ConfigurationError as error:
        raise ConfigurationError(f"--encoder {source}, timm's {described['architecture']}: {error}") from None
    except Exception as error:  # of huggingface_hub and httpx, or a config of another form
        raise ConfigurationError(
            f"--encoder {source}, timm's {described['architecture']}, cannot be loaded ({one_line(error)})"
        ) from error
    return finished(model, view, "as loaded", source, unused)


def load_file_of_weights(path: Path) -> LoadedEncoder:
    """A state dict of a ResNet under torchvision's names."""
    if path.suffix not in WEIGHT_FILES:
        raise ConfigurationError(f"--encoder {path}: a folder, a Hub id, or a file of weights {' '.join(WEIGHT_FILES)}")
    try:
        model, unused = plain_resnet(read_state(path))
    except ConfigurationError as error:
        raise ConfigurationError(f"--encoder {path}: {error}") from None
    view = View(remark="224 pixels and ImageNet's mean and deviation are assumed")
    return finished(model, view, "as loaded", str(path), unused)


def finished(model: PreTrainedModel, view: View, network: str, source: str, unused: list[str]) -> LoadedEncoder:
    model.eval()
    try:
        with torch.no_grad():
            num_features = embed(model, torch.zeros(1, 3, view.size, view.size)).shape[1]
    except Exception as error:  # the model is any
        raise ConfigurationError(
            f"--encoder {source}: {type(model).__name__} gives no pooled features ({one_line(error)})"
        ) from error
    size = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    note = f"{source}: {type(model).__name__}, {size:.1f} M parameters, {num_features} features"
    note += f"; {view.remark}" if view.remark else ""
    note += f"; not used: {in_groups(unused)}" if unused else ""
    return LoadedEncoder(model, view.size, view.crop, view.mean, view.std, network, note)


def random_weights(model: PreTrainedModel) -> PreTrainedModel:
    """The same encoder before any training, in evaluation mode."""
    return type(model)(copy.deepcopy(model.config)).eval()


def read_state(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file or of a pickle, which is loaded without executing anything.

    A state dict that stands under `state_dict` or `model` is found.

    Raises:
        ConfigurationError: it cannot be read, or holds something else than tensors.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of pickle, zipfile, torch, safetensors: no common ancestor
        if re.search("Unsupported (global|class)", str(error), re.IGNORECASE):
            reason = "it holds more than tensors, which would have to be executed"
        else:
            # What torch says of a file that is no pickle is to load it by executing it.
            said = "" if isinstance(error, pickle.UnpicklingError) else f" ({one_line(error)})"
            reason = f"it is none of tensors, or damaged{said}"
        raise ConfigurationError(f"the file cannot be loaded: {reason}") from None
    for name in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
            content = content[name]
    if not isinstance(content, Mapping) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise ConfigurationError("the file holds no dictionary of tensors")
    return dict(content)


def resnet(state: Mapping[str, Tensor]) -> tuple[ResNetModel, list[str]]:
    """A ResNetModel with a state under torchvision's names, and those names that it has no use for.

    Raises:
        ConfigurationError: the state is not whole, or of another network.
    """
    model = ResNetModel(ResNetConfig(**resnet_config(state)))
    mapped, unused = from_torchvision(state, model.state_dict())
    model.load_state_dict(mapped, strict=True)
    return model.eval(), unused


def plain_resnet(state: Mapping[str, Tensor]) -> tuple[ResNetModel, list[str]]:
    """As resnet; what has no use may be of the last layer only.

    Raises:
        ConfigurationError: as resnet, or the network has more than a ResNet, and so is another.
    """
    model, unused = resnet(state)
    other = [name for name in unused if not name.startswith("fc.")]
    if other:
        raise ConfigurationError(f"{len(other)} tensors that no plain ResNet has: {in_groups(other)}")
    return model, unused


def in_groups(names: list[str]) -> str:
    """Names by their first word, with how many there are: `fc (2), head (4)`."""
    groups: dict[str, int] = {}
    for name in names:
        groups[name.split(".")[0]] = groups.get(name.split(".")[0], 0) + 1
    return ", ".join(f"{group} ({number})" for group, number in groups.items())


def check_index(folder: Path) -> None:
    """Check that an index of weights names files of its own folder only.

    Raises:
        ConfigurationError: it names another.
    """
    for index in folder.glob("*.index.json"):
        try:
            files = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise ConfigurationError(f"--encoder {folder}: {index.name} cannot be read ({one_line(error)})") from None
        outside = next((file for file in files if not isinstance(file, str) or Path(file).name != file), None)
        if outside is not None:
            raise ConfigurationError(f"--encoder {folder}: {index.name} names {outside}, which is not in the folder")


def view_of(processor: Mapping[str, object]) -> View:
    """What a preprocessor_config.json says, as a view of ours.

    Raises:
        ValueError: it says nothing of sizes.
    """
    remarks = []
    size, crop_size = processor.get("size"), processor.get("crop_size")
    kind = str(processor.get("image_processor_type") or processor.get("feature_extractor_type") or "")
    shorter = size.get("shortest_edge") if isinstance(size, Mapping) else size
    if isinstance(crop_size, Mapping):
        crop_size = crop_size.get("height")
    if kind.startswith("ConvNext") and shorter is not None:
        # Its sizes are those of the crop; from 384 pixels on there is none.
        crop_size = shorter
        shorter = int(shorter / processor.get("crop_pct", 224 / 256)) if shorter < 384 else shorter
        if crop_size == shorter:
            remarks.append("its processor squashes images to a square, here the centre is cropped")
    elif isinstance(size, Mapping) and "height" in size:
        shorter = crop_size = size["height"]
        remarks.append("its processor squashes images to a square, here the centre is cropped")
    elif not processor.get("do_center_crop", True) or crop_size is None:
        crop_size = shorter
        remarks.append("its processor crops no centre, here it is cropped")
    if not isinstance(shorter, int) or not isinstance(crop_size, int) or not 8 <= crop_size <= shorter:
        raise ValueError(f"sizes {size} and {processor.get('crop_size')}")
    if processor.get("resample", 2) not in (2, None):
        remarks.append("its processor does not resize bilinearly, here it is done so")
    share = crop_size / shorter
    while int(crop_size / share) < shorter:  # rounding may have taken a pixel
        share = math.nextafter(share, 0)
    mean, std = (0.0,) * 3, (1.0,) * 3
    if processor.get("do_normalize", True):
        mean, std = tuple(processor.get("image_mean", IMAGENET_MEAN)), tuple(processor.get("image_std", IMAGENET_STD))
    return View(crop_size, share, mean, std, "; ".join(remarks))


def weights_fingerprint(encoder: nn.Module) -> str:
    """A name for an encoder's weights and statistics."""
    digest = hashlib.sha256()
    for name, values in sorted(encoder.state_dict().items()):
        digest.update(name.encode())
        digest.update(values.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
