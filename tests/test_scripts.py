"""The scripts as a user types them: help, recipes, wrong input."""

import ast
import json
import os
import re
import subprocess

import cv2
import numpy as np
import pytest
from helpers import ROOT

from m2t_accel.config.pretrain import PretrainConfig

SCRIPTS = sorted((ROOT / "scripts").glob("*.py"))


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_consists_of_a_docstring_with_its_command_and_a_main_function(path):
    tree = ast.parse(path.read_text())
    assert f"scripts/{path.name}" in ast.get_docstring(tree)
    functions = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
    assert functions[-1] == "main"
    assert len(functions) == 1 or path.stem == "benchmark"  # it has a function for each of its commands


def test_help_recipes_and_wrong_flags_are_answered_without_heavy_imports(run_script):
    """torch alone takes 2.5 s to import; without it these answers take less than a second."""
    wrong = [["--epoch", "3"], ["--epochs", "0"]]
    lines = [["scripts/pretrain.py", *words] for words in (["--recipe", "list"], *wrong)]
    lines += [[f"scripts/{path.name}", "--help"] for path in SCRIPTS]
    done = run_script("tests/several_scripts.py", json.dumps(lines))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert {"torch", "transformers", "datasets", "numpy", "accelerate"} & set(found["modules"]) == set()
    (status, recipes, _), *refused = found["answers"][:3]
    assert status == 0
    assert "128x2080Ti-b4096-300ep" in recipes
    assert [status for status, _, _ in refused] == [2, 2]
    assert "--epochs" in refused[0][2]
    assert "out of range" in refused[1][2]
    for path, (status, help, _) in zip(SCRIPTS, found["answers"][3:], strict=True):
        assert status == 0
        assert f"usage: {path.name}" in help
        if path.name == "pretrain.py":
            assert [name for name in PretrainConfig.__dataclass_fields__ if f"--{name} " not in help] == []


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_every_flag_that_help_shows_is_known(ask, path):
    commands = [["data"], ["step"], ["estimate"]] if path.stem == "benchmark" else [[]]
    for command in commands:
        script = f"scripts/{path.name}"
        help = ask(script, *command, "--help").out
        found = dict(re.findall(r"^ +(--\w+)(?: (\S+))?", help.replace("-h, --help", ""), re.MULTILINE))
        assert found, help
        for flag, value in found.items():
            error = ask(script, *command, flag, "--no_such_flag").err
            if value == "" or value.startswith("["):  # a switch
                assert f"unknown flag {flag}" not in error, error
            else:
                assert f" {flag}: expected " in error, error


# Takes the modules and names that Windows lacks away, runs each script, and prints the errors.
ON_WINDOWS = """
import argparse, contextlib, io, json, multiprocessing, runpy, shutil, signal, subprocess, sys, tempfile

sys.platform = "win32"
sys.modules["fcntl"] = sys.modules["resource"] = None
del signal.SIGUSR1
for script in json.loads(sys.argv[1]):
    sys.argv = [script, "--help"]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as exit:
        print(exit.code)
"""


def test_windows_is_refused_in_one_line(run_script):
    done = run_script("-c", ON_WINDOWS, json.dumps([str(path) for path in SCRIPTS]))
    assert done.stdout.split() == ["2"] * len(SCRIPTS)
    assert done.stderr.splitlines() == [
        f"{path.name}: error: Windows is not supported: type `wsl --install`, and use Linux in WSL 2"
        for path in SCRIPTS
    ]


def test_a_process_prints_an_error_in_one_line_and_exits_with_status_2(run_script):
    done = run_script("scripts/pretrain.py", "--recipe", "digit")
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"pretrain\.py: error: --recipe digit: .*digits.*\n", done.stderr)


# One wrong input of each kind; words in capitals are folders of the fixture below.
WRONG = [
    (["--recipe", "digit"], "--recipe digit: .* digits"),
    (["--epoch", "3"], "--epoch, .*--epochs"),
    (["--epochs", "ten"], "--epochs ten: .*whole number"),
    (["--epochs", "0"], "--epochs 0 .*out of range"),
    (["--batch_size", "100", "--device_batch_size", "32"], "--batch_size 96 or 128"),
    (["--dataset", "/no/such/folder"], "--dataset .*no such file"),
    (["--dataset", "EMPTY"], r"--dataset .*no image.*\*\.parquet"),
    (["--dataset", "UNLABELLED"], "--dataset .*use --batch_size 4"),
    (["--dataset", "UNLABELLED", "--batch_size", "2", "--evaluate_every", "1"], "no labels .*--label_column"),
    (["--encoder", "CONVNEXT"], "--encoder .*BatchNorm"),
    (["--output_dir", "/proc/run"], "--output_dir /proc/run .*written"),
]


