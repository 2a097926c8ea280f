"""The results of a study: collected from folders of runs, kept without them, shown as a table and a picture."""

import json
import shutil

import pytest
from helpers import write_run
from PIL import Image

from m2t_accel.config.fields import ConfigurationError
from m2t_accel.run.output_dir import FILES
from m2t_accel.study.driver import PRETRAINING, PROBE, RANDOM_WEIGHTS, next_task
from m2t_accel.study.plan import plain_settings, read_study
from m2t_accel.study.report import COLOURS, MARKERS, markdown_table, report, spread_out
from m2t_accel.study.results import collect, different_images, is_trained, read_results

NONE = {"runs": [], "random_weights": []}
SETTINGS = "settings: {recipe: digits, epochs: 4, warmup_epochs: 1}\n"
GRID = "grid:\n  seed: [0, 1]\n  device_batch_size: [8, 64]\n  weight_momentum: [0.9, 0.99]\n"


def study_of(folder, text=f"{SETTINGS}{GRID}linear_probe: {{epochs: 3}}\n"):
    (folder / "study.yaml").write_text(text)
    return read_study(str(folder / "study.yaml"), {}, folder / "runs")


def pretrain(run):
    """Write the folder of a complete run without training it; kNN top-1 is 95 % and 1 % more for each seed."""
    write_run(run.folder, **{"seed": 0, **run.varied})
    for name in FILES:
        (run.folder / name).parent.mkdir(exist_ok=True)
        (run.folder / name).touch()


def probe(run, top1, random_weights=False):
    """Write the result of a linear probe without training one."""
    config = run.probe_config(random_weights)
    protocol = {name: value for name, value in plain_settings(config).items() if name not in ("seed", "output_dir")}
    result = {"figures": {"top1": top1}, "protocol": protocol, "seed": config.seed, "seconds": 2, "weights": "abc"}
    folder = run.folder / ("linear_probe_random_weights" if random_weights else "linear_probe")
    folder.mkdir()
    (folder / "result.json").write_text(json.dumps(result))


@pytest.fixture
def half_done(tmp_path):
    """A study of eight runs: the four of seed 0 and the first of seed 1 are complete, the next one lacks its probe."""
    study = study_of(tmp_path)
    for number, run in enumerate(study.runs[:6]):
        pretrain(run)
        if number < 5:
            probe(run, 0.9 + 0.01 * number)
    probe(study.runs[0], 0.5, random_weights=True)
    return study


def test_more_values_than_colours_have_another_marker():
    looks = {(COLOURS[kind % len(COLOURS)], MARKERS[kind % len(MARKERS)]) for kind in range(50)}
    assert len(looks) == 50


def test_tasks_come_in_the_order_of_the_grid_and_none_twice(half_done):
    begun, tasks = set(), []
    while (task := next_task(half_done, NONE, begun)) is not None:
        begun.add(task.key)
        tasks.append(task)
    runs = half_done.runs
    # The probe of a run that is not trained yet, and all that follows from it, waits.
    expected = [(4, RANDOM_WEIGHTS), (5, PROBE), (6, PRETRAINING), (7, PRETRAINING)]
    assert [(task.run.name, task.kind) for task in tasks] == [(runs[number].name, kind) for number, kind in expected]


def test_the_tasks_of_a_run_do_not_overlap(half_done):
    task = next_task(half_done, NONE)
    assert task == (half_done.runs[4], RANDOM_WEIGHTS)
    assert next_task(half_done, NONE, [task.key]) == (half_done.runs[5], PROBE)
    assert next_task(half_done, NONE, [task.key], [half_done.runs[5].name]) == (half_done.runs[6], PRETRAINING)


def test_a_probe_with_other_settings_is_not_the_studys(half_done, tmp_path):
    changed = study_of(tmp_path, f"{SETTINGS}{GRID}linear_probe: {{epochs: 4}}\n")
    task = next_task(changed, NONE)
    assert task == (changed.runs[0], RANDOM_WEIGHTS)
    assert next_task(changed, NONE, [task.key]) == (changed.runs[0], PROBE)
    assert collect(changed, NONE)["runs"][0]["linear_top1"] is None


def test_a_run_whose_encoder_is_missing_is_not_complete(half_done):
    run = half_done.runs[0]
    (run.folder / "encoder" / "model.safetensors").unlink()
    assert not is_trained(run)
    assert next_task(half_done, NONE) == (run, PRETRAINING)


