import json

import pytest
import torch
import torchvision
from transformers import AutoImageProcessor, AutoModel

from m2t_accel.config.fields import ConfigurationError
from m2t_accel.hub.encoders import load_encoder
from m2t_accel.hub.import_reference import import_reference
from m2t_accel.hub.tensor_names import to_torchvision
from m2t_accel.model import create_encoder, embed


def published(prefix="module.", encoder="resnet10-quarter"):
    """Return a checkpoint in the format of the published code: two encoders with projectors, and a predictor."""
    torch.manual_seed(0)
    state = {}
    for network in ("student_encoder", "teacher_encoder"):
        tensors = to_torchvision(create_encoder(encoder).state_dict())
        state |= {f"{prefix}{network}.{name}": tensor for name, tensor in tensors.items()}
        state[f"{prefix}{network}.fc.0.weight"] = torch.randn(8, 512)
        state[f"{prefix}{network}.fc.1.running_mean"] = torch.zeros(8)
    state[f"{prefix}predictor.0.weight"] = torch.zeros(3)
    return {"model": state, "start_epoch": 100, "optimizer": {"param_groups": [{"lr": 0.1}]}}


def test_a_teacher_of_the_published_code_computes_the_same(tmp_path):
    checkpoint = published(encoder="resnet18")
    torch.save(checkpoint, tmp_path / "last_epoch_ckpt.pth.tar")
    output = tmp_path / "encoder"
    lines = import_reference(tmp_path / "last_epoch_ckpt.pth.tar", "teacher", output)
    assert "features differ from torchvision's by" in lines[1]
    assert "125 tensors not used" in lines[2]
    assert "student_encoder (122), predictor (1), fc.0.weight, fc.1.running_mean" in lines[2]

    theirs = torchvision.models.resnet18().eval()
    theirs.fc = torch.nn.Identity()
    start = "module.teacher_encoder."
    body = {k.removeprefix(start): v for k, v in checkpoint["model"].items() if k.startswith(start)}
    theirs.load_state_dict({k: v for k, v in body.items() if not k.startswith("fc.")}, strict=True)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(embed(AutoModel.from_pretrained(output), images), theirs(images))
    assert AutoImageProcessor.from_pretrained(output).crop_size["height"] == 224
    loaded = load_encoder(str(output))
    assert (loaded.network, loaded.image_size) == ("teacher", 224)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["encoder", "last_epoch_ckpt.pth.tar"]
    assert "last_epoch_ckpt.pth.tar" in (output / "README.md").read_text()


def test_a_state_dict_of_torchvision_is_imported(tmp_path):
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "resnet18.pth")
    (tmp_path / "encoder").mkdir()  # an empty folder is allowed
    lines = import_reference(tmp_path / "resnet18.pth", "teacher", tmp_path / "encoder")
    assert "features differ from torchvision's by" in lines[1]
    assert lines[2] == "2 tensors not used: fc.weight, fc.bias"
    assert "momentum2_teacher" not in json.loads((tmp_path / "encoder" / "config.json").read_text())


def test_a_student_that_torchvision_does_not_have_is_imported(tmp_path):
    checkpoint = published(prefix="")
    torch.save(checkpoint, tmp_path / "small.pth")
    lines = import_reference(tmp_path / "small.pth", "student", tmp_path / "encoder")
    assert lines[1].startswith("not compared: ")
    loaded = load_encoder(str(tmp_path / "encoder"))
    assert loaded.network == "student"
    for name, tensor in to_torchvision(loaded.model.state_dict()).items():
        assert torch.equal(tensor, checkpoint["model"][f"student_encoder.{name}"])


def test_wrong_checkpoints_and_folders_are_refused(tmp_path):
    checkpoint, output = tmp_path / "checkpoint.pth.tar", tmp_path / "encoder"

    def refused(message, network="teacher"):
        with pytest.raises(ConfigurationError, match=message) as caught:
            import_reference(checkpoint, network, output)
        assert "\n" not in str(caught.value)
        assert not output.exists()

    refused("no such file")
    whole = published()
    lacking = {k: v for k, v in whole["model"].items() if k != "module.teacher_encoder.layer1.0.bn1.running_var"}
    torch.save({"model": lacking}, checkpoint)
    refused(r"tensors are missing: layer1\.0\.bn1\.running_var$")
    torch.save({"model": {k: v for k, v in whole["model"].items() if "student" not in k}}, checkpoint)
    refused(r"has no student_encoder\.….*there are predictor, teacher_encoder", network="student")
    wrong = whole["model"] | {"module.teacher_encoder.conv1.weight": torch.zeros(64, 3, 3, 3)}
    torch.save({"model": wrong}, checkpoint)
    refused("stem has the shape")
    checkpoint.write_text("no checkpoint at all")
    refused("no tensors, or is damaged")
    torch.save(whole, checkpoint)
    with pytest.raises(ConfigurationError, match=r"--output .* cannot be written"):
        import_reference(checkpoint, "teacher", checkpoint / "encoder")
    output.mkdir()
    (output / "mine.txt").write_text("")
    with pytest.raises(ConfigurationError, match=r"--output .* exists and is not empty"):
        import_reference(checkpoint, "teacher", output)


def test_a_full_disk_is_one_line_and_leaves_no_half_folder(tmp_path, small_disk):
    disk = small_disk(200)
    torch.save(published(), tmp_path / "checkpoint.pth.tar")
    with pytest.raises(ConfigurationError, match=r"--output \S+ cannot be written \(.*No space left"):
        import_reference(tmp_path / "checkpoint.pth.tar", "teacher", disk / "encoder")
    assert list(disk.iterdir()) == []
