import pickle
import sys

import numpy as np
import pytest
import torch
import torchvision
import yaml

from m2t_accel.config.fields import ConfigurationError
from m2t_accel.hub import export as export_module
from m2t_accel.hub.encoders import LoadedEncoder
from m2t_accel.hub.export import export
from m2t_accel.hub.tensor_names import detectron2_name, to_torchvision
from m2t_accel.model import create_encoder, embed

VIEW = (64, 0.875, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def encoder(name):
    """Return an encoder of random weights, with different statistics in each layer, so that a swap shows."""
    torch.manual_seed(0)
    model = create_encoder(name).eval()
    for layer in model.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.running_mean.normal_(std=0.1)
            layer.running_var.uniform_(0.5, 2)
    return LoadedEncoder(model, *VIEW, "teacher", "an encoder")


@pytest.fixture(scope="module")
def resnet18():
    return encoder("resnet18")


def features(loaded, images):
    with torch.no_grad():
        return embed(loaded.model, images)


@pytest.mark.parametrize("ending", ["safetensors", "pth"])
def test_torchvision_computes_the_same(resnet18, tmp_path, ending):
    output = tmp_path / "new" / f"weights.{ending}"
    lines = export(resnet18, "torchvision", output)
    assert output.stat().st_mode & 0o666 == output.parent.stat().st_mode & 0o666, "others may read it"
    assert lines[0].startswith(f"{output}: torchvision's resnet18 without its last layer; features differ by ")
    names = {}
    exec(f"{lines[2]}; {lines[3]}", names)  # the printed code
    model = names["model"].eval()
    model.fc = torch.nn.Identity()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(model(images), features(resnet18, images), rtol=0, atol=1e-5)
    assert [path.name for path in output.parent.iterdir()] == [output.name]


def test_timm_computes_the_same(resnet18, tmp_path):
    pytest.importorskip("timm")
    lines = export(resnet18, "timm", tmp_path / "weights.safetensors")
    names = {}
    exec(f"{lines[2]}; {lines[3]}", names)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(names["model"].eval()(images), features(resnet18, images), rtol=0, atol=1e-5)


def test_detectron2_gets_its_names_and_pixels(resnet18, tmp_path):
    lines = export(resnet18, "detectron2", tmp_path / "r18.pkl")
    content = pickle.loads((tmp_path / "r18.pkl").read_bytes())
    assert content["matching_heuristics"] is True
    model = content["model"]
    assert model["stem.conv1.weight"].shape == (64, 3, 7, 7)
    state = resnet18.model.state_dict()
    shortcut = state["encoder.stages.2.layers.0.shortcut.normalization.running_var"].numpy()
    np.testing.assert_array_equal(model["res4.0.shortcut.norm.running_var"], shortcut)
    assert not any("num_batches" in name or name.startswith("layer") for name in model)
    assert len(model) == sum(not name.endswith("num_batches_tracked") for name in state)
    assert lines[1] == f"{tmp_path}/r18.yaml: the config for it"
    assert (tmp_path / "r18.yaml").read_text() == "\n".join(lines[2:]) + "\n"
    (tmp_path / "r18b.yaml").write_text("mine")
    with pytest.raises(ConfigurationError, match=r"--output .*r18b\.pkl: its config .*r18b\.yaml exists"):
        export(resnet18, "detectron2", tmp_path / "r18b.pkl")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r18.pkl", "r18.yaml", "r18b.yaml"]


# Settings of detectron2/config/defaults.py, with their defaults.
DETECTRON2_DEFAULTS = {
    "VERSION": 2,
    "MODEL": {
        "WEIGHTS": "",
        "PIXEL_MEAN": [103.530, 116.280, 123.675],
        "PIXEL_STD": [1.0, 1.0, 1.0],
        "BACKBONE": {"FREEZE_AT": 2},
        "RESNETS": {
            "DEPTH": 50,
            "NUM_GROUPS": 1,
            "NORM": "FrozenBN",
            "STRIDE_IN_1X1": True,
            "RES5_DILATION": 1,
            "RES2_OUT_CHANNELS": 256,
            "STEM_OUT_CHANNELS": 64,
        },
    },
    "INPUT": {"FORMAT": "BGR"},
    "TEST": {"PRECISE_BN": {"ENABLED": False, "NUM_ITER": 200}},
}


def merged(defaults, given):
    """Merge settings as yacs does: an unknown name or another type than the default's is an error."""
    for name, value in given.items():
        assert name in defaults, f"Non-existent config key: {name}"
        assert type(value) is type(defaults[name]), name
    return defaults | {
        name: merged(defaults[name], value) if isinstance(value, dict) else value for name, value in given.items()
    }


def build_resnet_backbone(resnets):
    """Return the shapes of some tensors that detectron2/modeling/backbone/resnet.py creates, and check its assertions.

    `assert out_channels == 64, "Must set MODEL.RESNETS.RES2_OUT_CHANNELS = 64 for R18/R34"`
    `assert res5_dilation == 1, "Must set MODEL.RESNETS.RES5_DILATION = 1 for R18/R34"`
    `assert num_groups == 1, "Must set MODEL.RESNETS.NUM_GROUPS = 1 for R18/R34"`
    """
    is_basic = resnets["DEPTH"] in (18, 34)
    if is_basic:
        assert resnets["RES2_OUT_CHANNELS"] == 64
        assert (resnets["RES5_DILATION"], resnets["NUM_GROUPS"]) == (1, 1)
    last = "conv2" if is_basic else "conv3"
    channels = [resnets["RES2_OUT_CHANNELS"] * 2**stage for stage in range(4)]
    return {f"res{stage}.0.{last}.weight": number for stage, number in enumerate(channels, start=2)}


@pytest.mark.parametrize("depth", [18, 34, 50, 101, 152])
def test_detectron2_accepts_its_config(tmp_path, depth):
    with torch.device("meta"):
        model = create_encoder(f"resnet{depth}")
    loaded = LoadedEncoder(model, *VIEW, "teacher", "an encoder")
    given = export_module.detectron2_config(loaded, depth, tmp_path / "r.pkl")
    given = yaml.safe_load(yaml.safe_dump(given))
    config = merged(DETECTRON2_DEFAULTS, given)
    widths = build_resnet_backbone(config["MODEL"]["RESNETS"])
    state = {detectron2_name(name): tensor for name, tensor in to_torchvision(model.state_dict()).items()}
    assert {name: state[name].shape[0] for name in widths} == widths
    assert state["stem.conv1.weight"].shape[0] == config["MODEL"]["RESNETS"]["STEM_OUT_CHANNELS"]
    # MoCo's detection/configs: pascal_voc_R_50_C4_24k_moco.yaml and its base.
    assert config["MODEL"]["PIXEL_MEAN"] == [123.675, 116.28, 103.53]
    assert config["MODEL"]["PIXEL_STD"] == [58.395, 57.12, 57.375]
    assert config["INPUT"]["FORMAT"] == "RGB"
    assert config["MODEL"]["BACKBONE"]["FREEZE_AT"] == 0
    assert config["MODEL"]["RESNETS"]["NORM"] == "SyncBN"
    assert config["MODEL"]["RESNETS"]["STRIDE_IN_1X1"] is False
    assert config["TEST"]["PRECISE_BN"]["ENABLED"] is True
    assert config["MODEL"]["WEIGHTS"] == str(tmp_path / "r.pkl")


@pytest.mark.slow
def test_onnx_computes_the_same_for_any_batch(tmp_path):
    onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    loaded, output = encoder("resnet10-quarter"), tmp_path / "encoder.onnx"
    lines = export(loaded, "onnx", output)
    assert "ONNX, opset" in lines[0]
    session = runtime.InferenceSession(str(output), providers=["CPUExecutionProvider"])
    for number in (1, 3, 7):
        images = torch.randn(number, 3, 64, 64)
        found = torch.from_numpy(session.run(["features"], {"pixel_values": images.numpy()})[0])
        torch.testing.assert_close(found, features(loaded, images), rtol=0, atol=1e-5)
    metadata = {entry.key: entry.value for entry in onnx.load(output).metadata_props}
    assert metadata["image_size"] == "64"
    assert metadata["image_mean"] == "[0.485, 0.456, 0.406]"
    assert [path.name for path in tmp_path.iterdir()] == ["encoder.onnx"]


@pytest.mark.parametrize(("format", "file"), [("torchvision", "x.pth"), ("timm", "x.pth"), ("detectron2", "x.pkl")])
def test_a_network_that_the_library_does_not_have_is_refused(tmp_path, format, file):
    with pytest.raises(ConfigurationError, match=r"widths \[16, 32, 64, 128\] .*--format onnx"):
        export(encoder("resnet10-quarter"), format, tmp_path / file)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("format", "file"), [("torchvision", "x.pth"), ("timm", "x.pth"), ("detectron2", "x.pkl")])
