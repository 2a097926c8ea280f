"""Warm starts: the encoder of a source, in student and teacher."""

import pytest
import torch
from accelerate import Accelerator
from helpers import tiny
from safetensors.torch import save_file
from transformers import AutoModel, ResNetConfig, ResNetForImageClassification, ResNetModel, ViTConfig, ViTModel

from m2t_accel.config.fields import ConfigurationError
from m2t_accel.config.recipes import build_config
from m2t_accel.hub.tensor_names import to_torchvision
from m2t_accel.hub.warm_start import load_warm_start
from m2t_accel.model import create_encoder
from m2t_accel.pretrain import create_step


@pytest.fixture(scope="module")
def source():
    """An encoder with other statistics than a new one."""
    torch.manual_seed(1)
    model = create_encoder("resnet10-quarter").eval()
    for layer in model.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2)
            layer.num_batches_tracked.fill_(7)
    return model


def start(source, tmp_path, **settings):
    config = build_config(tiny(tmp_path / "run", init_from=str(source), **settings))
    return load_warm_start(config, Accelerator())


def refused(source, tmp_path, **settings):
    with pytest.raises(ConfigurationError) as caught:
        start(source, tmp_path, **settings)
    message = str(caught.value)
    assert message.startswith(f"--init_from {source}")
    assert "\n" not in message
    assert "--encoder " + str(source) not in message
    return message


def write_classifier(model, folder):
    classifier = ResNetForImageClassification(model.config)
    classifier.resnet.load_state_dict(model.state_dict())
    classifier.save_pretrained(folder)


def published(model):
    """Return a checkpoint of the published code whose student has other weights."""
    state = to_torchvision(model.state_dict())
    content = {f"module.teacher_encoder.{name}": tensor for name, tensor in state.items()}
    content |= {f"module.student_encoder.{name}": 2 * tensor for name, tensor in state.items()}
    return {"model": content | {"module.teacher_encoder.fc.0.weight": torch.zeros(3, 3)}}


SOURCES = {
    "run": lambda model, path: model.save_pretrained(path / "encoder"),
    "encoder": lambda model, path: model.save_pretrained(path),
    "classifier": write_classifier,
    "weights.pth": lambda model, path: torch.save(to_torchvision(model.state_dict()), path),
    "weights.safetensors": lambda model, path: save_file(to_torchvision(model.state_dict()), path),
    "last_epoch_ckpt.pth.tar": lambda model, path: torch.save(published(model), path),
}


@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize("encoder", [None, "resnet10-quarter"])
def test_student_and_teacher_are_the_source_tensor_by_tensor(source, tmp_path, kind, encoder):
    SOURCES[kind](source, tmp_path / kind)
    given = {"recipe": "8x2080Ti-b256-100ep", "dataset": "digits"} | ({"encoder": encoder} if encoder else {})
    warm = start(tmp_path / kind, tmp_path, **given)
    assert warm.encoder == "resnet10-quarter", "the architecture is the source's, not the recipe's"
    config = build_config(tiny(tmp_path / "run", encoder=warm.encoder))
    step = create_step(config, Accelerator(), None, warm.architecture, warm.state)
    expected = source.state_dict()
    for network in (step.student, step.teacher):
        found = network.encoder.state_dict()
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor), name
    # Projector and predictor are those of a run from random weights with the same seed.
    cold = create_step(config, Accelerator())
    for name, tensor in cold.student.projector.state_dict().items():
        assert torch.equal(step.student.projector.state_dict()[name], tensor)


def test_what_was_not_used_and_another_normalisation_are_named(source, tmp_path):
    write_classifier(source, tmp_path / "classifier")
    lines = start(tmp_path / "classifier", tmp_path).lines
    assert f"starts from {tmp_path / 'classifier'}: ResNetModel, " in lines[0]
    assert "not used: classifier (2)" in lines[0]
    assert "mean 0.305 0.305 0.305 and deviation 0.377 0.377 0.377, for " in lines[1]
    assert "by 0.485 0.456 0.406 and 0.229 0.224 0.225" in lines[1]
    view = {"image_mean": (0.485, 0.456, 0.406), "image_std": (0.229, 0.224, 0.225)}
    assert len(start(tmp_path / "classifier", tmp_path, **view).lines) == 1


