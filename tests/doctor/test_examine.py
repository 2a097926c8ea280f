import json
import re
import shlex
from types import SimpleNamespace

import pytest
import torch
from helpers import ROOT, write_image, write_parquet

import m2t_accel.benchmark.data as loader_benchmark
from m2t_accel.config.fields import ConfigurationError
from m2t_accel.config.recipes import build_config
from m2t_accel.doctor import examine, machine, speed
from m2t_accel.doctor.findings import Findings

SCRIPT = "scripts/doctor.py"
TINY = ("--hidden_size", 32, "--projection_size", 16, "--max_images", 320, "--num_workers", 0)
GROUPS = ["environment", "launch", "data", "speed", "recipe"]


@pytest.fixture(autouse=True)
def short_measurements(monkeypatch):
    for module, name, value in (
        (loader_benchmark, "WARM_UP", 0.01),
        (speed, "LOADER_SECONDS", 0.02),
        (speed, "STEP_SECONDS", 0.1),
        (speed, "MAX_STEPS", 5),
        (speed, "PROBE", 64),
        (speed, "EVALUATION_SECONDS", 0.01),
    ):
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # a line about unused GPUs is for more of them


def lines_of(answer, mark):
    """Return the names of the lines with a mark."""
    return re.findall(rf"^  {mark} (.{{15}})", answer.out, re.MULTILINE)


def test_a_run_that_can_start_has_lines_in_five_groups_and_nothing_is_written(ask, tmp_path):
    output, file = tmp_path / "run", tmp_path / "doctor.json"
    answer = ask(SCRIPT, *TINY, "--output_dir", output, "--json", file, "--price_per_hour", 2, "--hours", 0.05)
    assert answer.status == 0, answer.out + answer.err
    assert [line for line in answer.out.splitlines() if line in (*GROUPS, "advice")] == [*GROUPS, "advice"]
    assert not output.exists()
    result = json.loads(file.read_text())
    assert result["fails"] is False
    figures = result["figures"]
    assert figures["images"] == 40 * 320
    assert figures["images_per_second_of_the_step"] > 0
    assert figures["seconds"] > figures["images"] / figures["images_per_second"]
    command = shlex.split(result["advice"]["command"])
    assert command[:4] == ["python", "scripts/pretrain.py", "--recipe", "digits"]
    assert result["advice"]["command"] in answer.out
    for row in result["findings"]:
        assert row["text"] in answer.out
    assert names_in_the_docs() == [
        (row["group"], row["name"]) for row in result["findings"] if row["group"] != "advice" and row["name"] != "cost"
    ]


def names_in_the_docs():
    """Return the groups and names of the lines that docs/recipes.md shows, as --json has them."""
    text = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8").partition("python scripts/doctor.py\n")[2]
    shown = re.search(r"```\n(environment\n.*?)```", text, re.DOTALL)[1]
    found, group = [], ""
    for line in shown.splitlines():
        if line in GROUPS:
            group = line
        elif line.startswith("  ") and not line.startswith("  ✓ shared memory"):  # there is none without workers
            found.append((group, line[4:19].strip()))
    return found


def test_a_folder_with_half_the_images_broken_and_a_learning_rate_that_diverges_end_with_status_1(ask, tmp_path):
    for i in range(60):
        path = tmp_path / "pictures" / "ab"[i % 2] / f"{i:02}.png"
        write_image(path, value=i)
        if i % 4 > 1:
            path.write_bytes(b"no image")
    words = ("--dataset", tmp_path / "pictures", "--output_dir", tmp_path / "run", "--learning_rate_per_256", 40)
    answer = ask(SCRIPT, *TINY, *words, "--batch_size", 16, "--evaluate_every", 0)
    assert answer.status == 1
    assert [name.strip() for name in lines_of(answer, "✗")] == ["damage", "learning rate"]
    assert "30 of 60 images cannot be decoded" in answer.out
    assert "--max_bad_fraction 0.6" in answer.out
    assert "--learning_rate_per_256 0.4" in answer.out
    assert answer.out.splitlines()[-1] == "The run would fail: damage, learning rate."


