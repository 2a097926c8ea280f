"""The accelerate configurations and the checks of a launch, in this process and by real launches."""

import json
import math
import os
import socket
import types
from datetime import timedelta

import psutil
import pytest
import torch
from accelerate import Accelerator
from accelerate.commands.config.config_args import load_config_from_file
from helpers import ROOT, tiny, write_image
from safetensors.torch import load_file

from m2t_accel import pretrain
from m2t_accel.config.fields import ConfigurationError
from m2t_accel.config.recipes import build_config
from m2t_accel.distributed import launch as launch_module
from m2t_accel.distributed.launch import (
    LaunchRequest,
    check_launch,
    check_options,
    container_quota,
    limit_threads,
    num_cores,
    read_request,
    route_gloo,
    start_accelerator,
)
from m2t_accel.run import completion
from m2t_accel.run.trackers import scalars

CONFIGS = ROOT / "accelerate_configs"
EXPECTED = {  # processes, machines, on the CPU, mixed precision
    "cpu.yaml": (1, 1, True, "no"),
    "cpu2.yaml": (2, 1, True, "no"),
    "1gpu.yaml": (1, 1, False, "bf16"),
    "8gpu.yaml": (8, 1, False, "bf16"),
    "4x8gpu.yaml": (32, 4, False, "bf16"),
    "16x8gpu.yaml": (128, 16, False, "bf16"),
}


def test_every_configuration_is_tested():
    assert {path.name for path in CONFIGS.iterdir()} == set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_accelerate_reads_the_configuration(name):
    config = load_config_from_file(str(CONFIGS / name))
    assert (config.num_processes, config.num_machines, config.use_cpu, config.mixed_precision) == EXPECTED[name]
    # MULTI_CPU would start a single process, without a message.
    assert config.distributed_type == ("MULTI_GPU" if config.num_processes > 1 else "NO")


GRAPHS = {"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR", "ACCELERATE_DYNAMO_MODE": "reduce-overhead"}
TWO, EIGHT = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}, {"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "8"}


@pytest.mark.parametrize(
    ("environment", "num_devices", "requested"),
    [
        ({}, 0, LaunchRequest()),
        ({"MASTER_PORT": "29500"}, 0, LaunchRequest()),  # exported by some clusters
        ({}, 1, LaunchRequest(on_gpu=True)),
        ({**TWO, "CUDA_VISIBLE_DEVICES": "-1,-1"}, 0, LaunchRequest(2)),
        ({**TWO, "ACCELERATE_USE_CPU": "true"}, 0, LaunchRequest(2)),
        (EIGHT, 8, LaunchRequest(8, on_gpu=True)),
        ({"WORLD_SIZE": "32", "LOCAL_WORLD_SIZE": "8"}, 8, LaunchRequest(32, on_gpu=True)),
    ],
)
def test_a_launch_as_requested_is_accepted(environment, num_devices, requested):
    check_launch(environment, num_devices, requested)


@pytest.mark.parametrize(
    ("environment", "num_devices", "requested", "message"),
    [
        (EIGHT, 0, LaunchRequest(8, on_gpu=True), r"^8 processes .* has none: use .*cpu2\.yaml"),
        (EIGHT, 0, LaunchRequest(), r"^8 processes .* has none"),  # under another launcher
        ({}, 0, LaunchRequest(on_gpu=True), r"^1 process .* has none: use .*cpu\.yaml"),
        (EIGHT, 2, LaunchRequest(8, on_gpu=True), r"with 2 GPUs: add --num_processes 2, .*1gpu\.yaml"),
        ({}, 0, LaunchRequest(2), r"^2 processes .* one was started .*cpu2\.yaml"),
    ],
)
def test_another_launch_than_requested_is_refused(environment, num_devices, requested, message):
    with pytest.raises(ConfigurationError, match=message):
        check_launch(environment, num_devices, requested)


def test_processes_that_accelerate_does_not_join_are_refused(monkeypatch):
    Accelerator()  # fixes Accelerate's state: one process
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigurationError, match="2 processes were launched but Accelerate joined 1"):
        start_accelerator()


