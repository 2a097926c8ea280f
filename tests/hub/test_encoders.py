import argparse
import json
import os
import pickle

import cv2
import pytest
import torch
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
from m2t_accel.hub.tensor_names import to_torchvision
from m2t_accel.model import create_encoder, embed

SETTINGS = {"image_size": 48, "image_mean": (0.4, 0.5, 0.6), "image_std": (0.2, 0.25, 0.3), "evaluation_crop": 0.8}


@pytest.fixture
def run(tmp_path):
    """Write the encoder of a run, and return the folder of the run."""
    torch.manual_seed(0)
    encoder = create_encoder("resnet10-quarter").eval()
    encoder.config.momentum2_teacher = {"network": "teacher"}
    encoder.save_pretrained(tmp_path / "run" / "encoder")
    image_processor(ImageSettings(dataset="digits", **SETTINGS)).save_pretrained(tmp_path / "run" / "encoder")
    return tmp_path / "run"


def torchvision_state():
    state = to_torchvision(create_encoder("resnet10-quarter").state_dict())
    return state | {"fc.weight": torch.zeros(10, 128), "fc.bias": torch.zeros(10)}


def refused(source):
    with pytest.raises(ConfigurationError) as caught:
        load_encoder(str(source))
    message = str(caught.value)
    assert message.startswith(f"--encoder {source}")
    assert "\n" not in message
    return message


def test_a_run_and_its_encoder_folder_load_the_same(run):
    loaded = load_encoder(str(run))
    assert (loaded.image_size, loaded.image_mean, loaded.image_std) == (48, (0.4, 0.5, 0.6), (0.2, 0.25, 0.3))
    assert loaded.network == "teacher"
    assert "128 features" in loaded.note
    again = load_encoder(str(run / "encoder"))
    images = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        assert torch.equal(embed(loaded.model, images), embed(again.model, images))
        assert not torch.equal(embed(random_weights(loaded.model), images), embed(again.model, images))


def test_a_classifier_of_transformers_loads_without_its_last_layer(tmp_path):
    model = ResNetForImageClassification(ResNetConfig(**create_encoder("resnet10-quarter").config.to_diff_dict()))
    model.save_pretrained(tmp_path)
    loaded = load_encoder(str(tmp_path))
    assert "not used: classifier (2)" in loaded.note
    assert "ImageNet's mean and deviation are assumed" in loaded.note
    assert loaded.network == "as loaded"
    (tmp_path / "preprocessor_config.json").write_text('{"size": {"shortest_edge": "big"}, "crop_size": 8}')
    assert "are assumed" in load_encoder(str(tmp_path)).note, "sizes that are none"


@pytest.mark.parametrize("file", ["weights.pth", "weights.safetensors", "lightning.ckpt"])
def test_a_file_of_weights_loads(tmp_path, file):
    state = torchvision_state()
    if file.endswith("safetensors"):
        save_file(state, tmp_path / file)
    else:
        arguments = argparse.Namespace(epochs=3)  # in the checkpoints of timm, DINO and MAE
        torch.save({"state_dict": state, "epoch": 3, "args": arguments}, tmp_path / file)
    loaded = load_encoder(str(tmp_path / file))
    assert "not used: fc (2)" in loaded.note
    assert torch.equal(loaded.model.state_dict()["embedder.embedder.convolution.weight"], state["conv1.weight"])


def test_a_timm_folder_loads(tmp_path):
    save_file(torchvision_state(), tmp_path / "model.safetensors")
    given = {"input_size": [3, 160, 160], "crop_pct": 0.95, "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "resnet18", "pretrained_cfg": given}))
    loaded = load_encoder(str(tmp_path))
    assert (loaded.image_size, loaded.evaluation_crop, loaded.image_mean) == (160, 0.95, (0.5, 0.5, 0.5))
    assert "bilinear" not in loaded.note
    given["input_size"] = [1, 28, 28]
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "resnet18", "pretrained_cfg": given}))
    assert "timm's resnet18: images of [1, 28, 28]" in refused(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "resnet18"}))
    assert "timm's resnet18, cannot be loaded (KeyError: 'mean')" in refused(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": "resnetaa50"}, "timm's resnetaa50: an anti-aliased ResNet"),
        ({"architecture": "resnetblur18"}, "timm's resnetblur18: an anti-aliased ResNet"),
        ({"model_args": {"num_classes": 0, "aa_layer": "blurpool"}}, "another network than a plain ResNet (aa_layer)"),
        ({"model_args": {"output_stride": 16, "global_pool": "avg"}}, "a plain ResNet (output_stride)"),
        ({"model_args": {"global_pool": "max"}}, "a plain ResNet (global_pool)"),
    ],
)
def test_a_timm_model_that_differs_from_a_plain_resnet_in_no_tensor_is_refused(tmp_path, change, message):
    save_file(torchvision_state(), tmp_path / "model.safetensors")
    given = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25], "interpolation": "bicubic"}
    plain = {"architecture": "resnet18", "pretrained_cfg": given}
    plain["model_args"] = {"num_classes": 10, "in_chans": 3, "global_pool": "avg"}  # as timm writes them
    (tmp_path / "config.json").write_text(json.dumps(plain))
    assert "timm does not resize bilinearly; m2t_accel does" in load_encoder(str(tmp_path)).note
    (tmp_path / "config.json").write_text(json.dumps(plain | change))
    assert message in refused(tmp_path)


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
    {
        "image_processor_type": "BitImageProcessor",
        "size": {"shortest_edge": 55},
        "crop_size": {"height": 48, "width": 48},
        "do_rescale": False,
        "image_mean": [102.0, 127.5, 153.0],
        "image_std": [51.0, 63.75, 76.5],
    },
    {
        "image_processor_type": "BitImageProcessor",
        "size": {"shortest_edge": 55},
        "crop_size": {"height": 48, "width": 48},
        "rescale_factor": 1 / 127.5,
        "image_mean": [0.8, 1.0, 1.2],
        "image_std": [0.4, 0.5, 0.6],
    },
]


