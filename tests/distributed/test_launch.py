"""The accelerate configurations: what they promise, and that a launch keeps it."""

import json

import pytest
import torch
from accelerate import Accelerator
from accelerate.commands.config.config_args import load_config_from_file
from helpers import ROOT, tiny, write_image
from safetensors.torch import load_file

from m2t_accel.config.fields import ConfigurationError
from m2t_accel.distributed.launch import Promise, check_launch, read_promise
from m2t_accel.distributed.processes import check_same_images

CONFIGS = ROOT / "accelerate_configs"
PROMISED = {  # processes, machines, on the CPU, mixed precision
    "cpu.yaml": (1, 1, True, "no"),
    "cpu2.yaml": (2, 1, True, "no"),
    "1gpu.yaml": (1, 1, False, "bf16"),
    "8gpu.yaml": (8, 1, False, "bf16"),
    "4x8gpu.yaml": (32, 4, False, "bf16"),
    "16x8gpu.yaml": (128, 16, False, "bf16"),
}


def test_these_are_all_files():
    assert {path.name for path in CONFIGS.iterdir()} == set(PROMISED)


@pytest.mark.parametrize("name", PROMISED)
def test_accelerate_reads_what_the_file_promises(name):
    config = load_config_from_file(str(CONFIGS / name))
    assert (config.num_processes, config.num_machines, config.use_cpu, config.mixed_precision) == PROMISED[name]
    # MULTI_CPU starts one process, in silence: several processes need the type that launches them.
    assert config.distributed_type == ("MULTI_GPU" if config.num_processes > 1 else "NO")


# --- launches for real


def launch(run_script, name, *arguments, environment=None):
    return run_script(
        *("-m", "accelerate.commands.launch", "--config_file", CONFIGS / name, *arguments), environment=environment
    )


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


HASTE = """
import collections, os, sys, tempfile
from datetime import timedelta
import torch
from m2t_accel.distributed.processes import control_group, create_groups, groups, destroy_process_group

torch.set_num_threads(1)
sys.setswitchinterval(1000)  # gloo's threads get the interpreter only where it is left to them
os.environ.update(ACCELERATE_USE_CPU="1", WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1")
statuses = collections.Counter()
for _ in range(6):
    path, children = tempfile.mktemp(), []
    for rank in range(2):
        children.append(os.fork())
        if children[-1] == 0:
            store = torch.distributed.FileStore(path, 2)
            torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
            create_groups(timedelta(seconds=60))
            for group in (control_group(), groups().patient, None):
                torch.distributed.all_reduce(torch.ones(1000), group=group)
            destroy_process_group()
            sys.exit()
    statuses.update(os.waitpid(child, 0)[1] for child in children)
print(dict(statuses))
"""


@pytest.mark.slow
def test_a_process_that_ends_after_a_call_is_not_aborted(run_script):
    """With torch's destroy_process_group alone, one of five is."""
    done = run_script("-c", HASTE)
    assert (done.stdout, done.stderr) == ("{0: 12}\n", "")


