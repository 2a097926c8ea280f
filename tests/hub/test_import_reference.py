import json

import pytest
import torch
import torchvision
from transformers import AutoImageProcessor, AutoModel

from m2t_accel.config.fields import ConfigurationError
from m2t_accel.hub.encoders import load_encoder
from m2t_accel.hub.import_reference import import_reference
from m2t_accel.model import embed


def published(prefix="module."):
    """A checkpoint as the published code writes it, in small: two encoders with projectors, and a predictor."""
    torch.manual_seed(0)
    state = {}
    for network in ("student_encoder", "teacher_encoder"):
        body = torchvision.models.resnet18()
        for name, tensor in body.state_dict().items():
            if not name.startswith("fc."):
                state[f"{prefix}{network}.{name}"] = tensor
        state[f"{prefix}{network}.fc.0.weight"] = torch.randn(8, 512)
        state[f"{prefix}{network}.fc.1.running_mean"] = torch.zeros(8)
    state[f"{prefix}predictor.0.weight"] = torch.zeros(3)
    return {"model": state, "start_epoch": 100, "optimizer": {"param_groups": [{"lr": 0.1}]}}


@pytest.mark.parametrize("prefix", ["module.", ""])
@pytest.mark.parametrize("network", ["teacher", "student"])
def test_a_checkpoint_of_the_published_code(tmp_path, prefix, network):
    checkpoint = published(prefix)
    torch.save(checkpoint, tmp_path / "last_epoch_ckpt.pth.tar")
    output = tmp_path / "encoder"
    lines = import_reference(tmp_path / "last_epoch_ckpt.pth.tar", network, output)
    assert "features differ from torchvision's by" in lines[1]
    other = "student" if network == "teacher" else "teacher"
    assert f"{other}_encoder (122), predictor (1), fc.0.weight, fc.1.running_mean" in lines[2]
    assert "125 tensors are not used" in lines[2]

    theirs = torchvision.models.resnet18().eval()
    start = f"{prefix}{network}_encoder."
    body = {k.removeprefix(start): v for k, v in checkpoint["model"].items() if k.startswith(start)}
    theirs.load_state_dict({k: v for k, v in body.items() if not k.startswith("fc.")}, strict=False)
    theirs.fc = torch.nn.Identity()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(embed(AutoModel.from_pretrained(output), images), theirs(images))
    assert AutoImageProcessor.from_pretrained(output).crop_size["height"] == 224
    loaded = load_encoder(str(output))
    assert (loaded.network, loaded.image_size) == (network, 224)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["encoder", "last_epoch_ckpt.pth.tar"]
    assert "last_epoch_ckpt.pth.tar" in (output / "README.md").read_text()


def test_a_state_dict_of_torchvision(tmp_path):
    torch.save(torchvision.models.resnet50().state_dict(), tmp_path / "resnet50.pth")
    (tmp_path / "encoder").mkdir()  # an empty folder may be there
    lines = import_reference(tmp_path / "resnet50.pth", "teacher", tmp_path / "encoder")
    assert lines[2] == "2 tensors are not used: fc.weight, fc.bias"
    assert "momentum2_teacher" not in json.loads((tmp_path / "encoder" / "config.json").read_text())


def test_what_is_refused(tmp_path):
    checkpoint, output = tmp_path / "checkpoint.pth.tar", tmp_path / "encoder"

    def refused(message, network="teacher"):
        with pytest.raises(ConfigurationError, match=message) as caught:
            import_reference(checkpoint, network, output)
        assert "\n" not in str(caught.value)
        assert not output.exists()

    refused("no such file; give a checkpoint such as last_epoch_ckpt")
    whole = published()
    lacking = {k: v for k, v in whole["model"].items() if k != "module.teacher_encoder.layer1.0.bn1.running_var"}
    torch.save({"model": lacking}, checkpoint)
    refused(r"the tensor layer1\.0\.bn1\.running_var is missing")
    torch.save({"model": {k: v for k, v in whole["model"].items() if "student" not in k}}, checkpoint)
    refused(r"has no student_encoder\.….*there are predictor, teacher_encoder", network="student")
    wrong = whole["model"] | {"module.teacher_encoder.conv1.weight": torch.zeros(64, 3, 3, 3)}
    torch.save({"model": wrong}, checkpoint)
    refused("whose stem has the shape")
    checkpoint.write_text("no checkpoint at all")
    refused("it is none of tensors, or damaged")
    torch.save(whole, checkpoint)
    output.mkdir()
    (output / "mine.txt").write_text("")
    with pytest.raises(ConfigurationError, match="exists and is not empty: give another folder"):
        import_reference(checkpoint, "teacher", output)
