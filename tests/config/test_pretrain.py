import re
from pathlib import Path

import pytest

from m2t_accel.config.fields import ConfigurationError
from m2t_accel.config.pretrain import PretrainConfig, check_inputs
from m2t_accel.config.recipes import build_config


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dataset": "/no/such/folder"}, "--dataset /no/such/folder: no such file"),
        ({"dataset": "imagenet"}, "--dataset imagenet: no such file"),
        ({"dataset": "x" * 300}, "--dataset x.*: no such file"),
        ({"dataset": ".", "output_dir": "../" + Path.cwd().name}, "--output_dir .* is the folder of --dataset"),
        ({"encoder": "resnet51"}, "--encoder resnet51: unknown, did you mean resnet50"),
        ({"encoder": "x" * 300}, "--encoder x.*: unknown"),
        ({"push_to_hub": "digits"}, "--push_to_hub digits: .*USER/NAME"),
    ],
)
def test_missing_inputs_are_refused(settings, message):
    with pytest.raises(ConfigurationError, match=f"^{message}"):
        check_inputs(build_config(settings))


def test_a_missing_tracker_is_refused(monkeypatch):
    config = build_config({"report_to": ("tensorboard", "wandb")})
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name == "tensorboard" or None)
    with pytest.raises(ConfigurationError, match=r"^--report_to wandb: not installed; type `pip install wandb`"):
        check_inputs(config)


@pytest.mark.parametrize(
    ("settings", "trackers"),
    [
        ({}, ()),
        ({"report_to": "none"}, ()),
        ({"report_to": ["wandb", "mlflow", "wandb"]}, ("wandb", "mlflow")),
        ({"report_to": "all"}, ("mlflow", "aim")),
        ({"tracker": "tensorboard"}, ("tensorboard",)),  # the name in older files
        ({"tracker": "none"}, ()),
    ],
)
def test_trackers_that_are_meant(monkeypatch, settings, trackers):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name in ("aim", "mlflow") or None)
    assert build_config(settings).trackers == trackers


def test_publishing_needs_a_login(monkeypatch):
    config = build_config({"push_to_hub": "me/digits"})
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_x")
    check_inputs(config)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(ConfigurationError, match="--push_to_hub me/digits needs a login: type `hf auth login`"):
        check_inputs(config)


@pytest.mark.parametrize(
    ("words", "intervals"),
    [
        (("500steps",), {"step": 500}),
        (("1step",), {"step": 1}),
        (("0.5epoch", "15min"), {"epoch": 0.5, "minute": 15}),
        (("90minutes",), {"minute": 90}),
        (("never",), {}),
    ],
)
def test_intervals_between_checkpoints(words, intervals):
    assert build_config({"checkpoint_every": words}).checkpoint_intervals == intervals


@pytest.mark.parametrize(
    "words", [("5",), ("0steps",), ("1.5steps",), ("-3steps",), ("1h",), ("3steps", "4steps"), ("never", "1min")]
)
def test_wrong_intervals_are_refused(words):
    with pytest.raises(ConfigurationError, match=f"^--checkpoint_every {re.escape(' '.join(words))}: .*500steps"):
        build_config({"checkpoint_every": words})


def test_text_and_lists_stand_for_tuples_from_python():
    config = PretrainConfig(
        dataset="digits", checkpoint_every="500steps 1epoch", report_to="none", crop_scale=[0.2, 1], keep="1 0"
    )
    assert (config.checkpoint_every, config.report_to) == (("500steps", "1epoch"), ("none",))
    assert (config.crop_scale, config.keep) == ((0.2, 1.0), (1, 0))
    with pytest.raises(ConfigurationError, match="--keep 1: 2 numbers are needed"):
        PretrainConfig(dataset="digits", keep="1")


def test_checkpoints_and_limits_have_the_documented_defaults():
    config = build_config({})
    assert (config.checkpoint_every, config.keep) == (("15min",), (3, 0))
    assert (config.max_bad_fraction, config.collective_timeout) == (0.001, 10)


def test_at_least_one_checkpoint_is_kept():
    with pytest.raises(ConfigurationError, match=r"^--keep 0 5: at least"):
        build_config({"keep": (0, 5)})


def test_the_warmup_is_counted_in_epochs():
    config = build_config({"epochs": 80, "warmup_epochs": 8})
    rates = [config.schedule(step, steps_per_epoch=22).learning_rate for step in range(80 * 22)]
    assert rates.index(max(rates)) == 8 * 22


def test_max_steps_replaces_the_epochs_and_keeps_the_share_of_the_warmup():
    config = build_config({"epochs": 80, "warmup_epochs": 8, "max_steps": 50})
    assert config.total_steps(steps_per_epoch=22) == 50
    rates = [config.schedule(step, 22).learning_rate for step in range(50)]
    assert rates.index(max(rates)) == 5  # a tenth of the steps
    assert config.schedule(49, 22).weight_momentum == 1
    assert build_config({"epochs": 80}).total_steps(22) == 1760
