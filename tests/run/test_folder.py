"""Tests of the folder of a run: where a run starts, what happens to the files, and the lock."""

import json
import os
import re
import shutil
import signal
import time

import pytest
import torch

from m2t_accel.config.fields import ConfigurationError
from m2t_accel.config.recipes import build_config
from m2t_accel.run.checkpoint import write_checkpoint
from m2t_accel.run.folder import RunFolder, Start
from m2t_accel.run.output_dir import list_files


def config_in(folder, **settings):
    return build_config({"output_dir": str(folder), **settings})


def save(folder, step, **settings):
    config = config_in(folder, **settings)
    manifest = {"step": step, "number": step, "config": vars(config), "progress": {"reported": step}}
    return write_checkpoint(folder / "checkpoints", {"weights": {"a": torch.ones(3)}}, manifest)


def find_start(folder, **settings):
    return RunFolder(folder).find_start(config_in(folder, **settings))


def test_a_missing_folder_starts_at_step_0_and_is_not_created(tmp_path):
    assert find_start(tmp_path / "run") == Start()
    assert not (tmp_path / "run").exists()


def test_the_newest_intact_checkpoint_is_found_and_damaged_ones_are_reported(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step)
    (tmp_path / "checkpoints" / "step-3" / "weights.safetensors").unlink()
    start = find_start(tmp_path)
    assert start.checkpoint.manifest["step"] == 2
    (remark,) = start.remarks
    assert f"{tmp_path}/checkpoints/step-3 (weights.safetensors: No such file" in remark
    assert find_start(tmp_path, resume="never") == Start()
    for step in (1, 2):
        (tmp_path / "checkpoints" / f"step-{step}" / "manifest.json").write_text("")
    with pytest.raises(ConfigurationError, match=r"--output_dir .*damaged.*step-3.*step-2.*step-1"):
        find_start(tmp_path)


def test_a_named_checkpoint_must_be_intact(tmp_path):
    for step in (1, 2):
        save(tmp_path, step)
    name = str(tmp_path / "checkpoints" / "step-1")
    assert find_start(tmp_path, resume=name).checkpoint.manifest["step"] == 1
    (tmp_path / "checkpoints" / "step-1" / "manifest.json").unlink()
    with pytest.raises(ConfigurationError, match=r"--resume .*step-1 .*manifest.*/step-2"):
        find_start(tmp_path, resume=name)


def test_a_checkpoint_must_have_the_same_settings(tmp_path):
    save(tmp_path, 1)
    with pytest.raises(ConfigurationError, match=r"step-1.*batch_size .*64.* 32"):
        find_start(tmp_path, batch_size=32)
    find_start(tmp_path, num_workers=5, keep=(7, 7))
    with pytest.raises(ConfigurationError, match=r"epochs .*40.* 90.*--resume"):
        find_start(tmp_path, epochs=90)
    find_start(tmp_path, epochs=90, resume=str(tmp_path / "checkpoints" / "step-1"))


def complete(folder, **content):
    """Write the files of a complete run, and a training.json with this content."""
    (folder / "encoder").mkdir(parents=True)
    names = ("config.yaml", "metrics.jsonl", "curves.png")
    names += ("encoder/README.md", "encoder/model.safetensors", "encoder/preprocessor_config.json")
    for name in names:
        (folder / name).write_text(name)
    (folder / "training.json").write_text(json.dumps({"images_seen": 64, **content}))


def test_a_complete_run_is_recognized(tmp_path):
    save(tmp_path, 1)
    complete(tmp_path)  # as an earlier version wrote it
    assert find_start(tmp_path) == Start(complete=True)
    complete(tmp_path / "new", files=list_files(tmp_path))
    assert find_start(tmp_path / "new") == Start(complete=True)
    (tmp_path / "new" / "training.json").write_text('{"cut": ')
    assert not find_start(tmp_path / "new").complete


@pytest.mark.parametrize(
    "name", ["config.yaml", "curves.png", "encoder/README.md", "encoder/model.safetensors", "encoder"]
)
def test_what_a_complete_run_lacks_is_named(tmp_path, name):
    complete(tmp_path)
    complete(tmp_path / "run", files=list_files(tmp_path))
    path = tmp_path / "run" / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(ConfigurationError, match=rf"lacks .*{name}.* no intact checkpoint .*: remove the folder"):
        find_start(tmp_path / "run")
    save(tmp_path / "run", 1)
    start = find_start(tmp_path / "run")
    assert (start.checkpoint.manifest["step"], start.complete) == (1, False)
    assert re.search(rf"^missing in .*{name}.*; written again from the last checkpoint$", start.remarks[0])
    (tmp_path / "run" / "training.json").write_text(json.dumps({"images_seen": 65, "files": list_files(tmp_path)}))
    with pytest.raises(ConfigurationError, match=rf"lacks .*{name}.*, type --resume .*/step-1$"):
        find_start(tmp_path / "run")


