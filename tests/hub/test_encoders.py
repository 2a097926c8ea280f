import json
import os
import pickle

import cv2
import pytest
import torch
import torchvision
from helpers import natural_image
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoImageProcessor, ResNetConfig, ResNetForImageClassification, ViTConfig, ViTModel

from m2t_accel.config.data import ImageSettings
from m2t_accel.config.fields import ConfigurationError
from m2t_accel.data.crops import central_view
from m2t_accel.data.photometry import evaluation_view
from m2t_accel.hub.encoders import load_encoder, random_weights
from m2t_accel.hub.folder import image_processor
from m2t_accel.model import create_encoder, embed

SETTINGS = {"image_size": 48, "image_mean": (0.4, 0.5, 0.6), "image_std": (0.2, 0.25, 0.3), "evaluation_crop": 0.8}


@pytest.fixture
def run(tmp_path):
    """A run's folder, as far as its encoder goes."""
    torch.manual_seed(0)
    encoder = create_encoder("resnet10-quarter").eval()
    encoder.config.momentum2_teacher = {"network": "teacher"}
    encoder.save_pretrained(tmp_path / "run" / "encoder")
    image_processor(ImageSettings(dataset="digits", **SETTINGS)).save_pretrained(tmp_path / "run" / "encoder")
    return tmp_path / "run"


def refused(source):
    with pytest.raises(ConfigurationError) as caught:
        load_encoder(str(source))
    message = str(caught.value)
    assert message.startswith(f"--encoder {source}")
    assert "\n" not in message
    return message


def test_a_run_and_its_encoder_folder(run):
    loaded = load_encoder(str(run))
    assert (loaded.image_size, loaded.image_mean, loaded.image_std) == (48, (0.4, 0.5, 0.6), (0.2, 0.25, 0.3))
    assert loaded.network == "teacher"
    assert "128 features" in loaded.note
    again = load_encoder(str(run / "encoder"))
    images = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        assert torch.equal(embed(loaded.model, images), embed(again.model, images))
        assert not torch.equal(embed(random_weights(loaded.model), images), embed(again.model, images))


def test_a_classifier_of_transformers_gives_its_body(tmp_path):
    model = ResNetForImageClassification(ResNetConfig(**create_encoder("resnet10-quarter").config.to_diff_dict()))
    model.save_pretrained(tmp_path)
    loaded = load_encoder(str(tmp_path))
    assert "not used: classifier (2)" in loaded.note
    assert "ImageNet's mean and deviation are assumed" in loaded.note
    assert loaded.network == "as loaded"


@pytest.mark.parametrize("file", ["weights.pth", "weights.safetensors"])
def test_a_file_of_weights(tmp_path, file):
    state = torchvision.models.resnet18().state_dict()
    if file.endswith("pth"):
        torch.save({"state_dict": state, "epoch": 3}, tmp_path / file)
    else:
        save_file(state, tmp_path / file)
    loaded = load_encoder(str(tmp_path / file))
    assert "not used: fc (2)" in loaded.note
    assert torch.equal(loaded.model.state_dict()["embedder.embedder.convolution.weight"], state["conv1.weight"])


def test_timms_files(tmp_path):
    save_file(torchvision.models.resnet18().state_dict(), tmp_path / "model.safetensors")
    told = {"input_size": [3, 160, 160], "crop_pct": 0.95, "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "resnet18", "pretrained_cfg": told}))
    loaded = load_encoder(str(tmp_path))
    assert (loaded.image_size, loaded.evaluation_crop, loaded.image_mean) == (160, 0.95, (0.5, 0.5, 0.5))
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "resnet18"}))
    assert "cannot be loaded (KeyError: 'mean')" in refused(tmp_path)


PROCESSORS = [
    {
        "image_processor_type": "BitImageProcessor",
        "size": {"shortest_edge": 64},
        "crop_size": {"height": 48, "width": 48},
    },
    {
        "image_processor_type": "BitImageProcessor",
        "size": {"shortest_edge": 55},
        "crop_size": {"height": 48, "width": 48},
    },
    {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 48}, "crop_pct": 0.875},
    {"feature_extractor_type": "ConvNextFeatureExtractor", "size": 48, "crop_pct": 0.9},
]