@pytest.mark.parametrize(
    ("arguments", "requested"),
    [
        (None, LaunchRequest()),
        (["train.py", "--epochs", "3"], LaunchRequest()),
        (["--num_processes", "4", "train.py"], LaunchRequest(4)),
        (["--config_file", str(CONFIGS / "cpu.yaml"), "train.py"], LaunchRequest(1)),
        (["--config_file", str(CONFIGS / "cpu.yaml"), "--num_processes", "2", "train.py"], LaunchRequest(2)),
        (["--config_file", str(CONFIGS / "cpu2.yaml"), "train.py"], LaunchRequest(2)),
        (["--config_file", str(CONFIGS / "1gpu.yaml"), "--cpu", "train.py"], LaunchRequest(1)),
        (["--config_file", str(CONFIGS / "4x8gpu.yaml"), "train.py"], LaunchRequest(32, on_gpu=True)),
        (["--config_file", "/no/such/file.yaml", "train.py"], LaunchRequest()),
        (["--cpu", "--gradient_accumulation_steps", "4", "train.py"], LaunchRequest(accumulation=4)),
    ],
)
def test_the_request_is_read_from_the_launch_command(arguments, requested):
    assert read_request(arguments) == requested


def config_of(batch_size, device_batch_size):
    return build_config({"batch_size": batch_size, "device_batch_size": device_batch_size})


@pytest.mark.parametrize(
    ("environment", "num_devices", "request_", "config"),
    [
        ({}, 0, LaunchRequest(), None),
        ({"ACCELERATE_USE_FSDP": "false", "ACCELERATE_MIXED_PRECISION": "bf16"}, 0, LaunchRequest(), None),
        ({"ACCELERATE_MIXED_PRECISION": "fp16"}, 1, LaunchRequest(), None),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, 0, LaunchRequest(), None),  # it works
        ({**GRAPHS, "ACCELERATE_DYNAMO_BACKEND": "no"}, 1, LaunchRequest(), config_of(64, 32)),
        (GRAPHS, 1, LaunchRequest(), config_of(64, 64)),
        (GRAPHS, 0, LaunchRequest(), config_of(64, 32)),  # CPUs have no CUDA graphs
        (TWO, 0, LaunchRequest(2, accumulation=4), config_of(64, 8)),  # what happens anyway
    ],
)
def test_options_of_the_launch_that_work_are_accepted(environment, num_devices, request_, config):
    check_options(environment, num_devices, request_, config)


@pytest.mark.parametrize(
    ("environment", "num_devices", "request_", "config", "message"),
    [
        ({"ACCELERATE_USE_FSDP": "true"}, 8, LaunchRequest(), None, r"^FSDP .* not supported.*8gpu\.yaml"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, 0, LaunchRequest(), None, r"^DeepSpeed .* not supported"),
        ({"ACCELERATE_USE_MEGATRON_LM": "1"}, 0, LaunchRequest(), None, r"^Megatron-LM .* not supported"),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, 0, LaunchRequest(), None, r"^a parallelism_config"),
        ({"ACCELERATE_MIXED_PRECISION": "fp16"}, 0, LaunchRequest(), None, "fp16 .*on a CPU: one of no, bf16$"),
        ({"ACCELERATE_MIXED_PRECISION": "fp16", "ACCELERATE_USE_CPU": "true"}, 1, LaunchRequest(), None, "on a CPU"),
        ({"ACCELERATE_MIXED_PRECISION": "fp8"}, 1, LaunchRequest(), None, "fp8 .*on a GPU: one of no, bf16, fp16$"),
        ({"ACCELERATE_MIXED_PRECISION": "half"}, 0, LaunchRequest(), None, "half is not supported"),
        (GRAPHS, 1, LaunchRequest(), config_of(64, 32), "^--dynamo_mode reduce-overhead .* several sub-batches"),
        ({}, 0, LaunchRequest(accumulation=4), config_of(64, 64), "type --batch_size 256 --device_batch_size 64"),
        (TWO, 0, LaunchRequest(2, accumulation=4), config_of(64, 32), "--batch_size 256 --device_batch_size 32"),
        ({}, 0, LaunchRequest(accumulation=4), None, "leave it out$"),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "2"}, 0, LaunchRequest(), config_of(64, 64), "--batch_size 128"),
    ],
)
def test_options_of_the_launch_that_would_be_ignored_or_fail_are_refused(
    environment, num_devices, request_, config, message
):
    with pytest.raises(ConfigurationError, match=message) as caught:
        check_options(environment, num_devices, request_, config)
    assert "\n" not in str(caught.value)


