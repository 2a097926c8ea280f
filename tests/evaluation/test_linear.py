import contextlib
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
from m2t_accel.evaluation import linear, supervised
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
    files = [*(Path(config.output_dir) / "classifier").iterdir(), Path(config.output_dir) / "result.json"]
    assert len({file.stat().st_mode for file in files}) == 1, "others may read all files"


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
    assert f"2 images cannot be decoded, and left out, the first is {images}/train/blue/5.png (no known im" in printed
    assert "no classifier/ will be written: transformers has none" in printed
    assert "pipeline" not in printed
    assert sorted(path.name for path in Path(config.output_dir).iterdir()) == ["config.yaml", "result.json"]


def test_a_classifier_with_other_logits_is_refused(given, monkeypatch):
    evaluation = start_evaluation(probe(given))
    head = Heads(evaluation.num_features, 3, (0.5,)).eval().heads[0]
    model = build_classifier(evaluation.encoder, head[0], ["a", "b", "c"])
    linear.insert_head(model, head, evaluation)
    monkeypatch.setattr(linear, "fold_batch_norm", lambda head: torch.nn.Linear(evaluation.num_features, 3))
    with pytest.raises(ConfigurationError, match=r"logits that differ"):
        linear.insert_head(model, head, evaluation)


def test_a_probe_whose_classifier_is_refused_or_not_written_only_measures_again(given, monkeypatch):
    """A classifier with other logits, then a full disk; every process must hear of both."""
    config, steps, shared = probe(given), [], []
    with monkeypatch.context() as patch:
        patch.setattr(linear, "fold_batch_norm", lambda head: torch.nn.Linear(head[0].in_features, 3))
        patch.setattr(linear, "on_all_processes", lambda accelerator, action: (shared.append(1), action()))
        with pytest.raises(ConfigurationError, match=r"logits that differ by .*cpu\.yaml` only measure again$"):
            linear.evaluate_linear(config)
    assert shared == [1]

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Heads, "train_step", lambda *_: steps.append(1))
    with monkeypatch.context() as patch:
        patch.setattr(supervised, "save_classifier", full_disk)
        with pytest.raises(
            ConfigurationError, match=r"\(No space left on device\); it has the saved training: .*same command"
        ):
            linear.evaluate_linear(config)
    assert not (Path(config.output_dir) / "result.json").exists()
    linear.evaluate_linear(config)
    assert steps == [], "the training was saved before the check"
    assert not (Path(config.output_dir) / "checkpoint.pt").exists()


def test_a_training_that_could_not_be_saved_is_not_called_saved(given, monkeypatch):
    def full_disk(*_):
        raise OSError(28, "No space left on device")

    for name in ("atomic_write", "save_classifier"):
        monkeypatch.setattr(supervised, name, full_disk)
    with pytest.raises(ConfigurationError, match=r"\(No space left on device\); the training is not saved: make room"):
        linear.evaluate_linear(probe(given))


def test_features_that_are_not_finite_stop_the_probe(given, monkeypatch):
    """In the training and in the measurement, as if some images overflowed that are not blank."""
    evaluation = start_evaluation(config := probe(given))
    for module in ("linear", "features"):
        monkeypatch.setattr(f"m2t_accel.evaluation.{module}.embed", lambda *inputs: embed(*inputs) * torch.nan)
    with pytest.raises(ConfigurationError, match="loss is nan in epoch 1: the encoder overflows in float32, or"):
        linear.evaluate_linear(config)
    head = torch.nn.Linear(evaluation.num_features, 3)
    with pytest.raises(ConfigurationError, match="features are not finite"):
        rank_classes(evaluation.encoder, [head], evaluation.images.validation, evaluation)


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


# An error of the last check on process 1 alone.
PLANTED = """
import os, runpy, sys
from m2t_accel.config.fields import ConfigurationError
from m2t_accel.evaluation import linear

def fail(*_):
    raise ConfigurationError("logits that differ")

if os.environ["RANK"] == "1":
    linear.insert_head = fail
sys.path.insert(0, "scripts")
runpy.run_path("scripts/linear_probe.py", run_name="__main__")
"""


@pytest.mark.slow
def test_an_error_of_the_last_check_on_one_process_ends_both_at_once(given, tmp_path, run_script):
    (tmp_path / "linear_probe.py").write_text(PLANTED)
    words = [word for item in {**given, "epochs": 1, "batch_size": 16, "device_batch_size": 4}.items() for word in item]
    words[::2] = [f"--{name}" for name in words[::2]]
    done = run_script(
        *("-m", "accelerate.commands.launch", "--config_file", "accelerate_configs/cpu2.yaml"),
        *(tmp_path / "linear_probe.py", *words),
        timeout=120,
    )
    assert done.returncode != 0
    assert "linear_probe.py: error: logits that differ" in done.stderr
    assert not (Path(given["output_dir"]) / "result.json").exists()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_steps_of_a_probe_do_not_wait_for_the_gpu(given):
    evaluation, device = start_evaluation(probe(given)), torch.device("cuda", 0)
    stand_in = SimpleNamespace(
        process_index=0, num_processes=1, device=device, autocast=contextlib.nullcontext, gather=lambda rows: rows
    )
    evaluation.encoder.to(device, memory_format=torch.channels_last)
    heads = Heads(evaluation.num_features, 3, (0.5, 5.0)).to(device)
    source = linear.AugmentedFeatures(evaluation._replace(accelerator=stand_in), evaluation.images.train)
    for step, (features, labels) in enumerate(source.batches(0)):
        heads.train_step(features, labels, 0.1)
        torch.cuda.set_sync_debug_mode("error" if step < 4 else "default")  # the first step starts cuDNN and cuBLAS


@pytest.mark.slow
def test_two_processes_train_the_same_heads(given, tmp_path, two_processes):
    settings, folder = two_processes("linear_probe")
    alone = linear.evaluate_linear(build_linear_probe({**given, **settings}))
    two = json.loads((folder / "result.json").read_text())
    for key in ("figures", "data", "protocol", "weights"):
        assert json.loads(json.dumps(alone[key])) == two[key]
    a, b = weights_of(tmp_path / "result"), weights_of(folder)
    assert all(torch.equal(a[key], b[key]) for key in a)
