"""Tests of when a run is saved, and of full, deleted and read-only disks."""

import os
import shutil
import subprocess
import time
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator

from m2t_accel.config.fields import ConfigurationError
from m2t_accel.config.recipes import build_config
from m2t_accel.run import checkpoint
from m2t_accel.run.checkpoint import list_checkpoints, verify
from m2t_accel.run.folder import RunFolder
from m2t_accel.run.resume import Progress
from m2t_accel.run.saving import Saver


class SavedRun:
    """A saver, and stand-ins for the state, report and data of its run."""

    def __init__(self, folder, num_values=1000, **settings):
        self.value = torch.ones(num_values)
        self.lines = []
        state = SimpleNamespace(copy=lambda rows, positions: {"weights": {"value": self.value}})
        state.gradient_scaler = state.architecture = lambda: None
        report = SimpleNamespace(rows=[], print_line=self.lines.append, seconds=lambda: 1.0)
        report.report_bad_images = report.collect_health = lambda: None
        data = SimpleNamespace(note="", train=[], fingerprint="")
        requests = SimpleNamespace(positions=lambda step: None)
        self.progress = Progress()
        config = build_config({"output_dir": str(folder), **settings})
        self.saver = Saver(state, RunFolder(folder), config, Accelerator(), self.progress, report, data, requests, 10)

    def save(self, step):
        self.progress.step = step
        self.saver.begin()


@pytest.fixture
def create(tmp_path):
    """Create runs, and close their savers at the end."""
    runs = []

    def create_run(folder=tmp_path, *arguments, **settings):
        runs.append(SavedRun(folder, *arguments, **settings))
        return runs[-1]

    yield create_run
    for run in runs:
        run.saver.close()


@pytest.mark.parametrize(
    ("every", "due"),
    [
        (("3steps",), [3, 6, 9, 12, 15, 18]),
        (("1epoch",), [10, 20]),
        (("0.25epochs",), [3, 5, 8, 10, 13, 15, 18, 20]),
        (("1epoch", "8steps"), [8, 10, 16, 20]),
        (("5min",), []),
        (("never",), []),
    ],
)
def test_steps_and_epochs_at_which_a_run_is_saved(create, every, due):
    saver = create(checkpoint_every=every).saver
    assert [step for step in range(1, 21) if saver.is_due(step)] == due


def test_only_the_process_that_writes_names_the_last_checkpoint(create):
    run = create()
    assert run.saver.describe_last_good() == "There is no checkpoint yet"
    run.save(3)
    folder = run.saver.folder.checkpoints
    assert run.saver.wait() == f"The last good checkpoint is {folder}/step-3"
    run.saver.accelerator = SimpleNamespace(is_main_process=False)
    assert run.saver.describe_last_good() == f"The checkpoints are in {folder}"


def test_minutes_are_counted_whatever_the_wall_clock_says(create, monkeypatch):
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now)
    monkeypatch.setattr(time, "time", lambda: 0.0)  # set back by fifty years
    run = create(checkpoint_every=("2min",))
    is_time = []
    for _ in range(9):
        now += 30
        is_time.append(run.saver.is_time())
        if is_time[-1]:
            run.save(1)
            run.saver.wait()
    assert is_time == [False, False, False, True] * 2 + [False]


def test_checkpoints_are_written_numbered_and_pruned(create, tmp_path):
    run = create(keep=(2, 0))
    assert run.saver.wait() == "There is no checkpoint yet"
    for step in (1, 2, 3):
        run.save(step)
    assert run.saver.wait().endswith(f"{tmp_path}/checkpoints/step-3")
    assert [path.name for path in list_checkpoints(tmp_path / "checkpoints")] == ["step-3", "step-2"]
    assert verify(tmp_path / "checkpoints" / "step-3").manifest["number"] == 3
    assert run.lines == []


def test_a_state_is_saved_once_unless_the_write_failed(create, tmp_path, monkeypatch):
    run = create()
    run.progress.step = 4
    for failing in (False, False, True, False):  # a run's last save is often due at its last step
        if failing:
            run.progress.step = 5
            monkeypatch.setattr(checkpoint, "save_file", lambda *arguments: (_ for _ in ()).throw(OSError(28, "full")))
        assert ("could not be saved (full)" in run.saver.save_now()) == failing
        monkeypatch.undo()
    assert run.progress.num_saved == 3
    assert [path.name for path in list_checkpoints(tmp_path / "checkpoints")] == ["step-5", "step-4"]


def test_values_that_are_not_finite_end_the_run(create, tmp_path):
    run = create()
    run.save(1)
    run.saver.wait()
    run.value = torch.tensor([1.0, float("nan")])
    run.save(2)
    with pytest.raises(ConfigurationError, match=r"not finite.*/step-1"):
        run.saver.wait()
    assert [path.name for path in list_checkpoints(tmp_path / "checkpoints")] == ["step-1"]


def test_a_deleted_folder_is_created_again(create, tmp_path):
    run = create(tmp_path / "run")
    run.save(1)
    run.saver.wait()
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    run.save(2)
    run.saver.wait()
    shutil.rmtree(tmp_path / "run")
    run.save(3)
    assert run.saver.wait().endswith("step-3")
    verify(tmp_path / "run" / "checkpoints" / "step-3")
    assert (tmp_path / "run" / ".lock").exists()
    assert run.lines == []


def test_a_folder_deleted_during_a_write_costs_that_checkpoint_alone(create, tmp_path, monkeypatch):
    run = create(tmp_path / "run")
    save_file = checkpoint.save_file

    def delete_then_save(tensors, path):
        shutil.rmtree(tmp_path / "run")
        save_file(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", delete_then_save)
    run.save(1)
    assert "could not be saved" in run.saver.wait()
    monkeypatch.undo()
    assert "the run continues" in run.lines[0]
    run.save(2)
    assert run.saver.wait().endswith("step-2")


def test_a_full_disk_prints_a_warning_and_the_next_save_tries_again(create, small_disk):
    disk = small_disk(kilobytes=3072)
    run = create(disk / "run", 350_000, keep=(5, 0))  # 1.4 MB each
    for step in (1, 2, 3):
        run.save(step)
    found = run.saver.wait()
    assert "could not be saved (" in found
    assert "space" in found.lower()
    assert found.endswith(f"{disk}/run/checkpoints/step-2")
    assert len(run.lines) == 1
    assert "the run continues" in run.lines[0]
    assert sorted(os.listdir(disk / "run" / "checkpoints")) == ["step-1", "step-2"]
    shutil.rmtree(disk / "run" / "checkpoints" / "step-1")
    run.save(4)
    assert run.saver.wait().endswith("step-4")


def test_a_disk_that_becomes_read_only(create, small_disk):
    disk = small_disk(kilobytes=3072)
    (disk.parent / "checkpoints").symlink_to(disk)
    run = create(disk.parent)
    run.save(1)
    run.saver.wait()
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    run.save(2)
    assert "(Read-only file system)" in run.saver.wait()
    assert len(run.lines) == 1
    subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
    run.save(3)
    assert run.saver.wait().endswith("step-3")