def test_results_have_means_over_the_seeds_and_the_curves(half_done, tmp_path):
    results = report(half_done, NONE, tmp_path)
    assert results == json.loads((tmp_path / "results.json").read_text())
    assert [run["name"] for run in results["runs"]] == [run.name for run in half_done.runs[:6]]
    first = results["runs"][0]
    assert first["curve"] == {"epoch": [0.0, 4.0], "knn_top1": [0.9, 0.95]}
    assert len(first["loss"]) == 4
    assert first["loss"] == sorted(first["loss"], reverse=True)
    assert (first["knn_top1"], first["linear_top1"], first["seconds"], first["weights"]) == (0.95, 0.9, 4.0, "abc")
    assert results["cells"][0] == {
        "settings": {"device_batch_size": 8, "weight_momentum": 0.9},
        "knn_top1": {"mean": 0.955, "deviation": 0.0071, "smallest": 0.95, "largest": 0.96, "seeds": 2},
        "linear_top1": {"mean": 0.92, "deviation": 0.0283, "smallest": 0.9, "largest": 0.94, "seeds": 2},
    }
    found = [(each["settings"], each["knn_top1"], each["linear_top1"]) for each in results["random_weights"]]
    assert found == [({"seed": 0}, 0.9, 0.5), ({"seed": 1}, 0.91, None)]
    assert markdown_table(results).splitlines() == [
        "| device_batch_size | weight_momentum | kNN top-1 % | linear top-1 % |",
        "| --- | --- | --- | --- |",
        "| 8 | 0.9 | 95.50 ± 0.71 (2 seeds) | 92.00 ± 2.83 (2 seeds) |",
        "| 8 | 0.99 | 95.50 ± 0.71 (2 seeds) | 91.00 (1 seed) |",
        "| 64 | 0.9 | 95.00 (1 seed) | 92.00 (1 seed) |",
        "| 64 | 0.99 | 95.00 (1 seed) | 93.00 (1 seed) |",
        "|  | random weights | 90.50 ± 0.71 (2 seeds) | 50.00 (1 seed) |",
    ]
    with Image.open(tmp_path / "figure.png") as picture:
        assert picture.width > 1200  # two panels of curves, one of points


def test_results_are_small(half_done, tmp_path):
    report(half_done, NONE, tmp_path)
    text = (tmp_path / "results.json").read_text()
    assert len(text) < 12_000
    assert '"epoch": [0.0, 4.0],' in text  # a list of numbers is one line


def test_results_hold_no_path_of_the_machine(half_done, tmp_path):
    for run in half_done.runs[:5]:
        for file in (run.folder / "training.json", run.folder / "linear_probe" / "result.json"):
            content = json.loads(file.read_text())
            content["command"] = f"python scripts/x.py --dataset '/data/of me/images' --output_dir {run.folder}"
            file.write_text(json.dumps(content))
    text = json.dumps(report(half_done, NONE, tmp_path))
    assert "--dataset images --output_dir seed-0" in text
    assert "of me" not in text
    assert str(tmp_path) not in text


def test_complete_results_stay_without_the_folders_of_their_runs(half_done, tmp_path):
    file = tmp_path / "results.json"
    before = report(half_done, NONE, tmp_path)
    shutil.rmtree(tmp_path / "runs")
    stored = read_results(file, half_done)
    assert report(half_done, stored, tmp_path) == before
    # Of seed 1, the second run has lost its folder before it was probed. So it is trained again, as are the last two.
    task = next_task(half_done, stored)
    assert task == (half_done.runs[5], PRETRAINING)
    pretrain(task.run)
    # The random weights of seed 1 were not measured yet; any run of this seed has their architecture.
    assert next_task(half_done, stored) == (task.run, RANDOM_WEIGHTS)
    probe(task.run, 0.6, random_weights=True)
    assert next_task(half_done, stored) == (task.run, PROBE)
    probe(task.run, 0.99)
    assert next_task(half_done, stored) == (half_done.runs[6], PRETRAINING)
    after = report(half_done, stored, tmp_path)
    assert after["runs"][:5] == before["runs"][:5]
    assert after["runs"][5]["linear_top1"] == 0.99
    assert [each["linear_top1"] for each in after["random_weights"]] == [0.5, 0.6]


def test_the_rows_of_a_study_of_seeds_alone_are_named(tmp_path):
    study = study_of(tmp_path, f"{SETTINGS}grid: {{seed: [0, 1]}}\n")
    for run in study.runs:
        pretrain(run)
    assert [line.split(" | ")[0] for line in markdown_table(report(study, NONE, tmp_path)).splitlines()] == [
        "| encoder",
        "| ---",
        "| trained",
        "| random weights",
    ]


