import contextlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import write_image
from PIL import Image
from safetensors.torch import load_file
from transformers import pipeline

from m2t_accel.config.evaluation import build_knn, build_linear_probe
from m2t_accel.config.fields import ConfigurationError
from m2t_accel.data.photometry import evaluation_view
from m2t_accel.data.requests import DeviceBatches
from m2t_accel.data.views import FlippedCrops
from m2t_accel.evaluation import knn
from m2t_accel.evaluation import linear as linear_module
from m2t_accel.evaluation.features import labels_of
from m2t_accel.evaluation.heads import Heads
from m2t_accel.evaluation.setup import start_evaluation
from m2t_accel.model import embed


@pytest.fixture
def given(small_run, small_images):
    return {"encoder": str(small_run), "dataset": str(small_images), "num_workers": 0}


def linear(given, **others):
    return build_linear_probe({**given, "epochs": 3, "batch_size": 16, "device_batch_size": 4, **others})


def test_knn(given, capsys):
    result = knn.evaluate_knn(build_knn({**given, "k": [1, 5]}))
    assert set(result["figures"]) == {"top1_k1", "top1_k5"}
    assert result["figures"]["top1_k1"] > 0.8, "three colours"
    assert (result["data"]["bank"]["images"], result["data"]["test"]["images"]) == (42, 21)
    assert "knn on" in capsys.readouterr().out
    again = knn.evaluate_knn(build_knn({**given, "k": [1, 5]}))
    assert again == result, "read, not measured again"


def test_a_linear_probe_equals_a_second_implementation(given):
    """Crops by hand from the same random numbers, one forward each, the heads' own loop: the same test figure."""
    config = linear(given, learning_rates=[0.5])
    result = linear_module.evaluate_linear(config)
    evaluation = start_evaluation(config)
    train, test = evaluation.images.train, evaluation.images.validation
    torch.manual_seed(config.seed)
    heads = Heads(evaluation.num_features, 3, (0.5,))
    heads.load_state_dict(evaluation_start(evaluation, config))
    views, labels = FlippedCrops(train, evaluation.config), torch.from_numpy(labels_of(train))
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
    samples, classes, _ = linear_module.ranked(evaluation, test, list(heads.eval().heads))
    assert samples.tolist() == list(range(21))
    hits = classes[:, 0, 0] == torch.from_numpy(labels_of(test))
    assert result["figures"]["top1"] == hits.double().mean().item()
    written = load_file(f"{config.output_dir}/classifier/model.safetensors")["classifier.1.weight"]
    linear_layer, norm = heads.heads[0]
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    torch.testing.assert_close(written, (linear_layer.weight * scale[:, None]).detach(), rtol=1e-4, atol=1e-6)


def evaluation_start(evaluation, config):
    """The heads as the probe starts them: the seed's, after the encoder's features were counted."""
    from accelerate.utils import set_seed

    set_seed(config.seed)
    return Heads(evaluation.num_features, 3, config.learning_rates).state_dict()


def test_the_classifier_runs_in_a_pipeline_with_label_names(given, small_images):
    config = linear(given, learning_rates=[0.5, 5.0])
    result = linear_module.evaluate_linear(config)
    assert result["protocol"]["chosen_learning_rate"] in (0.5, 5.0)
    assert set(result["protocol"]["held_out_top1"]) == {"0.5", "5.0"}
    assert result["data"]["train"]["images"] == 38, "a tenth is held out to choose"
    classify = pipeline("image-classification", model=f"{config.output_dir}/classifier")
    files = sorted((small_images / "val").rglob("*.png"))
    hits = [classify(Image.open(file))[0]["label"] == file.parent.name for file in files]
    assert np.mean(hits) == pytest.approx(result["figures"]["top1"], abs=1e-9)


@pytest.mark.parametrize("features", ["augmented", "cached"])
def test_a_probe_that_was_stopped_goes_on_as_if_it_had_not_been(given, tmp_path, monkeypatch, capsys, features):
    whole = linear(given, output_dir=str(tmp_path / "whole"), learning_rates=[0.1, 1.0], features=features)
    stopped = linear(given, output_dir=str(tmp_path / "stopped"), learning_rates=[0.1, 1.0], features=features)
    wanted = linear_module.evaluate_linear(whole)
    train_step, steps = Heads.train_step, []

    def stopping(self, *arguments):
        steps.append(1)
        if len(steps) == 6:
            raise KeyboardInterrupt
        return train_step(self, *arguments)

    monkeypatch.setattr(Heads, "train_step", stopping)
    with pytest.raises(KeyboardInterrupt):
        linear_module.evaluate_linear(stopped)
    monkeypatch.setattr(Heads, "train_step", train_step)
    assert not (tmp_path / "stopped" / "result.json").exists()
    with pytest.raises(ConfigurationError, match=r"another evaluation \(another epochs\)"):
        linear_module.evaluate_linear(
            linear(given, output_dir=str(tmp_path / "stopped"), epochs=4, features=features, learning_rates=[0.1, 1.0])
        )
    capsys.readouterr()
    found = linear_module.evaluate_linear(stopped)
    assert "goes on after 4 steps" in capsys.readouterr().out
    assert found["figures"] == wanted["figures"]
    assert found["protocol"]["held_out_top1"] == wanted["protocol"]["held_out_top1"]
    a, b = (load_file(tmp_path / name / "classifier" / "model.safetensors") for name in ("whole", "stopped"))
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert sorted(path.name for path in (tmp_path / "stopped").iterdir()) == [
        "classifier",
        "config.yaml",
        "result.json",
    ]


