"""Export an encoder's weights to other libraries, and compare the features there before the file is kept."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import logging
import pickle
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType

import torch
import torchvision
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from m2t_accel.config.fields import ConfigurationError, count, one_line, write_errors_in_one_line
from m2t_accel.config.pretrain import ENCODERS
from m2t_accel.files import atomic_write, let_others_read, write_text
from m2t_accel.hub.encoders import LoadedEncoder
from m2t_accel.hub.tensor_names import detectron2_name, resnet_config, to_torchvision
from m2t_accel.model import embed

TOLERANCE = 1e-5  # relative to the largest feature, or to 1 if all are smaller
SUFFIXES = {
    "torchvision": (".safetensors", ".pth"),
    "timm": (".safetensors", ".pth"),
    "detectron2": (".pkl",),
    "onnx": (".onnx",),
}


def export(encoder: LoadedEncoder, format: str, output: Path) -> list[str]:
    """Write an encoder for another library. Return lines for the user: the file, its preprocessing, how to load it.

    The file is kept only if the library computes the same features from it.

    Args:
        format: a key of SUFFIXES.

    Raises:
        ConfigurationError: the library has no such network or is not installed, the file exists or cannot be
            written, or the features differ.
    """
    if output.suffix not in SUFFIXES[format]:
        raise ConfigurationError(
            f"--output {output}: for {format} the name must end in {' or '.join(SUFFIXES[format])}"
        )
    if output.exists():
        raise ConfigurationError(f"--output {output} exists: give another name, or remove it")
    writers: Mapping[str, Callable[[LoadedEncoder, Path, Path], list[str]]] = {
        "torchvision": export_torchvision,
        "timm": export_timm,
        "detectron2": export_detectron2,
        "onnx": export_onnx,
    }
    with write_errors_in_one_line("output", output):
        output.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(output) as temporary:
            lines = writers[format](encoder, temporary, output)
    return [f"{output}: {lines[0]}", *lines[1:]]


def standard_name(model: PreTrainedModel) -> str:
    """Return the name of this network in other libraries, such as resnet50.

    Raises:
        ConfigurationError: other libraries do not have this network.
    """
    names = [name for name in ENCODERS if hasattr(torchvision.models, name)]
    advice = f"({', '.join(names)}): --format onnx takes any encoder"
    try:
        config = resnet_config(to_torchvision(model.state_dict()))
    except (KeyError, ConfigurationError):
        raise ConfigurationError(f"{type(model).__name__} is no ResNet that other libraries have {advice}") from None
    for name in names:
        if all(config[key] == value for key, value in ENCODERS[name].items()) and config["embedding_size"] == 64:
            return name
    raise ConfigurationError(
        f"other libraries have no ResNet of depths {config['depths']} and widths {config['hidden_sizes']} {advice}"
    )


def torchvision_features(name: str, state: Mapping[str, Tensor]) -> nn.Module:
    """Return torchvision's network of that name without its last layer, with these weights, in evaluation mode.

    `num_batches_tracked` may be missing.
    """
    model = torchvision.models.get_model(name).eval()
    model.fc = nn.Identity()
    model.load_state_dict(state, strict=True)
    return model


def random_images(encoder: LoadedEncoder, number: int) -> Tensor:
    """Return random images (number, 3, S, S) of the encoder's size, the same in every call."""
    return torch.randn(number, 3, encoder.image_size, encoder.image_size, generator=torch.Generator().manual_seed(0))


def feature_difference(encoder: LoadedEncoder, other: Callable[[Tensor], Tensor], number: int = 2) -> float:
    """Return the largest absolute difference between the features of the encoder and of another network.

    Args:
        other: maps images (number, 3, S, S) to features (number, C).

    Raises:
        ConfigurationError: the difference is more than rounding.
    """
    images = random_images(encoder, number)
    with torch.no_grad():
        expected, found = embed(encoder.model, images), other(images)
    if expected.shape != found.shape:
        raise ConfigurationError(
            f"the other library gives features of {tuple(found.shape)}, not {tuple(expected.shape)}"
        )
    difference = (expected - found).abs().max().item()
    if not difference <= TOLERANCE * max(1.0, expected.abs().max().item()):
        raise ConfigurationError(f"the other library's features differ by {difference:.2g}: nothing was written")
    return difference


