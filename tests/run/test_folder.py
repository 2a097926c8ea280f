"""The folder of a run: one run at a time, whole files, and where a run goes on."""

import json
import os
import subprocess
import sys

import pytest
import torch

from m2t_accel.config.fields import ConfigurationError
from m2t_accel.config.recipes import build_config
from m2t_accel.files import JsonLines, write_text
from m2t_accel.run.checkpoint import write_checkpoint
from m2t_accel.run.folder import RunFolder, Start


def config_in(folder, **settings):
    return build_config({"output_dir": str(folder), **settings})


def save(folder, step, **settings):
    config = config_in(folder, **settings)
    manifest = {"step": step, "number": step, "config": vars(config), "progress": {"reported": step}}
    return write_checkpoint(folder / "checkpoints", {"weights": {"a": torch.ones(3)}}, manifest)


# --- where a run begins


def test_a_new_folder(tmp_path):
    assert RunFolder(tmp_path / "run").find_start(config_in(tmp_path / "run")) == Start()
    assert not (tmp_path / "run").exists()


def test_the_newest_whole_checkpoint_and_what_is_damaged(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step)
    (tmp_path / "checkpoints" / "step-3" / "weights.safetensors").unlink()
    start = RunFolder(tmp_path).find_start(config_in(tmp_path))
    assert start.checkpoint.manifest["step"] == 2
    assert start.remarks == (
        f"damaged, not used: {tmp_path}/checkpoints/step-3 (weights.safetensors: No such file or directory)",
    )
    assert RunFolder(tmp_path).find_start(config_in(tmp_path, resume="never")) == Start()
    (tmp_path / "checkpoints" / "step-1" / "manifest.json").write_text("")
    (tmp_path / "checkpoints" / "step-2" / "manifest.json").write_text("")
    with pytest.raises(ConfigurationError, match=r"no checkpoint is whole .*step-3.*step-2.*step-1.*to begin anew"):
        RunFolder(tmp_path).find_start(config_in(tmp_path))


def test_a_named_checkpoint(tmp_path):
    for step in (1, 2):
        save(tmp_path, step)
    one = str(tmp_path / "checkpoints" / "step-1")
    assert RunFolder(tmp_path).find_start(config_in(tmp_path, resume=one)).checkpoint.manifest["step"] == 1
    (tmp_path / "checkpoints" / "step-1" / "manifest.json").unlink()
    with pytest.raises(
        ConfigurationError, match=r"--resume .*step-1: not a whole checkpoint \(manifest.*beside it: .*step-2"
    ):
        RunFolder(tmp_path).find_start(config_in(tmp_path, resume=one))


def test_a_checkpoint_of_other_settings(tmp_path):
    save(tmp_path, 1)
    with pytest.raises(
        ConfigurationError, match=r"step-1 is of a run with other settings \(batch_size 64 there, 32 here"
    ):
        RunFolder(tmp_path).find_start(config_in(tmp_path, batch_size=32))
    RunFolder(tmp_path).find_start(config_in(tmp_path, num_workers=5, keep=(7, 7)))
    with pytest.raises(ConfigurationError, match=r"epochs 80 there, 90 here\).*name the checkpoint: --resume"):
        RunFolder(tmp_path).find_start(config_in(tmp_path, epochs=90))
    RunFolder(tmp_path).find_start(config_in(tmp_path, epochs=90, resume=str(tmp_path / "checkpoints" / "step-1")))


def test_a_complete_run(tmp_path):
    save(tmp_path, 1)
    (tmp_path / "training.json").write_text("{}")
    assert RunFolder(tmp_path).find_start(config_in(tmp_path)) == Start(complete=True)


# --- what is made of the folder


def test_the_folder_at_the_step_of_its_checkpoint(tmp_path):
    for step in (2, 3, 5):
        save(tmp_path, step)
    folder = RunFolder(tmp_path)
    folder.metrics.add([{"step": step} for step in range(5)])
    (tmp_path / "bad_images.jsonl").write_text('{"sample": 3}\n{"sam')
    (tmp_path / "checkpoints" / ".step-6.partial").mkdir()
    start = folder.find_start(config_in(tmp_path, resume=str(tmp_path / "checkpoints" / "step-3")))
    told = RunFolder(tmp_path).prepare(start, "text: 1\n")
    assert told == [f"{tmp_path}/checkpoints/step-5 is set aside as set-aside-step-5; remove it when you like"]
    assert [row["step"] for row in folder.metrics.read()] == [0, 1, 2, 3]
    assert (tmp_path / "bad_images.jsonl").read_text() == '{"sample": 3}\n'
    assert (tmp_path / "config.yaml").read_text() == "text: 1\n"
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["set-aside-step-5", "step-2", "step-3"]


