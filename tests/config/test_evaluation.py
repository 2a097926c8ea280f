from pathlib import Path

import pytest

from m2t_accel.config import evaluation
from m2t_accel.config.command_line import parse_settings
from m2t_accel.config.evaluation import (
    FINETUNE_PROTOCOLS,
    PROTOCOLS,
    FinetuneConfig,
    LinearProbeConfig,
    build_embed,
    build_finetune,
    build_knn,
    build_linear_probe,
)
from m2t_accel.config.fields import ConfigurationError

GIVEN = {"encoder": "someone/encoder", "dataset": "/data/imagenet"}


def parse(*arguments):
    return parse_settings(
        "test", "", LinearProbeConfig, build_linear_probe, "protocol", evaluation.probe_table, arguments=arguments
    )[0]


@pytest.mark.parametrize(
    ("name", "rate", "epochs", "schedule"), [("byol", 0.2, 80, "cosine"), ("moco", 30.0, 100, "steps")]
)
def test_the_linear_protocols_are_the_published_ones(name, rate, epochs, schedule):
    """Source: arXiv 2101.07525 and its published code."""
    config = build_linear_probe({**GIVEN, "protocol": name})
    assert (config.learning_rates, config.epochs, config.schedule) == ((rate,), epochs, schedule)
    assert (config.batch_size, config.crop_scale, config.flip_probability) == (256, (0.08, 1.0), 0.5)
    assert config.features == "augmented"


@pytest.mark.parametrize(
    ("name", "labels", "epochs"), [("1percent", 0.01, 50), ("10percent", 0.1, 50), ("all", 1.0, 30)]
)
def test_the_fine_tuning_protocols_are_those_of_byol(name, labels, epochs):
    """Source: BYOL (arXiv 2006.07733), semi-supervised: SGD with Nesterov momentum, 1024 images, no weight decay."""
    config = build_finetune({**GIVEN, "protocol": name})
    assert (config.labels, config.epochs, config.batch_size, config.weight_decay) == (labels, epochs, 1024, 0)
    assert config.learning_rate_per_256 * 4 in (0.005, 0.01, 0.02, 0.05, 0.1)


def test_the_defaults_of_knn_are_those_of_wu_et_al():
    config = build_knn(GIVEN)
    assert (config.k, config.temperature) == ((20, 200), 0.07)
    assert config.image_size is None, "it is read from the encoder"


def test_the_default_protocol_depends_on_the_dataset():
    assert build_linear_probe(GIVEN).protocol == "byol"
    assert build_finetune(GIVEN).protocol == "1percent"
    for build in (build_linear_probe, build_finetune):
        assert build({**GIVEN, "dataset": "digits"}).protocol == "digits"
    assert build_linear_probe({**GIVEN, "dataset": "digits", "protocol": "moco"}).learning_rates == (30.0,)


@pytest.mark.parametrize("words", [["0.1,1,10"], ["0.1", "1", "10"]])
def test_several_learning_rates_are_separated_by_commas_or_spaces(words):
    config = parse("--encoder", "a/b", "--dataset", "digits", "--learning_rates", *words)
    assert config.learning_rates == (0.1, 1.0, 10.0)


def test_a_configuration_file_gives_the_same_configuration(tmp_path):
    config = parse("--encoder", "a/b", "--dataset", "digits", "--learning_rates", "0.1,0.3", "--image_size", "64")
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    assert parse("--config", str(tmp_path / "config.yaml")) == config


@pytest.mark.parametrize(
    ("kind", "build", "table", "protocols"),
    [
        (LinearProbeConfig, build_linear_probe, evaluation.probe_table, PROTOCOLS),
        (FinetuneConfig, build_finetune, evaluation.finetune_table, FINETUNE_PROTOCOLS),
    ],
)
def test_the_table_lists_all_protocols(capsys, kind, build, table, protocols):
    with pytest.raises(SystemExit):
        parse_settings("test", "", kind, build, "protocol", table, arguments=("--protocol", "list"))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["protocol", *protocols]


@pytest.mark.parametrize(
    ("build", "given", "message"),
    [
        (build_knn, {"dataset": "digits"}, "--encoder is needed"),
        (build_knn, {"encoder": "a/b"}, "--dataset is needed"),
        (build_linear_probe, {**GIVEN, "protocol": "mocov3"}, r"--protocol mocov3.*mean moco\?.*byol, moco, digits"),
        (build_finetune, {**GIVEN, "protocol": "5percent"}, r"--protocol 5percent.*mean 1percent\?"),
        (build_linear_probe, {**GIVEN, "features": "cache"}, r"--features cache.*mean cached\?"),
        (build_linear_probe, {**GIVEN, "learning_rates": []}, "--learning_rates is empty"),
        (build_linear_probe, {**GIVEN, "learning_rates": ["0.1,", "1,10"]}, "--learning_rates : a number"),
        (build_linear_probe, {**GIVEN, "learning_rates": [0.1, 0]}, "--learning_rates 0 .*more than 0"),
        (build_linear_probe, {**GIVEN, "k": [20]}, "unknown setting k"),
        (build_embed, {**GIVEN, "format": "csv"}, "--format csv.*parquet, safetensors"),
    ],
)
def test_wrong_settings_are_refused(build, given, message):
    with pytest.raises(ConfigurationError, match=message):
        build(given)


