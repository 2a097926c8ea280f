"""An encoder's weights for other libraries, each file loaded into the library itself and compared before it is kept."""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import os
import pickle
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType

import torch
import torchvision
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from m2t_accel.config.fields import ConfigurationError, one_line
from m2t_accel.config.pretrain import ENCODERS
from m2t_accel.hub.encoders import LoadedEncoder
from m2t_accel.hub.tensor_names import detectron2_name, resnet_config, to_torchvision
from m2t_accel.model import embed

TOLERANCE = 1e-5  # of the largest feature, or of 1
ENDINGS = {
    "torchvision": (".safetensors", ".pth"),
    "timm": (".safetensors", ".pth"),
    "detectron2": (".pkl",),
    "onnx": (".onnx",),
}


def export(encoder: LoadedEncoder, form: str, output: Path) -> list[str]:
    """Write an encoder for another library, a key of ENDINGS; what was done and how to load it comes back in lines.

    The file is complete and verified, or it is not there.

    Raises:
        ConfigurationError: the library has no such network or is not installed, the file exists or cannot be
            written, or what the library computes is not what the encoder does.
    """
    if output.suffix not in ENDINGS[form]:
        raise ConfigurationError(f"--output {output}: for {form} the name must end in {' or '.join(ENDINGS[form])}")
    if output.exists():
        raise ConfigurationError(f"--output {output} exists: give another name, or remove it")
    writers: Mapping[str, Callable[[LoadedEncoder, Path, Path], list[str]]] = {
        "torchvision": export_torchvision,
        "timm": export_timm,
        "detectron2": export_detectron2,
        "onnx": export_onnx,
    }
    temporary = output.with_name(f".{output.stem}.{os.getpid()}{output.suffix}")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        lines = writers[form](encoder, temporary, output)
        os.replace(temporary, output)
    except OSError as error:
        raise ConfigurationError(f"--output {output} cannot be written ({error.strerror or one_line(error)})") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    return [f"{output}: {lines[0]}", *lines[1:]]


def standard_name(model: PreTrainedModel) -> str:
    """The name, such as resnet50, under which other libraries have this network.

    Raises:
        ConfigurationError: they have none.
    """
    names = [name for name in ENCODERS if hasattr(torchvision.models, name)]
    try:
        config = resnet_config(to_torchvision(model.state_dict()))
    except (KeyError, ConfigurationError):
        raise ConfigurationError(
            f"{type(model).__name__} is no ResNet that other libraries have ({', '.join(names)}): --format onnx "
            "takes any"
        ) from None
    for name in names:
        if all(config[key] == value for key, value in ENCODERS[name].items()) and config["embedding_size"] == 64:
            return name
    raise ConfigurationError(
        f"a ResNet of depths {config['depths']} and widths {config['hidden_sizes']} is none that other libraries have "
        f"({', '.join(names)}): --format onnx takes any"
    )


def some_images(encoder: LoadedEncoder, number: int) -> Tensor:
    """Random images (number, 3, S, S) to compare networks with, always the same."""
    return torch.randn(number, 3, encoder.image_size, encoder.image_size, generator=torch.Generator().manual_seed(0))


def compare(encoder: LoadedEncoder, other: Callable[[Tensor], Tensor], number: int = 2) -> float:
    """The largest difference between the encoder's features and another network's.

    Raises:
        ConfigurationError: it is more than rounding.
    """
    images = some_images(encoder, number)
    with torch.no_grad():
        wanted, found = embed(encoder.model, images), other(images)
    if wanted.shape != found.shape:
        raise ConfigurationError(f"the other library gives features of {tuple(found.shape)}, not {tuple(wanted.shape)}")
    difference = (wanted - found).abs().max().item()
    if not difference <= TOLERANCE * max(1.0, wanted.abs().max().item()):
        raise ConfigurationError(f"the other library's features differ by {difference:.2g}: nothing was written")
    return difference