def test_an_option_that_accelerate_refuses_is_one_line(monkeypatch):
    def refuse(**options):
        raise ImportError("it is not\ninstalled")

    monkeypatch.setattr(launch_module, "Accelerator", refuse)
    with pytest.raises(ConfigurationError, match=r"^accelerate cannot start .*ImportError: it is not installed.*cpu"):
        start_accelerator()


@pytest.mark.parametrize(
    ("backend", "minutes", "expected"), [(None, 2, 2), ("no", 2, 2), ("INDUCTOR", 2, 30), ("inductor", 45, 45)]
)
def test_a_process_that_compiles_is_not_lost(monkeypatch, backend, minutes, expected):
    monkeypatch.delenv("ACCELERATE_DYNAMO_BACKEND", raising=False)
    if backend is not None:
        monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", backend)
    config = build_config({"recipe": "digits", "collective_timeout": minutes})
    assert launch_module.collective_timeout(config) == timedelta(minutes=expected)


@pytest.mark.parametrize(
    ("words", "arguments"),
    [
        (["bash"], None),
        (["python", "/usr/bin/accelerate", "launch", "--cpu", "train.py"], ["--cpu", "train.py"]),
        (["python", "/usr/bin/accelerate-launch", "--cpu", "train.py"], ["--cpu", "train.py"]),
        (["python", "-m", "accelerate.commands.launch", "--cpu", "train.py"], ["--cpu", "train.py"]),
        (psutil.AccessDenied(), None),
    ],
)
def test_the_launcher_is_recognized_by_its_command(monkeypatch, words, arguments):
    def cmdline(process):
        if isinstance(words, Exception):
            raise words
        return words

    monkeypatch.setattr(psutil.Process, "cmdline", cmdline)
    assert launch_module.launcher_arguments() == arguments


def test_a_run_records_the_command_of_its_launch(monkeypatch):
    monkeypatch.setattr(launch_module, "launcher_arguments", lambda: ["--config_file", "my cpu2.yaml", "train.py"])
    assert launch_module.command() == "accelerate launch --config_file 'my cpu2.yaml' train.py"


def test_gloo_uses_the_interface_that_leads_to_the_first_machine(monkeypatch):
    networks = {"node1": "10.0.0.2", "node7": "127.0.0.1", launch_module.OUTSIDE: "192.168.0.2"}
    interfaces = {"lo": "127.0.0.1", "eth0": "192.168.0.2", "ib0": "10.0.0.2"}
    addresses = {name: [types.SimpleNamespace(address=address)] for name, address in interfaces.items()}
    monkeypatch.setattr(launch_module, "source_address", lambda host: networks[host])
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: addresses)
    several = {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "node1"}
    for given, interface in (
        (several, "ib0"),
        ({**several, "MASTER_ADDR": "node7"}, "eth0"),  # on node7, as Debian sets it up
        ({**several, "GLOO_SOCKET_IFNAME": "eth7"}, "eth7"),
        ({**several, "WORLD_SIZE": "2"}, None),  # one machine
    ):
        environment = dict(given)
        route_gloo(environment)
        assert environment.get("GLOO_SOCKET_IFNAME") == interface


