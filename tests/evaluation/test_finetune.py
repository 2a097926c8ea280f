import copy
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.utils import set_seed
from safetensors.torch import load_file
from torch import nn
from transformers import pipeline

from m2t_accel.config.evaluation import build_finetune
from m2t_accel.config.fields import ConfigurationError
from m2t_accel.data.photometry import evaluation_view
from m2t_accel.data.requests import DeviceBatches
from m2t_accel.data.views import FlippedCrops
from m2t_accel.evaluation import finetune
from m2t_accel.evaluation.features import read_labels
from m2t_accel.evaluation.setup import start_evaluation
from m2t_accel.model import embed


def settings(given, **others):
    return build_finetune({**given, "batch_size": 16, "epochs": 2, **others})


def test_a_subset_has_the_same_share_of_each_class():
    labels = np.repeat([0, 1, 2, 7], [1300, 732, 1, 50])
    chosen = finetune.balanced_subset(labels, 0.01, seed=0)
    assert np.bincount(labels[chosen]).tolist() == [13, 7, 1, 0, 0, 0, 0, 1], "at least one of each"
    assert np.array_equal(chosen, finetune.balanced_subset(labels, 0.01, seed=0))
    assert not np.array_equal(chosen, finetune.balanced_subset(labels, 0.01, seed=1))
    assert len(set(chosen.tolist())) == len(chosen)
    assert finetune.balanced_subset(labels, 1.0, seed=0).tolist() == list(range(len(labels)))
    ten = finetune.balanced_subset(labels, 0.1, seed=0)
    assert set(chosen.tolist()) <= set(ten.tolist()), "more labels are the same ones and others"


@pytest.mark.parametrize(
    ("share", "advice"),
    [
        ({"labels": 0.1}, "use a larger share of --labels (1: all)"),
        ({"labels": 0.8}, "use --batch_size 32 --device_batch_size 32, or a larger share of --labels (1: all)"),
    ],
)
def test_a_share_smaller_than_a_batch_is_named_as_a_share(given, share, advice):
    with pytest.raises(
        ConfigurationError, match=r"--protocol 1percent\) trains on (3|33) of the 42 .* 1024: "
    ) as caught:
        finetune.evaluate_finetuned(build_finetune({**given, **share}))
    assert str(caught.value).endswith(f": {advice}")


