import pytest
import torch
import torchvision
from transformers import ResNetConfig, ResNetModel

from m2t_accel.config.fields import ConfigurationError
from m2t_accel.hub import tensor_names
from m2t_accel.model import create_encoder, embed


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_a_torchvision_resnet_computes_the_same_under_transformers_names(name):
    torch.manual_seed(0)
    theirs = torchvision.models.get_model(name).eval()
    for layer in theirs.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):  # different statistics in each layer, so that a swap shows
            layer.running_mean.normal_(std=0.1)
            layer.running_var.uniform_(0.5, 2)
    model = ResNetModel(ResNetConfig(**tensor_names.resnet_config(theirs.state_dict()))).eval()
    mapped, unused = tensor_names.from_torchvision(theirs.state_dict(), model.state_dict())
    model.load_state_dict(mapped, strict=True)
    assert unused == ["fc.weight", "fc.bias"]
    theirs.fc = torch.nn.Identity()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(embed(model, images), theirs(images))
    back = tensor_names.to_torchvision(model.state_dict())
    assert set(back) == set(theirs.state_dict())
    assert all(torch.equal(back[key], value) for key, value in theirs.state_dict().items())


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnet10-quarter"])
def test_the_shapes_determine_the_configuration(name):
    with torch.device("meta"):
        model = create_encoder(name)
    found = tensor_names.resnet_config(tensor_names.to_torchvision(model.state_dict()))
    assert found == {key: getattr(model.config, key) for key in found}


# Source: detectron2's tools/convert-torchvision-to-d2.py, and the names of its ResNet.
@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("conv1.weight", "stem.conv1.weight"),
        ("bn1.running_mean", "stem.conv1.norm.running_mean"),
        ("layer1.0.conv1.weight", "res2.0.conv1.weight"),
        ("layer1.0.bn3.bias", "res2.0.conv3.norm.bias"),
        ("layer4.2.bn2.running_var", "res5.2.conv2.norm.running_var"),
        ("layer2.0.downsample.0.weight", "res3.0.shortcut.weight"),
        ("layer2.0.downsample.1.weight", "res3.0.shortcut.norm.weight"),
    ],
)
def test_names_of_detectron2(name, theirs):
    assert tensor_names.detectron2_name(name) == theirs


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("wide_resnet50_2", "wide or grouped ResNet"),
        ("resnext50_32x4d", "wide or grouped ResNet"),
        ("vgg11", r"no ResNet .* features\.0\.weight"),
    ],
)
def test_networks_that_resnet_model_cannot_represent_are_refused(name, message):
    with torch.device("meta"):
        state = torchvision.models.get_model(name).state_dict()
    with pytest.raises(ConfigurationError, match=message):
        tensor_names.resnet_config(state)


def test_missing_and_misshapen_tensors_are_refused():
    model = create_encoder("resnet10-quarter")
    state = tensor_names.to_torchvision(model.state_dict())

    def without(name):
        return {key: value for key, value in state.items() if name not in key}

    with pytest.raises(ConfigurationError, match=r"tensors are missing: layer2\.0\.bn2\.bias$"):
        tensor_names.from_torchvision(without("layer2.0.bn2.bias"), model.state_dict())
    with pytest.raises(ConfigurationError, match=r"missing: bn1\.running_var, (layer\S+, ){3}layer\S+ and 7 more$"):
        tensor_names.from_torchvision(without("running_var"), model.state_dict())
    wrong = state | {"bn1.weight": torch.ones(3)}
    with pytest.raises(ConfigurationError, match=r"bn1\.weight has the shape \(3,\), \(16,\) is needed"):
        tensor_names.from_torchvision(wrong, model.state_dict())
    with pytest.raises(ConfigurationError, match=r"layer3 missing"):
        tensor_names.resnet_config(without("layer3.0.conv2.weight"))
    with pytest.raises(ConfigurationError, match=r"stem has the shape \(16, 3, 3, 3\)"):
        tensor_names.resnet_config(state | {"conv1.weight": torch.zeros(16, 3, 3, 3)})
    assert tensor_names.from_torchvision(without("num_batches"), model.state_dict())[1] == [], "older files have none"


def test_an_unknown_name_is_refused():
    with pytest.raises(KeyError):
        tensor_names.torchvision_name("pooler.weight")