def installed(*names: str) -> list[ModuleType]:
    """Libraries that only some exports need.

    Raises:
        ConfigurationError: one is not installed.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return [importlib.import_module(name) for name in names]
    except ImportError as error:
        raise ConfigurationError(f'{error.name} is not installed: type `pip install "m2t_accel[export]"`') from None


def write_state(state: Mapping[str, Tensor], file: Path) -> dict[str, Tensor]:
    """Write tensors as .safetensors or .pth; what is read back from it comes back."""
    if file.suffix == ".safetensors":
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, file)
        return load_file(file)
    torch.save(dict(state), file)
    return torch.load(file, weights_only=True)


def read_line(output: Path) -> str:
    if output.suffix == ".safetensors":
        return f'from safetensors.torch import load_file; state = load_file("{output}")'
    return f'import torch; state = torch.load("{output}", weights_only=True)'


def export_torchvision(encoder: LoadedEncoder, file: Path, output: Path) -> list[str]:
    name = standard_name(encoder.model)
    state = write_state(to_torchvision(encoder.model.state_dict()), file)
    model = torchvision.models.get_model(name).eval()
    lacking = model.load_state_dict(state, strict=False)
    if set(lacking.missing_keys) != {"fc.weight", "fc.bias"} or lacking.unexpected_keys:
        raise ConfigurationError(f"torchvision's {name} does not take these weights ({lacking})")
    model.fc = nn.Identity()
    return [
        f"torchvision's {name} without its last layer; features differ by {compare(encoder, model):.1g}",
        pixels(encoder),
        f"{read_line(output)}",
        f"import torchvision; model = torchvision.models.{name}(); model.load_state_dict(state, strict=False)",
    ]


def export_timm(encoder: LoadedEncoder, file: Path, output: Path) -> list[str]:
    (timm,) = installed("timm")
    name = standard_name(encoder.model)
    state = write_state(to_torchvision(encoder.model.state_dict()), file)
    model = timm.create_model(name, pretrained=False, num_classes=0).eval()
    model.load_state_dict(state, strict=True)
    return [
        f"timm's {name} without a classifier; features differ by {compare(encoder, model):.1g}",
        pixels(encoder),
        f"{read_line(output)}",
        f'import timm; model = timm.create_model("{name}", num_classes=0); model.load_state_dict(state)',
    ]


def pixels(encoder: LoadedEncoder) -> str:
    mean, std = ([round(value, 6) for value in values] for values in (encoder.image_mean, encoder.image_std))
    return f"images: RGB, 0 to 1, minus {mean}, divided by {std}"


def export_detectron2(encoder: LoadedEncoder, file: Path, output: Path) -> list[str]:
    """As detectron2's own converter of torchvision's weights writes them; the library itself is not needed.

    Source: detectron2's tools/convert-torchvision-to-d2.py, for names and form, and what it says of the pixels. Its
    frozen BatchNorm has no count of batches, so that is left out.
    """
    name = standard_name(encoder.model)
    state = to_torchvision(encoder.model.state_dict())
    model = {
        detectron2_name(key): tensor.numpy() for key, tensor in state.items() if not key.endswith("num_batches_tracked")
    }
    content = {"model": model, "__author__": "m2t_accel", "matching_heuristics": True}
    file.write_bytes(pickle.dumps(content))
    found = pickle.loads(file.read_bytes())["model"]
    # The way back, as a ResNet of torchvision: every tensor once, and the same features.
    back = {key: torch.from_numpy(found.pop(detectron2_name(key))) for key in state if detectron2_name(key) in found}
    check = torchvision.models.get_model(name).eval()
    check.load_state_dict(back, strict=False)
    check.fc = nn.Identity()
    difference = compare(encoder, check)
    if found:
        raise ConfigurationError(f"{len(found)} tensors have no way back, such as {next(iter(found))}")
    depth = name.removeprefix("resnet")
    mean, std = ([round(255 * value, 3) for value in values] for values in (encoder.image_mean, encoder.image_std))
    return [
        f"detectron2's ResNet-{depth}; by its published names, mapped back: features differ by {difference:.1g}",
        f'MODEL: {{WEIGHTS: "{output}", PIXEL_MEAN: {mean}, PIXEL_STD: {std},',
        f"        RESNETS: {{DEPTH: {depth}, STRIDE_IN_1X1: False}}}}",
        "INPUT: {FORMAT: RGB}",
    ]


class PooledFeatures(nn.Module):
    """pixel_values (N, 3, H, W) in, features (N, C) out."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        return embed(self.model, pixel_values)


def export_onnx(encoder: LoadedEncoder, file: Path, output: Path) -> list[str]:
    onnx, runtime, _ = installed("onnx", "onnxruntime", "onnxscript")
    # torch tells of each step on stdout, and onnxscript warns of its own parts.
    quiet = logging.getLogger("torch.onnx")
    level = quiet.level
    quiet.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            torch.onnx.export(
                PooledFeatures(encoder.model).eval(),
                (some_images(encoder, 2),),
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
    except Exception as error:  # of torch.export and onnxscript; the model is any
        raise ConfigurationError(
            f"{type(encoder.model).__name__} cannot be exported to ONNX ({one_line(error)})"
        ) from error
    finally:
        quiet.setLevel(level)
    model = onnx.load(file)
    told = {
        "image_size": encoder.image_size,
        "evaluation_crop": encoder.evaluation_crop,
        "image_mean": list(encoder.image_mean),
        "image_std": list(encoder.image_std),
    }
    onnx.helper.set_model_props(model, {name: str(value) for name, value in told.items()})
    onnx.checker.check_model(model)
    onnx.save(model, file)
    session = runtime.InferenceSession(str(file), providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(["features"], {"pixel_values": images.numpy()})[0])

    difference = max(compare(encoder, run, number) for number in (1, 5))
    opset = model.opset_import[0].version
    return [
        f"ONNX, opset {opset}, any batch of {encoder.image_size} pixels; features differ by {difference:.1g} in "
        "onnxruntime",
        pixels(encoder),
        f'import onnxruntime; session = onnxruntime.InferenceSession("{output}")',
        'features = session.run(["features"], {"pixel_values": images})[0]',
    ]
