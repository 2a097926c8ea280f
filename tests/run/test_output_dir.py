import json

import pytest
import yaml

from m2t_accel.config.fields import ConfigurationError
from m2t_accel.config.recipes import build_config
from m2t_accel.run.output_dir import check_output_dir


def config_in(folder, **settings):
    return build_config({"output_dir": str(folder), **settings})


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    check_output_dir(config_in(tmp_path / "new" / "deep"))
    (tmp_path / "notes.txt").write_text("not a file of a run")
    check_output_dir(config_in(tmp_path))
    for folder in (tmp_path / "notes.txt" / "run", "/proc/run"):
        with pytest.raises(ConfigurationError, match=f"^--output_dir {folder} cannot be written"):
            check_output_dir(config_in(folder))
    with pytest.raises(ConfigurationError, match="255 bytes"):
        check_output_dir(config_in(tmp_path / ("x" * 300)))
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.fixture
def run_folder(tmp_path):
    """A folder with the config.yaml of a run of 40 epochs, and one checkpoint."""
    (tmp_path / "config.yaml").write_text("# a header\n" + config_in(tmp_path, evaluate_every=8).to_yaml())
    (tmp_path / "checkpoints" / "step-3").mkdir(parents=True)
    return tmp_path


def test_the_same_run_may_go_on(run_folder):
    check_output_dir(config_in(run_folder))
    free = {"num_workers": 0, "log_every": 3, "deterministic": True, "keep": (9, 2), "checkpoint_every": ("1epoch",)}
    check_output_dir(config_in(run_folder, **free))
    check_output_dir(config_in(run_folder, epochs=90, resume=str(run_folder / "checkpoints" / "step-3")))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"resume": "never"}, r"holds a run \(config\.yaml\): .*--resume auto"),
        (
            {"encoder": "resnet18", "blur_sigma": (0.1, 1.0)},
            r"\(encoder was resnet10-quarter, now resnet18; blur_sigma was 0\.1 2\.0, now 0\.1 1\.0\)",
        ),
        ({"epochs": 90}, r"epochs was 40, now 90.*--resume .*/checkpoints/step-N"),
        ({"epochs": 30, "resume": "checkpoints/step-3"}, "epochs was 40, now 30"),
        ({"max_steps": 90}, "max_steps was None, now 90"),
        ({"max_steps": 90, "resume": "checkpoints/step-3"}, "max_steps was None, now 90"),
    ],
)
def test_another_run_is_refused(run_folder, settings, message):
    if "/" in settings.get("resume", ""):
        settings = {**settings, "resume": str(run_folder / settings["resume"])}
    with pytest.raises(ConfigurationError, match=message):
        check_output_dir(config_in(run_folder, **settings))


@pytest.mark.parametrize("content", ["", "a list: [", "- a", "\0"])
def test_a_config_yaml_that_is_not_of_a_run_is_refused(tmp_path, content):
    (tmp_path / "config.yaml").write_text(content)
    with pytest.raises(ConfigurationError, match=r"^--output_dir .*config\.yaml"):
        check_output_dir(config_in(tmp_path))


def test_the_settings_of_a_complete_run_are_those_of_training_json(run_folder):
    recorded = yaml.safe_load((run_folder / "config.yaml").read_text())
    (run_folder / "training.json").write_text(json.dumps({"config": recorded}))
    check_output_dir(config_in(run_folder))
    with pytest.raises(ConfigurationError, match=r"other settings \(seed was 0, now 3\)"):
        check_output_dir(config_in(run_folder, seed=3))
    (run_folder / "config.yaml").write_text(config_in(run_folder, evaluate_every=8, seed=3, keep=(9, 9)).to_yaml())
    with pytest.raises(ConfigurationError, match=r"config\.yaml has been changed .*\(seed was 0, now 3\): remove"):
        check_output_dir(config_in(run_folder))
    with pytest.raises(ConfigurationError, match=r"other settings \(seed was 0, now 3\)"):
        check_output_dir(config_in(run_folder, seed=3))  # `--config` with the changed file
    (run_folder / "config.yaml").unlink()
    check_output_dir(config_in(run_folder))
    with pytest.raises(ConfigurationError, match=r"other settings \(seed was 0, now 3\)"):
        check_output_dir(config_in(run_folder, seed=3))
    with pytest.raises(ConfigurationError, match=r"epochs was 40, now 90.*--resume .*/checkpoints/step-N"):
        check_output_dir(config_in(run_folder, epochs=90))


def test_files_of_a_run_without_a_config_yaml_are_refused(run_folder):
    (run_folder / "config.yaml").unlink()
    with pytest.raises(ConfigurationError, match=r"holds a run \(checkpoints\)"):
        check_output_dir(config_in(run_folder))
    (run_folder / "checkpoints" / "step-3" / "manifest.json").write_text("")
    check_output_dir(config_in(run_folder))  # the checkpoint has the settings
