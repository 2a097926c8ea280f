"""The scripts as a user types them: help, recipes, mistakes."""

import ast
import json
import os
import runpy
import subprocess
import sys
import time

import cv2
import numpy as np
import pytest
from helpers import ROOT

from m2t_accel.config.pretrain import PretrainConfig

SCRIPTS = sorted((ROOT / "scripts").glob("*.py"))


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_is_a_docstring_with_the_command_and_a_main(path):
    tree = ast.parse(path.read_text())
    assert f"scripts/{path.name}" in ast.get_docstring(tree)
    assert [node.name for node in tree.body if isinstance(node, ast.FunctionDef)] == ["main"]


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["--help"], 0, "--learning_rate_per_256"),
        (["--recipe", "list"], 0, "128x2080Ti-b4096-300ep"),
        (["--epoch", "3"], 2, "unknown flag --epoch, did you mean --epochs?"),
    ],
)
def test_quick_answers(run_script, arguments, status, words):
    """In under a second, on the better of three tries: the machine may be busy, but torch takes 2.5 s at its best."""
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        done = run_script("scripts/pretrain.py", *arguments)
        seconds.append(time.perf_counter() - start)
        assert done.returncode == status
        assert words in done.stdout + done.stderr
    assert min(seconds) < 1.0, seconds


def test_help_names_every_setting_and_explains_it(run_script):
    text = run_script("scripts/pretrain.py", "--help").stdout
    for name in PretrainConfig.__dataclass_fields__:
        assert f"--{name}" in text


# A mistake of each kind, through the script's main: one line, status 2, nothing written.
MISTAKES = [
    (["--recipe", "digit"], "did you mean digits?"),
    (["--epoch", "3"], "did you mean --epochs?"),
    (["--epochs", "ten"], "a whole number is needed"),
    (["--epochs", "0"], "out of range"),
    (["--batch_size", "100", "--device_batch_size", "32"], "use --batch_size 96 or 128"),
    (["--dataset", "/no/such/folder"], "no such file or folder"),
    (["--dataset", "EMPTY"], "holds no image: looked at any depth for *.parquet"),
    (["--dataset", "UNLABELLED"], "fewer than one batch of 64: use --batch_size 4"),
    (
        ["--dataset", "UNLABELLED", "--batch_size", "2", "--evaluate_every", "1"],
        "has no labels (class folders, or a column named by --label_column); found:",
    ),
    (["--encoder", "CONVNEXT"], "ConvNextModel has no BatchNorm"),
    (["--output_dir", "/proc/run"], "cannot be written"),
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


@pytest.mark.parametrize(("arguments", "words"), MISTAKES, ids=lambda value: str(value)[:50])
def test_a_mistake_is_one_line(folders, monkeypatch, capfd, arguments, words):
    arguments = [str(folders / word) if word.isupper() else word for word in arguments]
    script = ROOT / "scripts" / "pretrain.py"
    monkeypatch.setattr(
        sys, "argv", [str(script), "--recipe", "digits", "--output_dir", str(folders / "run"), *arguments]
    )
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(script), run_name="__main__")
    assert caught.value.code == 2
    error = capfd.readouterr().err
    assert error.startswith("pretrain.py: error: ")
    assert words in error
    assert error.count("\n") == 1
    assert not (folders / "run").exists()


@pytest.mark.slow
def test_a_mistake_that_only_the_data_shows_is_one_line_in_a_process_of_its_own(folders, run_script):
    """No warning of a library, no traceback: the whole of standard error is the line."""
    done = run_script(
        "scripts/pretrain.py", *f"--recipe digits --output_dir {folders}/run --dataset {folders}/EMPTY".split()
    )
    assert done.returncode == 2
    assert done.stderr.startswith("pretrain.py: error: --dataset ")
    assert done.stderr.count("\n") == 1
    assert not (folders / "run").exists()


# --- scripts/pretrain.sbatch, between commands that stand for those of SLURM and the launcher

COMMANDS = {
    "scontrol": 'if [ "$1" = show ]; then printf "node%s\\n" 7 8; else echo "$@" >> "$RECORD/requeued"; fi',
    "srun": 'SLURM_NODEID=1 exec "$@"',
    "accelerate": 'printf "%s\\n" "$@" > "$RECORD/launched"; kill -USR1 $$; eval "$LAUNCHER"; exit 1',
}


def submit(tmp_path, launcher, *words):
    for name, text in COMMANDS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    environment = {"SLURM_JOB_NODELIST": "node[7-8]", "SLURM_NNODES": "2", "SLURM_JOB_ID": "5", "LAUNCHER": launcher}
    environment |= {"RECORD": str(tmp_path), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "scripts/pretrain.sbatch", *words], cwd=ROOT, env={**os.environ, **environment}, capture_output=True
    )
    requeued = tmp_path / "requeued"
    return done, requeued.read_text() if requeued.exists() else None


def test_a_job_that_has_saved_is_queued_again(tmp_path):
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
    done, requeued = submit(tmp_path, f"mkdir -p '{run}/checkpoints/step-9'", str(run))
    assert requeued == "requeue 5\n" * 2


def test_a_job_that_has_saved_nothing_or_is_complete_is_not_queued_again(tmp_path):
    run = tmp_path / "run"
    done, requeued = submit(tmp_path, "true", str(run))
    assert (done.returncode, requeued) == (1, None)
    _, requeued = submit(tmp_path, f"mkdir -p {run}/checkpoints/step-5; touch {run}/training.json", str(run))
    assert requeued is None
    done, requeued = submit(tmp_path, "true")
    assert (done.returncode, requeued) == (2, None)
    assert b"usage: sbatch scripts/pretrain.sbatch FOLDER" in done.stderr


@pytest.mark.parametrize("arguments", [["--help"], ["--recipe", "list"], ["--epoch", "3"], ["--epochs", "0"]])
def test_quick_answers_import_nothing_heavy(run_script, arguments):
    script = (
        "import runpy, sys\n"
        f"sys.argv = ['scripts/pretrain.py', *{arguments!r}]\n"
        "try:\n    runpy.run_path('scripts/pretrain.py', run_name='__main__')\n"
        "except SystemExit:\n    pass\n"
        "print('heavy:', sorted({'torch', 'transformers', 'datasets', 'numpy', 'accelerate'} & set(sys.modules)))"
    )
    done = run_script("-c", script)
    assert done.stdout.splitlines()[-1] == "heavy: []", done.stderr