def test_weights_of_another_size_and_lost_metrics_are_named(tmp_path):
    complete(tmp_path, files={"metrics.jsonl": None, "encoder/model.safetensors": 999})
    save(tmp_path, 1)
    (remark,) = find_start(tmp_path).remarks
    assert "encoder/model.safetensors (25 bytes instead of 999)" in remark
    complete(tmp_path / "run", files=list_files(tmp_path))
    (tmp_path / "run" / "metrics.jsonl").unlink()
    start = find_start(tmp_path / "run")
    assert start.complete
    assert start.remarks == (f"{tmp_path}/run/metrics.jsonl is missing, and cannot be written again",)


def test_the_folder_goes_back_to_the_step_of_its_checkpoint(tmp_path):
    for step in (2, 3, 5):
        save(tmp_path, step)
    folder = RunFolder(tmp_path)
    folder.metrics.add([{"step": step} for step in range(5)])
    (tmp_path / "bad_images.jsonl").write_text('{"sample": 3}\n{"sam')
    (tmp_path / "checkpoints" / ".step-6.partial").mkdir()
    (tmp_path / "training.json").write_text("{}")  # the run was complete
    start = find_start(tmp_path, resume=str(tmp_path / "checkpoints" / "step-3"))
    (line,) = RunFolder(tmp_path).prepare(start, "text: 1\n")
    assert f"{tmp_path}/checkpoints/step-5 is set aside as set-aside-step-5" in line
    assert [row["step"] for row in folder.metrics.read()] == [0, 1, 2, 3]
    assert (tmp_path / "bad_images.jsonl").read_text() == '{"sample": 3}\n'
    assert (tmp_path / "config.yaml").read_text() == "text: 1\n"
    assert not (tmp_path / "training.json").exists()
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["set-aside-step-5", "step-2", "step-3"]


def test_a_run_resumed_in_another_folder_copies_its_metrics(tmp_path):
    path = save(tmp_path / "one", 3)
    RunFolder(tmp_path / "one").metrics.add([{"step": step} for step in range(5)])
    folder = RunFolder(tmp_path / "two")
    start = folder.find_start(config_in(tmp_path / "two", resume=str(path)))
    folder.acquire_lock()
    folder.prepare(start, "")
    folder.close()
    assert [row["step"] for row in folder.metrics.read()] == [0, 1, 2, 3]
    assert [row["step"] for row in RunFolder(tmp_path / "one").metrics.read()] == [0, 1, 2, 3, 4]


def test_a_run_killed_before_its_first_checkpoint_starts_over(tmp_path):
    (tmp_path / "config.yaml").write_text(config_in(tmp_path).to_yaml())
    folder = RunFolder(tmp_path)
    folder.metrics.add([{"step": 0}])
    start = find_start(tmp_path)
    assert start == Start()
    folder.prepare(start, "")
    assert list(folder.metrics.read()) == []


def test_a_run_that_started_in_between_is_noticed(tmp_path):
    start = find_start(tmp_path)
    save(tmp_path, 3)
    with pytest.raises(ConfigurationError, match=r"--output_dir .*another run"):
        RunFolder(tmp_path).prepare(start, "")


def test_a_folder_is_locked_by_one_run_until_its_process_dies(tmp_path, in_child):
    def lock_and_fork():
        RunFolder(tmp_path).acquire_lock()
        worker = os.fork()
        if not worker:
            time.sleep(60)
            os._exit(0)
        return worker

    holder, worker = in_child(lock_and_fork)
    with pytest.raises(ConfigurationError, match=rf"--output_dir .*another run.*process {holder} on "):
        RunFolder(tmp_path).acquire_lock()
    os.kill(holder, signal.SIGKILL)
    os.waitid(os.P_PID, holder, os.WEXITED | os.WNOWAIT)
    folder = RunFolder(tmp_path)
    folder.acquire_lock()  # although a worker of the killed run is still alive
    folder.close()
    os.kill(int(worker), signal.SIGKILL)


def test_a_deleted_folder_is_created_and_locked_again(tmp_path, in_child):
    folder = RunFolder(tmp_path / "run")
    folder.acquire_lock()
    first = folder.lock
    folder.acquire_lock()
    assert folder.lock == first
    (tmp_path / "run" / ".lock").unlink()
    (tmp_path / "run").rmdir()
    folder.acquire_lock()
    assert "another run" in in_child(RunFolder(tmp_path / "run").acquire_lock)[1]
    folder.close()
    assert in_child(RunFolder(tmp_path / "run").acquire_lock)[1] == "None\n"
