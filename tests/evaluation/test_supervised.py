from pathlib import Path

import pytest
import torch

from m2t_accel.config.evaluation import build_finetune, build_knn, build_linear_probe
from m2t_accel.config.fields import ConfigurationError
from m2t_accel.evaluation.finetune import evaluate_finetuned
from m2t_accel.evaluation.knn import evaluate_knn
from m2t_accel.evaluation.linear import evaluate_linear
from m2t_accel.evaluation.setup import start_evaluation
from m2t_accel.evaluation.supervised import Checkpoint


@pytest.fixture
def evaluation(given):
    Path(given["output_dir"]).mkdir()
    return start_evaluation(build_linear_probe({**given, "epochs": 1, "batch_size": 16, "device_batch_size": 4}))


def other_weights(evaluation, train):
    return evaluation._replace(weights="others"), train


def other_images(evaluation, train):
    return evaluation, train.select(range(20))


def other_settings(evaluation, train):
    config = build_linear_probe({**vars(evaluation.config), "seed": 4})
    return evaluation._replace(config=config), train


def other_place(evaluation, train):
    """Settings that change nothing."""
    config = build_linear_probe({**vars(evaluation.config), "num_workers": 3})
    return evaluation._replace(config=config), train


def test_a_checkpoint_returns_what_was_saved_if_nothing_else_has_changed(evaluation):
    train = evaluation.images.train
    Checkpoint(evaluation, train).save({"step": 4, "seconds": 1.5, "heads": {"w": torch.eye(3)}}, {7})
    broken = {2}
    state = Checkpoint(*other_place(evaluation, train)).load(broken, 5)
    assert (state["step"], state["seconds"], broken) == (4, 1.5, {2, 7})
    assert torch.equal(state["heads"]["w"], torch.eye(3))
    for change, words in (
        (other_weights, "an encoder with other weights"),
        (other_images, "other images"),
        (other_settings, "other settings"),
    ):
        with pytest.raises(ConfigurationError, match=rf"checkpoint.pt belongs to {words}: remove it"):
            Checkpoint(*change(evaluation, train)).load(set(), 5)


def test_a_checkpoint_in_another_precision_is_refused_unless_it_is_complete(evaluation):
    """The second half of a training in another precision would be of no protocol."""
    train = evaluation.images.train
    saved = Checkpoint(evaluation, train)
    saved.precision = "fp16"
    saved.save({"step": 4, "seconds": 1.5}, set())
    with pytest.raises(
        ConfigurationError, match="in fp16, not float32: type `accelerate launch --mixed_precision fp16"
    ):
        Checkpoint(evaluation, train).load(set(), 5)
    complete = Checkpoint(evaluation, train)
    assert complete.load(set(), 4)["step"] == 4
    assert complete.precision == "fp16"


def test_a_damaged_checkpoint_is_refused(evaluation):
    checkpoint = Checkpoint(evaluation, evaluation.images.train)
    checkpoint.save({"step": 4, "seconds": 1.5}, set())
    checkpoint.path.write_bytes(checkpoint.path.read_bytes()[:1000])
    with pytest.raises(ConfigurationError, match=r"checkpoint.pt cannot be read .* remove it"):
        checkpoint.load(set(), 5)


def test_a_checkpoint_that_cannot_be_written_is_a_warning_and_the_old_one_stays(evaluation, small_disk, capsys):
    checkpoint = Checkpoint(evaluation, evaluation.images.train)
    checkpoint.path = small_disk(64) / "checkpoint.pt"
    checkpoint.save({"step": 4, "seconds": 1.5}, set())
    checkpoint.save({"step": 5, "seconds": 1.5, "large": torch.zeros(100_000)}, set())
    assert "warning: " in (printed := capsys.readouterr().out)
    assert "checkpoint.pt cannot be written" in printed
    assert checkpoint.load(set(), 5)["step"] == 4
    assert [path.name for path in checkpoint.path.parent.iterdir()] == ["checkpoint.pt"]


def test_results_have_the_same_fingerprints_of_the_same_images(given, tmp_path):
    def result(name, build, evaluate, **settings):
        return evaluate(build({**given, "output_dir": str(tmp_path / name), **settings}))["data"]

    knn = result("knn", build_knn, evaluate_knn)
    small = {"epochs": 1, "batch_size": 16, "device_batch_size": 16}
    probe = result("probe", build_linear_probe, evaluate_linear, **small)
    tuned = result("tuned", build_finetune, evaluate_finetuned, **small, labels=1.0)
    assert knn["bank"]["fingerprint"] == probe["train"]["fingerprint"] == tuned["train"]["fingerprint"]
    assert knn["test"]["fingerprint"] == probe["test"]["fingerprint"] == tuned["test"]["fingerprint"]
    few = result("few", build_finetune, evaluate_finetuned, **small, labels=0.5)
    assert few["train"]["fingerprint"] != tuned["train"]["fingerprint"]
