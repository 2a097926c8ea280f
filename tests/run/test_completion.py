"""Tests of what a complete run leaves, and in which order."""

import json
import types

import pytest
import yaml

from m2t_accel.config.recipes import build_config
from m2t_accel.model import Teacher, create_encoder, create_student
from m2t_accel.run import completion
from m2t_accel.run.completion import VERSIONS, finish
from m2t_accel.run.folder import RunFolder


@pytest.fixture
def ended(tmp_path):
    """The arguments of `finish` for a run whose last step is done."""
    config = build_config({"output_dir": str(tmp_path), "epochs": 3, "warmup_epochs": 1, "evaluate_every": 1})
    RunFolder(tmp_path).metrics.add(
        [
            {"step": step, "epoch": step / 2, "loss": 1.0, "embedding_std": 0.5, "learning_rate": 0.1, "seconds": 1.0}
            | {"weight_momentum": 1.0, "statistics_momentum": 0.0, "knn_top1": 0.5}
            for step in range(4)
        ]
    )
    student = create_student(create_encoder("resnet10-quarter"), 32, 16, 8)
    step = types.SimpleNamespace(student=student, teacher=Teacher(student))
    parts = [{"step": step, "command": "c", "hardware": name, "versions": VERSIONS} for step, name in enumerate("aab")]
    return config, types.SimpleNamespace(note="digits: 3 images"), step, parts, 3, 9.0, lambda: None


def test_all_parts_of_a_run_are_recorded(ended, tmp_path, capsys):
    finish(*ended)
    training = json.loads((tmp_path / "training.json").read_text())
    assert training["hardware"] == "a, then b"
    assert training["dataset"] == "digits"
    assert training["config"] == yaml.safe_load(ended[0].to_yaml())
    weights = tmp_path / "encoder" / "model.safetensors"
    assert training["files"] == {
        "metrics.jsonl": None,
        "curves.png": None,
        "encoder/README.md": None,
        "encoder/config.json": None,
        "encoder/model.safetensors": weights.stat().st_size,
        "encoder/preprocessor_config.json": None,
    }
    assert [part["step"] for part in training["parts"]] == [0, 1, 2]
    assert training["images_seen"] == 3 * 64
    assert "a, then b" in (tmp_path / "encoder" / "README.md").read_text()
    assert "Trained in 9 s: 192 images, 21 " in capsys.readouterr().out


def test_files_that_are_written_again_change_no_fact_and_need_no_metrics(ended, tmp_path):
    config, data, step, parts, num_steps, *others = ended
    (tmp_path / "metrics.jsonl").unlink()
    finish(config, data, step, [*parts, {**parts[0], "step": num_steps, "hardware": "a laptop"}], num_steps, *others)
    training = json.loads((tmp_path / "training.json").read_text())
    assert (training["hardware"], training["images_seen"]) == ("a, then b", 3 * 64)
    assert not (tmp_path / "curves.png").exists(), "there is nothing to draw"


@pytest.mark.parametrize("function", ["save_encoder", "replace_folder", "draw_curves"])
def test_a_run_that_could_not_be_finished_is_not_complete(ended, tmp_path, monkeypatch, function):
    (tmp_path / "encoder").mkdir()
    (tmp_path / "encoder" / "old").write_text("")

    def fail(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(completion, function, fail)
    with pytest.raises(OSError, match="No space"):
        finish(*ended)
    monkeypatch.undo()
    assert not (tmp_path / "training.json").exists()
    # The folder is the old one or the new one, never a mixture.
    assert (tmp_path / "encoder" / "old").exists() == (function != "draw_curves")
    finish(*ended)
    assert (tmp_path / "training.json").exists()
    assert not (tmp_path / "encoder" / "old").exists()
