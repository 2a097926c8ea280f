"""Journeys of runs that are stopped, killed, moved and cut off: whole processes, launches and machines."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import survive
from helpers import ROOT, tiny

from m2t_accel.run.checkpoint import list_checkpoints

# --- kills


@pytest.mark.slow
@pytest.mark.parametrize(("num_processes", "streamed", "epochs"), [((1, 1, 1), True, 7), ((2, 1), False, 5)])
def test_a_run_that_is_killed_is_the_run_that_was_not(tmp_path, num_processes, streamed, epochs):
    """On one process, killed twice; and killed on two processes, it goes on with one, beside a run on one.

    `python tests/survive.py kills` does it longer.
    """
    found = survive.kills(tmp_path, num_processes, streamed, epochs)
    assert found["kills"] == len(num_processes) - 1
    assert found["in saves"] >= 1
    assert found["tensors"] > 150
    assert found["different"] == []
    assert found["metrics differ by"] <= (1e-6 if 2 in num_processes else 0)
    assert (found["lost"], found["repeated"]) == (0, 0)


# --- signals


def pretrain_command(folder, *launch, **settings):
    flags = [str(word) for name, value in tiny(folder, **settings).items() for word in (f"--{name}", value)]
    return [sys.executable, *launch, "scripts/pretrain.py", *flags]


LAUNCH = ("-m", "accelerate.commands.launch", "--quiet", "--config_file")


def read_until(process, pattern):
    printed = ""
    for line in process.stdout:
        printed += line
        if re.search(pattern, line):
            return printed
    raise AssertionError(printed)


@pytest.mark.slow
def test_a_signal_to_one_of_two_processes_ends_both_and_the_same_command_goes_on(tmp_path):
    words = pretrain_command(
        *(tmp_path / "run", *LAUNCH, "accelerate_configs/cpu2.yaml"), epochs=200, checkpoint_every="never"
    )
    process = survive.start(words)
    read_until(process, "epoch 0: ")
    trainers = [pid for pid in survive.descendants(process.pid) if trains(pid)]
    assert len(trainers) == 2
    os.kill(trainers[1], signal.SIGUSR1)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    step = int(re.search(r"stopped by SIGUSR1, after step (\d+) of 1000\. The last good", printed)[1])
    assert re.search(r"exitcode\s*: 75", printed), printed
    assert [path.name for path in list_checkpoints(tmp_path / "run" / "checkpoints")] == [f"step-{step}"]
    process = survive.start(words)
    assert f"goes on from step {step} of 1000" in read_until(process, "goes on from")
    process.send_signal(signal.SIGTERM)  # to the launcher, as a scheduler does
    printed, _ = process.communicate(timeout=60)
    assert "stopped by SIGTERM, after step" in printed


def trains(pid):
    with contextlib.suppress(OSError):
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        return b"scripts/pretrain.py" in words and b"accelerate.commands.launch" not in words
    return False


@pytest.mark.slow
def test_a_run_whose_launcher_is_killed_saves_itself(tmp_path):
    words = pretrain_command(
        *(tmp_path / "run", *LAUNCH, "accelerate_configs/cpu.yaml"), epochs=200, checkpoint_every="never", num_workers=1
    )
    process = survive.start(words)
    read_until(process, "epoch 0: ")
    time.sleep(1)
    process.kill()
    printed, _ = process.communicate(timeout=60)  # until the last process has closed it
    assert re.search(r"stopped by SIGTERM, after step \d+ of 1000\. The last good checkpoint is", printed), printed
    assert len(list_checkpoints(tmp_path / "run" / "checkpoints")) == 1


@pytest.mark.slow
def test_ctrl_c_saves_and_ctrl_c_again_ends_at_once(tmp_path):
    words = pretrain_command(tmp_path / "run", epochs=200, checkpoint_every="never", num_workers=1)
    process = survive.start(words)  # in a group of its own, as a shell would make it: its workers get the signal too
    read_until(process, "epoch 0: ")
    time.sleep(0.5)
    os.killpg(process.pid, signal.SIGINT)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Ctrl-C again ends it at once" in printed
    assert "stopped by SIGINT, after step" in printed
    assert "Traceback" not in printed, printed
    saved = list_checkpoints(tmp_path / "run" / "checkpoints")
    assert len(saved) == 1
    process = survive.start(words)
    read_until(process, "goes on from step")
    time.sleep(0.5)
    for _ in range(2):
        os.killpg(process.pid, signal.SIGINT)
        time.sleep(0.01)
    process.communicate(timeout=60)
    assert process.returncode in (-signal.SIGINT, 130)
    assert len(list_checkpoints(tmp_path / "run" / "checkpoints")) <= 2
    assert saved[0] in list_checkpoints(tmp_path / "run" / "checkpoints")


# --- machines: each a network namespace with an address of its own


class Hosts:
    """Two machines in a network."""

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
            pytest.skip(f"this machine makes no network namespaces: {str(reason).strip()}")
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
        """As the README has it for several machines, one process on each."""
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
        assert time.monotonic() < deadline, f"{path} did not come"
        time.sleep(0.01)


@pytest.mark.slow
def test_machines_that_die_and_are_cut_off(tmp_path):
    """One dies, then the cable is pulled: the other ends in time. Gone on with on one, it is the run of one."""
    reference = tmp_path / "reference"
    words = [sys.executable, "scripts/pretrain.py", *survive.DIGITS, "--epochs", "6"]
    survive.run([*words, "--output_dir", str(reference)])
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"  # machines need not share a disk
    with Hosts(f"m2t{os.getpid()}") as hosts:
        a, b = (hosts.launch(rank, folder) for rank, folder in enumerate((run, elsewhere)))
        wait_for(run / "checkpoints" / "step-20")
        hosts.kill(hosts.names[1])
        b.communicate(timeout=10)
        began = time.monotonic()
        printed, _ = a.communicate(timeout=60)
        assert time.monotonic() - began < 30
        assert a.returncode != 0
        assert re.search(
            r"pretrain\.py: process 0 of 2 has lost the others: .*Connection (reset|closed) by peer", printed
        )
        assert "The same command goes on from the last checkpoint" in printed

        short = ("--collective_timeout", "0.1")  # six seconds
        a, b = (hosts.launch(rank, folder, *short) for rank, folder in enumerate((run, elsewhere)))
        wait_for(run / "checkpoints" / "step-60")
        ip("-n", hosts.names[1], "link", "set", "net0", "down")
        began = time.monotonic()
        said = [host.communicate(timeout=90)[0] for host in (a, b)]
        assert time.monotonic() - began < 60
        assert "process 0 of 2 has lost the others: no word from process 1" in said[0], said[0]
        assert "process 1 of 2 has lost the others" in said[1], said[1]
        assert "waited for 0.1 minutes (--collective_timeout)" in said[0]
    said = survive.run([*words, "--output_dir", str(run)])
    assert re.search(r"goes on from step (60|80|1[0-2]\d) of 132", said)
    assert not elsewhere.exists()
    one, two = (survive.last_tensors(folder) for folder in (reference, run))
    same = [name for name in one if not name.startswith("processes")]
    assert [name for name in same if not one[name].equal(two[name])] == []


@pytest.mark.slow
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
    trainers = [pid for pid in survive.descendants(process.pid) if trains(pid)]
    os.kill(trainers[1], signal.SIGSTOP)
    printed = read_until(process, "has lost the others")
    assert "no word from process 1" in printed, printed
    os.kill(trainers[1], signal.SIGKILL)  # its launcher would wait for half a minute
    process.communicate(timeout=60)


def test_the_journeys_know_the_root():
    assert (ROOT / "tests" / "pretrain_recorded.py").exists()