def test_training_equals_a_plain_loop(given):
    """One virtual device: the loop trains with torch's own BatchNorm, one batch after the other."""
    config = settings(given, labels=1.0, device_batch_size=16, learning_rate_per_256=0.8)
    result = finetune.evaluate_finetuned(config)
    evaluation = start_evaluation(config)
    train = evaluation.images.train
    set_seed(config.seed)
    linear = nn.Linear(evaluation.num_features, 3)
    nn.init.zeros_(linear.bias)
    encoder = copy.deepcopy(evaluation.encoder).requires_grad_(True).train()
    optimizer = torch.optim.SGD([*encoder.parameters(), *linear.parameters()], lr=1, momentum=0.9, nesterov=True)
    views, labels = FlippedCrops(train, evaluation.config), torch.from_numpy(read_labels(train))
    requests = list(DeviceBatches(train, evaluation.config, 1, 0))
    assert len(requests) == 2 * (42 // 16)
    for step, request in enumerate(requests):
        batch = views.__getitems__(request)
        images = torch.stack([c.flip(1) if f else c for c, f in zip(batch.crops, batch.photometry, strict=True)])
        optimizer.param_groups[0]["lr"] = 0.8 * 16 / 256 * (1 + math.cos(math.pi * step / len(requests))) / 2
        logits = linear(embed(encoder, evaluation_view(images, evaluation.config)))
        optimizer.zero_grad()
        nn.functional.cross_entropy(logits, labels[batch.samples]).backward()
        optimizer.step()
    written = load_file(f"{config.output_dir}/classifier/model.safetensors")
    for name, tensor in encoder.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            torch.testing.assert_close(written[f"resnet.{name}"], tensor, rtol=1e-4, atol=1e-6, msg=name)
    torch.testing.assert_close(written["classifier.1.weight"], linear.weight.detach(), rtol=1e-4, atol=1e-6)
    name = "resnet.embedder.embedder.normalization.running_mean"
    assert written[name].abs().max() > 0.01
    assert result["data"]["train"]["images"] == 42


def test_a_share_of_the_labels_is_listed_and_trained_on_once(given, capsys):
    config = settings(given, labels=0.4, batch_size=6, device_batch_size=6)
    result = finetune.evaluate_finetuned(config)
    assert "18 images, 40 % of each class" in capsys.readouterr().out
    subset = json.loads((Path(config.output_dir) / "subset.json").read_text())
    assert len(subset["samples"]) == result["data"]["train"]["images"] == 18
    assert result["protocol"]["labels"] == 0.4
    classify = pipeline("image-classification", model=f"{config.output_dir}/classifier")
    assert set(classify.model.config.id2label.values()) == {"blue", "green", "red"}
    assert finetune.evaluate_finetuned(config) == result, "it is read, not trained again"


def test_statistics_do_not_depend_on_how_sub_batches_are_shared():
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(3)
    batches = torch.randn(4, 8, 3) * torch.arange(1, 5).view(4, 1, 1)

    statistics = finetune.RunningStatistics(norm)
    norm.double().float()  # other tensors, as Accelerate gives them on two CPU processes
    seen = torch.cat([batches.mean(1), batches.var(1)], dim=1)
    for batch in batches[:2]:
        norm(batch)
        statistics.add()
    # The other process has the other two sub-batches.
    statistics.commit(SimpleNamespace(reduce=lambda tensor, reduction: (tensor + seen[2:].mean(0)) / 2))
    torch.testing.assert_close(norm.running_mean, 0.1 * seen[:, :3].mean(0))
    torch.testing.assert_close(norm.running_var, 0.9 + 0.1 * seen[:, 3:].mean(0))


def test_a_loss_that_is_not_finite_stops_the_training(given):
    config = settings(given, labels=1.0, device_batch_size=16, learning_rate_per_256=1e30, epochs=4)
    with pytest.raises(ConfigurationError, match=r"loss is nan .* --learning_rate_per_256 below 1e\+30"):
        finetune.evaluate_finetuned(config)


def test_an_interrupted_training_resumes_to_the_same_bits(given, small_images, tmp_path, monkeypatch, capsys):
    """One broken image is replaced before and after the interruption, and counted once."""
    images = tmp_path / "images"
    shutil.copytree(small_images, images)
    (images / "train/blue/5.png").write_bytes(b"broken")
    given = {**given, "dataset": str(images), "labels": 1.0, "device_batch_size": 8, "epochs": 3}
    whole, stopped = (settings({**given, "output_dir": str(tmp_path / name)}) for name in ("whole", "stopped"))
    expected = finetune.evaluate_finetuned(whole)
    commit, steps = finetune.RunningStatistics.commit, []

    def interrupt(self, accelerator):
        steps.append(1)
        if len(steps) == 4:
            raise KeyboardInterrupt
        commit(self, accelerator)

    with monkeypatch.context() as patch:
        patch.setattr(finetune.RunningStatistics, "commit", interrupt)
        with pytest.raises(KeyboardInterrupt):
            finetune.evaluate_finetuned(stopped)
    names = sorted(path.name for path in (tmp_path / "stopped").iterdir())
    assert names == ["checkpoint.pt", "config.yaml", "subset.json"]
    (tmp_path / "stopped" / ".checkpoint.1.pt").write_text("left by a killed process")
    capsys.readouterr()
    found = finetune.evaluate_finetuned(stopped)
    assert "resumes after step 2, from" in capsys.readouterr().out
    for key in ("figures", "data", "protocol", "weights"):
        assert found[key] == expected[key]
    assert found["data"]["undecodable"] == 1
    a, b = (load_file(tmp_path / name / "classifier" / "model.safetensors") for name in ("whole", "stopped"))
    assert all(torch.equal(a[key], b[key]) for key in a)
    names = sorted(path.name for path in (tmp_path / "stopped").iterdir())
    assert names == ["classifier", "config.yaml", "result.json", "subset.json"]


def test_a_training_that_is_interrupted_after_its_last_step_only_measures(given, monkeypatch):
    config = settings(given, labels=1.0, device_batch_size=16)

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("m2t_accel.evaluation.supervised.rank_classes", interrupt)
        with pytest.raises(KeyboardInterrupt):
            finetune.evaluate_finetuned(config)
    monkeypatch.setattr(finetune.RunningStatistics, "commit", interrupt)
    state = torch.load(path := Path(config.output_dir) / "checkpoint.pt")
    torch.save({**state, "precision": "bf16"}, path)
    found = finetune.evaluate_finetuned(config)
    assert found["data"]["train"]["images"] == 42
    assert (found["protocol"]["training_precision"], found["protocol"]["precision"]) == ("bf16", "float32")


@pytest.mark.slow
def test_two_processes_train_the_same_network_up_to_rounding(given, tmp_path, two_processes):
    settings, folder = two_processes("finetune")
    alone = finetune.evaluate_finetuned(build_finetune({**given, **settings}))
    two = json.loads((folder / "result.json").read_text())
    assert json.loads(json.dumps(alone["data"])) == two["data"]
    a, b = (load_file(path / "classifier" / "model.safetensors") for path in (tmp_path / "result", folder))
    for name, tensor in a.items():
        if not name.endswith("num_batches_tracked"):  # counts the sub-batches of the main process
            torch.testing.assert_close(b[name], tensor, rtol=1e-3, atol=1e-5, msg=name)