def test_a_seed_or_a_value_may_be_added_to_a_study(half_done, tmp_path):
    before = report(half_done, NONE, tmp_path)
    shutil.rmtree(tmp_path / "runs")
    more = study_of(tmp_path, f"{SETTINGS}{GRID.replace('[0, 1]', '[0, 1, 2]')}linear_probe: {{epochs: 3}}\n")
    assert collect(more, read_results(tmp_path / "results.json", more))["runs"] == before["runs"]


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("epochs: 4", "epochs: 5", "runs with other settings .epochs was 4, now 5.: move it"),
        ("[0, 1]", "[0]", "a run that the grid does not have .seed-1_device_batch_size-8_weight_momentum-0.9."),
        ("epochs: 3", "epochs: 6", "another linear_probe"),
    ],
)
def test_the_results_of_another_study_are_refused(half_done, tmp_path, old, new, words):
    report(half_done, NONE, tmp_path)
    shutil.rmtree(tmp_path / "runs")
    study = study_of(tmp_path, (tmp_path / "study.yaml").read_text().replace(old, new))
    with pytest.raises(ConfigurationError, match=words):
        read_results(tmp_path / "results.json", study)


@pytest.mark.parametrize("text", ["[]", "{}", '{"runs": 3}', "{"])
def test_another_file_in_the_place_of_the_results_is_refused(tmp_path, text):
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(ConfigurationError, match="is not a file of results"):
        read_results(tmp_path / "results.json", study_of(tmp_path))


def test_settings_that_follow_from_the_grid_are_those_of_each_run(tmp_path):
    study = study_of(
        tmp_path, "grid: {recipe: [digits, cifar10]}\nsettings: {dataset: digits, epochs: 4, warmup_epochs: 1}\n"
    )
    for run in study.runs:
        pretrain(run)
    results = report(study, NONE, tmp_path)
    assert "learning_rate_per_256" not in results["settings"]
    assert [run["settings"]["learning_rate_per_256"] for run in results["runs"]] == [0.4, 0.2]
    assert read_results(tmp_path / "results.json", study)["runs"] == results["runs"]


@pytest.mark.parametrize("num_kept", [0, 1])
def test_runs_without_evaluations_or_with_the_first_alone_are_drawn(tmp_path, num_kept):
    study = study_of(tmp_path, SETTINGS)
    pretrain(study.runs[0])
    file = study.runs[0].folder / "metrics.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    for row in rows:
        if row["step"] >= num_kept:
            row.pop("knn_top1", None)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (result,) = report(study, NONE, tmp_path)["runs"]
    assert result["curve"]["epoch"] == [0.0][:num_kept]
    assert (tmp_path / "figure.png").exists()


def test_without_a_complete_run_nothing_is_written(ask, tmp_path):
    study_of(tmp_path)
    answer = ask("scripts/study.py", tmp_path / "study.yaml", "--runs_dir", tmp_path / "runs", "--collect")
    assert answer.status == 0
    assert "| 8 | 0.9 | - | - |" in answer.out
    assert [path.name for path in tmp_path.iterdir()] == ["study.yaml"]


def test_the_results_of_a_trial_are_written_to_the_folder_of_its_runs(half_done, ask, tmp_path):
    (tmp_path / "study.yaml").write_text((tmp_path / "study.yaml").read_text().replace("epochs: 4", "epochs: 40"))
    words = [tmp_path / "study.yaml", "--runs_dir", tmp_path / "runs", "--collect"]
    assert ask("scripts/study.py", *words, "--set", "epochs=4").status == 0
    assert (tmp_path / "runs" / "results.json").exists()
    assert (tmp_path / "runs" / "figure.png").exists()
    assert not (tmp_path / "results.json").exists()


@pytest.mark.usefixtures("half_done", "full_disk")
def test_a_full_disk_is_one_line(ask, tmp_path):
    answer = ask("scripts/study.py", tmp_path / "study.yaml", "--runs_dir", tmp_path / "runs", "--collect")
    assert answer.status == 2
    assert answer.err.startswith(f"study.py: error: --study {tmp_path / 'results.json'} cannot be written (No space")
    assert answer.err.count("\n") == 1
    assert not (tmp_path / "figure.png").exists()


def test_labels_of_a_picture_do_not_overlap():
    assert spread_out([50, 10, 50.5], 2) == pytest.approx([49.25, 10, 51.25])


def test_results_on_other_images_are_named(half_done):
    results = collect(half_done, NONE)
    for number, result in enumerate(results["runs"]):
        result["data"] = None if number == 5 else {"fingerprint": number > 1}
    names = [run.name for run in half_done.runs]
    assert different_images(results) == (
        f"Warning: the images of {names[0]} and {names[2]} differ, so their figures cannot be compared."
    )
    results["grid"] = {**results["grid"], "max_image_pixels": [1, 2]}
    assert different_images(results) is None