def test_an_encoder_that_transformers_has_no_classifier_of(given, monkeypatch, capsys):
    def none(*_):
        raise ConfigurationError("transformers has none")

    monkeypatch.setattr(linear_module, "classifier", none)
    config = linear(given)
    result = linear_module.evaluate_linear(config)
    said = capsys.readouterr().out
    assert "no classifier/ will be written: transformers has none" in said
    assert "pipeline" not in said
    assert result["figures"]["top1"] >= 0
    assert sorted(path.name for path in Path(config.output_dir).iterdir()) == ["config.yaml", "result.json"]


def test_a_broken_checkpoint_and_one_of_another_encoder(given, tmp_path):
    config = linear(given, output_dir=str(tmp_path / "probe"))
    evaluation = start_evaluation(config)
    path = tmp_path / "checkpoint.pt"
    heads = Heads(evaluation.num_features, 3, (0.2,))
    linear_module.save_checkpoint(path, heads, 4, {7}, 1.5, evaluation)
    broken = set()
    assert linear_module.load_checkpoint(path, heads, broken, evaluation) == (4, 1.5)
    assert broken == {7}
    with pytest.raises(ConfigurationError, match="of an encoder with other weights: remove it to begin anew"):
        linear_module.load_checkpoint(path, heads, broken, evaluation._replace(weights="other"))
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ConfigurationError, match="cannot be read"):
        linear_module.load_checkpoint(path, heads, broken, evaluation)


def test_images_that_cannot_be_decoded_are_counted(given, small_images, capsys):
    (small_images / "val" / "red" / "3.png").write_bytes(b"broken")
    (small_images / "train" / "blue" / "5.png").write_bytes(b"broken")
    result = linear_module.evaluate_linear(linear(given))
    assert result["data"]["undecodable"] == 2
    assert result["data"]["test"]["images"] == 20
    assert "2 images cannot be decoded" in capsys.readouterr().out


@pytest.mark.slow
def test_figures_do_not_depend_on_the_number_of_processes(given, tmp_path, run_script):
    """kNN and a probe of two heads, here and on two processes: the figures to the last digit, the classifier's bits."""
    probe_flags = {"epochs": 2, "batch_size": 16, "device_batch_size": 4, "learning_rates": [0.1, 1]}
    for script, flags, build, evaluate in (
        ("knn", {}, build_knn, knn.evaluate_knn),
        ("linear_probe", probe_flags, build_linear_probe, linear_module.evaluate_linear),
    ):
        with one_thread():
            here = evaluate(build({**given, **flags, "output_dir": str(tmp_path / f"{script}-1")}))
        words = [word for name, value in {**given, **flags}.items() for word in (f"--{name}", value)]
        words = [",".join(map(str, word)) if isinstance(word, list) else word for word in words]
        launch = ["-m", "accelerate.commands.launch", "--config_file", "accelerate_configs/cpu2.yaml"]
        folder = tmp_path / f"{script}-2"
        done = run_script(
            *launch,
            f"scripts/{script}.py",
            *words,
            "--output_dir",
            folder,
            environment={"OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, done.stderr
        there = json.loads((folder / "result.json").read_text())
        for key in ("figures", "data", "protocol", "weights"):
            assert json.loads(json.dumps(here[key])) == there[key]
    a, b = (load_file(tmp_path / f"linear_probe-{n}" / "classifier" / "model.safetensors") for n in (1, 2))
    assert all(torch.equal(a[key], b[key]) for key in a)


@contextlib.contextmanager
def one_thread():
    number = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(number)


def test_whole_batches_are_in_the_order_of_the_virtual_devices():
    class TwoProcesses:
        num_processes = 2

        def gather(self, rows):  # the other process has the devices 1 and 3
            return torch.cat([rows, rows + 10])

    rows = torch.tensor([[0, 1], [20, 21]])  # this one has 0 and 2, of two images each
    assert linear_module.whole_batch(rows, TwoProcesses()).tolist() == [0, 1, 10, 11, 20, 21, 30, 31]


def test_too_few_images(given, tmp_path):
    write_image(tmp_path / "few" / "a" / "1.png")
    write_image(tmp_path / "few" / "b" / "1.png")
    with pytest.raises(ConfigurationError, match="has one image to train on: two are the least"):
        linear_module.evaluate_linear(linear({**given, "dataset": str(tmp_path / "few"), "validation_fraction": 0.5}))