def import_optional(*names: str) -> list[ModuleType]:
    """Import libraries that only some formats need.

    Raises:
        ConfigurationError: a library is not installed.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return [importlib.import_module(name) for name in names]
    except ImportError as error:
        raise ConfigurationError(f'{error.name} is not installed: type `pip install "m2t_accel[export]"`') from None


def write_state(state: Mapping[str, Tensor], file: Path) -> dict[str, Tensor]:
    """Write tensors as .safetensors or .pth. Read the file again and return its tensors.

    Raises:
        OSError: the file cannot be written.
    """
    is_safetensors = file.suffix == ".safetensors"
    try:
        if is_safetensors:
            save_file({name: tensor.contiguous() for name, tensor in state.items()}, file)
            let_others_read(file)
        else:
            torch.save(dict(state), file)
    except (SafetensorError, RuntimeError) as error:  # raised for a full disk
        raise OSError(None, one_line(error), str(file)) from None
    return load_file(file) if is_safetensors else torch.load(file, weights_only=True)


def loading_line(output: Path) -> str:
    """Return the line of Python that reads a file of write_state."""
    if output.suffix == ".safetensors":
        return f'from safetensors.torch import load_file; state = load_file("{output}")'
    return f'import torch; state = torch.load("{output}", weights_only=True)'


def preprocessing_line(encoder: LoadedEncoder) -> str:
    """Return the normalisation of the encoder's images in words."""
    mean, std = ([round(value, 6) for value in values] for values in (encoder.image_mean, encoder.image_std))
    return f"images: RGB, 0 to 1, minus {mean}, divided by {std}"


def export_torchvision(encoder: LoadedEncoder, file: Path, output: Path) -> list[str]:
    """Write a state dict for torchvision to `file`. Return the lines of `export`, which name `output`."""
    name = standard_name(encoder.model)
    model = torchvision_features(name, write_state(to_torchvision(encoder.model.state_dict()), file))
    return [
        f"torchvision's {name} without its last layer; features differ by {feature_difference(encoder, model):.1g}",
        preprocessing_line(encoder),
        loading_line(output),
        f"import torchvision; model = torchvision.models.{name}(); model.load_state_dict(state, strict=False)",
    ]


def export_timm(encoder: LoadedEncoder, file: Path, output: Path) -> list[str]:
    """Write a state dict for timm to `file`. Return the lines of `export`, which name `output`."""
    (timm,) = import_optional("timm")
    name = standard_name(encoder.model)
    state = write_state(to_torchvision(encoder.model.state_dict()), file)
    model = timm.create_model(name, pretrained=False, num_classes=0).eval()
    model.load_state_dict(state, strict=True)
    return [
        f"timm's {name} without a classifier; features differ by {feature_difference(encoder, model):.1g}",
        preprocessing_line(encoder),
        loading_line(output),
        f'import timm; model = timm.create_model("{name}", num_classes=0); model.load_state_dict(state)',
    ]


def export_detectron2(encoder: LoadedEncoder, file: Path, output: Path) -> list[str]:
    """Write a pickle for detectron2 to `file`, and beside `output` its config. Return the lines of `export`.

    detectron2 need not be installed. Names, form and pixels are those of its own converter. Its frozen BatchNorm has no
    count of batches, so the count is left out.

    Source: detectron2's tools/convert-torchvision-to-d2.py.
    """
    name = standard_name(encoder.model)
    config_file = output.with_suffix(".yaml")
    if config_file.exists():
        raise ConfigurationError(f"--output {output}: its config {config_file} exists: give another name, or remove it")
    state = to_torchvision(encoder.model.state_dict())
    model = {
        detectron2_name(key): tensor.numpy() for key, tensor in state.items() if not key.endswith("num_batches_tracked")
    }
    content = {"model": model, "__author__": "m2t_accel", "matching_heuristics": True}
    file.write_bytes(pickle.dumps(content))
    # Map the names in the file back to torchvision's, so that torchvision can compute the features.
    found = pickle.loads(file.read_bytes())["model"]
    back = {key: torch.from_numpy(found.pop(detectron2_name(key))) for key in state if detectron2_name(key) in found}
    if found:
        raise ConfigurationError(
            f"{count(len(found), 'tensor')} without a torchvision name, such as {next(iter(found))}"
        )
    difference = feature_difference(encoder, torchvision_features(name, back))
    depth = int(name.removeprefix("resnet"))
    settings = yaml.safe_dump(detectron2_config(encoder, depth, output), sort_keys=False, default_flow_style=None)
    base = "Base-RCNN-FPN.yaml" if depth in (18, 34) else "pascal_voc_R_50_C4_24k.yaml"
    head = (
        "# The C4 head is made of bottlenecks and takes no weights of ResNet-18 and 34: use an FPN detector."
        if depth in (18, 34)
        else "# MoCo's C4 detector has MODEL.ROI_HEADS.NAME: Res5ROIHeadsExtraNorm, of its detection/train_net.py."
    )
    use = f"# Settings of MoCo's detection protocol. Put a line before them: _BASE_: {base} (the file of your detector)"
    write_text(config_file, f"{use}\n{head}\n{settings}")
    return [
        f"detectron2's ResNet-{depth}; with its names mapped back to torchvision's, features differ by "
        f"{difference:.1g}",
        f"{config_file}: the config for it",
        *(use, head, *settings.splitlines()),
    ]