def test_too_little_disk_and_a_folder_of_another_run_end_with_status_1(ask, tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "free_bytes", lambda folder: 10**6)
    (tmp_path / "config.yaml").write_text("epochs: 3\nbatch_size: 32\n")
    answer = ask(SCRIPT, *TINY, "--output_dir", tmp_path)
    assert answer.status == 1
    assert [name.strip() for name in lines_of(answer, "✗")] == ["disk", "output"]
    assert "another --output_dir" in answer.out


def test_a_launch_that_fails_does_not_stop_the_other_checks(ask, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    answer = ask(SCRIPT, *TINY, "--output_dir", tmp_path / "run")
    assert answer.status == 1
    assert "✗ processes      --mixed_precision fp16 is not supported on a CPU" in answer.out
    assert "✓ damage" in answer.out
    assert "! speed          not measured, because the launch failed" in answer.out


def test_a_hub_dataset_is_not_copied_but_read_in_place(ask, tmp_path, dataset_hub):
    write_parquet(tmp_path / "hub" / "someone" / "pictures" / "train-00000-of-00001.parquet", 10, 40, row_group_size=8)
    words = ("--dataset", "someone/pictures", "--output_dir", tmp_path / "run", "--batch_size", 8, "--num_workers", 0)
    answer = ask(SCRIPT, *TINY, *words)
    assert answer.status == 0, answer.out + answer.err
    assert "40 images" in answer.out
    assert "not measured from the copy that the run will make" in answer.out
    assert "all images are shuffled in each epoch" in answer.out  # of the copy
    assert machine.missing_copy(build_config({"dataset": "someone/pictures"}))


def test_wrong_flags_end_with_status_2_in_one_line(ask, tmp_path):
    for words, message in (
        (("--epoch", 3), "did you mean --epochs"),
        (("--hours", 0), "--hours 0"),
        (("--dataset", "/nowhere"), "--dataset /nowhere"),
        (("--json", "/nowhere/x.json"), "--json /nowhere/x.json cannot be written"),
        (("--hours", "x"), "--hours: invalid float value: 'x'"),
        # Settings that fit the recipe for photographs and not `digits` are accepted with --hours.
        (("--hours", 5, "--dataset", "/nowhere", "--device_batch_size", 128, "--epochs", 12), "--dataset /nowhere"),
        (("--hours", 5, "--recipe", "digits", "--dataset", "/nowhere", "--epochs", 12), "--warmup_epochs 13"),
    ):
        answer = ask(SCRIPT, *words)
        assert answer.status == 2
        assert message in answer.err
        assert answer.err.count("\n") == 1


def test_a_process_that_lacks_memory_alone_ends_instead_of_leaving_the_others_waiting(monkeypatch, capsys):
    def lack_memory(*arguments):
        raise ConfigurationError("out of memory")

    config = build_config({"dataset": "digits"})
    speeds = speed.LoaderSpeed(1, 100.0, 100.0)
    monkeypatch.setattr(examine, "measure_loader", lambda *arguments: speeds)
    monkeypatch.setattr(examine, "measure_step", lack_memory)
    for is_main in (True, False):
        findings = Findings(is_main)
        findings.start_group("speed")
        examination = examine.Examination(config, findings, SimpleNamespace(process_index=3))
        examination.data = SimpleNamespace(train=range(1000))
        if is_main:
            examination.measure()
            assert "step           out of memory" in capsys.readouterr().out
        else:
            with pytest.raises(ConfigurationError, match="process 3, step: out of memory"):
                examination.measure()


@pytest.mark.slow
def test_two_processes_are_examined_together(run_script, tmp_path):
    """Each line is printed once, and the images of both processes count."""
    launch = ("-m", "accelerate.commands.launch", "--config_file", "accelerate_configs/cpu2.yaml")
    words = ("--device_batch_size", 32, "--output_dir", tmp_path / "run", "--json", tmp_path / "doctor.json")
    done = run_script(*launch, SCRIPT, *words, environment={"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("✓ versions") == 1
    assert "2 × cpu" in done.stdout
    assert json.loads((tmp_path / "doctor.json").read_text())["figures"]["measured_sub_batch"] == 32


def test_findings_that_cannot_be_written_are_one_line(ask, monkeypatch):
    monkeypatch.setattr(examine, "examine", lambda *arguments: {"fails": False})
    answer = ask(SCRIPT, "--json", "/dev/full")
    assert answer.status == 2
    assert answer.err.startswith("doctor.py: error: --json /dev/full cannot be written (No space left on device)")
