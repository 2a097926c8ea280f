"""Slow tests of runs that are stopped, killed, moved and cut off, with real processes, launches and machines."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import survive
from helpers import tiny, write_tar
from loopback_hub import loopback_hub
from survive import read_until, trainers_of

from m2t_accel.run.checkpoint import list_checkpoints

pytestmark = pytest.mark.slow


def test_a_killed_run_equals_a_run_that_was_not_killed(tmp_path):
    """Kill a run on two processes twice, and resume it on one.

    `python tests/survive.py kills` does the same for longer, and on one process.
    """
    source = survive.streamed_digits(tmp_path / "set", as_pixels=True)
    found = survive.kills(tmp_path, (2, 2, 1), source, epochs=7)
    assert found["kills"] == 2
    assert found["in saves"] >= 1
    assert found["tensors"] > 150
    assert found["different"] == []
    assert found["metrics differ by"] <= 1e-6
    assert (found["lost"], found["repeated"]) == (0, 0)


def test_killed_runs_on_three_and_four_processes_equal_runs_that_were_not_killed(run_script):
    """The same command kills more of them; a process of its own has the modules of the runs, but no threads."""
    done = run_script("tests/survive.py", "short", "--num_processes", 3, 4, "--kills", 1)
    assert len(re.findall(survive.ALL_EQUAL, done.stdout)) == 2, done.stdout + done.stderr


def test_a_streamed_hub_dataset_shows_the_same_images_on_any_number_of_processes(tmp_path, monkeypatch):
    """A Hub that does not answer ends a run on two processes. It is resumed on one, killed, and resumed on two.

    It shows what an unbroken run on one process shows.
    """
    folder = tmp_path / "hub" / "someone" / "tars"
    folder.mkdir(parents=True)
    for shard, number in enumerate((64, 60, 70, 66, 50, 74)):
        write_tar(folder / f"train-{shard:04}.tar", 100 * shard, number)
    with loopback_hub(tmp_path / "hub") as hub:
        environment = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        for name, value in {**environment, "HF_HOME": str(tmp_path / "home")}.items():
            monkeypatch.setenv(name, value)
        arguments = [*survive.DIGITS, "--dataset", "someone/tars", "--streaming", "--images_per_epoch", 384]
        arguments += ["--epochs", 12, "--checkpoint_every", "3steps", "--num_workers", 1]
        records, runs = ([tmp_path / f"{name}-{kind}" for name in ("whole", "broken")] for kind in ("record", "run"))
        survive.run(survive.command(records[0], runs[0], 1, arguments))
        process = survive.start(survive.command(records[1], runs[1], 2, arguments))
        wait_for(runs[1] / "checkpoints" / "step-9")
        hub.fails = ("train-", 404)  # the Hub's own library repeats other errors for half a minute
        printed, _ = process.communicate(timeout=120)
        assert (
            len(re.findall(r"error: the shard hf://.*/train-000\d\.tar cannot be read .* resumes from", printed)) == 1
        )
        (checkpoint, *_) = list_checkpoints(runs[1] / "checkpoints")
        hub.fails = ("", 200)
        process = survive.start(survive.command(records[1], runs[1], 1, arguments))
        step = int(checkpoint.name.removeprefix("step-"))
        assert f"resumes from step {step} of 72" in read_until(process, "resumes from")
        wait_for(runs[1] / "checkpoints" / f"step-{step + 6}")
        process.kill()
        process.communicate(timeout=120)
        survive.run(survive.command(records[1], runs[1], 2, arguments))
    assert survive.lost_and_repeated(records[1], records[0]) == (0, 0)
    whole, broken = map(survive.metrics, runs)
    assert survive.largest_difference(whole, broken) <= 1e-6


def pretrain_command(folder, *launch, **settings):
    flags = [str(word) for name, value in tiny(folder, **settings).items() for word in (f"--{name}", value)]
    return [sys.executable, *launch, "scripts/pretrain.py", *flags]


LAUNCH = ("-m", "accelerate.commands.launch", "--quiet", "--config_file")


def test_a_signal_to_one_of_two_processes_ends_both_and_the_same_command_resumes(tmp_path):
    words = pretrain_command(
        *(tmp_path / "run", *LAUNCH, "accelerate_configs/cpu2.yaml"), epochs=200, checkpoint_every="never"
    )
    process = survive.start(words)
    read_until(process, "epoch 0: ")
    trainers = trainers_of(process)
    assert len(trainers) == 2
    os.kill(trainers[1], signal.SIGUSR1)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    step = int(re.search(r"SIGUSR1, after step (\d+) of 1000", printed)[1])
    assert re.search(r"exitcode\s*: 75", printed), printed
    assert [path.name for path in list_checkpoints(tmp_path / "run" / "checkpoints")] == [f"step-{step}"]
    process = survive.start(words)
    assert f"resumes from step {step} of 1000" in read_until(process, "resumes from")
    process.send_signal(signal.SIGTERM)  # to the launcher, as a scheduler does
    printed, _ = process.communicate(timeout=60)
    assert "SIGTERM, after step" in printed
    header = (tmp_path / "run" / "config.yaml").read_text()
    assert "# accelerate launch --quiet --config_file accelerate_configs/cpu2.yaml scripts/pretrain.py" in header


# The loss of process 1 is not finite in its second step.
NOT_FINITE = """
import os, runpy
from m2t_accel import step

