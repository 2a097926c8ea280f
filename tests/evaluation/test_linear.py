import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.utils import set_seed
from helpers import write_image
from PIL import Image
from safetensors.torch import load_file
from transformers import pipeline

from m2t_accel.config.evaluation import build_linear_probe
from m2t_accel.config.fields import ConfigurationError
from m2t_accel.data.photometry import evaluation_view
from m2t_accel.data.requests import DeviceBatches
from m2t_accel.data.views import FlippedCrops
from m2t_accel.evaluation import linear
from m2t_accel.evaluation.features import read_labels
from m2t_accel.evaluation.heads import Heads, build_classifier
from m2t_accel.evaluation.setup import start_evaluation
from m2t_accel.evaluation.supervised import rank_classes
from m2t_accel.model import embed


def probe(given, **others):
    return build_linear_probe({**given, "epochs": 3, "batch_size": 16, "device_batch_size": 4, **others})


def weights_of(folder):
    return load_file(Path(folder) / "classifier" / "model.safetensors")


def test_a_linear_probe_equals_a_second_implementation(given):
    """The second implementation crops by the same random numbers, embeds whole batches and has a loop of its own."""
    config = probe(given, learning_rates=[0.5])
    result = linear.evaluate_linear(config)
    evaluation = start_evaluation(config)
    train, test = evaluation.images.train, evaluation.images.validation
    set_seed(config.seed)
    heads = Heads(evaluation.num_features, 3, (0.5,))
    views, labels = FlippedCrops(train, evaluation.config), torch.from_numpy(read_labels(train))
    requests = list(DeviceBatches(train, evaluation.config, 1, 0))
    total = 3 * (42 // 16)
    for step in range(total):
        parts = [views.__getitems__(request) for request in requests[4 * step : 4 * step + 4]]
        crops = torch.cat([part.crops for part in parts])
        flip = torch.cat([part.photometry for part in parts])
        images = torch.stack([c.flip(1) if f else c for c, f in zip(crops, flip, strict=True)])
        with torch.no_grad():
            features = embed(evaluation.encoder, evaluation_view(images, evaluation.config))
        factor = (1 + np.cos(np.pi * step / total)) / 2 * 16 / 256
        heads.train_step(features, labels[torch.cat([part.samples for part in parts])], factor)
    found = rank_classes(evaluation.encoder, heads.eval().heads, test, evaluation)
    assert found.labels.tolist() == read_labels(test).tolist()
    assert result["figures"] == {"top1": (found.classes[:, 0, 0] == found.labels).double().mean().item()}
    linear_layer, norm = heads.heads[0]
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    written = weights_of(config.output_dir)["classifier.1.weight"]
    torch.testing.assert_close(written, (linear_layer.weight * scale[:, None]).detach(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("features", ["augmented", "cached"])
def test_an_interrupted_probe_resumes_to_the_same_bits(given, small_images, tmp_path, monkeypatch, capsys, features):
    """The whole probe also shows that a rate is chosen, and that its classifier runs in a pipeline."""
    given = {**given, "learning_rates": [0.5, 5.0], "features": features}
    whole, stopped = (probe({**given, "output_dir": str(tmp_path / name)}) for name in ("whole", "stopped"))
    expected = linear.evaluate_linear(whole)
    assert expected["protocol"]["chosen_learning_rate"] in (0.5, 5.0)
    assert expected["data"]["train"]["images"] == 38, "a tenth is held out to choose"
    classify = pipeline("image-classification", model=str(tmp_path / "whole" / "classifier"))
    files = sorted((small_images / "val").rglob("*.png"))
    hits = [classify(Image.open(file))[0]["label"] == file.parent.name for file in files]
    assert np.mean(hits) == pytest.approx(expected["figures"]["top1"], abs=1e-9)

    train_step, steps = Heads.train_step, []

    def interrupt(self, *arguments):
        steps.append(1)
        if len(steps) == 6:
            raise KeyboardInterrupt
        return train_step(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Heads, "train_step", interrupt)
        with pytest.raises(KeyboardInterrupt):
            linear.evaluate_linear(stopped)
    assert not (tmp_path / "stopped" / "result.json").exists()
    with pytest.raises(ConfigurationError, match=r"--output_dir .*differs in epochs"):
        linear.evaluate_linear(probe({**given, "output_dir": stopped.output_dir}, epochs=4))
    capsys.readouterr()
    found = linear.evaluate_linear(stopped)
    assert "resumes after step 4" in capsys.readouterr().out
    assert found["figures"] == expected["figures"]
    assert found["protocol"] == expected["protocol"]
    a, b = weights_of(tmp_path / "whole"), weights_of(tmp_path / "stopped")
    assert all(torch.equal(a[key], b[key]) for key in a)
    names = sorted(path.name for path in (tmp_path / "stopped").iterdir())
    assert names == ["classifier", "config.yaml", "result.json"]


def test_broken_images_are_counted_and_a_missing_classifier_is_announced(
    given, small_images, tmp_path, monkeypatch, capsys
):
    def no_classifier(*_):
        raise ConfigurationError("transformers has none")

    monkeypatch.setattr(linear, "build_classifier", no_classifier)
    images = tmp_path / "images"
    shutil.copytree(small_images, images)
    for name in ("val/red/3.png", "train/blue/5.png"):
        (images / name).write_bytes(b"broken")
    config = probe({**given, "dataset": str(images)})
    result = linear.evaluate_linear(config)
    assert result["data"]["undecodable"] == 2
    assert result["data"]["test"]["images"] == 20
    printed = capsys.readouterr().out
    assert "2 images cannot be decoded" in printed
    assert "no classifier/ will be written: transformers has none" in printed
    assert "pipeline" not in printed
    assert sorted(path.name for path in Path(config.output_dir).iterdir()) == ["config.yaml", "result.json"]


def test_a_classifier_with_other_logits_is_refused(given, monkeypatch):
    evaluation = start_evaluation(probe(given))
    head = Heads(evaluation.num_features, 3, (0.5,)).eval().heads[0]
    model = build_classifier(evaluation.encoder, head[0], ["a", "b", "c"])
    linear.insert_head(model, head, evaluation)
    monkeypatch.setattr(linear, "fold_batch_norm", lambda head: torch.nn.Linear(evaluation.num_features, 3))
    with pytest.raises(ValueError, match=r"logits .* differ"):
        linear.insert_head(model, head, evaluation)


def test_gathered_batches_are_in_the_order_of_the_virtual_devices():
    # The other process has the devices 1 and 3; this one has 0 and 2, of two images each.
    two_processes = SimpleNamespace(num_processes=2, gather=lambda rows: torch.cat([rows, rows + 10]))
    rows = torch.tensor([[0, 1], [20, 21]])
    assert linear.gather_batch(rows, two_processes).tolist() == [0, 1, 10, 11, 20, 21, 30, 31]


def test_one_training_image_is_refused(given, tmp_path):
    for name in ("a", "b"):
        write_image(tmp_path / "few" / name / "1.png")
    with pytest.raises(ConfigurationError, match=r"--dataset .* one image to train on"):
        linear.evaluate_linear(probe({**given, "dataset": str(tmp_path / "few"), "validation_fraction": 0.5}))


@pytest.mark.slow
def test_two_processes_train_the_same_heads(given, tmp_path, two_processes):
    settings, folder = two_processes("linear_probe")
    alone = linear.evaluate_linear(build_linear_probe({**given, **settings}))
    two = json.loads((folder / "result.json").read_text())
    for key in ("figures", "data", "protocol", "weights"):
        assert json.loads(json.dumps(alone[key])) == two[key]
    a, b = weights_of(tmp_path / "result"), weights_of(folder)
    assert all(torch.equal(a[key], b[key]) for key in a)