def test_results_go_to_the_folder_of_the_run(tmp_path):
    (tmp_path / "run" / "encoder").mkdir(parents=True)
    for encoder in (tmp_path / "run", tmp_path / "run" / "encoder"):
        assert build_knn({**GIVEN, "encoder": str(encoder)}).output_dir == str(tmp_path / "run" / "knn")
    assert build_linear_probe(GIVEN).output_dir == "runs/encoder/linear_probe"
    assert build_finetune(GIVEN).output_dir == "runs/encoder/finetuning"
    assert build_knn({**GIVEN, "random_weights": True}).output_dir == "runs/encoder/knn_random_weights"
    assert build_knn({**GIVEN, "output_dir": "mine"}).output_dir == "mine"
    (tmp_path / "resnet.pth").write_bytes(b"")
    assert build_knn({**GIVEN, "encoder": str(tmp_path / "resnet.pth")}).output_dir == "runs/resnet/knn"


def test_results_of_another_encoder_do_not_go_to_a_run_of_the_same_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("runs/resnet50-v1.5", "encoders/resnet50-v1.5", "encoders/resnet50"):
        Path(name).mkdir(parents=True)
    Path("resnet50.pth").touch()
    others = ["encoders/resnet50", "resnet50.pth", "timm/resnet50"]
    for encoder in others:
        assert build_knn({**GIVEN, "encoder": encoder}).output_dir == "runs/resnet50/knn"
    assert build_knn({**GIVEN, "encoder": "encoders/resnet50-v1.5"}).output_dir == "runs/resnet50-v1.5/knn"
    Path("runs/resnet50/encoder").mkdir(parents=True)
    for encoder in others:
        with pytest.raises(ConfigurationError, match=f"--encoder {encoder} is not .* runs/resnet50, .*--output_dir"):
            build_knn({**GIVEN, "encoder": encoder})
        assert build_knn({**GIVEN, "encoder": encoder, "output_dir": "mine"}).output_dir == "mine"
    for encoder in ("runs/resnet50", "runs/resnet50/encoder", tmp_path / "runs/resnet50"):
        assert Path(build_knn({**GIVEN, "encoder": str(encoder)}).output_dir).resolve().parent.name == "resnet50"
    Path("runs/linked").mkdir()
    Path("elsewhere/encoder").mkdir(parents=True)
    Path("runs/linked/encoder").symlink_to(tmp_path / "elsewhere/encoder")
    assert build_knn({**GIVEN, "encoder": "runs/linked/encoder"}).output_dir == "runs/linked/knn"
    build_knn({**GIVEN, "encoder": "resnet50"})  # there is none: `check_encoder` says so


def test_results_can_be_published_only_with_their_completed_run(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_x")
    given = {**GIVEN, "encoder": str(tmp_path / "run"), "push_to_hub": "me/digits"}
    (tmp_path / "run" / "encoder").mkdir(parents=True)
    with pytest.raises(ConfigurationError, match=r"--push_to_hub .*run is not a completed run"):
        evaluation.check_publishing(build_linear_probe(given))
    (tmp_path / "run" / "training.json").write_text("{}")
    evaluation.check_publishing(build_linear_probe(given))
    evaluation.check_publishing(build_finetune(given))
    with pytest.raises(ConfigurationError, match="--output_dir"):
        evaluation.check_publishing(build_linear_probe({**given, "output_dir": str(tmp_path / "elsewhere")}))
    with pytest.raises(ConfigurationError, match=r"--push_to_hub digits: .*USER/NAME"):
        evaluation.check_publishing(build_linear_probe({**given, "push_to_hub": "digits"}))
    evaluation.check_publishing(build_linear_probe(GIVEN))


@pytest.mark.parametrize("encoder", ["runs/digits", "runs/digits/encoder", "some/folder/below", "encoder.pth"])
def test_a_missing_encoder_is_refused(tmp_path, monkeypatch, encoder):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigurationError, match=f"--encoder {encoder}: no such"):
        evaluation.check_encoder(encoder)
    evaluation.check_encoder("user/name")