loss, calls = step.momentum_teacher_loss, []

def break_step_2(*arguments, **options):
    calls.append(1)
    return loss(*arguments, **options) * (float("nan") if len(calls) == 2 else 1.0)

if os.environ["RANK"] == "1":
    step.momentum_teacher_loss = break_step_2
runpy.run_path("scripts/pretrain.py", run_name="__main__")
"""


def test_a_loss_that_is_not_finite_on_process_1_ends_both_with_its_number(tmp_path):
    (tmp_path / "pretrain.py").write_text(NOT_FINITE)
    flags = [f"--{name}={value}" for name, value in tiny(tmp_path / "run", evaluate_every=0).items()]
    process = survive.start(
        [sys.executable, *LAUNCH, "accelerate_configs/cpu2.yaml", str(tmp_path / "pretrain.py"), *flags]
    )
    printed, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    (line,) = re.findall(r"pretrain\.py: error: .*", printed)
    assert re.search(r"the loss is nan in step 2 on process 1, .*/not_finite\.json\. There is no checkpoint yet", line)
    saved = json.loads((tmp_path / "run" / "not_finite.json").read_text())
    (sub_batch,) = saved["sub_batches"]
    assert (saved["step"], sub_batch["process"], sub_batch["virtual_device"]) == (2, 1, 1)
    assert len(sub_batch["samples"]) == 32
    assert not (tmp_path / "run" / "encoder").exists()


def test_a_run_whose_launcher_is_killed_saves_itself(tmp_path):
    words = pretrain_command(
        *(tmp_path / "run", *LAUNCH, "accelerate_configs/cpu.yaml"), epochs=200, checkpoint_every="never", num_workers=1
    )
    process = survive.start(words)
    read_until(process, "epoch 0: ")
    time.sleep(1)
    process.kill()
    printed, _ = process.communicate(timeout=60)  # until the last process has closed the pipe
    assert re.search(r"SIGTERM, after step \d+ of 1000.*/step-", printed), printed
    assert len(list_checkpoints(tmp_path / "run" / "checkpoints")) == 1


def test_ctrl_c_saves_and_a_second_ctrl_c_ends_at_once(tmp_path):
    words = pretrain_command(tmp_path / "run", epochs=200, checkpoint_every="never", num_workers=1)
    process = survive.start(words)  # in its own process group, so that its workers get the signal, as from a shell
    read_until(process, "epoch 0: ")
    time.sleep(0.5)
    os.killpg(process.pid, signal.SIGINT)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Ctrl-C again" in printed
    assert "SIGINT, after step" in printed
    assert "Traceback" not in printed, printed
    saved = list_checkpoints(tmp_path / "run" / "checkpoints")
    assert len(saved) == 1
    process = survive.start(words)
    read_until(process, "resumes from step")  # printed before the workers start, so the first step takes a while
    os.killpg(process.pid, signal.SIGINT)
    read_until(process, "Ctrl-C again")
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT
    assert list_checkpoints(tmp_path / "run" / "checkpoints") == saved


class Hosts:
    """Two machines in a network; each is a network namespace with its own address."""

    def __init__(self, name):
        self.names = [f"{name}a", f"{name}b"]

    def __enter__(self):
        a, b = self.names
        try:
            for host in self.names:
                ip("netns", "add", host)
            ip("link", "add", "net0", "netns", a, "type", "veth", "peer", "name", "net0", "netns", b)
            for number, host in enumerate(self.names, 1):
                ip("-n", host, "addr", "add", f"10.77.0.{number}/24", "dev", "net0")
                for device in ("lo", "net0"):
                    ip("-n", host, "link", "set", device, "up")
        except (OSError, subprocess.CalledProcessError) as error:
            self.__exit__()
            reason = getattr(error, "stderr", "") or error
            pytest.skip(f"this machine cannot create network namespaces: {str(reason).strip()}")
        return self

    def __exit__(self, *exception):
        for host in self.names:
            with contextlib.suppress(OSError, subprocess.CalledProcessError):
                self.kill(host)
                ip("netns", "del", host)

    def kill(self, host):
        for pid in ip("netns", "pids", host).split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)

    def launch(self, rank, folder, *flags):
        """Start one process of two on a machine, by the command that the documentation gives."""
        launch = [*LAUNCH, "accelerate_configs/cpu2.yaml", "--num_machines", "2", "--num_processes", "2"]
        launch += ["--machine_rank", str(rank), "--main_process_ip", "10.77.0.1", "--main_process_port", "29500"]
        words = [sys.executable, *launch, "scripts/pretrain.py", *survive.DIGITS, "--epochs", "6"]
        words += ["--checkpoint_every", "20steps", "--output_dir", str(folder), *flags]
        return survive.start(["ip", "netns", "exec", self.names[rank], *words])


def ip(*words):
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout


def wait_for(path):
    deadline = time.monotonic() + 90
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} was not written"
        time.sleep(0.01)


def test_a_run_on_two_machines_survives_the_loss_of_one_and_of_the_network(tmp_path):
    """The remaining process ends with a message each time; resumed on one machine, the run equals a run on one."""
    reference = tmp_path / "reference"
    words = [sys.executable, "scripts/pretrain.py", *survive.DIGITS, "--epochs", "6"]
    survive.run([*words, "--output_dir", str(reference)])
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"  # machines need not share a disk
    with Hosts(f"m2t{os.getpid()}") as hosts:
        a, b = (hosts.launch(rank, folder) for rank, folder in enumerate((run, elsewhere)))
        wait_for(run / "checkpoints" / "step-20")
        hosts.kill(hosts.names[1])
        b.communicate(timeout=10)
        printed, _ = a.communicate(timeout=60)
        assert a.returncode != 0
        assert re.search(r"process 0 of 2 has lost the others: .*Connection (reset|closed) by peer", printed)
        assert "from the last checkpoint" in printed

        short = ("--collective_timeout", "0.1")  # six seconds
        a, b = (hosts.launch(rank, folder, *short) for rank, folder in enumerate((run, elsewhere)))
        wait_for(run / "checkpoints" / "step-60")
        ip("-n", hosts.names[1], "link", "set", "net0", "down")
        printed_a, printed_b = (host.communicate(timeout=60)[0] for host in (a, b))
        assert "process 0 of 2 has lost the others: process 1 does not respond" in printed_a, printed_a
        assert "process 1 of 2 has lost the others" in printed_b, printed_b
        assert "0.1 minutes (--collective_timeout)" in printed_a
    printed = survive.run([*words, "--output_dir", str(run)])
    assert re.search(r"resumes from step (60|80|1[0-2]\d) of 132", printed)
    assert not elsewhere.exists()
    one, two = (survive.last_tensors(folder) for folder in (reference, run))
    shared = [name for name in one if not name.startswith("processes")]
    assert [name for name in shared if not one[name].equal(two[name])] == []


def test_a_process_that_hangs_is_named(tmp_path):
    words = pretrain_command(
        *(tmp_path / "run", *LAUNCH, "accelerate_configs/cpu2.yaml"),
        epochs=200,
        checkpoint_every="5steps",
        collective_timeout=0.05,
    )
    process = survive.start(words)
    read_until(process, "epoch 0: ")
    wait_for(tmp_path / "run" / "checkpoints" / "step-10")
    trainers = trainers_of(process)
    os.kill(trainers[1], signal.SIGSTOP)
    printed = read_until(process, "has lost the others")
    assert "process 1 does not respond" in printed, printed
    os.kill(trainers[1], signal.SIGKILL)  # its launcher would wait for 30 s
    process.communicate(timeout=60)
