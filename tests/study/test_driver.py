"""A study as processes: what fails, stops and continues."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml
from helpers import ROOT, tiny

from m2t_accel.study import driver
from m2t_accel.study.plan import read_study

NONE = {"runs": [], "random_weights": []}
SCRIPT = """
import os, sys, time
given = dict(zip(sys.argv[1::2], sys.argv[2::2]))
print(given["--seed"], os.environ.get("OMP_NUM_THREADS"))
if given["--seed"] == "1":
    sys.exit("no disk is left")
"""


def write(folder, **others):
    settings = tiny("", **others.pop("settings", {}))
    del settings["output_dir"]
    (folder / "study.yaml").write_text(yaml.safe_dump({"settings": settings, **others}, sort_keys=False))
    return folder / "study.yaml"


def test_a_task_that_fails_is_one_line_and_the_others_go_on(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    (tmp_path / "pretrain.py").write_text(SCRIPT)
    study = read_study(str(write(tmp_path, grid={"seed": [0, 1, 2]})), {}, tmp_path / "runs")
    starts, start = [], driver.start

    def start_once(task, *others):
        starts.append(task.key)
        assert len(starts) <= 3, starts
        return start(task, *others)

    monkeypatch.setattr(driver, "start", start_once)
    assert driver.run_study(study, NONE, tmp_path / "runs", tmp_path, 2, lambda: None) == 3
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6
    failed = {line[6:12]: line[12:] for line in lines if "FAILED" in line}
    assert (
        failed["seed-1"] == f": pretraining FAILED with exit status 1: no disk is left ({tmp_path}/runs/seed-1/log.txt)"
    )
    # A script that ends without an error, but also without a result, is not started again and again.
    assert failed["seed-0"].startswith(": pretraining FAILED with exit status 0: 0 1 (")  # seed, number of threads


def test_two_studies_do_not_run_in_one_folder(tmp_path):
    study = read_study(str(write(tmp_path, grid={"seed": [0, 1]})), {}, tmp_path / "runs")
    hold = "from m2t_accel.study.driver import *; lock(Path(sys.argv[1])); print(1, flush=True); sys.stdin.read()"
    words = [sys.executable, "-c", hold, str(tmp_path / "runs")]
    with subprocess.Popen(words, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with pytest.raises(driver.ConfigurationError, match=r"another study\.py is running in it"):
            driver.run_study(study, NONE, tmp_path / "runs", tmp_path, 1, lambda: None)
        other.stdin.close()


def begin(file, *words):
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("MASTER_", "LOCAL_", "WORLD_"))}
    command = [sys.executable, "scripts/study.py", str(file), "--runs_dir", str(file.parent / "runs"), *words]
    return subprocess.Popen(command, cwd=ROOT, env=clean, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for_steps(folders, number):
    """Wait until the metrics of each run have so many lines."""
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline:
        files = [folder / "metrics.jsonl" for folder in folders]
        if all(file.exists() and len(file.read_text().splitlines()) > number for file in files):
            return
        time.sleep(0.05)
    raise AssertionError("the runs do not train")


def no_process_is_left(folder):
    words = [process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"])]
    return not any(word.startswith(str(folder)) for line in words for word in line)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "linear_probe"), [(signal.SIGINT, {"epochs": 2}), (signal.SIGKILL, None)], ids=["SIGINT", "SIGKILL"]
)
def test_a_study_that_is_stopped_continues_with_the_same_command(tmp_path, number, linear_probe):
    file = write(tmp_path, settings={"epochs": 60}, grid={"seed": [0, 1]}, linear_probe=linear_probe)
    runs = [tmp_path / "runs" / name for name in ("seed-0", "seed-1")]
    study = begin(file, "--jobs", "2")
    wait_for_steps(runs, 20)
    study.send_signal(number)
    out, _ = study.communicate(timeout=240)
    assert study.returncode == {signal.SIGINT: 130, signal.SIGKILL: -9}[number], out
    if number != signal.SIGKILL:
        assert (
            f"study.py: stopped by {number.name}, and all its processes have ended; the same command continues" in out
        )
        assert "FAILED" not in out
        assert no_process_is_left(tmp_path / "runs")
    deadline = time.monotonic() + 60
    while not no_process_is_left(tmp_path / "runs") and time.monotonic() < deadline:
        time.sleep(0.2)
    assert all(list((run / "checkpoints").glob("step-*")) for run in runs)
    assert not (tmp_path / "results.json").exists()
    study = begin(file, "--jobs", "2")
    out, _ = study.communicate(timeout=240)
    assert study.returncode == 0, out
    assert all("resumes from step" in (run / "log.txt").read_text() for run in runs)
    assert out.count("is done") == (2 if linear_probe is None else 6)  # two runs, two probes, two of random weights
    results = json.loads((tmp_path / "results.json").read_text())
    assert [run["curve"]["epoch"][-1] for run in results["runs"]] == [60, 60]
    if linear_probe is not None:
        assert all(each["linear_top1"] is not None for each in (*results["runs"], *results["random_weights"]))
    commands = [run["command"] for run in results["runs"]]
    assert all(command.startswith("python scripts/pretrain.py --recipe digits") for command in commands)
    study = begin(file)
    out, _ = study.communicate(timeout=240)
    assert (study.returncode, out.splitlines()[0]) == (
        0,
        f"| encoder | kNN top-1 % |{' linear top-1 % |' if linear_probe else ''}",
    )


@pytest.mark.slow
def test_a_run_that_fails_makes_the_exit_status_1(tmp_path):
    file = write(tmp_path, grid={"learning_rate_per_256": [0.4, 1e30]})
    study = begin(file)
    out, _ = study.communicate(timeout=240)
    assert study.returncode == 1
    assert "learning_rate_per_256-1e-30: pretraining FAILED with exit status 2: pretrain.py: error: the loss is" in out
    assert "learning_rate_per_256-0.4: pretraining is done" in out
    assert len(json.loads((Path(tmp_path) / "results.json").read_text())["runs"]) == 1
