"""Load an encoder from a run, a transformers or timm model in a folder or on the Hub, or a file of weights."""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import math
import os
import pickle
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

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

from m2t_accel.config.fields import ConfigurationError, count, did_you_mean, one_line
from m2t_accel.hub.tensor_names import first_names, from_torchvision, resnet_config
from m2t_accel.model import embed, quiet_transformers

WEIGHT_FILES = (".safetensors", ".pth", ".pt", ".bin", ".tar", ".ckpt")
# The encoder that a method evaluates, if its checkpoint holds several: MoCo, MoCo v3, most others.
MAIN_NETWORKS = ("encoder_q.", "base_encoder.", "backbone.")
# Classifiers and projectors: modules after the encoder, which may stay unused.
HEADS = re.compile(r"(fc|classifier|heads?|linear|mlp|prototypes)$|.*(proj|predict)")
NOT_BILINEAR = "{} does not resize bilinearly; m2t_accel does"
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class LoadedEncoder:
    """An encoder with its weights and the preprocessing of its images."""

    model: PreTrainedModel  # in evaluation mode, float32; m2t_accel.model.embed returns its features
    image_size: int  # pixels
    evaluation_crop: float  # share of the shorter side that the central crop keeps
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]
    network: str  # "teacher" or "student" if the configuration says so, else "as loaded"
    note: str  # one line for the user: the model, its size, and the tensors that were not used

    @property
    def preprocessing(self) -> dict[str, object]:
        """Return sizes and normalisation under the names of ImageSettings."""
        return {name: getattr(self, name) for name in ("image_size", "evaluation_crop", "image_mean", "image_std")}


class Preprocessing(NamedTuple):
    """Sizes and normalisation: the shorter side is resized to int(size / crop), then the centre is cropped to size."""

    size: int = 224
    crop: float = 0.875
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    remark: str = ""  # for the user: assumptions, and differences from the encoder's own image processor


def load_encoder(source: str) -> LoadedEncoder:
    """Load an encoder and its preprocessing.

    Nothing in the source is executed: no remote code, and no pickle that holds more than tensors. A missing tensor is
    an error.

    Args:
        source: folder of a run, folder or Hub id of a transformers or timm model, or file of weights.

    Raises:
        ConfigurationError: the source does not exist or cannot be loaded.
    """
    path = Path(source)
    if path.is_file():
        return load_weight_file(path)
    if path.is_dir():
        folders = [folder for folder in (path / "encoder", path / "classifier") if (folder / "config.json").is_file()]
        path = folders[0] if folders else path
        if not (path / "config.json").is_file():
            check_not_own_module(path)
            raise ConfigurationError(
                f"--encoder {source}: the folder has no config.json, and no encoder/ with one: has the run ended?"
            )
        check_index(path)
        source = str(path)
    try:
        config, _ = PretrainedConfig.get_config_dict(source)
    except Exception as error:  # errors of huggingface_hub, httpx and json have no common base class
        raise ConfigurationError(
            f"--encoder {source}: its config.json cannot be read ({one_line(error)}); give a folder that exists, or a "
            "Hub id that you can reach (`hf auth login` for a gated one)"
        ) from error
    kind = config.get("model_type")
    # timm writes no model_type. Some versions of transformers read its files as a "timm_wrapper".
    if "architecture" in config and kind in (None, "timm_wrapper"):
        return load_timm(source, config)
    if kind not in CONFIG_MAPPING:
        remote_code = "; it asks for code of its own, which is never run" if "auto_map" in config else ""
        raise ConfigurationError(
            f"--encoder {source}: transformers has no model type {kind}{remote_code}; give a transformers model or a "
            "timm ResNet"
        )
    return load_transformers(source, config)


def check_not_own_module(folder: Path) -> None:
    """Check that a folder without config.json is not that of a run of a user's own module, or encoder/ of one.

    Raises:
        ConfigurationError: it holds weights.
    """
    for file in (folder / "encoder" / "model.safetensors", folder / "model.safetensors"):
        if file.is_file():
            raise ConfigurationError(
                f"--encoder {folder}: the weights have no config.json, so they are of a module of your own, and only "
                "transformers models and timm ResNets can be given; load them into the module by "
                f'safetensors.torch.load_model(module, "{file}")'
            )


