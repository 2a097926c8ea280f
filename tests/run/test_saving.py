"""When a run's state is saved, and what becomes of a run whose disk is full, gone or read-only."""

import os
import shutil
import subprocess
import time

import pytest
import torch
from accelerate import Accelerator

from m2t_accel.config.fields import ConfigurationError
from m2t_accel.config.recipes import build_config
from m2t_accel.run.checkpoint import list_checkpoints, verify
from m2t_accel.run.folder import RunFolder
from m2t_accel.run.saving import Saver


class State:
    """Stands for a run's."""

    def __init__(self, values=1000):
        self.value = torch.ones(values)

    def copy(self, rows):
        return {"weights": {"value": self.value}}


def saver_of(folder, state=None, **settings):
    config = build_config({"output_dir": str(folder), **settings})
    said = []
    return Saver(state or State(), RunFolder(folder), config, Accelerator(), 10, said.append), said


def manifest(step):
    return {"step": step, "config": {}}


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
def test_when_it_is_due(tmp_path, every, due):
    saver, _ = saver_of(tmp_path, checkpoint_every=every)
    assert [step for step in range(1, 21) if saver.is_due(step)] == due


def test_by_minutes_whatever_the_clock_says(tmp_path, monkeypatch):
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now)
    monkeypatch.setattr(time, "time", lambda: 0.0)  # set back by fifty years
    saver, _ = saver_of(tmp_path, checkpoint_every=("2min",))
    seen = []
    for _ in range(9):
        now += 30
        seen.append(saver.is_time())
        if seen[-1]:
            saver.save(manifest(1), [])
            saver.finish()
    assert seen == [False, False, False, True] * 2 + [False]


def test_what_is_saved_and_told(tmp_path):
    saver, said = saver_of(tmp_path, keep=(2, 0))
    assert saver.finish() == "There is no checkpoint yet"
    for step in (1, 2, 3):
        saver.save(manifest(step), [])
    assert saver.finish() == f"The last good checkpoint is {tmp_path}/checkpoints/step-3"
    assert [path.name for path in list_checkpoints(tmp_path / "checkpoints")] == ["step-3", "step-2"]
    assert verify(tmp_path / "checkpoints" / "step-3").manifest["number"] == 3
    assert said == []
    saver.close()


def test_numbers_that_are_not_finite_end_the_run(tmp_path):
    saver, _ = saver_of(tmp_path, state := State())
    saver.save(manifest(1), [])
    saver.finish()
    state.value = torch.tensor([1.0, float("nan")])
    saver.save(manifest(2), [])
    with pytest.raises(
        ConfigurationError, match=r"value holds values .* not finite, and no .* is .*/checkpoints/step-1"
    ):
        saver.finish()
    assert [path.name for path in list_checkpoints(tmp_path / "checkpoints")] == ["step-1"]
    saver.close()


def test_a_deleted_folder_is_made_again(tmp_path):
    saver, said = saver_of(tmp_path / "run")
    saver.save(manifest(1), [])
    saver.finish()
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    saver.save(manifest(2), [])
    saver.finish()
    shutil.rmtree(tmp_path / "run")
    saver.save(manifest(3), [])
    assert saver.finish().endswith("step-3")
    verify(tmp_path / "run" / "checkpoints" / "step-3")
    assert said == []
    saver.close()


def test_folders_deleted_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    saver, said = saver_of(tmp_path / "run")
    save_file = __import__("m2t_accel.checkpoint").checkpoint.save_file

    def delete_then_save(tensors, path):
        shutil.rmtree(tmp_path / "run")
        save_file(tensors, path)

    monkeypatch.setattr("m2t_accel.run.checkpoint.save_file", delete_then_save)
    saver.save(manifest(1), [])
    assert "but it could not be saved" in saver.finish()
    monkeypatch.undo()
    assert "the run goes on" in said[0]
    saver.save(manifest(2), [])
    assert saver.finish().endswith("step-2")
    saver.close()


def test_a_full_disk_is_told_and_the_next_time_is_tried_again(small_disk):
    disk = small_disk(kilobytes=3072)
    saver, said = saver_of(disk / "run", State(350_000), keep=(5, 0))  # 1.4 MB each
    for step in (1, 2, 3):
        saver.save(manifest(step), [])
    told = saver.finish()
    assert "but it could not be saved (" in told
    assert "space" in told.lower()
    assert told.endswith(f"The last good checkpoint is {disk}/run/checkpoints/step-2")
    assert len(said) == 1
    assert "the run goes on" in said[0]
    assert saver.failing()
    assert sorted(os.listdir(disk / "run" / "checkpoints")) == ["step-1", "step-2"]
    shutil.rmtree(disk / "run" / "checkpoints" / "step-1")
    saver.save(manifest(4), [])
    assert saver.finish().endswith("step-4")
    assert not saver.failing()
    saver.close()


def test_a_disk_that_becomes_read_only(small_disk):
    disk = small_disk(kilobytes=3072)
    (disk.parent / "checkpoints").symlink_to(disk)
    saver, said = saver_of(disk.parent)
    saver.save(manifest(1), [])
    saver.finish()
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    saver.save(manifest(2), [])
    assert "(Read-only file system). The last good checkpoint is" in saver.finish()
    assert len(said) == 1
    subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
    saver.save(manifest(3), [])
    assert saver.finish().endswith("step-3")
    saver.close()