def test_gloo_uses_the_loopback_interface_without_another_network(monkeypatch):
    def connect(probe, address):
        if address[0] == launch_module.OUTSIDE:
            raise OSError(101, "Network is unreachable")
        original(probe, address)

    original = socket.socket.connect
    monkeypatch.setattr(socket.socket, "connect", connect)
    environment = {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    route_gloo(environment)
    assert environment["GLOO_SOCKET_IFNAME"] == "lo"


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({}, math.inf),
        ({"cpu.max": "max 100000"}, math.inf),
        ({"cpu.max": "200000 100000"}, 2.0),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, math.inf),
        ({"cpu/cpu.cfs_quota_us": "50000", "cpu/cpu.cfs_period_us": "100000"}, 0.5),
    ],
)
def test_the_quota_of_a_container_limits_the_cores(files, quota, tmp_path, monkeypatch):
    (tmp_path / "cpu").mkdir()
    for name, content in files.items():
        (tmp_path / name).write_text(content + "\n")
    monkeypatch.setattr(launch_module, "CGROUPS", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)), raising=False)
    assert container_quota(tmp_path) == quota
    assert num_cores() == {math.inf: 8, 2.0: 2, 0.5: 1}[quota]


@pytest.mark.parametrize(
    ("arguments", "environment", "num_processes", "image_size", "num_threads"),
    [
        (None, {}, 1, None, 6),
        (None, {}, 1, 64, 6),
        (None, {}, 1, 32, 1),
        (None, {}, 4, 224, 1),
        (None, {"OMP_NUM_THREADS": "16"}, 1, 32, 16),
        (["train.py"], {}, 2, 224, 3),  # the launcher has set OMP_NUM_THREADS=16
        (["train.py"], {"OMP_NUM_THREADS": "16"}, 1, 224, 16),
        (["--num-cpu-threads-per-process", "16", "train.py"], {}, 1, 224, 16),
    ],
)
def test_there_are_no_more_threads_than_cores_unless_the_user_asks(
    arguments, environment, num_processes, image_size, num_threads, monkeypatch
):
    """On 6 cores, where torch or the launcher has chosen 16 threads; the environment is that of the launcher."""
    monkeypatch.setattr(launch_module, "num_cores", lambda: 6)
    monkeypatch.setattr(launch_module, "launcher_arguments", lambda: arguments)
    monkeypatch.setattr(psutil.Process, "environ", lambda process: environment)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(num_processes))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for name, value in ({"OMP_NUM_THREADS": "16"} if arguments else environment).items():
        monkeypatch.setenv(name, value)
    chosen = fake_threads(monkeypatch, 16)
    limit_threads(image_size)
    assert chosen[-1] == num_threads


def fake_threads(monkeypatch, number):
    """Let torch only record its number of threads. Return the record."""
    chosen = [number]
    monkeypatch.setattr(launch_module, "_num_threads", (0, 0))
    monkeypatch.setattr(torch, "get_num_threads", lambda: chosen[-1])
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    return chosen


def test_the_threads_of_a_run_do_not_depend_on_the_run_before_it(monkeypatch):
    monkeypatch.setattr(launch_module, "num_cores", lambda: 6)
    monkeypatch.setattr(launch_module, "launcher_arguments", lambda: None)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    chosen = fake_threads(monkeypatch, 16)
    for image_size, number in ((32, 1), (32, 1), (224, 6), (None, 6)):
        limit_threads(image_size)
        assert chosen[-1] == number
    torch.set_num_threads(2)  # by the user
    limit_threads(224)
    assert chosen[-1] == 2