def load_transformers(source: str, config: Mapping[str, object]) -> LoadedEncoder:
    """Load a transformers model from a folder or a Hub id.

    Raises:
        ConfigurationError: the model cannot be loaded, or tensors are missing or have another shape.
    """
    try:
        with quiet_transformers():
            # Other shapes are refused below, by a message that names a tensor.
            model, info = AutoModel.from_pretrained(
                source,
                trust_remote_code=False,
                dtype=torch.float32,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
    except Exception as error:  # a wrong file can make the code of any model raise anything
        raise ConfigurationError(f"--encoder {source} cannot be loaded ({one_line(error)})") from error
    missing = sorted({*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])})
    if missing:
        raise ConfigurationError(
            f"--encoder {source}: {len(missing)} of its tensors are missing or have another shape: "
            f"{first_names(missing)}"
        )
    network = (config.get("momentum2_teacher") or {}).get("network", "as loaded")
    try:
        preprocessing = read_preprocessing(BaseImageProcessor.get_image_processor_dict(source)[0])
    except ConfigurationError as error:  # a ValueError, too
        raise ConfigurationError(f"--encoder {source}: {error}") from None
    except (OSError, TypeError, ValueError):
        preprocessing = Preprocessing(
            remark="without an image processor: 224 pixels and ImageNet's mean and deviation are assumed"
        )
    return loaded_encoder(model, preprocessing, network, source, sorted(info["unexpected_keys"]))


def load_timm(source: str, config: Mapping[str, object]) -> LoadedEncoder:
    """Load a timm ResNet: config.json with `pretrained_cfg`, and weights under torchvision's names.

    Raises:
        ConfigurationError: the files cannot be loaded, or describe another network than a plain ResNet.
    """
    name = f"--encoder {source}, timm's {config['architecture']}"
    try:
        check_plain_timm(config)
        if os.path.isdir(source):
            file = Path(source) / "model.safetensors"
        else:
            file = Path(hf_hub_download(source, "model.safetensors"))
        model, unused = load_plain_resnet(read_state(file))
        pretrained = config.get("pretrained_cfg") or config
        channels, height, width = pretrained.get("input_size", (3, 224, 224))
        if channels != 3 or height != width:
            raise ConfigurationError(f"images of {pretrained['input_size']} (three channels and a square are needed)")
        mean, std = tuple(pretrained["mean"]), tuple(pretrained["std"])
        remark = "" if pretrained.get("interpolation", "bilinear") == "bilinear" else NOT_BILINEAR.format("timm")
        preprocessing = Preprocessing(height, pretrained.get("crop_pct", 0.875), mean, std, remark)
    except ConfigurationError as error:
        raise ConfigurationError(f"{name}: {error}") from None
    except Exception as error:  # errors of huggingface_hub and httpx, or a configuration with other fields
        raise ConfigurationError(f"{name}, cannot be loaded ({one_line(error)})") from error
    return loaded_encoder(model, preprocessing, "as loaded", source, unused)


def check_plain_timm(config: Mapping[str, object]) -> None:
    """Check that timm builds a plain ResNet from a config.json, as far as the tensors cannot tell.

    Raises:
        ConfigurationError: layers or strides differ from those of a plain ResNet.
    """
    if str(config["architecture"]).startswith(("resnetaa", "resnetblur")):  # pooling has no tensors
        raise ConfigurationError("an anti-aliased ResNet computes other features: give a plain one, such as resnet50")
    allowed = {"num_classes", "in_chans"}
    other = {name: value for name, value in (config.get("model_args") or {}).items() if name not in allowed}
    if other.get("global_pool") in ("avg", ""):  # timm itself writes it
        del other["global_pool"]
    if other:
        raise ConfigurationError(
            f"model_args in its config.json make it another network than a plain ResNet ({', '.join(other)}): give a "
            "model without them"
        )


def load_weight_file(path: Path) -> LoadedEncoder:
    """Load a state dict of a ResNet with torchvision's names, or of a method that has trained such a ResNet.

    From a checkpoint of this method's published code this takes the teacher.

    Raises:
        ConfigurationError: the file cannot be loaded, or holds another network than a plain ResNet.
    """
    if path.suffix not in WEIGHT_FILES:
        raise ConfigurationError(
            f"--encoder {path}: give a folder, a Hub id, or a file of weights ({' '.join(WEIGHT_FILES)})"
        )
    try:
        state, others, is_published_code = select_network(read_state(path), "teacher")
        model, unused = load_plain_resnet(state)
    except ConfigurationError as error:
        raise ConfigurationError(f"--encoder {path}: {error}") from None
    remark = "the teacher of a checkpoint of the published code; " if is_published_code else ""
    preprocessing = Preprocessing(remark=f"{remark}224 pixels and ImageNet's mean and deviation are assumed")
    network = "teacher" if is_published_code else "as loaded"
    return loaded_encoder(model, preprocessing, network, str(path), [*others, *unused])