@pytest.fixture
def folders(tmp_path):
    for name in ("EMPTY", "UNLABELLED", "CONVNEXT"):
        (tmp_path / name).mkdir()
    for i in range(4):
        cv2.imwrite(str(tmp_path / "UNLABELLED" / f"{i}.png"), np.zeros((8, 8, 3), np.uint8))
    config = {"model_type": "convnext", "depths": [1, 1], "hidden_sizes": [8, 8], "num_stages": 2}
    (tmp_path / "CONVNEXT" / "config.json").write_text(json.dumps(config))
    return tmp_path


@pytest.mark.parametrize(("arguments", "words"), WRONG, ids=lambda value: str(value)[:50])
def test_wrong_input_is_one_line_and_nothing_is_written(folders, ask, arguments, words):
    arguments = [str(folders / word) if word.isupper() else word for word in arguments]
    answer = ask("scripts/pretrain.py", "--recipe", "digits", "--output_dir", folders / "run", *arguments)
    assert answer.status == 2
    assert re.fullmatch(rf"pretrain\.py: error: .*{words}.*\n", answer.err)
    assert not (folders / "run").exists()


@pytest.mark.slow
def test_libraries_add_nothing_to_the_line_of_an_error(folders, run_script):
    """The error is found after all libraries are imported; neither a warning nor a traceback joins it."""
    done = run_script(
        "scripts/pretrain.py", *f"--recipe digits --output_dir {folders}/run --dataset {folders}/EMPTY".split()
    )
    assert done.returncode == 2
    assert re.fullmatch(r"pretrain\.py: error: --dataset .*\n", done.stderr)


# Programs that take the place of SLURM's and of the launcher in scripts/pretrain.sbatch.
COMMANDS = {
    "scontrol": 'if [ "$1" = show ]; then printf "node%s\\n" 7 8; else echo "$@" >> "$RECORD/requeued"; fi',
    "srun": 'echo "$1" > "$RECORD/srun"; shift; SLURM_NODEID=1 exec "$@"',
    "accelerate": 'printf "%s\\n" "$@" > "$RECORD/launched"; kill -USR1 $$; eval "$LAUNCHER"; exit 1',
}


def submit(tmp_path, launcher, *words):
    """Run the batch script; `launcher` is what the launcher does. Return the process, and the requests to requeue."""
    for name, text in COMMANDS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    environment = {"SLURM_JOB_NODELIST": "node[7-8]", "SLURM_NNODES": "2", "SLURM_JOB_ID": "5"}
    environment |= {"SLURM_CPUS_PER_TASK": "64", "LAUNCHER": launcher}
    environment |= {"RECORD": str(tmp_path), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "scripts/pretrain.sbatch", *words], cwd=ROOT, env={**os.environ, **environment}, capture_output=True
    )
    requeued = tmp_path / "requeued"
    return done, requeued.read_text() if requeued.exists() else None


def test_a_job_that_has_saved_a_checkpoint_is_queued_again(tmp_path):
    run = tmp_path / "my run"
    done, requeued = submit(tmp_path, f"mkdir -p '{run}/checkpoints/step-5'", str(run), "--recipe", "a b")
    assert (done.returncode, requeued) == (1, "requeue 5\n")
    launched = (tmp_path / "launched").read_text().splitlines()
    assert launched[-5:] == ["scripts/pretrain.py", "--recipe", "a b", "--output_dir", str(run)]
    assert launched[:2] == ["launch", "--quiet"]
    flags = dict(zip(launched[2:-5:2], launched[3:-5:2], strict=True))
    assert flags == {
        "--config_file": "accelerate_configs/4x8gpu.yaml",
        "--num_machines": "2",
        "--num_processes": "16",
        "--machine_rank": "1",
        "--main_process_ip": "node7",
    }
    _, requeued = submit(tmp_path, f"mkdir -p '{run}/checkpoints/step-9'", str(run))
    assert requeued == "requeue 5\n" * 2


def test_a_job_has_eight_cores_for_each_gpu(tmp_path):
    words = (ROOT / "scripts" / "pretrain.sbatch").read_text().split()
    assert {"--gpus-per-node=8", "--cpus-per-task=64"} <= set(words)
    submit(tmp_path, "true", str(tmp_path / "run"))
    assert (tmp_path / "srun").read_text() == "--cpus-per-task=64\n"


def test_a_job_that_has_saved_nothing_or_is_complete_is_not_queued_again(tmp_path):
    run = tmp_path / "run"
    done, requeued = submit(tmp_path, "true", str(run))
    assert (done.returncode, requeued) == (1, None)
    _, requeued = submit(tmp_path, f"mkdir -p {run}/checkpoints/step-5; touch {run}/training.json", str(run))
    assert requeued is None
    done, requeued = submit(tmp_path, "true")
    assert (done.returncode, requeued) == (2, None)
    assert b"usage: sbatch" in done.stderr
