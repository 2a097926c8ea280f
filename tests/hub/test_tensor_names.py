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
        if isinstance(layer, torch.nn.BatchNorm2d):  # statistics that tell one layer from another
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


def test_the_configuration_is_told_by_the_shapes():
    for name in ("resnet18", "resnet50", "resnet10-quarter"):
        config = create_encoder(name).config
        told = tensor_names.resnet_config(tensor_names.to_torchvision(create_encoder(name).state_dict()))
        assert told == {key: getattr(config, key) for key in told}


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


def test_what_resnet_model_cannot_be():
    for name, message in (
        ("wide_resnet50_2", "wide or grouped ResNet"),
        ("resnext50_32x4d", "wide or grouped ResNet"),
        ("vgg11", "its first names are features.0.weight"),
    ):
        with torch.device("meta"):
            state = torchvision.models.get_model(name).state_dict()
        with pytest.raises(ConfigurationError, match=message):
            tensor_names.resnet_config(state)


def test_missing_and_misshapen_tensors():
    model = create_encoder("resnet10-quarter")
    state = tensor_names.to_torchvision(model.state_dict())
    short = {key: value for key, value in state.items() if key != "layer2.0.bn2.bias"}
    with pytest.raises(ConfigurationError, match=r"the tensor layer2\.0\.bn2\.bias is missing"):
        tensor_names.from_torchvision(short, model.state_dict())
    wrong = state | {"bn1.weight": torch.ones(3)}
    with pytest.raises(ConfigurationError, match=r"bn1\.weight has the shape \(3,\), \(16,\) is needed"):
        tensor_names.from_torchvision(wrong, model.state_dict())
    with pytest.raises(ConfigurationError, match=r"layer3 is not whole"):
        tensor_names.resnet_config({key: value for key, value in state.items() if key != "layer3.0.conv2.weight"})
    uncounted = {key: value for key, value in state.items() if "num_batches" not in key}
    assert tensor_names.from_torchvision(uncounted, model.state_dict())[1] == []


def test_a_name_that_is_no_resnets():
    with pytest.raises(KeyError):
        tensor_names.torchvision_name("pooler.weight")
