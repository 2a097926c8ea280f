"""Tests of checkpoints on the disk: damage, kills, failed writes, pruning."""

import json
import os
import re
import threading

import pytest
import torch

from m2t_accel.run import checkpoint
from m2t_accel.run.checkpoint import (
    CheckpointWriter,
    DamagedCheckpointError,
    NotFiniteError,
    good_checkpoints,
    list_checkpoints,
    prune,
    read_tensors,
    remove_leftovers,
    set_aside,
    verify,
    write_checkpoint,
)

FILES = {
    "weights": {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(7)},
    "more": {"c": torch.ones(3, 4, dtype=torch.float64), "nothing": torch.empty(0, 2)},
}


def write(folder, step, number=None):
    return write_checkpoint(folder, FILES, {"step": step, "number": number or step, "config": {"name": "α"}})


def test_a_checkpoint_is_read_as_it_was_written(tmp_path):
    path = write(tmp_path / "checkpoints", 12)
    assert path == tmp_path / "checkpoints" / "step-12"
    assert sorted(os.listdir(path)) == ["manifest.json", "more.safetensors", "weights.safetensors"]
    found = verify(path)
    assert found.manifest["step"] == 12
    assert found.manifest["config"] == {"name": "α"}
    tensors = read_tensors(found)
    assert tensors.keys() == FILES.keys()
    for file, expected in FILES.items():
        assert tensors[file].keys() == expected.keys()
        for name, tensor in expected.items():
            assert tensors[file][name].dtype == tensor.dtype
            assert torch.equal(tensors[file][name], tensor)


def test_every_cut_of_every_file_is_noticed(tmp_path):
    path = write(tmp_path, 1)
    files = sorted(path.iterdir())
    assert len(files) == 3
    for file in files:
        whole = file.read_bytes()
        for length in (0, 1, len(whole) // 2, len(whole) - 1):
            file.write_bytes(whole[:length])
            with pytest.raises(DamagedCheckpointError, match=file.name):
                verify(path)
        file.unlink()
        with pytest.raises(DamagedCheckpointError, match=f"{file.name}: No such file"):
            verify(path)
        file.write_bytes(whole)
    verify(path)


def test_every_changed_byte_of_every_file_is_noticed(tmp_path):
    path = write(tmp_path, 1)
    for file in path.iterdir():
        whole = file.read_bytes()
        for place in range(0, len(whole), 3):
            file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
            with pytest.raises(DamagedCheckpointError, match=r"manifest\.json|" + file.name):
                verify(path)
        file.write_bytes(whole + b"\n")
        with pytest.raises(DamagedCheckpointError):
            verify(path)
        file.write_bytes(whole)
    verify(path)


def test_another_format_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "FORMAT", 2)
    path = write(tmp_path, 1)
    monkeypatch.undo()
    with pytest.raises(DamagedCheckpointError, match=r"format 2.* 1"):
        verify(path)


@pytest.mark.parametrize("content", ["[]", "{}", '{"manifest": 3}', "null", "\0", '{"manifest": {"files": []}}'])
def test_a_manifest_that_is_none_is_noticed(tmp_path, content):
    (tmp_path / "step-3").mkdir()
    (tmp_path / "step-3" / "manifest.json").write_text(content)
    with pytest.raises(DamagedCheckpointError, match=r"manifest\.json"):
        verify(tmp_path / "step-3")


def test_the_newest_checkpoint_has_the_most_steps_whatever_the_clock_says(tmp_path):
    for step in (9, 100, 20):
        write(tmp_path, step)
        os.utime(tmp_path / f"step-{step}", (1e9 - step, 1e9 - step))  # a clock that was set back before each
    (tmp_path / "step-x").mkdir()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-100", "step-20", "step-9"]
    assert list_checkpoints(tmp_path / "none") == []


def test_damaged_checkpoints_are_skipped_and_reported(tmp_path):
    for step in (1, 2, 3):
        write(tmp_path, step)
    (tmp_path / "step-3" / "more.safetensors").write_bytes(b"")
    damaged = []
    assert next(good_checkpoints(tmp_path, damaged)).path == tmp_path / "step-2"
    ((path, reason),) = damaged
    assert path == tmp_path / "step-3"
    assert re.fullmatch(r"more\.safetensors has 0 bytes instead of \d+", reason)