def loaded_encoder(
    model: PreTrainedModel, preprocessing: Preprocessing, network: str, source: str, unused: list[str]
) -> LoadedEncoder:
    """Return the model as a LoadedEncoder, with a note for the user.

    Raises:
        ConfigurationError: the model has no pooled features.
    """
    model.eval()
    size, crop, mean, std, remark = preprocessing
    try:
        with torch.no_grad():
            num_features = embed(model, torch.zeros(1, 3, size, size)).shape[1]
    except Exception as error:  # any transformers model may be given
        raise ConfigurationError(
            f"--encoder {source}: {type(model).__name__} gives no pooled features ({one_line(error)})"
        ) from error
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    note = f"{source}: {type(model).__name__}, {millions:.1f} M parameters, {num_features} features"
    note += f"; {remark}" if remark else ""
    note += f"; not used: {count_by_module(unused)}" if unused else ""
    return LoadedEncoder(model, size, crop, mean, std, network, note)


def random_weights(model: PreTrainedModel) -> PreTrainedModel:
    """Return the same architecture with random weights, in evaluation mode."""
    return type(model)(copy.deepcopy(model.config)).eval()


def read_state(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a .safetensors file or of a pickle, without executing anything.

    If the pickle holds a state dict under `state_dict` or `model`, return that one.

    Raises:
        ConfigurationError: the file cannot be read, or holds anything other than tensors.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        # The checkpoints of timm, DINO and MAE hold the arguments of their command lines.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # errors of pickle, zipfile, torch and safetensors have no common base class
        if re.search("Unsupported (global|class)", str(error), re.IGNORECASE):
            reason = "it holds more than tensors, and would have to be executed; save model.state_dict() alone"
        elif isinstance(error, pickle.UnpicklingError):
            reason = "it holds no tensors, or is damaged"  # torch's own message suggests to execute the file
        else:
            reason = f"it holds no tensors, or is damaged ({one_line(error)})"
        raise ConfigurationError(f"the file cannot be loaded: {reason}") from None
    for name in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
            content = content[name]
    if not isinstance(content, Mapping) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        entries = list(map(str, content)) if isinstance(content, Mapping) else []
        found = f" but the entries {first_names(entries)}: save the weights among them alone" if entries else ""
        raise ConfigurationError(f"the file holds no dictionary of tensors{found}")
    return dict(content)


def load_resnet(state: Mapping[str, Tensor]) -> tuple[ResNetModel, list[str]]:
    """Return a ResNetModel with the weights of a torchvision state dict, and the names that it does not use.

    Raises:
        ConfigurationError: a tensor is missing, or the state is another network's.
    """
    model = ResNetModel(ResNetConfig(**resnet_config(state)))
    renamed, unused = from_torchvision(state, model.state_dict())
    model.load_state_dict(renamed, strict=True)
    return model.eval(), unused


def load_plain_resnet(state: Mapping[str, Tensor]) -> tuple[ResNetModel, list[str]]:
    """Load a state dict like `load_resnet`, but allow unused tensors only in classifiers and projectors.

    Raises:
        ConfigurationError: as `load_resnet`, or the state has other unused tensors, so it is another network.
    """
    model, unused = load_resnet(state)
    other = [name for name in unused if not HEADS.match(name.split(".")[0])]
    if other:
        raise ConfigurationError(f"{count(len(other), 'tensor')} that no plain ResNet has: {first_names(other)}")
    return model, unused


def select_network(state: Mapping[str, Tensor], network: str) -> tuple[dict[str, Tensor], list[str], bool]:
    """Select the tensors of one ResNet from the state dict of a method, and remove the prefix of their names.

    DistributedDataParallel puts `module.` before each name, and a method the name of the network, such as
    `encoder_q.`. The published code of this method writes `teacher_encoder.` and `student_encoder.`.

    Args:
        network: "teacher" or "student": the network to select from a checkpoint of the published code.

    Returns:
        The tensors of the network; the names of all other tensors; whether the checkpoint is of the published code.

    Raises:
        ConfigurationError: the checkpoint does not hold the network, or holds several of unknown names.
    """
    state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    modules = sorted({name.split(".")[0] for name in state})
    is_published_code = not {"teacher_encoder", "student_encoder"}.isdisjoint(modules)
    if is_published_code:
        prefix = f"{network}_encoder."
    else:
        stems = [name.removesuffix("conv1.weight") for name in state if name.endswith("conv1.weight")]
        found = [prefix for prefix in stems if f"{prefix}layer1.0.conv1.weight" in state]
        known = [prefix for prefix in ("", *MAIN_NETWORKS) if prefix in found]
        if len(found) > 1 and not known:
            raise ConfigurationError(f"it holds {len(found)} networks ({', '.join(found)}): keep one of them in a file")
        prefix = (known or found or [""])[0]
    others = [name for name in state if not name.startswith(prefix)]
    if len(others) == len(state):
        raise ConfigurationError(f"it has no {prefix}…{did_you_mean(prefix, modules)}; there are {', '.join(modules)}")
    selected = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    return selected, others, is_published_code


def count_by_module(names: list[str]) -> str:
    """Return the first parts of tensor names with their counts, such as `fc (2), head (4)`."""
    counts = Counter(name.split(".")[0] for name in names)
    return ", ".join(f"{module} ({count})" for module, count in counts.items())


def check_index(folder: Path) -> None:
    """Check that an index of weights names only files in its own folder.

    Raises:
        ConfigurationError: the index cannot be read, or names a file elsewhere.
    """
    for index in folder.glob("*.index.json"):
        try:
            files = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise ConfigurationError(f"--encoder {folder}: {index.name} cannot be read ({one_line(error)})") from None
        outside = next((file for file in files if not isinstance(file, str) or Path(file).name != file), None)
        if outside is not None:
            raise ConfigurationError(f"--encoder {folder}: {index.name} names {outside}, which is not in the folder")


def read_preprocessing(processor: Mapping[str, object]) -> Preprocessing:
    """Convert a preprocessor_config.json; `remark` lists the differences from the processor.

    Raises:
        ConfigurationError: the processor changes the order of the channels.
        TypeError, ValueError: the processor has no usable sizes or numbers.
    """
    remarks = []
    size, crop_size = processor.get("size"), processor.get("crop_size")
    kind = str(processor.get("image_processor_type") or processor.get("feature_extractor_type") or "")
    if processor.get("do_flip_channel_order", kind.startswith("MobileViT")):
        raise ConfigurationError("its image processor makes BGR images: give an encoder of RGB images")
    shorter = size.get("shortest_edge") if isinstance(size, Mapping) else size
    if isinstance(crop_size, Mapping):
        crop_size = crop_size.get("height")
    squashes = False
    if kind.startswith("ConvNext") and shorter is not None:
        # Its `shortest_edge` is the size of the crop. From 384 pixels on it squashes instead of cropping.
        crop_size, squashes = shorter, shorter >= 384
        shorter = shorter if squashes else int(shorter / processor.get("crop_pct", 224 / 256))
    elif isinstance(size, Mapping) and "height" in size:
        shorter, squashes = size["height"], True
        if not processor.get("do_center_crop") or crop_size is None:
            crop_size = shorter
    elif not processor.get("do_center_crop", True) or crop_size is None:
        crop_size = shorter
        remarks.append("its processor does not crop the centre; m2t_accel does")
    if squashes:
        remarks.append("its processor squashes images to a square; m2t_accel crops the centre")
    if not isinstance(shorter, int) or not isinstance(crop_size, int) or not 8 <= crop_size <= shorter:
        raise ValueError(f"sizes {size} and {processor.get('crop_size')}")
    if processor.get("resample", 2) not in (2, None):
        remarks.append(NOT_BILINEAR.format("its processor"))
    share = crop_size / shorter
    while int(crop_size / share) < shorter:  # rounding may lose a pixel
        share = math.nextafter(share, 0)
    mean, std = (0.0,) * 3, (1.0,) * 3
    if processor.get("do_normalize", True):
        mean, std = tuple(processor.get("image_mean", IMAGENET_MEAN)), tuple(processor.get("image_std", IMAGENET_STD))
    # The processor normalises pixels from 0 to `white`, m2t_accel from 0 to 1.
    white = 255 * (1 if processor.get("do_rescale") is False else processor.get("rescale_factor") or 1 / 255)
    if abs(white - 1) > 1e-6:
        mean, std = tuple(value / white for value in mean), tuple(value / white for value in std)
    return Preprocessing(crop_size, share, mean, std, "; ".join(remarks))


def weights_fingerprint(encoder: nn.Module) -> str:
    """Return 16 hexadecimal digits that identify an encoder's weights and statistics."""
    digest = hashlib.sha256()
    for name, values in sorted(encoder.state_dict().items()):
        digest.update(name.encode())
        digest.update(values.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
