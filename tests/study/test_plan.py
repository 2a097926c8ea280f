"""The file of a study, and what is said before its first run."""

from pathlib import Path

import pytest

from m2t_accel.config.fields import ConfigurationError
from m2t_accel.study.plan import flag_words, read_study

GRID = "grid:\n  seed: [0, 1]\n  device_batch_size: [8, 64]\n"


def write(folder, text):
    file = folder / "study.yaml"
    file.write_text(text)
    return str(file)


def test_a_run_is_planned_for_each_combination_in_the_order_of_the_grid(tmp_path):
    file = write(
        tmp_path, f"title: Batches\nsettings: {{recipe: digits, crop_scale: [0.3, 1]}}\n{GRID}linear_probe: {{}}\n"
    )
    study = read_study(file, {"dataset": "digits", "epochs": "20"}, tmp_path / "runs")
    assert study.title == "Batches"
    assert [run.name for run in study.runs] == [
        "seed-0_device_batch_size-8",
        "seed-0_device_batch_size-64",
        "seed-1_device_batch_size-8",
        "seed-1_device_batch_size-64",
    ]
    run = study.runs[2]
    assert (run.config.seed, run.config.device_batch_size, run.config.epochs) == (1, 8, 20)
    assert run.folder == tmp_path / "runs" / run.name
    assert (run.cell, run.of_random_weights) == ({"device_batch_size": 8}, {"seed": 1})
    words = "--recipe digits --crop_scale 0.3 1.0 --dataset digits --epochs 20 --seed 1 --device_batch_size 8"
    assert list(flag_words(run.given)) == words.split()
    assert run.probe == {"encoder": str(run.folder), "dataset": "digits", "seed": 1}
    assert run.probe_config().protocol == "digits"
    assert not (tmp_path / "runs").exists()


def test_the_probe_reads_the_images_of_the_run(tmp_path):
    text = "settings: {dataset: digits, validation_fraction: 0.2, max_images: 320}\nlinear_probe: {epochs: 3}\n"
    (run,) = read_study(write(tmp_path, text), {}, tmp_path / "runs").runs
    assert run.name == "run"
    assert run.probe == {
        "encoder": str(run.folder),
        "dataset": "digits",
        "seed": 0,
        "validation_fraction": 0.2,
        "max_images": 320,
        "epochs": 3,
    }


def test_runs_of_other_networks_have_other_random_weights(tmp_path):
    file = write(tmp_path, "grid: {encoder: [resnet18, resnet50], weight_momentum: [0.9, 0.99]}")
    study = read_study(file, {}, tmp_path / "runs")
    assert [run.of_random_weights["encoder"] for run in study.runs] == ["resnet18"] * 2 + ["resnet50"] * 2
    assert "weight_momentum" not in study.runs[0].of_random_weights


def test_values_are_words_that_the_command_line_reads_back(tmp_path):
    text = "settings: {max_steps: null, streaming: false, blur_probability: [1, 0.1], crop_scale: 0.2 1}"
    (run,) = read_study(write(tmp_path, text), {"keep": "1 0"}, tmp_path / "runs").runs
    words = "--max_steps none --streaming false --blur_probability 1.0 0.1 --crop_scale 0.2 1.0 --keep 1 0"
    assert list(flag_words(run.given)) == words.split()


WRONG = [
    ("grids: {seed: [0]}", "study.yaml: unknown key grids, did you mean grid"),
    ("settings: {recipe: digit}", "study.yaml: --recipe digit: .*did you mean digits"),
    ("grid: {weight_momentun: [0.9]}", "unknown setting weight_momentun, did you mean weight_momentum"),
    ("grid: {weight_momentum: [0.9, 2]}", "study.yaml: --weight_momentum 2 is out of range"),
    ("grid: {weight_momentum: 0.9}", r"weight_momentum needs a list of values, such as \[0, 1\]"),
    ("grid: {seed: []}", "seed needs a list"),
    ("grid: {seed: [0, 1, 0]}", "seed-0 would be the name of two runs"),
    ("grid: {seed: [0, 1]}\nsettings: {seed: 0}", "seed is in the grid and also"),
    ("grid: [seed]", "grid: needs lines"),
    ("settings: {output_dir: runs/x}", "output_dir: the study gives it to each run"),
    ("linear_probe: {protocl: byol}", "unknown setting protocl, did you mean protocol"),
    ("linear_probe: {encoder: runs/x}", "encoder: the study gives it"),
    ("settings: {dataset: /no/such/folder}", "--dataset /no/such/folder: no such file"),
    ("grid: {device_batch_size: [64, 48]}", "--batch_size 64 is not a multiple of --device_batch_size 48"),
    ("- a list", "STUDY .*study.yaml: needs lines"),
]


@pytest.mark.parametrize(("text", "words"), WRONG, ids=lambda value: str(value)[:40])
def test_a_wrong_study_is_refused_in_one_line_before_anything_is_written(ask, tmp_path, text, words):
    answer = ask("scripts/study.py", write(tmp_path, text), "--runs_dir", tmp_path / "runs")
    assert answer.status == 2
    assert answer.err.startswith("study.py: error: ")
    assert answer.err.count("\n") == 1
    with pytest.raises(ConfigurationError, match=words):
        raise ConfigurationError(answer.err)
    assert [path.name for path in tmp_path.iterdir()] == ["study.yaml"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--jobs", "0"], "--jobs 0 is out of range"),
        (["--set", "epochs"], "--set epochs: needs NAME=VALUE"),
        (["--set", "epoch=2"], "unknown setting epoch, did you mean epochs"),
        (["--set", "seed=1"], "seed is in the grid and also"),
        (["--set", "epoch=2", "--set", "num_workers=0", "--collect"], "unknown setting epoch, did you mean epochs"),
        (["--job", "2"], "--job"),
    ],
)
def test_wrong_flags_are_refused_in_one_line(ask, tmp_path, arguments, words):
    answer = ask("scripts/study.py", write(tmp_path, GRID), "--runs_dir", tmp_path / "runs", *arguments)
    assert answer.status == 2
    assert words in answer.err
    assert answer.err.count("\n") == 1


def test_the_folder_of_another_study_is_refused(tmp_path):
    from helpers import write_run

    write_run(tmp_path / "runs" / "seed-0_device_batch_size-8", epochs=3)
    with pytest.raises(ConfigurationError, match=r"--runs_dir .* cannot take this study: .*epochs was 3, now 40"):
        read_study(write(tmp_path, GRID), {}, tmp_path / "runs")


def test_the_studies_of_the_repository_are_read(root, tmp_path):
    files = Path(root / "results").glob("*/study.yaml")
    numbers = {
        file.parent.name: len(read_study(str(file), {"dataset": "digits"}, tmp_path / file.parent.name).runs)
        for file in files
    }
    assert numbers == {"statistics": 12, "cifar10-recipe": 1, "digits-statistics": 8}
