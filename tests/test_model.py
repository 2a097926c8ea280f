import copy
import json

import pytest
import torch
from loopback_hub import loopback_hub
from torch import nn
from torch.nn import functional
from transformers import AutoModel, ConvNextConfig, RegNetConfig, ResNetConfig, ResNetModel

from m2t_accel.config.fields import ConfigurationError
from m2t_accel.model import (
    Student,
    Teacher,
    create_encoder,
    create_student,
    embed,
    momentum_teacher_loss,
    plain_encoder,
)
from m2t_accel.momentum_norm import MomentumBatchNorm


def small_student():
    torch.manual_seed(0)
    return create_student(create_encoder("resnet10-quarter"), image_size=32, hidden_size=16, projection_size=8)


def unit(*rows):
    return functional.normalize(torch.tensor(rows, dtype=torch.float64), dim=1)


@pytest.mark.parametrize(
    ("k1", "k2", "expected"),
    [
        (unit((1, 0), (0, 1)), unit((1, 0), (0, 1)), 0.0),  # aligned
        (unit((0, 1), (1, 0)), unit((0, 1), (1, 0)), 4.0),  # at right angles
        (unit((-1, 0), (0, -1)), unit((-1, 0), (0, -1)), 8.0),  # opposed
        (unit((1, 0), (0, 1)), unit((-1, 0), (0, -1)), 4.0),  # the views are summed: 0 + 4
        (unit((1, 0), (1, 0)), unit((1, 0), (1, 0)), 2.0),  # the images are averaged: (0 + 4) / 2
    ],
)
def test_loss(k1, k2, expected):
    q = unit((1, 0), (0, 1))
    assert momentum_teacher_loss(predictions=(q, q), targets=(k1, k2)).item() == pytest.approx(expected, abs=1e-12)


def test_outputs_are_unit_norm_and_each_is_of_its_own_view():
    student = small_student()
    teacher = Teacher(student).eval()
    view_1, view_2 = torch.randn(2, 4, 3, 32, 32)
    for outputs in (student(view_1, view_2), teacher(view_1, view_2)):
        for output in outputs:
            assert output.shape == (4, 8)
            torch.testing.assert_close(output.norm(dim=1), torch.ones(4))
    k1, k2 = teacher(view_1, view_2)
    of_view_1, of_view_2 = (
        functional.normalize(teacher.projector(embed(teacher.encoder, v))) for v in (view_1, view_2)
    )
    assert torch.equal(k1, of_view_1)
    assert torch.equal(k2, of_view_2)


def test_the_views_pass_one_after_the_other():
    """BatchNorm sees one view at a time: two batches of N, not one of 2 N."""
    student = small_student()
    seen = []
    student.projector[1].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[0]))
    student(*torch.randn(2, 4, 3, 32, 32))
    assert seen == [4, 4]


def test_the_teacher_takes_view_2_first():
    """An encoder with dropout draws its random numbers in this order; another order would be another run."""
    teacher, seen = Teacher(small_student()), []
    teacher.encoder.register_forward_pre_hook(
        lambda _, args, named: seen.append(named["pixel_values"]), with_kwargs=True
    )
    view_1, view_2 = torch.randn(2, 4, 3, 32, 32)
    teacher(view_1, view_2)
    assert seen[0] is view_2
    assert seen[1] is view_1


def test_the_teacher_follows_weights_and_not_statistics():
    student = small_student()
    teacher = Teacher(student)
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    before = {name: parameter.clone() for name, parameter in teacher.named_parameters()}
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.normal_()
        for name, buffer in student.named_buffers():
            if "running" in name:
                buffer.fill_(7)
    teacher.follow(student, weight_momentum=0.9)
    theirs = dict(student.named_parameters())
    assert not any(name.startswith("predictor") for name in before)
    for name, parameter in teacher.named_parameters():
        torch.testing.assert_close(parameter, 0.9 * before[name] + 0.1 * theirs[name])
    assert not any((b == 7).any() for n, b in teacher.named_buffers() if "running" in n)
    frozen = {name: parameter.clone() for name, parameter in teacher.named_parameters()}
    teacher.follow(student, weight_momentum=1.0)
    assert all(torch.equal(parameter, frozen[name]) for name, parameter in teacher.named_parameters())


def test_the_plain_encoder_has_the_teachers_features_and_no_momentum_layer():
    teacher = Teacher(small_student())
    teacher(*torch.randn(2, 4, 3, 32, 32))
    teacher.commit_statistics()
    plain = plain_encoder(teacher.encoder)
    assert type(plain) is ResNetModel
    assert not any(isinstance(layer, MomentumBatchNorm) for layer in plain.modules())
    images = torch.randn(4, 3, 32, 32)
    torch.testing.assert_close(embed(plain, images), embed(teacher.encoder.eval(), images), rtol=0, atol=0)


SMALL = {"depths": [1, 2], "hidden_sizes": [16, 32], "embedding_size": 8}