@pytest.mark.slow
def test_two_processes_equal_one_with_two_accumulation_steps(run_script, tmp_path):
    """SGD and LARS, float64, 11 steps: losses and the teacher's weights and history to 1e-9."""
    paths = {}
    for optimizer, rate in (("sgd", 0.1), ("lars", 1.0)):
        for number in (1, 2):
            settings = tiny(
                tmp_path / f"{optimizer}-{number}",
                optimizer=optimizer,
                learning_rate_per_256=rate,
                batch_size=128,
                device_batch_size=64,
                image_size=16,
                epochs=1,
                warmup_epochs=0.2,
                evaluate_every=1,
            )
            path = tmp_path / f"{optimizer}-{number}.json"
            path.write_text(json.dumps(settings))
            paths[optimizer, number] = path
    for number, name in ((1, "cpu.yaml"), (2, "cpu2.yaml")):
        done = launch(run_script, name, "tests/train_in_float64.py", paths["sgd", number], paths["lars", number])
        assert done.returncode == 0, done.stderr
        assert "Warning" not in done.stderr, done.stderr
        assert f"# accelerate launch --config_file {CONFIGS / name} tests/" in (
            (tmp_path / f"sgd-{number}" / "config.yaml").read_text()
        )
    for optimizer in ("sgd", "lars"):
        one, two = tmp_path / f"{optimizer}-1", tmp_path / f"{optimizer}-2"
        losses = [[row["loss"] for row in metrics(folder) if "loss" in row] for folder in (one, two)]
        assert len(losses[0]) == len(losses[1]) == 11
        assert max(abs(a - b) for a, b in zip(*losses, strict=True)) < 1e-9
        assert metrics(one)[-1]["knn_top1"] == metrics(two)[-1]["knn_top1"]
        teacher = load_file(one / "teacher-0-of-1.safetensors")
        assert any("running_var" in name for name in teacher)
        for rank in (0, 1):
            other = load_file(two / f"teacher-{rank}-of-2.safetensors")
            assert other.keys() == teacher.keys()
            for name, tensor in teacher.items():
                torch.testing.assert_close(other[name], tensor, rtol=0, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.slow
def test_more_processes_than_the_file_starts_is_an_error(run_script, tmp_path):
    """`--num_processes 2` beside cpu.yaml starts one process, in silence."""
    done = launch(
        run_script, "cpu.yaml", "--num_processes", "2", "scripts/pretrain.py", "--output_dir", tmp_path / "run"
    )
    assert done.returncode != 0
    assert "2 processes were asked for but one was started" in done.stderr
    assert "cpu2.yaml" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.skipif(torch.accelerator.is_available(), reason="needs a machine without GPUs")
def test_the_8_gpu_file_without_gpus_is_an_error(run_script, tmp_path):
    done = launch(
        run_script,
        "8gpu.yaml",
        *("--num_processes", "2", "scripts/pretrain.py", "--batch_size", "64", "--device_batch_size", "32"),
        *("--output_dir", tmp_path / "run"),
    )
    assert done.returncode != 0
    assert done.stderr.count("pretrain.py: error: 2 processes were started for GPUs, but this machine has none") == 1
    assert "cpu2.yaml" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_mistake_in_the_data_is_one_line_of_two_processes(run_script, tmp_path):
    """Each finds it; one says it, and none is left in a collective call."""
    (tmp_path / "empty").mkdir()
    done = launch(
        run_script,
        "cpu2.yaml",
        *("scripts/pretrain.py", "--recipe", "digits", "--device_batch_size", "32", "--dataset", tmp_path / "empty"),
        *("--output_dir", tmp_path / "run"),
    )
    assert done.returncode != 0
    assert done.stderr.count("pretrain.py: error: ") == 1
    assert "holds no image" in done.stderr
    assert "[rank" not in done.stderr, done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_too_many_broken_images_stop_two_processes_with_one_line(run_script, tmp_path):
    """Each process meets some of them; all know of all, and stop together."""
    for i in range(32):
        write_image(tmp_path / "images" / f"{i}.png")
        if i % 2:
            (tmp_path / "images" / f"{i}.png").write_text("not an image")
    done = launch(
        run_script,
        "cpu2.yaml",
        *("scripts/pretrain.py", "--recipe", "digits", "--dataset", tmp_path / "images", "--log_every", 2),
        *("--batch_size", 16, "--device_batch_size", 8, "--output_dir", tmp_path / "run", "--num_workers", 0),
    )
    assert done.returncode != 0
    assert done.stderr.count("pretrain.py: error: 16 of 32 images cannot be decoded, more than the 10 that") == 1
    assert "[rank" not in done.stderr, done.stderr
    assert len((tmp_path / "run" / "bad_images.jsonl").read_text().splitlines()) == 16


TWO, EIGHT = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}, {"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "8"}


@pytest.mark.parametrize(
    ("environment", "num_devices", "promise", "message"),
    [
        ({}, 0, Promise(), None),
        ({"MASTER_PORT": "29500"}, 0, Promise(), None),  # as clusters export it
        ({}, 1, Promise(on_gpu=True), None),
        ({**TWO, "CUDA_VISIBLE_DEVICES": "-1,-1"}, 0, Promise(2), None),
        ({**TWO, "ACCELERATE_USE_CPU": "true"}, 0, Promise(2), None),
        (EIGHT, 8, Promise(8, on_gpu=True), None),
        ({"WORLD_SIZE": "32", "LOCAL_WORLD_SIZE": "8"}, 8, Promise(32, on_gpu=True), None),
        (EIGHT, 0, Promise(8, on_gpu=True), "8 processes were started for GPUs, but this machine has none: use"),
        ({}, 0, Promise(on_gpu=True), r"1 process was started for GPUs, but this machine has none: use .*cpu\.yaml"),
        (EIGHT, 2, Promise(8, on_gpu=True), r"with 2 GPUs: add --num_processes 2, or use accel.*1gpu\.yaml"),
        ({}, 0, Promise(2), r"2 processes were asked for but one was started .*cpu2\.yaml"),
    ],
)
def test_a_launch_is_what_was_promised(environment, num_devices, promise, message):
    if message is None:
        check_launch(environment, num_devices, promise)
    else:
        with pytest.raises(ConfigurationError, match=message):
            check_launch(environment, num_devices, promise)


@pytest.mark.parametrize(
    ("words", "promise"),
    [
        (None, Promise()),
        (["train.py", "--epochs", "3"], Promise()),
        (["--num_processes", "4", "train.py"], Promise(4)),
        (["--config_file", str(CONFIGS / "cpu.yaml"), "train.py"], Promise(1)),
        (["--config_file", str(CONFIGS / "cpu.yaml"), "--num_processes", "2", "train.py"], Promise(2)),
        (["--config_file", str(CONFIGS / "cpu2.yaml"), "train.py"], Promise(2)),
        (["--config_file", str(CONFIGS / "4x8gpu.yaml"), "train.py"], Promise(32, on_gpu=True)),
        (["--config_file", "/no/such/file.yaml", "train.py"], Promise()),
    ],
)
def test_what_a_launch_command_promises(words, promise):
    assert read_promise(words) == promise


def test_machines_with_different_images_are_refused(monkeypatch):
    check_same_images(Accelerator(), "digits: 1,437 images", "abc")
    monkeypatch.setattr("m2t_accel.distributed.processes.gather_to_all", lambda found: [found, "elsewhere: 3 images"])
    with pytest.raises(
        ConfigurationError, match=r"different images \(digits: 1,437 images \[abc\]; but elsewhere elsewhere: 3 images"
    ):
        check_same_images(Accelerator(), "digits: 1,437 images", "abc")
