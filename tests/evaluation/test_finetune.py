import copy
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.utils import set_seed
from safetensors.torch import load_file
from torch import nn
from transformers import pipeline

from m2t_accel.config.evaluation import FINETUNE_PROTOCOLS, build_finetune
from m2t_accel.config.fields import ConfigurationError
from m2t_accel.data.photometry import evaluation_view
from m2t_accel.data.requests import DeviceBatches
from m2t_accel.data.views import FlippedCrops
from m2t_accel.evaluation import finetune
from m2t_accel.evaluation.features import labels_of
from m2t_accel.evaluation.setup import start_evaluation
from m2t_accel.model import embed


@pytest.fixture
def given(small_run, small_images):
    return {"encoder": str(small_run), "dataset": str(small_images), "num_workers": 0, "batch_size": 16, "epochs": 2}


def test_the_presets_are_byols():
    """Source: BYOL (arXiv 2006.07733), semi-supervised: SGD with Nesterov momentum, 1024 images, no weight decay."""
    for name, labels, epochs in (("1percent", 0.01, 50), ("10percent", 0.1, 50), ("all", 1.0, 30)):
        config = build_finetune({"encoder": "a/b", "dataset": "c/d", "protocol": name})
        assert (config.labels, config.epochs, config.batch_size, config.weight_decay) == (labels, epochs, 1024, 0)
        assert config.learning_rate_per_256 * 4 in (0.005, 0.01, 0.02, 0.05, 0.1)
    assert set(FINETUNE_PROTOCOLS) == {"1percent", "10percent", "all", "digits"}


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


def test_training_equals_a_plain_loop(given):
    """One virtual device: torch's own BatchNorm, one batch after the other."""
    config = build_finetune({**given, "labels": 1.0, "device_batch_size": 16, "learning_rate_per_256": 0.8})
    result = finetune.evaluate_finetuned(config)
    evaluation = start_evaluation(config)
    train = evaluation.images.train
    set_seed(config.seed)
    linear = nn.Linear(evaluation.num_features, 3)
    nn.init.zeros_(linear.bias)
    encoder = copy.deepcopy(evaluation.encoder).requires_grad_(True).train()
    optimizer = torch.optim.SGD([*encoder.parameters(), *linear.parameters()], lr=1, momentum=0.9, nesterov=True)
    views, labels = FlippedCrops(train, evaluation.config), torch.from_numpy(labels_of(train))
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
    moved = "resnet.embedder.embedder.normalization.running_mean"
    assert written[moved].abs().max() > 0.01
    assert result["data"]["train"]["images"] == 42


def test_a_few_labels(given, small_images):
    config = build_finetune({**given, "labels": 0.4, "batch_size": 6, "device_batch_size": 6})
    result = finetune.evaluate_finetuned(config)
    subset = json.loads((Path(config.output_dir) / "subset.json").read_text())
    assert len(subset["samples"]) == result["data"]["train"]["images"] == 18
    assert result["protocol"]["labels"] == 0.4
    classify = pipeline("image-classification", model=f"{config.output_dir}/classifier")
    assert set(classify.model.config.id2label.values()) == {"blue", "green", "red"}
    assert finetune.evaluate_finetuned(config) == result, "read, not trained again"


def test_statistics_do_not_depend_on_how_sub_batches_are_shared():
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(3)
    batches = torch.randn(4, 8, 3) * torch.arange(1, 5).view(4, 1, 1)

    class Processes:
        """Two that have two sub-batches each, as one reduces with the other."""

        def __init__(self, other):
            self.other = other

        def reduce(self, tensor, reduction):
            return (tensor + self.other) / 2

    statistics = finetune.RunningStatistics(norm)
    seen = torch.cat([batches.mean(1), batches.var(1)], dim=1)
    for batch in batches[:2]:
        norm(batch)
        statistics.add()
    statistics.commit(Processes(seen[2:].mean(0)))
    torch.testing.assert_close(norm.running_mean, 0.1 * seen[:, :3].mean(0))
    torch.testing.assert_close(norm.running_var, 0.9 + 0.1 * seen[:, 3:].mean(0))


@pytest.mark.slow
def test_two_processes_compute_the_same_to_rounding(given, tmp_path, run_script):
    for file in ("cpu", "cpu2"):
        done = run_script(
            *("-m", "accelerate.commands.launch", "--config_file", f"accelerate_configs/{file}.yaml"),
            *("scripts/finetune.py", "--encoder", given["encoder"], "--dataset", given["dataset"], "--num_workers", 0),
            *("--labels", 1.0, "--epochs", 2, "--batch_size", 16, "--device_batch_size", 8),
            *("--output_dir", tmp_path / file),
            environment={"OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, done.stderr
    a, b = (load_file(tmp_path / file / "classifier" / "model.safetensors") for file in ("cpu", "cpu2"))
    for name, tensor in a.items():
        if not name.endswith("num_batches_tracked"):  # of the first process
            torch.testing.assert_close(b[name], tensor, rtol=1e-3, atol=1e-5, msg=name)


def test_a_loss_that_is_not_finite_ends_it(given):
    config = build_finetune(
        {**given, "labels": 1.0, "device_batch_size": 16, "learning_rate_per_256": 1e30, "epochs": 4}
    )
    with pytest.raises(ConfigurationError, match=r"the loss is nan .*: try a --learning_rate_per_256 below 1e\+30"):
        finetune.evaluate_finetuned(config)