def test_a_run_that_goes_on_in_another_folder_takes_its_metrics_along(tmp_path):
    path = save(tmp_path / "one", 3)
    RunFolder(tmp_path / "one").metrics.add([{"step": step} for step in range(5)])
    config = config_in(tmp_path / "two", resume=str(path))
    folder = RunFolder(tmp_path / "two")
    start = folder.find_start(config)
    folder.hold()
    folder.prepare(start, "")
    assert [row["step"] for row in folder.metrics.read()] == [0, 1, 2, 3]
    assert [row["step"] for row in RunFolder(tmp_path / "one").metrics.read()] == [0, 1, 2, 3, 4]


def test_a_run_killed_before_its_first_checkpoint_begins_anew(tmp_path):
    (tmp_path / "config.yaml").write_text(config_in(tmp_path).to_yaml())
    folder = RunFolder(tmp_path)
    folder.metrics.add([{"step": 0}])
    start = folder.find_start(config_in(tmp_path))
    assert start == Start()
    folder.prepare(start, "")
    assert list(folder.metrics.read()) == []


def test_another_run_that_began_in_between_is_noticed(tmp_path):
    folder = RunFolder(tmp_path)
    start = folder.find_start(config_in(tmp_path))
    save(tmp_path, 3)
    with pytest.raises(ConfigurationError, match="another run has just begun there"):
        folder.prepare(start, "")


# --- the lock

HOLD = (
    "import sys; from m2t_accel.run_folder import RunFolder; RunFolder(sys.argv[1]).hold(); print('held', flush=True); "
)


def holder(folder, then):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD + then, str(folder)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    return process, process.stdout.readline()


def test_two_runs_cannot_have_one_folder(tmp_path):
    process, said = holder(tmp_path, "import time; time.sleep(60)")
    assert said == "held\n"
    with pytest.raises(
        ConfigurationError, match=rf"another run is writing to it \(process {process.pid} on .*\): wait"
    ):
        RunFolder(tmp_path).hold()
    process.kill()
    process.communicate()
    RunFolder(tmp_path).hold()  # a killed run holds nothing


def test_a_child_of_a_killed_run_holds_nothing(tmp_path):
    """Such as the workers of its loader, which need seconds to notice."""
    process, _ = holder(tmp_path, "import os, time; os.fork(); time.sleep(6)")
    process.kill()
    process.wait()
    RunFolder(tmp_path).hold()
    process.communicate()


def test_a_folder_that_was_deleted_is_made_and_held_again(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.hold()
    first = folder.lock
    folder.hold()
    assert folder.lock == first
    (tmp_path / "run" / ".lock").unlink()
    (tmp_path / "run").rmdir()
    folder.hold()
    process, said = holder(tmp_path / "run", "")
    assert said == ""
    assert "another run is writing to it" in process.communicate()[1]
    folder.close()
    process, said = holder(tmp_path / "run", "")
    assert said == "held\n"
    process.communicate()


# --- files


def test_lines_are_added_whole(tmp_path):
    lines = JsonLines(tmp_path / "new" / "lines.jsonl")
    assert list(lines.read()) == []
    lines.add([])
    assert not lines.path.exists()
    lines.add([{"a": 1}, {"a": 2}])
    with lines.path.open("a") as file:
        file.write('{"a": 3')  # killed in the middle
    assert [row["a"] for row in JsonLines(lines.path).read()] == [1, 2]
    again = JsonLines(lines.path)
    again.add([{"a": 4}])
    assert [json.loads(line)["a"] for line in lines.path.read_text().splitlines()] == [1, 2, 4]
    lines.path.unlink()  # by somebody else
    again.add([{"a": 5}])
    assert lines.path.read_text() == '{"a": 5}\n'


def test_lines_wait_for_room_on_the_disk(small_disk):
    disk = small_disk(kilobytes=64)
    lines = JsonLines(disk / "lines.jsonl")
    lines.add([{"a": 1}])
    (disk / "big").write_bytes(bytes(56 * 1024))
    with pytest.raises(OSError, match="No space left"):
        lines.add([{"a": 2, "text": "x" * 20_000}])
    with pytest.raises(OSError, match="No space left"):
        lines.add([{"a": 3}])
    assert [row["a"] for row in lines.read()] == [1, 2, 3]
    assert [row["a"] for row in JsonLines(lines.path).read()] == [1]
    (disk / "big").unlink()
    lines.add([{"a": 4}])
    assert [json.loads(line)["a"] for line in lines.path.read_text().splitlines()] == [1, 2, 3, 4]


def test_a_text_is_written_whole_or_not_at_all(small_disk):
    disk = small_disk(kilobytes=64)
    write_text(disk / "file", "old")
    with pytest.raises(OSError, match="No space left"):
        write_text(disk / "file", "x" * 100_000)
    assert [path.name for path in disk.iterdir()] == ["file"]
    assert (disk / "file").read_text() == "old"