def detectron2_config(encoder: LoadedEncoder, depth: int, weights: Path) -> dict[str, object]:
    """Return the settings that detectron2 needs for this backbone, and those of MoCo's detection protocol.

    Source: MoCo (arXiv 1911.05722), section 4.2 and appendix; its detection/configs.
    """
    mean, std = ([round(255 * value, 3) for value in values] for values in (encoder.image_mean, encoder.image_std))
    resnets: dict[str, object] = {"DEPTH": depth, "STRIDE_IN_1X1": False, "NORM": "SyncBN"}
    if depth in (18, 34):
        resnets["RES2_OUT_CHANNELS"] = 64  # detectron2's default is that of the bottlenecks
    return {
        "VERSION": 2,
        "MODEL": {
            "WEIGHTS": str(weights.resolve()),
            "PIXEL_MEAN": mean,
            "PIXEL_STD": std,
            "BACKBONE": {"FREEZE_AT": 0},  # all layers are trained, with BatchNorm
            "RESNETS": resnets,
        },
        "INPUT": {"FORMAT": "RGB"},
        "TEST": {"PRECISE_BN": {"ENABLED": True}},
    }


class PooledFeatures(nn.Module):
    """An encoder as a module from pixel_values (N, 3, H, W) to features (N, C)."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        return embed(self.model, pixel_values)


def export_onnx(encoder: LoadedEncoder, file: Path, output: Path) -> list[str]:
    """Write an ONNX model with preprocessing metadata to `file`. Return the lines of `export`, which name `output`."""
    onnx, runtime, _ = import_optional("onnx", "onnxruntime", "onnxscript")
    # torch prints each of its steps on stdout, and onnxscript warns about its own modules.
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            torch.onnx.export(
                PooledFeatures(encoder.model).eval(),
                (random_images(encoder, 2),),
                file,
                input_names=["pixel_values"],
                output_names=["features"],
                dynamic_shapes={"pixel_values": {0: torch.export.Dim("batch")}},
                dynamo=True,
                external_data=False,
                verbose=False,
            )
    except OSError:
        raise
    except Exception as error:  # any model may be given, and torch.export can raise anything
        raise ConfigurationError(
            f"{type(encoder.model).__name__} cannot be exported to ONNX ({one_line(error)})"
        ) from error
    finally:
        logger.setLevel(level)
    model = onnx.load(file)
    metadata = {name: json.dumps(value) for name, value in encoder.preprocessing.items()}
    onnx.helper.set_model_props(model, metadata)
    onnx.checker.check_model(model)
    onnx.save(model, file)
    session = runtime.InferenceSession(str(file), providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(["features"], {"pixel_values": images.numpy()})[0])

    difference = max(feature_difference(encoder, run, number) for number in (1, 5))
    opset = model.opset_import[0].version
    return [
        f"ONNX, opset {opset}, any batch of {encoder.image_size} pixels; features differ by {difference:.1g} in "
        "onnxruntime",
        preprocessing_line(encoder),
        f'import onnxruntime; session = onnxruntime.InferenceSession("{output}")',
        'features = session.run(["features"], {"pixel_values": images})[0]',
    ]