@pytest.mark.parametrize("processor", PROCESSORS, ids=lambda processor: str(processor["size"]))
@pytest.mark.parametrize("shape", [(90, 120), (75, 60)])
def test_our_view_is_the_processors(run, processor, shape):
    described = processor | {"resample": 2, "image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.25, 0.3]}
    (run / "encoder" / "preprocessor_config.json").write_text(json.dumps(described))
    loaded = load_encoder(str(run))
    names = ("image_size", "evaluation_crop", "image_mean", "image_std")
    config = ImageSettings(dataset="digits", **{name: getattr(loaded, name) for name in names})
    picture = cv2.GaussianBlur(natural_image(*shape), (0, 0), 2)
    crop = torch.from_numpy(central_view(picture, config.image_size, config.evaluation_crop))
    theirs = AutoImageProcessor.from_pretrained(run / "encoder")
    wanted = theirs(Image.fromarray(picture), return_tensors="pt").pixel_values
    assert (evaluation_view(crop[None], config) - wanted).abs().mean() < 1 / 255 / 0.25


def test_what_cannot_be_seen_as_the_processor_does_is_said(tmp_path):
    config = ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=32)
    ViTModel(config).save_pretrained(tmp_path)
    described = {"image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32}, "resample": 3}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(described))
    note = load_encoder(str(tmp_path)).note
    assert "squashes images to a square, here the centre is cropped" in note
    assert "does not resize bilinearly" in note


# --- what is not there, or broken


def test_nothing_to_load(tmp_path, run):
    (tmp_path / "empty").mkdir()
    assert "no config.json, and no encoder/ with one: has the run ended?" in refused(tmp_path / "empty")
    (tmp_path / "notes.txt").write_text("hello")
    assert "a folder, a Hub id, or a file of weights" in refused(tmp_path / "notes.txt")
    assert "cannot be read" in refused("nobody/nothing-at-all")
    (run / "encoder" / "config.json").write_text("{")
    assert "its config.json cannot be read" in refused(run)


def test_broken_weights(run, tmp_path):
    weights = run / "encoder" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    assert "cannot be loaded" in refused(run)
    state = create_encoder("resnet10-quarter").state_dict()
    name = "embedder.embedder.convolution.weight"
    save_file({k: v for k, v in state.items() if k != name}, weights, metadata={"format": "pt"})
    assert f"tensors are missing or have another shape, such as {name}" in refused(run)
    save_file(state | {name: torch.zeros(16, 3, 5, 5)}, weights, metadata={"format": "pt"})
    refused(run)
    weights.unlink()
    refused(run)
    torch.save([1, 2], tmp_path / "list.pth")
    assert "holds no dictionary of tensors" in refused(tmp_path / "list.pth")
    (tmp_path / "cut.pth").write_bytes(b"PK\x03\x04 cut")
    assert "cannot be loaded" in refused(tmp_path / "cut.pth")


# --- hostile files


class Bomb:
    """What a pickle may hold: a call to make when it is read."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (self.mark,)


@pytest.mark.parametrize("name", ["weights.pth", "run/encoder/pytorch_model.bin"])
@pytest.mark.parametrize("form", ["torch", "pickle"])
def test_a_pickle_is_not_executed(run, tmp_path, name, form):
    (run / "encoder" / "model.safetensors").unlink()
    mark = tmp_path / "executed"
    content = {"conv1.weight": Bomb(str(mark))}
    if form == "torch":
        torch.save(content, tmp_path / name)
    else:
        (tmp_path / name).write_bytes(pickle.dumps(content))
    refused(tmp_path / "weights.pth" if name == "weights.pth" else run)
    assert not mark.exists()


def test_code_from_elsewhere_is_not_run(run, tmp_path):
    mark = tmp_path / "executed"
    (run / "encoder" / "evil.py").write_text(f"import os; os.mkdir({str(mark)!r})")
    asks = {"auto_map": {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}}
    config = json.loads((run / "encoder" / "config.json").read_text())
    (run / "encoder" / "config.json").write_text(json.dumps(config | asks))
    load_encoder(str(run))  # of a type that transformers has: its own code
    (run / "encoder" / "config.json").write_text(json.dumps({"model_type": "evil"} | asks))
    assert "asks for code of its own, which is never run" in refused(run)
    assert not mark.exists()


def test_an_index_that_leaves_the_folder(run):
    (run / "encoder" / "model.safetensors").rename(run / "secret.safetensors")
    index = {"metadata": {}, "weight_map": {"embedder.embedder.convolution.weight": "../secret.safetensors"}}
    (run / "encoder" / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "names ../secret.safetensors, which is not in the folder" in refused(run)