def launch(run_script, name, *arguments):
    return run_script("-m", "accelerate.commands.launch", "--config_file", CONFIGS / name, *arguments)


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_two_processes_equal_one_with_two_accumulation_steps(run_script, tmp_path, float64, monkeypatch):
    """SGD and LARS, float64, 11 steps: losses and the teacher's weights and statistics to 1e-9."""
    monkeypatch.setattr(completion, "draw_curves", lambda *arguments, **options: None)

    def settings(folder, optimizer):
        return tiny(
            folder / optimizer,
            optimizer=optimizer,
            learning_rate_per_256={"sgd": 0.1, "lars": 1.0}[optimizer],
            max_images=352,
            batch_size=32,
            device_batch_size=16,
            image_size=16,
            epochs=1,
            warmup_epochs=0.2,
            evaluate_every=0,
        )

    one, two = tmp_path / "one", tmp_path / "two"
    for optimizer in ("sgd", "lars"):
        (tmp_path / f"{optimizer}.json").write_text(json.dumps(settings(two, optimizer)))
    done = run_script("tests/train_in_float64.py", tmp_path / "sgd.json", tmp_path / "lars.json")
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr, done.stderr
    for optimizer in ("sgd", "lars"):
        teacher = pretrain(build_config(settings(one, optimizer))).state_dict()
        rows = metrics(one / optimizer), metrics(two / optimizer)
        losses = [[row["loss"] for row in each if "loss" in row] for each in rows]
        assert len(losses[0]) == 11
        assert losses[1] == pytest.approx(losses[0], rel=0, abs=1e-9)
        clock = ("seconds", "images_per_second", "data_wait")
        for ours, theirs in zip(*rows, strict=True):  # the monitor sees the same run, however it is divided
            assert ("layers" in ours) == (ours["step"] in (1, 2, 4, 8, 11))
            ours, theirs = ({k: v for k, v in scalars(row).items() if k not in clock} for row in (ours, theirs))
            assert theirs == pytest.approx(ours, rel=1e-6, abs=1e-9)
        first, second = (load_file(two / optimizer / f"teacher-{rank}-of-2.safetensors") for rank in (0, 1))
        assert any("running_var" in name for name in teacher)
        assert first.keys() == second.keys() == teacher.keys()
        for name, tensor in teacher.items():
            assert first[name].equal(second[name]), name
            torch.testing.assert_close(first[name], tensor, rtol=0, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.slow
def test_more_processes_than_the_file_starts_is_an_error(run_script, tmp_path):
    """`--num_processes 2` with cpu.yaml starts one process, without a message of Accelerate."""
    done = launch(
        run_script, "cpu.yaml", "--num_processes", "2", "scripts/pretrain.py", "--output_dir", tmp_path / "run"
    )
    assert done.returncode != 0
    assert "2 processes were requested but one was started" in done.stderr
    assert "cpu2.yaml" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.skipif(torch.accelerator.is_available(), reason="needs a machine without GPUs")
def test_the_8_gpu_file_without_gpus_is_one_error(run_script, tmp_path):
    """Printed by the first process alone, also if it starts seconds after the other, as on a busy machine."""
    script = tmp_path / "pretrain.py"
    script.write_text(
        "import os, pathlib, runpy, time\n"
        "rank = os.environ['LOCAL_RANK']\n"
        "time.sleep(5 if rank == '0' else 0)\n"
        "end = os._exit\n"
        "def record(status):\n"  # not called in a process that the launcher ends
        "    pathlib.Path(__file__).with_name(f'printed-{rank}').touch()\n"
        "    end(status)\n"
        "os._exit = record\n"
        "runpy.run_path('scripts/pretrain.py', run_name='__main__')\n"
    )
    done = launch(
        run_script,
        "8gpu.yaml",
        *("--num_processes", "2", script, "--batch_size", "64", "--device_batch_size", "32"),
        *("--output_dir", tmp_path / "run"),
    )
    assert done.returncode != 0
    assert done.stderr.count("pretrain.py: error: 2 processes were started for GPUs") == 1
    assert [file.name for file in tmp_path.glob("printed-*")] == ["printed-0"]
    assert "cpu2.yaml" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_two_processes_print_an_error_in_the_data_once(run_script, tmp_path):
    """Both find it; one prints it, and none is left in a collective call."""
    (tmp_path / "empty").mkdir()
    done = launch(
        run_script,
        "cpu2.yaml",
        *("scripts/pretrain.py", "--recipe", "digits", "--device_batch_size", "32", "--dataset", tmp_path / "empty"),
        *("--output_dir", tmp_path / "run"),
    )
    assert done.returncode != 0
    assert done.stderr.count("pretrain.py: error: ") == 1
    assert "no image" in done.stderr
    assert "[rank" not in done.stderr, done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_too_many_broken_images_stop_two_processes_with_one_line(run_script, tmp_path):
    """Each process finds some of them; both count all of them, and stop together."""
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
    assert done.stderr.count("pretrain.py: error: 16 of 32 images") == 1
    assert "[rank" not in done.stderr, done.stderr
    assert len((tmp_path / "run" / "bad_images.jsonl").read_text().splitlines()) == 16