@pytest.mark.parametrize(
    ("last", "every", "kept"),
    [(1, 0, [6]), (3, 0, [4, 5, 6]), (1, 3, [3, 6]), (2, 2, [2, 4, 5, 6]), (9, 0, [*range(1, 7)])],
)
def test_pruning_keeps_the_last_and_every_mth(tmp_path, last, every, kept):
    for number in range(1, 7):
        write(tmp_path, 10 * number, number)
    prune(tmp_path, last, every)
    assert sorted(int(path.name.removeprefix("step-")) // 10 for path in tmp_path.iterdir()) == kept


def test_pruning_leaves_a_folder_without_a_manifest(tmp_path):
    for step in (5, 6):
        write(tmp_path, step)
    (tmp_path / "step-4").mkdir()
    prune(tmp_path, 1, 0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-4", "step-6"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_not_saved(tmp_path, value):
    files = {"weights": {"a": torch.tensor([1.0, value, 2.0])}}
    with pytest.raises(NotFiniteError, match="a holds values that are not finite"):
        write_checkpoint(tmp_path, files, {"step": 1})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("function", ["save_file", "flush", "sha256", "replace_folder"])
def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch, function):
    write(tmp_path, 1)

    def fail(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, function, fail)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path, 2)
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]
    verify(tmp_path / "step-1")


def test_a_folder_of_the_same_name_is_replaced(tmp_path):
    (tmp_path / "step-5").mkdir()
    (tmp_path / "step-5" / "other").write_text("")
    write(tmp_path, 5)
    verify(tmp_path / "step-5")
    assert [path.name for path in tmp_path.iterdir()] == ["step-5"]


class KilledError(BaseException):
    """Stands for kill -9."""


@pytest.mark.parametrize("moment", range(1, 9))
def test_a_kill_at_any_system_call_leaves_an_intact_checkpoint(tmp_path, monkeypatch, moment):
    write(tmp_path, 1)
    write(tmp_path, 2)
    (tmp_path / "step-2" / "more.safetensors").write_bytes(b"")  # damaged, and to be replaced
    calls = 0

    def counted(function):
        def call(*arguments, **options):
            nonlocal calls
            calls += 1
            if calls >= moment:
                raise KilledError
            return function(*arguments, **options)

        return call

    for module, name in ((os, "rename"), (checkpoint, "flush"), (checkpoint, "save_file")):
        monkeypatch.setattr(module, name, counted(getattr(module, name)))
    # A killed process does not clean up.
    rmtree = checkpoint.shutil.rmtree
    monkeypatch.setattr(checkpoint.shutil, "rmtree", lambda *a, **o: None if calls >= moment else rmtree(*a, **o))
    with pytest.raises(KilledError):
        write(tmp_path, 2)
    monkeypatch.undo()
    remove_leftovers(tmp_path)
    found = next(good_checkpoints(tmp_path, []))
    assert found.manifest["step"] in (1, 2)
    assert {path.name for path in tmp_path.iterdir()} == {"step-1", "step-2"}


def test_a_checkpoint_set_aside_is_neither_found_nor_removed(tmp_path):
    for _ in range(2):
        path = write(tmp_path, 4)
        set_aside(path)
    write(tmp_path, 3)
    prune(tmp_path, 1, 0)
    remove_leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"step-3", "set-aside-step-4", "set-aside-step-4-1"}
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-3"]


def test_the_writer_works_in_the_background(tmp_path, monkeypatch):
    go = threading.Event()
    write_one = checkpoint.write_checkpoint

    def wait(*arguments):
        assert go.wait(10)
        return write_one(*arguments)

    monkeypatch.setattr(checkpoint, "write_checkpoint", wait)
    writer = CheckpointWriter(tmp_path, keep_last=1, keep_every=0)
    assert writer.result() is None
    writer.submit(FILES, {"step": 1, "number": 1})
    assert writer.result(wait=False) is None
    go.set()
    assert writer.result() == tmp_path / "step-1"
    assert writer.result() is None
    writer.submit(FILES, {"step": 2, "number": 2})
    writer.close()
    assert writer.result() == tmp_path / "step-2"
    assert [path.name for path in tmp_path.iterdir()] == ["step-2"]
    assert json.loads((tmp_path / "step-2" / "manifest.json").read_text())["manifest"]["number"] == 2


def test_the_writer_raises_its_error_once(tmp_path):
    (tmp_path / "file").write_text("")
    writer = CheckpointWriter(tmp_path / "file", keep_last=1, keep_every=0)
    writer.submit(FILES, {"step": 1})
    with pytest.raises(OSError, match="exists"):
        writer.result()
    writer.submit({"weights": {"a": torch.tensor(float("nan"))}}, {"step": 1})
    with pytest.raises(OSError, match="exists"):
        writer.result()
    assert writer.result() is None
    writer.close()