def test_an_architecture_without_a_name_is_the_sources(tmp_path):
    model = ResNetModel(ResNetConfig(depths=[1, 1], hidden_sizes=[8, 16], embedding_size=8, layer_type="basic"))
    torch.save(to_torchvision(model.state_dict()), tmp_path / "weights.pth")
    warm = start(tmp_path / "weights.pth", tmp_path)
    assert warm.encoder == str(tmp_path / "weights.pth")
    assert warm.architecture.hidden_sizes == [8, 16]


def test_an_encoder_that_does_not_fit_is_refused(source, tmp_path):
    source.save_pretrained(tmp_path / "source")
    message = refused(tmp_path / "source", tmp_path, encoder="resnet18")
    assert "does not fit --encoder resnet18: " in message
    assert "tensors missing (encoder.stages.0.layers.1" in message
    assert "tensors of another shape (embedder.embedder.convolution.weight, " in message
    assert "leave --encoder out" in message
    short = ResNetConfig(depths=[1] * 3, hidden_sizes=[16, 32, 64], embedding_size=16, layer_type="basic")
    short.save_pretrained(tmp_path / "short")
    message = refused(tmp_path / "source", tmp_path, encoder=str(tmp_path / "short"))
    assert "tensors not used (encoder.stages.3.layers.0" in message
    # The same tensors, but the stride is in another convolution.
    config = ResNetConfig(depths=[1, 1], hidden_sizes=[32, 64], embedding_size=8, downsample_in_first_stage=False)
    ResNetModel(config).save_pretrained(tmp_path / "one")
    config.downsample_in_bottleneck = True
    config.save_pretrained(tmp_path / "other")
    message = refused(tmp_path / "one", tmp_path, encoder=str(tmp_path / "other"))
    assert "the tensors have the same names, but the features differ" in message


def test_sources_that_cannot_start_a_run_are_refused(source, tmp_path):
    assert "no such file or folder" in refused("runs/nothing", tmp_path)
    state = to_torchvision(source.state_dict())
    file = tmp_path / "weights.pth"
    torch.save({k: v for k, v in state.items() if "layer2.0.bn1.running" not in k}, file)
    assert "tensors are missing: layer2.0.bn1.running_mean, layer2.0.bn1.running_var" in refused(file, tmp_path)
    torch.save(state | {"layer2.0.bn1.weight": torch.ones(3)}, file)
    assert "layer2.0.bn1.weight has the shape (3,), (32,) is needed" in refused(file, tmp_path)
    torch.save(state | {"bn1.weight": torch.full((16,), torch.nan)}, file)
    assert "not finite" in refused(file, tmp_path)
    file.write_text("no weights")
    assert "holds no tensors, or is damaged" in refused(file, tmp_path)
    config = ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=32)
    ViTModel(config).save_pretrained(tmp_path / "vit")
    (tmp_path / "vit" / "preprocessor_config.json").write_text('{"size": {"height": 32, "width": 32}}')
    assert "has no BatchNorm" in refused(tmp_path / "vit", tmp_path)


def test_a_source_on_the_hub_is_the_base_model(source, tmp_path, monkeypatch):
    source.save_pretrained(tmp_path / "hub")
    monkeypatch.setattr("m2t_accel.hub.warm_start.load_encoder", lambda name: load(str(tmp_path / "hub")))
    from m2t_accel.hub.encoders import load_encoder as load

    assert start("someone/encoder", tmp_path).record["hub_id"] == "someone/encoder"
    assert start(tmp_path / "hub", tmp_path).record["hub_id"] is None
    monkeypatch.chdir(tmp_path)
    (tmp_path / "someone").mkdir()
    (tmp_path / "hub").rename(tmp_path / "someone" / "encoder")
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert start("someone/encoder", tmp_path).record["hub_id"] is None, "a folder that looks like a Hub id"
    assert isinstance(AutoModel.from_config(start("someone/encoder", tmp_path).architecture), ResNetModel)