@pytest.mark.parametrize("processor", PROCESSORS)
@pytest.mark.parametrize("shape", [(90, 120), (75, 60)])
def test_images_look_as_the_processor_shows_them(run, processor, shape):
    described = {"resample": 2, "image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.25, 0.3]} | processor
    (run / "encoder" / "preprocessor_config.json").write_text(json.dumps(described))
    loaded = load_encoder(str(run))
    config = ImageSettings(dataset="digits", **loaded.preprocessing)
    picture = cv2.GaussianBlur(natural_image(*shape), (0, 0), 2)
    crop = torch.from_numpy(central_view(picture, config.image_size, config.evaluation_crop))
    theirs = AutoImageProcessor.from_pretrained(run / "encoder")
    expected = theirs(Image.fromarray(picture), return_tensors="pt").pixel_values
    assert (evaluation_view(crop[None], config) - expected).abs().mean() < 1 / 255 / 0.25


def test_a_processor_may_squash_and_then_crop(run):
    described = {"size": {"height": 64, "width": 64}, "crop_size": {"height": 48, "width": 48}, "do_center_crop": True}
    (run / "encoder" / "preprocessor_config.json").write_text(json.dumps(described | {"rescale_factor": 0.00392156862}))
    loaded = load_encoder(str(run))
    assert (loaded.image_size, int(loaded.image_size / loaded.evaluation_crop)) == (48, 64)
    assert loaded.image_mean == (0.485, 0.456, 0.406), "a rounded 1 / 255 changes nothing"
    (run / "encoder" / "preprocessor_config.json").write_text(json.dumps(described | {"do_center_crop": False}))
    assert load_encoder(str(run)).image_size == 64


@pytest.mark.parametrize(
    "described",
    [
        {"image_processor_type": "MobileViTImageProcessor", "size": {"shortest_edge": 64}, "crop_size": 48},
        {"image_processor_type": "BitImageProcessor", "size": 64, "crop_size": 48, "do_flip_channel_order": True},
    ],
    ids=lambda described: described["image_processor_type"],
)
def test_a_processor_that_makes_bgr_images_is_refused(run, described):
    (run / "encoder" / "preprocessor_config.json").write_text(json.dumps(described))
    assert "its image processor makes BGR images" in refused(run / "encoder")
    (run / "encoder" / "preprocessor_config.json").write_text(json.dumps(described | {"do_flip_channel_order": False}))
    assert load_encoder(str(run)).image_size == 48


def test_the_note_names_differences_from_the_processor(tmp_path):
    config = ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=32)
    ViTModel(config).save_pretrained(tmp_path)
    described = {"image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32}, "resample": 3}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(described))
    note = load_encoder(str(tmp_path)).note
    assert "squashes images to a square" in note
    assert "does not resize bilinearly" in note


def test_a_source_without_an_encoder_is_refused(tmp_path, run):
    (tmp_path / "empty").mkdir()
    assert "no config.json" in refused(tmp_path / "empty")
    (run / "encoder" / "config.json").rename(run / "encoder" / "kept.json")
    for folder in (run, run / "encoder"):
        message = refused(folder)
        assert "a module of your own" in message
        assert f'load_model(module, "{run}/encoder/model.safetensors")' in message
    (run / "encoder" / "kept.json").rename(run / "encoder" / "config.json")
    (tmp_path / "notes.txt").write_text("hello")
    assert "a folder, a Hub id, or a file of weights" in refused(tmp_path / "notes.txt")
    assert "config.json cannot be read" in refused("nobody/nothing-at-all")
    (run / "encoder" / "config.json").write_text("{")
    assert "config.json cannot be read" in refused(run)


def test_missing_and_damaged_weights_are_refused(run, tmp_path):
    weights = run / "encoder" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    assert "cannot be loaded" in refused(run)
    state = create_encoder("resnet10-quarter").state_dict()
    name = "embedder.embedder.convolution.weight"
    save_file({k: v for k, v in state.items() if k != name}, weights, metadata={"format": "pt"})
    assert f"1 of its tensors are missing or have another shape: {name}" in refused(run)
    save_file(state | {name: torch.zeros(16, 3, 5, 5)}, weights, metadata={"format": "pt"})
    assert f"1 of its tensors are missing or have another shape: {name}" in refused(run)
    weights.unlink()
    assert "cannot be loaded" in refused(run)
    torch.save([1, 2], tmp_path / "list.pth")
    assert "holds no dictionary of tensors" in refused(tmp_path / "list.pth")
    torch.save({"teacher": state, "student": state}, tmp_path / "two.pth")
    assert "dictionary of tensors but the entries teacher, student: save the weights" in refused(tmp_path / "two.pth")
    torch.save(torch.nn.Linear(2, 2), tmp_path / "whole.pth")
    assert "have to be executed; save model.state_dict() alone" in refused(tmp_path / "whole.pth")
    (tmp_path / "cut.pth").write_bytes(b"PK\x03\x04 cut")
    assert "cannot be loaded" in refused(tmp_path / "cut.pth")


@pytest.mark.parametrize("name", ["layer1.0.se.fc1.weight", "attnpool.c_proj.weight", "bn0.weight"])
def test_a_file_of_another_network_is_refused(tmp_path, name):
    torch.save(torchvision_state() | {name: torch.zeros(2, 2)}, tmp_path / "weights.pth")
    assert f"1 tensor that no plain ResNet has: {name}" in refused(tmp_path / "weights.pth")


@pytest.mark.parametrize(
    ("prefix", "other", "unused"),
    [
        ("", "prototypes.weight", "prototypes (1), fc (2)"),
        ("module.", "module.projection_head.0.weight", "projection_head (1), fc (2)"),
        ("module.encoder_q.", "module.encoder_k.", "encoder_k (74), fc (2)"),
        ("module.base_encoder.", "module.momentum_encoder.", "momentum_encoder (74), fc (2)"),
        ("backbone.", "momentum_backbone.", "momentum_backbone (74), fc (2)"),
        ("module.encoder.", "module.predictor.0.weight", "predictor (1), fc (2)"),
        ("teacher_encoder.", "student_encoder.", "student_encoder (74), fc (2)"),
    ],
)
def test_the_encoder_of_a_method_is_found_in_its_checkpoint(tmp_path, prefix, other, unused):
    """The tensors of the other network are twice as large, so that a mistake shows."""
    state = torchvision_state()
    content = {f"{prefix}{name}": tensor for name, tensor in state.items()}
    is_network = other.endswith(".")
    content |= {f"{other}{k}": 2 * v for k, v in state.items()} if is_network else {other: torch.zeros(2, 2)}
    torch.save({"state_dict": content}, tmp_path / "checkpoint.pth.tar")
    loaded = load_encoder(str(tmp_path / "checkpoint.pth.tar"))
    for name, tensor in to_torchvision(loaded.model.state_dict()).items():
        assert torch.equal(tensor, state[name])
    assert set(unused.split(", ")) == set(loaded.note.split("not used: ")[1].split(", "))
    assert loaded.network == ("teacher" if "teacher" in prefix else "as loaded")


def test_a_checkpoint_of_several_networks_of_unknown_names_is_refused(tmp_path):
    state = torchvision_state()
    content = {f"{prefix}.{name}": tensor for prefix in ("left", "right") for name, tensor in state.items()}
    torch.save(content, tmp_path / "weights.pth")
    assert "it holds 2 networks (left., right.)" in refused(tmp_path / "weights.pth")


class Bomb:
    """An object whose pickle makes a folder when it is read."""

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


def test_code_in_the_folder_is_not_executed(run, tmp_path):
    mark = tmp_path / "executed"
    (run / "encoder" / "evil.py").write_text(f"import os; os.mkdir({str(mark)!r})")
    asks = {"auto_map": {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}}
    config = json.loads((run / "encoder" / "config.json").read_text())
    (run / "encoder" / "config.json").write_text(json.dumps(config | asks))
    load_encoder(str(run))  # transformers' own code for this model type
    (run / "encoder" / "config.json").write_text(json.dumps({"model_type": "evil"} | asks))
    assert "code of its own, which is never run" in refused(run)
    assert not mark.exists()


def test_an_index_that_names_files_elsewhere_is_refused(run):
    (run / "encoder" / "model.safetensors").rename(run / "secret.safetensors")
    index = {"metadata": {}, "weight_map": {"embedder.embedder.convolution.weight": "../secret.safetensors"}}
    (run / "encoder" / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "names ../secret.safetensors, which is not in the folder" in refused(run)