def test_a_file_with_other_features_is_not_kept(resnet18, tmp_path, monkeypatch, format, file):
    """Swap two tensors of the same shape."""

    def swapped(state):
        right = to_torchvision(state)
        a, b = "layer1.0.conv1.weight", "layer1.1.conv1.weight"
        return right | {a: right[b], b: right[a]}

    to_torchvision = export_module.to_torchvision
    monkeypatch.setattr(export_module, "to_torchvision", swapped)
    with pytest.raises(ConfigurationError, match=r"features differ by .* nothing was written"):
        export(resnet18, format, tmp_path / file)
    assert list(tmp_path.iterdir()) == []


def test_wrong_output_files_are_refused(resnet18, tmp_path):
    with pytest.raises(ConfigurationError, match=r"--output .*x\.pth: for detectron2 .*\.pkl"):
        export(resnet18, "detectron2", tmp_path / "x.pth")
    (tmp_path / "x.pth").write_text("mine")
    with pytest.raises(ConfigurationError, match=r"--output .*x\.pth exists"):
        export(resnet18, "torchvision", tmp_path / "x.pth")
    assert (tmp_path / "x.pth").read_text() == "mine"
    with pytest.raises(ConfigurationError, match=r"--output .* cannot be written"):
        export(resnet18, "torchvision", tmp_path / "x.pth" / "below.pth")


@pytest.mark.parametrize("file", ["x.pth", "x.safetensors"])
def test_a_full_disk_is_one_line_and_leaves_no_half_file(resnet18, small_disk, file):
    disk = small_disk(200)
    with pytest.raises(ConfigurationError, match=rf"--output \S+/{file} cannot be written"):
        export(resnet18, "torchvision", disk / file)
    assert list(disk.iterdir()) == []


@pytest.mark.parametrize(("format", "file", "package"), [("timm", "x.pth", "timm"), ("onnx", "x.onnx", "onnxruntime")])
def test_a_library_that_is_not_installed_is_named(resnet18, tmp_path, monkeypatch, format, file, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigurationError, match=rf"{package} is not installed: type `pip install"):
        export(resnet18, format, tmp_path / file)


def test_standard_networks_are_found_by_their_shapes():
    for name in ("resnet34", "resnet101"):
        with torch.device("meta"):
            assert export_module.standard_name(create_encoder(name)) == name
    assert {name for name in export_module.ENCODERS if hasattr(torchvision.models, name)} == set(
        export_module.ENCODERS
    ) - {"resnet10-quarter", "resnet10-half"}