@pytest.mark.parametrize(
    "config",
    [
        ResNetConfig(**SMALL, layer_type="basic"),
        ResNetConfig(**SMALL, layer_type="bottleneck", downsample_in_first_stage=True),
        RegNetConfig(**SMALL, groups_width=8, layer_type="x"),
        RegNetConfig(**SMALL, groups_width=8, layer_type="y"),
        ResNetConfig(**SMALL, hidden_act="gelu"),
    ],
    ids=lambda config: f"{config.model_type}-{config.layer_type}-{config.hidden_act}",
)
def test_activations_in_place_change_no_bit(config):
    torch.manual_seed(0)
    encoder = AutoModel.from_config(config).train()
    stock, settings = copy.deepcopy(encoder), encoder.config.to_dict()
    student = Student(encoder, feature_size=32, hidden_size=8, projection_size=4)
    teacher = Teacher(student)
    for network in (student.encoder, teacher.encoder):
        relus = [layer.inplace for layer in network.modules() if isinstance(layer, nn.ReLU)]
        assert relus
        assert all(relus)
    images = torch.randn(4, 3, 32, 32)
    for network in (encoder, stock):
        first, second = embed(network, images), embed(network, images.flip(0))
        (first.square().sum() + second.pow(3).sum()).backward()
    assert all(a.grad.equal(b.grad) for a, b in zip(encoder.parameters(), stock.parameters(), strict=True))
    assert all(torch.equal(value, stock.state_dict()[name]) for name, value in encoder.state_dict().items())
    outputs = [network(images, output_hidden_states=True) for network in (encoder, stock)]
    assert all(a.equal(b) for a, b in zip(*(output.hidden_states for output in outputs), strict=True))
    assert encoder.config.to_dict() == settings
    plain = plain_encoder(teacher.encoder)
    assert not any(layer.inplace for layer in plain.modules() if isinstance(layer, nn.ReLU))


class PreActivation(nn.Module):
    """An encoder whose sum needs the input of its ReLU."""

    def __init__(self):
        super().__init__()
        self.convolution, self.normalization, self.activation = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()

    def forward(self, images):
        hidden = self.normalization(self.convolution(images))
        return (hidden + self.activation(hidden)).mean(dim=(2, 3))


def test_activations_of_other_encoders_are_not_changed():
    student = Student(PreActivation(), feature_size=8, hidden_size=8, projection_size=4)
    assert not student.encoder.activation.inplace


@pytest.mark.parametrize(
    ("name", "millions"),
    [("resnet18", 11.177), ("resnet34", 21.285), ("resnet50", 23.508), ("resnet101", 42.500), ("resnet152", 58.144)],
)
def test_named_encoders_have_the_standard_sizes(name, millions):
    """Their parameters are those of torchvision's ResNets without the classifier."""
    with torch.device("meta"):
        encoder = create_encoder(name)
    assert sum(p.numel() for p in encoder.parameters()) / 1e6 == pytest.approx(millions, abs=1e-3)


def test_an_encoder_from_a_transformers_config_folder(tmp_path):
    RegNetConfig(depths=[1, 1, 1, 1], hidden_sizes=[8, 8, 16, 16], embedding_size=8, groups_width=8).save_pretrained(
        tmp_path
    )
    student = create_student(create_encoder(str(tmp_path)), image_size=32, hidden_size=16, projection_size=8)
    assert isinstance(student, Student)
    assert student.projector[0].in_features == 16


@pytest.mark.slow
def test_an_encoder_by_hub_id_over_http(tmp_path, run_script):
    config = RegNetConfig(depths=[1, 1, 1, 1], hidden_sizes=[8, 8, 16, 16], embedding_size=8, groups_width=8)
    config.save_pretrained(tmp_path / "hub" / "someone" / "regnet")
    code = "from m2t_accel.model import create_encoder; print(create_encoder('someone/regnet').config.hidden_sizes)"
    with loopback_hub(tmp_path / "hub") as hub:
        environment = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
        done = run_script("-c", code, environment=environment)
    assert done.stdout.strip() == "[8, 8, 16, 16]", done.stderr


def test_an_encoder_without_batch_norm_is_refused(tmp_path):
    ConvNextConfig(depths=[1, 1, 1, 1], hidden_sizes=[8, 8, 16, 16]).save_pretrained(tmp_path)
    with pytest.raises(ConfigurationError, match="ConvNextModel has no BatchNorm"):
        create_encoder(str(tmp_path))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_dtype_of_a_published_configuration_is_not_used(tmp_path, dtype):
    ResNetConfig(depths=[1, 1, 1, 1], hidden_sizes=[8, 8, 16, 16], embedding_size=8, dtype=dtype).save_pretrained(
        tmp_path
    )
    assert dtype in (tmp_path / "config.json").read_text()
    student = create_student(create_encoder(str(tmp_path)), image_size=32, hidden_size=16, projection_size=8)
    assert {parameter.dtype for parameter in student.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    "wrong", [{"depths": "x"}, {"layer_type": "zzz"}, {"hidden_act": "nope"}, {"hidden_sizes": [-8, 8, 16, 16]}]
)
def test_a_configuration_that_builds_no_model_is_one_line(tmp_path, wrong):
    config = {
        "model_type": "resnet",
        "depths": [1, 1, 1, 1],
        "hidden_sizes": [8, 8, 16, 16],
        "embedding_size": 8,
        **wrong,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigurationError, match="no transformers model") as caught:
        create_encoder(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_a_folder_without_an_encoder_is_refused(tmp_path):
    with pytest.raises(ConfigurationError, match=r"no config\.json"):
        create_encoder(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no-such-model"}))
    with pytest.raises(ConfigurationError, match="no transformers model") as caught:
        create_encoder(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_a_config_that_asks_for_remote_code_is_refused_and_its_code_not_run(tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil"}})
    )
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    with pytest.raises(ConfigurationError, match="no transformers model"):
        create_encoder(str(tmp_path))
    assert not (tmp_path / "ran").exists()
