"""Tests of whole runs in this process: results, interruption and resume, and values that go wrong."""

import importlib
import inspect
import json
import os
import re
import shutil
import signal
import sys
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import survive
import torch
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from helpers import stop_in_step, tiny, without_reader, write_image, write_parquet, write_tar
from survive import different, last_tensors, metrics
from transformers import AutoModel

from m2t_accel import step as training
from m2t_accel.config.evaluation import build_knn
from m2t_accel.config.fields import ConfigurationError, Interrupted
from m2t_accel.config.recipes import build_config
from m2t_accel.data import order, shards
from m2t_accel.data.order import permute
from m2t_accel.data.sources import load_images
from m2t_accel.distributed.interruption import NoBatchError
from m2t_accel.evaluation.knn import evaluate_knn, measure_knn
from m2t_accel.model import Teacher
from m2t_accel.momentum_norm import MomentumBatchNorm
from m2t_accel.pretrain import pretrain
from m2t_accel.run import checkpoint, completion
from m2t_accel.run.checkpoint import list_checkpoints, verify
from m2t_accel.run.folder import RunFolder
from m2t_accel.run.guard import Guard
from m2t_accel.run.report import KnnMonitor
from m2t_accel.step import TrainingStep


def train(settings, **others):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(completion, "draw_curves", lambda *arguments, **options: None)  # takes as long as a small run
        return pretrain(build_config({**settings, **others}))


def assert_same_run(one, other):
    """Check that metrics, last checkpoint and encoder of two runs are the same bit for bit."""
    assert metrics(one) == metrics(other)
    assert different(last_tensors(one), last_tensors(other)) == []


def checkpoint_names(folder):
    return [path.name for path in list_checkpoints(folder / "checkpoints")]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A function that returns the settings of a run of 10 steps, 5 per epoch, on 40 small images of 2 classes."""
    images = tmp_path_factory.mktemp("small")
    for split, number in (("train", 20), ("val", 4)):
        for first, name in ((0, "dark"), (128, "light")):
            for i in range(number):
                write_image(images / split / name / f"{i:02}.png", value=first + 5 * i)

    def settings(folder, **others):
        return tiny(folder, dataset=str(images), batch_size=8, device_batch_size=4, **others)

    return settings


@pytest.fixture(scope="module")
def whole_run(small, tmp_path_factory):
    """The folder of a run on these images that was not interrupted."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    train(small(folder))
    return folder


@pytest.fixture(scope="module")
def stopped_run(small, tmp_path_factory):
    """The folder of such a run that a signal has stopped in step 7, with checkpoints of steps 3, 6 and 7."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.MonkeyPatch.context() as patch:
        stop_in_step(patch, 7, signal.SIGUSR1)
        with pytest.raises(Interrupted, match=r"SIGUSR1.* 7 of 10.*/step-7"):
            train(small(folder, checkpoint_every="3steps", keep=(3, 2)))
    assert not (folder / "encoder").exists()
    assert checkpoint_names(folder) == ["step-7", "step-6", "step-3"]
    return folder


@pytest.fixture
def stopped(small, stopped_run, tmp_path):
    """The settings of a copy of the stopped run, in tmp_path/run."""
    shutil.copytree(stopped_run, tmp_path / "run")
    return small(tmp_path / "run", checkpoint_every="3steps", keep=(3, 2))


@pytest.fixture
def fresh_accelerator():
    """Forget Accelerate's settings, which the first run of a process fixes, before and after the test."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def test_a_run_leaves_a_line_per_step_a_checkpoint_and_an_encoder(trained_run):
    names = [".lock", "checkpoints", "config.yaml", "curves.png", "encoder", "metrics.jsonl"]
    names += ["pictures", "report.html", "training.json"]
    assert sorted(path.name for path in trained_run.iterdir()) == names
    assert checkpoint_names(trained_run) == ["step-10"]
    files = {path.name for path in (trained_run / "encoder").iterdir()}
    assert files == {"README.md", "config.json", "model.safetensors", "preprocessor_config.json"}
    rows = metrics(trained_run)
    assert [row["step"] for row in rows] == list(range(11))
    assert list(rows[0]) == ["step", "epoch", "knn_top1"]
    figures = {"step", "epoch", "loss", "embedding_std", "learning_rate", "statistics_momentum", "weight_momentum"}
    figures |= {"agreement"}
    health = {"effective_rank", "gradient_norm", "update_norm", "update_ratio", "teacher_distance"}
    health |= {"statistics_distance", "layers"}
    for row in rows[1:]:
        assert row.keys() - {"knn_top1"} == figures | (health if row["step"] in (1, 2, 4, 8, 10) else set())
        assert 0 < row["loss"] < 8
        assert 0 < row["embedding_std"] < 1.1
    assert [row["step"] for row in rows if "knn_top1" in row] == [0, 5, 10]
    assert rows[1]["statistics_momentum"] == 1.0
    assert rows[-1]["weight_momentum"] == 1.0
    assert rows[-1]["learning_rate"] < max(row["learning_rate"] for row in rows[1:]) / 5
    lines = (trained_run / "metrics.jsonl").read_text().splitlines()
    assert all('"seconds"' in line for line in lines)  # `metrics` leaves out what a clock says
    assert all('"images_per_second"' in line for line in lines[1:])


def test_the_encoder_of_a_run_is_the_teachers_and_has_the_accuracy_of_the_last_step(trained_run):
    tensors = last_tensors(trained_run)
    encoder = {name.removeprefix("encoder: "): tensors[name] for name in tensors if name.startswith("encoder: ")}
    assert encoder
    assert all(tensor.equal(tensors[f"teacher: encoder.{name}"]) for name, tensor in encoder.items())
    config, model = build_config(tiny(trained_run)), AutoModel.from_pretrained(trained_run / "encoder")
    images = load_images(config)
    result = measure_knn(model, images.bank, images.validation, 10, config, Accelerator())
    assert metrics(trained_run)[-1]["knn_top1"] == result.accuracies[20]


def test_a_complete_run_is_left_unchanged(trained_run, capsys):
    before = {path: path.stat().st_mtime_ns for path in trained_run.rglob("*")}
    assert train(tiny(trained_run)) is None
    assert f"{trained_run} is complete" in capsys.readouterr().out
    with pytest.raises(ConfigurationError, match=r"--output_dir .*holds a run"):
        train(tiny(trained_run), resume="never")
    with pytest.raises(ConfigurationError, match=r"seed .*0.* 1"):
        train(tiny(trained_run), seed=1)
    assert before == {path: path.stat().st_mtime_ns for path in trained_run.rglob("*")}


def test_a_complete_run_writes_again_what_it_lacks(trained_run, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(trained_run, run)
    weights = (run / "encoder" / "model.safetensors").read_bytes()
    (run / "config.yaml").unlink()
    shutil.rmtree(run / "encoder")
    with pytest.raises(ConfigurationError, match=r"other settings \(seed was 0, now 1\)"):
        train(tiny(run), seed=1)
    assert not (run / "encoder").exists()
    before = {path: path.stat().st_mtime_ns for path in (run / "checkpoints").rglob("*")}
    train(tiny(run))
    printed = capsys.readouterr().out
    assert re.search(r"missing in .*: config\.yaml, encoder/README\.md, .*; written again from the last check", printed)
    assert "resumes from step 10 of 10" in printed
    assert (run / "encoder" / "model.safetensors").read_bytes() == weights
    assert yaml.safe_load((run / "config.yaml").read_text())["seed"] == 0
    assert before == {path: path.stat().st_mtime_ns for path in (run / "checkpoints").rglob("*")}
    assert metrics(run) == metrics(trained_run)
    train(tiny(run))
    assert capsys.readouterr().out == f"{run} is complete: {run}/encoder\n"


def test_saves_workers_and_trackers_do_not_change_a_run(whole_run, tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = yaml.safe_load((whole_run / "config.yaml").read_text())
    assert settings["evaluate_every"] == 1, "config.yaml holds the value that was used, not the one that was given"
    others = {"checkpoint_every": "3steps", "keep": (2, 2), "num_workers": 1, "report_to": "tensorboard"}
    monkeypatch.setenv("HF_TOKEN", "hf_a")
    train({**settings, **others, "output_dir": str(tmp_path / "run"), "push_to_hub": "me/first"})
    assert_same_run(whole_run, tmp_path / "run")
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert saved["push_to_hub"] is None, "a repeated run would be published over this one"
    assert checkpoint_names(tmp_path / "run") == ["step-10", "step-9", "step-6"]
    losses = {}
    for path in (tmp_path / "run").rglob("events.out.tfevents*"):
        accumulator = EventAccumulator(str(path))
        accumulator.Reload()
        if "loss" in accumulator.Tags()["scalars"]:
            losses |= {event.step: event.value for event in accumulator.Scalars("loss")}
    assert losses == pytest.approx({row["step"]: row["loss"] for row in metrics(tmp_path / "run") if "loss" in row})


def write_photographs(folder, number=8):
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for i in range(number):
        cv2.imwrite(str(folder / f"{i}.jpg"), rng.integers(0, 256, (40, 50, 3), np.uint8))


def test_photographs_in_class_folders_train_and_broken_ones_are_not_evaluated(tmp_path, capsys):
    for name in ("cat", "dog"):
        for split in ("train", "val"):
            write_photographs(tmp_path / "photos" / split / name)
        (tmp_path / "photos" / "val" / name / "7.jpg").write_bytes(b"")
    settings = {"recipe": "8x2080Ti-b256-100ep", "encoder": "resnet10-quarter", "image_size": 32, "num_workers": 0}
    settings |= {"dataset": str(tmp_path / "photos"), "batch_size": 8, "device_batch_size": 4, "log_every": 1}
    train({**tiny(tmp_path / "run"), **settings, "epochs": 1, "warmup_epochs": 0.5})
    rows = metrics(tmp_path / "run")
    assert rows[-1]["step"] == 2
    accuracies = [row["knn_top1"] for row in rows if "knn_top1" in row]
    assert len(accuracies) == 2
    assert [14 * accuracy for accuracy in accuracies] == pytest.approx([round(14 * a) for a in accuracies])
    printed = capsys.readouterr().out
    assert "2 classes" in printed
    assert printed.count("2 images that cannot be decoded") == 1
    assert (tmp_path / "run" / "encoder" / "model.safetensors").exists()


def test_photographs_without_labels_are_not_evaluated_and_the_recipe_digits_warns(tmp_path, capsys):
    write_photographs(tmp_path / "photos", 4)
    settings = tiny(tmp_path / "run", dataset=str(tmp_path / "photos"), batch_size=4, device_batch_size=4)
    with pytest.raises(ConfigurationError, match=r"--evaluate_every 1 .*no labels"):
        train(settings, evaluate_every=1)
    assert not (tmp_path / "run").exists()
    train(settings)
    printed = capsys.readouterr().out
    assert "--recipe 8x2080Ti-b256-100ep" in printed
    assert "classes" not in printed
    assert not any("knn_top1" in row for row in metrics(tmp_path / "run"))


def test_mixed_precision_keeps_weights_and_statistics_in_float32(tmp_path, monkeypatch, fresh_accelerator):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    write_photographs(tmp_path / "photos")
    seen = set()
    forward = MomentumBatchNorm.forward

    def watch(self, input):
        if self.training:
            seen.add((input.dtype, self.running_mean.dtype, self.pending.dtype))
        return forward(self, input)

    monkeypatch.setattr(MomentumBatchNorm, "forward", watch)
    teacher = train(tiny(tmp_path / "run", dataset=str(tmp_path / "photos"), batch_size=8, device_batch_size=4))
    assert seen == {(torch.bfloat16, torch.float32, torch.float32)}
    assert "bf16" in (tmp_path / "run" / "config.yaml").read_text().splitlines()[0]
    assert {tensor.dtype for tensor in teacher.state_dict().values()} == {torch.float32, torch.int64}
    assert all(0 < row["loss"] < 8 for row in metrics(tmp_path / "run"))


@pytest.mark.slow
def test_a_compiled_run_is_the_same_run(tmp_path, monkeypatch, fresh_accelerator, float64):
    """The backend aot_eager does all that the compiler does but generate code."""
    losses = []
    for backend in ("NO", "AOT_EAGER"):
        AcceleratorState._reset_state(reset_partial_state=True)
        monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", backend)
        settings = tiny(tmp_path / backend, image_size=16, evaluate_every=0)
        train(settings, epochs=1, warmup_epochs=0.2)
        losses.append([row["loss"] for row in metrics(tmp_path / backend)])
    np.testing.assert_allclose(losses[0], losses[1], rtol=0, atol=1e-9)


def write_images_with_broken_ones(folder, broken):
    """Write 40 images, some of them cut, and return the settings of a run on them with 5 steps per epoch."""
    for i in range(40):
        write_image(folder / "images" / f"{i:03}.png", value=i)
        if i in broken:
            path = folder / "images" / f"{i:03}.png"
            path.write_bytes(path.read_bytes()[:50])
    return tiny(folder / "run", dataset=str(folder / "images"), batch_size=8, device_batch_size=4)


def test_broken_images_are_reported_once_in_all_parts_of_a_run(tmp_path, monkeypatch, capfd):
    settings = write_images_with_broken_ones(tmp_path, broken=(3, 17))
    settings["log_every"] = 100  # no line of metrics reports them before the run is stopped
    order = permute(np.arange(40), 40, (0, 0, 1)).tolist()
    stop_in_step(monkeypatch, 5 + max(order.index(3), order.index(17)) // 8 + 1)
    with pytest.raises(Interrupted):
        train(settings)
    monkeypatch.undo()
    train(settings)
    assert capfd.readouterr().out.count("another image is shown instead") == 2
    lines = [json.loads(line) for line in (tmp_path / "run" / "bad_images.jsonl").read_text().splitlines()]
    assert sorted((line["sample"], os.path.basename(line["path"])) for line in lines) == [
        (3, "003.png"),
        (17, "017.png"),
    ]
    assert all(line["reason"] for line in lines)


def test_too_many_broken_images_stop_a_run_that_can_go_on(tmp_path, capfd):
    broken = range(0, 33, 3)
    settings = write_images_with_broken_ones(tmp_path, broken)
    with pytest.raises(ConfigurationError, match=r"11 of 40 images .* 10 .*--max_bad_fraction.*/step-5"):
        train(settings)
    assert len((tmp_path / "run" / "bad_images.jsonl").read_text().splitlines()) == 11
    assert not (tmp_path / "run" / "encoder").exists()
    shutil.copytree(tmp_path / "run", tmp_path / "repaired")
    train(settings, max_bad_fraction=0.3)
    assert "from step 5 of 10" in capfd.readouterr().out
    for i in broken:
        write_image(tmp_path / "images" / f"{i:03}.png", value=i)
    (tmp_path / "repaired" / "bad_images.jsonl").unlink()
    train(settings, output_dir=str(tmp_path / "repaired"))
    assert (tmp_path / "repaired" / "encoder").exists()


def test_a_run_stopped_within_a_step_resumes_bit_for_bit(whole_run, stopped, tmp_path):
    train(stopped)
    assert_same_run(whole_run, tmp_path / "run")
    parts = json.loads((tmp_path / "run" / "training.json").read_text())["parts"]
    assert [part["step"] for part in parts] == [0, 7]


@pytest.mark.slow
@pytest.mark.parametrize("step", [1, 4, 5, 9])
def test_a_run_stopped_in_any_step_resumes_bit_for_bit(trained_run, tmp_path, monkeypatch, step):
    stop_in_step(monkeypatch, step)
    with pytest.raises(Interrupted, match=rf"SIGTERM.* {step} of 10.*/step-{step}"):
        train(tiny(tmp_path / "run"))
    monkeypatch.undo()
    assert checkpoint_names(tmp_path / "run") == [f"step-{step}"]
    train(tiny(tmp_path / "run"))
    assert_same_run(trained_run, tmp_path / "run")


def test_a_run_whose_output_is_not_read_any_more_goes_on_and_saves(small, tmp_path, monkeypatch):
    stop_in_step(monkeypatch, 7, signal.SIGINT)
    with without_reader() as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        monkeypatch.setattr(sys, "stderr", stream)
        with pytest.raises(Interrupted, match=r"SIGINT, after step 7 of 10\. "):
            train(small(tmp_path / "run"))
    assert checkpoint_names(tmp_path / "run") == ["step-7"]


def test_a_process_that_is_lost_during_the_set_up_is_one_line(small, tmp_path, monkeypatch):
    def fail(accelerator, action):
        raise RuntimeError("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer")

    accelerator = SimpleNamespace(num_processes=2, process_index=0, is_main_process=True)
    loop = importlib.import_module("m2t_accel.pretrain")
    monkeypatch.setattr(loop, "start_accelerator", lambda config, timeout: accelerator)
    monkeypatch.setattr(loop, "on_all_processes", fail)
    with pytest.raises(Interrupted, match=r"^process 0 of 2 has lost .*closed by peer\).*tries again$"):
        train(small(tmp_path / "run"))


def write_hub_tars(folder):
    """Write six tars of 16 training images and one of 12 validation images as a dataset of a Hub."""
    folder.mkdir(parents=True)
    for shard in range(6):
        write_tar(folder / f"train-{shard:04}.tar", 16 * shard, 16)
    write_tar(folder / "validation-0000.tar", 100, 12)


def on_hub(output_dir, **others):
    given = {"dataset": "someone/tars", "streaming": True, "images_per_epoch": 96, "batch_size": 16}
    return tiny(output_dir, **given, device_batch_size=4, image_size=16, evaluate_every=2, **others)


@pytest.mark.slow
def test_a_run_on_a_streamed_hub_dataset_resumes_bit_for_bit(tmp_path, dataset_hub, monkeypatch, capsys):
    """It is stopped by a signal, and then by a Hub that does not answer any more, with other numbers of workers."""
    write_hub_tars(tmp_path / "hub" / "someone" / "tars")
    for module, name, value in (
        (shards, "RETRY_DELAYS", (0.01, 0.01)),
        (order, "MIN_POOL_BATCHES", 2),
        (order, "POOL_SIZE", 1),
    ):
        monkeypatch.setattr(module, name, value)
    train(on_hub(tmp_path / "whole"))
    found = "96 images of 2 classes in split train; evaluation on 12 others (split validation, its own"
    assert found in capsys.readouterr().out
    with monkeypatch.context() as patch:
        stop_in_step(patch, 3)
        with pytest.raises(Interrupted, match=r"SIGTERM.* 3 of 12"):
            train(on_hub(tmp_path / "run", num_workers=1))
    begin = TrainingStep.begin

    def begin_and_fail(self, now, **options):
        dataset_hub.fails = ("train-", 404)  # the Hub's own library repeats other errors for half a minute
        begin(self, now, **options)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingStep, "begin", begin_and_fail)
        with pytest.raises(ConfigurationError, match=r"the shard hf://.*/train-000\d\.tar cannot be .* resumes from"):
            train(on_hub(tmp_path / "run"))
    dataset_hub.fails = ("", 200)
    steps = [int(name.removeprefix("step-")) for name in checkpoint_names(tmp_path / "run")]
    assert len(steps) == 2
    assert 3 < max(steps) < 12
    train(on_hub(tmp_path / "run"))
    assert_same_run(tmp_path / "whole", tmp_path / "run")


@pytest.mark.slow
def test_a_warm_start_begins_with_the_knn_of_its_source_and_resumes_without_it(
    trained_run, tmp_path, monkeypatch, capsys
):
    shutil.copytree(trained_run / "encoder", tmp_path / "source")
    names = ("dataset", "image_size", "image_mean", "image_std", "evaluation_crop", "num_workers")
    given = tiny(tmp_path / "run", init_from=str(tmp_path / "source"), epochs=1, warmup_epochs=0.5, max_images=1437)
    config = build_config(given)
    views = {name: getattr(config, name) for name in names}
    knn = {**views, "encoder": given["init_from"], "output_dir": str(tmp_path / "knn")}
    result = evaluate_knn(build_knn(knn))
    random = evaluate_knn(build_knn({**knn, "random_weights": True, "output_dir": str(tmp_path / "random")}))
    stop_in_step(monkeypatch, 3)
    with pytest.raises(Interrupted):
        train(given)
    monkeypatch.undo()
    first = metrics(tmp_path / "run")[0]
    assert (first["step"], first["knn_top1"]) == (0, result["figures"]["top1_k20"])
    assert result["figures"]["top1_k20"] != random["figures"]["top1_k20"]
    assert f"starts from {tmp_path / 'source'}: ResNetModel" in capsys.readouterr().out
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert (saved["init_from"], saved["encoder"]) == (given["init_from"], "resnet10-quarter")
    # A run that was never stopped has the same results, and the source is not needed again.
    train(given, output_dir=str(tmp_path / "whole"))
    shutil.rmtree(tmp_path / "source")
    capsys.readouterr()
    with pytest.raises(ConfigurationError, match=r"init_from was .*source, now None"):
        train({name: value for name, value in given.items() if name != "init_from"})
    train(given)
    printed = capsys.readouterr().out
    assert "starts from" not in printed
    assert re.search(rf"kNN top-1: \S+ % with the weights of {tmp_path / 'source'}, ", printed)
    assert_same_run(tmp_path / "whole", tmp_path / "run")
    training = json.loads((tmp_path / "run" / "training.json").read_text())
    assert training["parts"][0]["init_from"]["weights"] == result["weights"]
    assert "init_from" not in training["parts"][1]
    card = (tmp_path / "run" / "encoder" / "README.md").read_text()
    assert "| started from | source |" in card
    assert "base_model" not in card, "the source is not on the Hub"
    train(given)
    assert "is complete" in capsys.readouterr().out


def test_a_warm_start_whose_source_is_wrong_writes_nothing(small, tmp_path):
    with pytest.raises(ConfigurationError, match=r"^--init_from runs/nothing: no such file or folder"):
        train(small(tmp_path / "run", init_from="runs/nothing"))
    with pytest.raises(ConfigurationError, match=r"^--init_from runs/x: pretrain\(\) was given an encoder"):
        pretrain(build_config(small(tmp_path / "run", init_from="runs/x")), encoder=torch.nn.Conv2d(3, 8, 3))
    assert not (tmp_path / "run").exists()


def test_a_streamed_run_resumes_bit_for_bit_with_any_number_of_workers(tmp_path, monkeypatch):
    for shard in range(3):
        write_parquet(tmp_path / "set" / f"train-{shard}.parquet", 20 * shard, 20, row_group_size=6)
    settings = tiny(
        tmp_path / "whole", dataset=str(tmp_path / "set"), streaming=True, batch_size=16, device_batch_size=8
    )
    train(settings)
    settings["output_dir"] = str(tmp_path / "run")
    stop_in_step(monkeypatch, 4)
    with pytest.raises(Interrupted):
        train(settings, num_workers=1)
    monkeypatch.undo()
    train(settings)
    assert len(metrics(tmp_path / "run")) >= 6
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_a_run_killed_in_the_middle_of_a_save_resumes_bit_for_bit(small, whole_run, tmp_path, monkeypatch, capsys):
    """A copy of the folder in the middle of a save is what kill -9 leaves."""
    save_file, written = checkpoint.save_file, []

    def copy_and_save(tensors, path):
        written.append(path)
        if len(written) == 2 * 4 + 2:  # a checkpoint has 4 files of tensors
            shutil.copytree(tmp_path / "run", tmp_path / "killed")
        save_file(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", copy_and_save)
    train(small(tmp_path / "run", checkpoint_every="2steps"))
    assert checkpoint_names(tmp_path / "killed") == ["step-4", "step-2"]
    assert (tmp_path / "killed" / "checkpoints" / ".step-6.partial").exists()
    capsys.readouterr()
    train(small(tmp_path / "killed"))
    assert "from step 4 of 10" in capsys.readouterr().out
    assert_same_run(whole_run, tmp_path / "killed")


def test_a_killed_process_resumes_bit_for_bit_and_shows_each_sample_once(run_script):
    """Slow tests, and the same command, kill more of them, and one of several.

    It has a process of its own: the runs are forks, which this process may not allow any more.
    """
    done = run_script("tests/survive.py", "short", "--num_processes", 1, "--kills", 1)
    assert re.search(survive.ALL_EQUAL, done.stdout), done.stdout + done.stderr


@pytest.mark.parametrize(
    "evaluation", [pytest.param(0, marks=pytest.mark.slow), 1, pytest.param(2, marks=pytest.mark.slow)]
)
def test_a_signal_ends_an_evaluation_which_the_resumed_run_repeats(small, whole_run, tmp_path, monkeypatch, evaluation):
    stop_if_asked, calls = Guard.stop_if_asked, []

    def signal_and_stop(self):  # called after the only batch of the bank, then after the only batch of the queries
        calls.append(1)
        if len(calls) == 2 * evaluation + 1:
            os.kill(os.getpid(), signal.SIGTERM)
        stop_if_asked(self)

    monkeypatch.setattr(Guard, "stop_if_asked", signal_and_stop)
    with pytest.raises(Interrupted, match="SIGTERM") as caught:
        train(small(tmp_path / "run"))
    assert len(calls) == 2 * evaluation + 1, "the evaluation was completed"
    monkeypatch.undo()
    assert ("before the first step" in str(caught.value)) == (evaluation == 0)
    if evaluation:
        assert metrics(tmp_path / "run")[-1]["step"] == 5 * evaluation - 1, "the line of the evaluation waits"
    train(small(tmp_path / "run"))
    assert_same_run(whole_run, tmp_path / "run")


def test_a_signal_while_an_evaluation_waits_for_its_images_saves(small, whole_run, tmp_path, monkeypatch):
    measure, calls = KnnMonitor.measure, []

    def hang_after_an_epoch(self, *arguments):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
            raise NoBatchError
        return measure(self, *arguments)

    monkeypatch.setattr(KnnMonitor, "measure", hang_after_an_epoch)
    with pytest.raises(Interrupted, match=r"SIGTERM, after step 5 of 10\. .*/step-5"):
        train(small(tmp_path / "run"))
    train(small(tmp_path / "run"))
    assert_same_run(whole_run, tmp_path / "run")


def test_a_signal_while_a_step_waits_for_its_images_names_the_last_checkpoint(small, whole_run, tmp_path, monkeypatch):
    begin, calls = TrainingStep.begin, []

    def hang_in_step_7(self, *arguments, **options):
        calls.append(1)
        if len(calls) == 7:
            os.kill(os.getpid(), signal.SIGTERM)
            raise NoBatchError
        begin(self, *arguments, **options)

    monkeypatch.setattr(TrainingStep, "begin", hang_in_step_7)
    with pytest.raises(Interrupted, match=r"SIGTERM, while it waited for a batch\. .*/step-6; the same") as caught:
        train(small(tmp_path / "run", checkpoint_every="3steps"))
    assert caught.value.status == 75
    assert checkpoint_names(tmp_path / "run") == ["step-6", "step-3"]
    monkeypatch.undo()
    train(small(tmp_path / "run"))
    assert_same_run(whole_run, tmp_path / "run")


@pytest.mark.slow
def test_a_signal_during_a_save_completes_it_and_saves_again(trained_run, tmp_path, monkeypatch):
    save_file, written = checkpoint.save_file, []

    def save_and_signal(tensors, path):
        written.append(path)
        if len(written) == 6:  # the second file of the second checkpoint
            os.kill(os.getpid(), signal.SIGTERM)
        save_file(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", save_and_signal)
    with pytest.raises(Interrupted, match=r"SIGTERM, after step (\d+) of 10\. .*/step-\1"):
        train(tiny(tmp_path / "run", checkpoint_every="3steps", keep=(9, 0)))
    monkeypatch.undo()
    assert checkpoint_names(tmp_path / "run")[1:] == ["step-6", "step-3"]
    for path in list_checkpoints(tmp_path / "run" / "checkpoints"):
        verify(path)
    train(tiny(tmp_path / "run"))
    assert_same_run(trained_run, tmp_path / "run")


def test_a_damaged_checkpoint_is_reported_and_the_one_before_is_used(whole_run, stopped, tmp_path, capsys):
    file = tmp_path / "run" / "checkpoints" / "step-7" / "optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    train(stopped)
    printed = capsys.readouterr().out
    assert re.search(r"step-7 \(optimizer\.safetensors has [\d,]+ bytes", printed)
    assert "set-aside-step-7" in printed
    assert "from step 6 of 10" in printed
    assert_same_run(whole_run, tmp_path / "run")


def test_a_second_run_in_the_same_folder_is_refused_and_changes_nothing(stopped, tmp_path, in_child):
    run = RunFolder(tmp_path / "run")
    assert in_child(run.acquire_lock)[1] == "None\n"
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    with pytest.raises(ConfigurationError, match=r"--output_dir .*/run: another run is writing to it"):
        train(stopped)
    assert {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()} == before


def test_more_epochs_need_a_named_checkpoint_and_are_reported(stopped, tmp_path, capsys):
    with pytest.raises(ConfigurationError, match=r"epochs .*2.* 3.*--resume .*/step-N"):
        train(stopped, epochs=3)
    train(stopped, epochs=3, resume=str(tmp_path / "run" / "checkpoints" / "step-6"))
    printed = capsys.readouterr().out
    assert re.search(r"3 epochs instead of 2; .*learning_rate 0\.\d+ → 0\.\d+, ", printed)
    assert "step-7 is set aside" in printed
    assert metrics(tmp_path / "run")[-1]["step"] == 15
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert (saved["epochs"], saved["resume"]) == (3, "auto")


def test_the_same_command_continues_a_run_that_was_resumed_from_a_named_checkpoint(stopped, tmp_path, capsys):
    first = tmp_path / "run" / "checkpoints" / "step-6"
    with pytest.raises(ConfigurationError, match=r"--resume .*step-60: no such folder"):
        train(stopped, epochs=3, resume=f"{first}0")
    shutil.copytree(tmp_path / "run", tmp_path / "whole")
    train(stopped, epochs=3, resume=str(tmp_path / "whole" / "checkpoints" / "step-6"), output_dir=f"{tmp_path}/whole")
    with pytest.MonkeyPatch.context() as patch:
        stop_in_step(patch, 6)
        with pytest.raises(Interrupted, match="after step 12 of 15"):
            train(stopped, epochs=3, resume=str(first))
    shutil.rmtree(first)  # as --keep does in time
    train(stopped, epochs=3, resume=str(first))
    printed = capsys.readouterr().out
    assert f"already continues from {first}; to start there again, give another folder" in printed
    assert "resumes from step 12 of 15" in printed
    assert_same_run(tmp_path / "whole", tmp_path / "run")
    assert train(stopped, epochs=3, resume=str(first)) is None
    assert "is complete" in capsys.readouterr().out
    with pytest.raises(ConfigurationError, match="no such folder"):  # other settings ask for another start
        train(stopped, epochs=4, resume=str(first))


def test_max_steps_is_the_length_of_the_run_and_of_its_schedules(small, tmp_path, capsys):
    """Seven steps are 1.4 epochs; stopped after four of them, the run resumes to the same bits."""
    whole, stopped = (small(tmp_path / name, max_steps=7, epochs=1, warmup_epochs=0.5) for name in ("whole", "parts"))
    train(whole)
    assert "1.4 epochs, 7 steps of 8 images" in capsys.readouterr().out
    rows = [row for row in metrics(tmp_path / "whole") if row["step"] > 0]
    config = build_config(whole)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6, 7]
    assert [row["learning_rate"] for row in rows] == [config.schedule(step, 5).learning_rate for step in range(7)]
    assert [row["step"] for row in metrics(tmp_path / "whole") if "knn_top1" in row] == [0, 5, 7]
    assert yaml.safe_load((tmp_path / "whole" / "config.yaml").read_text())["max_steps"] == 7
    with pytest.MonkeyPatch.context() as patch:
        stop_in_step(patch, 4)
        with pytest.raises(Interrupted, match="after step 4 of 7"):
            train(stopped)
    train(stopped)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    capsys.readouterr()
    assert train(stopped) is None
    assert "is complete" in capsys.readouterr().out
    train(stopped, max_steps=9, resume=str(tmp_path / "parts" / "checkpoints" / "step-7"))
    assert "9 steps instead of 7; from this step on the schedules are those of 9 steps" in capsys.readouterr().out
    assert metrics(tmp_path / "parts")[-1]["step"] == 9


def test_a_run_resumes_on_the_same_images_wherever_they_are(tmp_path, monkeypatch):
    settings = write_images_with_broken_ones(tmp_path, broken=())
    stop_in_step(monkeypatch, 3)
    with pytest.raises(Interrupted):
        train(settings)
    monkeypatch.undo()
    (tmp_path / "images").rename(tmp_path / "moved")
    settings["dataset"] = str(tmp_path / "moved")
    (tmp_path / "moved" / "003.png").rename(tmp_path / "moved" / "3.png")
    with pytest.raises(ConfigurationError, match=r"--dataset: other images"):
        train(settings)
    (tmp_path / "moved" / "3.png").rename(tmp_path / "moved" / "003.png")
    train(settings)
    assert metrics(tmp_path / "run")[-1]["step"] == 10


def test_a_run_that_diverges_ends_without_an_encoder(tmp_path):
    with pytest.raises(ConfigurationError, match=r"the loss is nan .*--learning_rate_per_256 below 1e\+12"):
        train(tiny(tmp_path / "run", learning_rate_per_256=1e12))
    assert not (tmp_path / "run" / "encoder").exists()
    for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} in metrics.jsonl"))


def test_a_loss_that_is_not_finite_changes_no_weight(whole_run, stopped, tmp_path, monkeypatch):
    loss, calls = training.momentum_teacher_loss, []

    def broken(*arguments, **options):
        calls.append(1)
        return loss(*arguments, **options) * (float("nan") if len(calls) == 4 else 1.0)  # sub-batch 2 of step 9

    monkeypatch.setattr(training, "momentum_teacher_loss", broken)
    with pytest.raises(ConfigurationError, match=r"nan in step 9 on process 0.*not_finite\.json.*/step-7.*--learning"):
        train(stopped)
    monkeypatch.undo()
    saved = json.loads((tmp_path / "run" / "not_finite.json").read_text())
    assert (saved["step"], saved["epoch"], saved["step_of_epoch"], saved["seed"]) == (9, 1, 3, 0)
    (sub_batch,) = saved["sub_batches"]
    assert (sub_batch["process"], sub_batch["virtual_device"], sub_batch["loss"]) == (0, 1, "nan")
    expected = permute(np.arange(3 * 8 + 4, 4 * 8), 40, (0, 0, 1))
    assert sub_batch["samples"] == expected.tolist()
    assert len(sub_batch["images"]) == 4
    assert checkpoint_names(tmp_path / "run")[0] == "step-7"
    train(stopped)
    assert_same_run(whole_run, tmp_path / "run")


def overflow_above(patch, scale):
    """Give runs a gradient scaler, as float16 does on a GPU, and let the loss of a large scale overflow."""
    start, loss, scalers = inspect.unwrap(pretrain).__globals__["start_accelerator"], training.momentum_teacher_loss, []

    def start_with_scaler(*arguments):
        accelerator = start(*arguments)
        accelerator.scaler = torch.amp.GradScaler("cpu")
        scalers.append(accelerator.scaler)
        return accelerator

    def overflow(*arguments, **options):
        is_large = scalers[-1].get_scale() > scale
        return loss(*arguments, **options) * (float("inf") if is_large else 1.0)

    patch.setitem(inspect.unwrap(pretrain).__globals__, "start_accelerator", start_with_scaler)
    patch.setattr(training, "momentum_teacher_loss", overflow)


def test_steps_that_overflow_float16_are_skipped_and_a_run_resumes_among_them(small, tmp_path, monkeypatch):
    overflow_above(monkeypatch, 2.0**13)  # the scale begins at 2 ** 16, so three steps are skipped
    train(small(tmp_path / "whole"), evaluate_every=0)
    rows = metrics(tmp_path / "whole")
    assert [row["step"] for row in rows] == list(range(1, 11))
    assert all(0 < row["loss"] < 8 and row["skipped_steps"] == 3 for row in rows)
    for stops_in in (2, 5):  # while steps are skipped, and later
        with monkeypatch.context() as patch:
            stop_in_step(patch, stops_in)
            with pytest.raises(Interrupted, match="before the first step" if stops_in == 2 else "after step 2 of 10"):
                train(small(tmp_path / "run"), evaluate_every=0)
    manifest = verify(tmp_path / "run" / "checkpoints" / "step-2").manifest
    assert (manifest["gradient_scaler"]["scale"], manifest["progress"]["skipped"]) == (2.0**13, 3)
    train(small(tmp_path / "run"), evaluate_every=0)
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_a_run_that_has_skipped_steps_is_finished_in_another_precision(small, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        overflow_above(patch, 2.0**13)
        stop_in_step(patch, 5)
        with pytest.raises(Interrupted, match="after step 2 of 10"):
            train(small(tmp_path / "run"), evaluate_every=0)
    train(small(tmp_path / "run"), evaluate_every=0)
    rows = metrics(tmp_path / "run")
    assert [row["step"] for row in rows] == list(range(1, 11))
    assert all(row["update_norm"] > 0 for row in rows if "update_norm" in row)
    assert rows[-1]["skipped_steps"] == 3


def test_a_run_that_overflows_float16_at_every_scale_ends(small, tmp_path, monkeypatch):
    overflow_above(monkeypatch, 0.0)
    with pytest.raises(ConfigurationError, match=r"loss is inf in step 1 .*scale of 1\).*--mixed_precision bf16"):
        train(small(tmp_path / "run", epochs=5), evaluate_every=0)
    assert len(json.loads((tmp_path / "run" / "not_finite.json").read_text())["sub_batches"]) == 2


def test_a_weight_that_is_not_finite_reaches_no_checkpoint(stopped, tmp_path, monkeypatch):
    follow, calls = Teacher.follow, []

    def follow_and_break(self, student, weight_momentum):
        follow(self, student, weight_momentum)
        calls.append(1)
        if len(calls) == 3:  # when it is created, in step 8, in step 9
            next(self.parameters()).data[0] = float("inf")

    monkeypatch.setattr(Teacher, "follow", follow_and_break)
    with pytest.raises(ConfigurationError, match=r"not finite.*/step-7"):
        train(stopped)
    assert checkpoint_names(tmp_path / "run") == ["step-7", "step-6", "step-3"]


@pytest.mark.parametrize("stops", [False, True])
def test_collapse_prints_a_warning_or_ends_the_run(stopped, tmp_path, monkeypatch, capsys, stops):
    spread = training.embedding_std
    monkeypatch.setattr(training, "embedding_std", lambda embeddings: 1e-3 * spread(embeddings))
    if stops:
        with pytest.raises(ConfigurationError, match=r"step 8: .*collapsed.*--stop_on_collapse"):
            train(stopped, stop_on_collapse=True)
        assert not (tmp_path / "run" / "encoder").exists()
    else:
        train(stopped)
        printed = capsys.readouterr().out
        assert printed.count("collapsed") == 1
        assert "warning: step 8: the teacher" in printed
        (row,) = [row for row in metrics(tmp_path / "run") if "alarms" in row]
        assert (row["step"], len(row["alarms"])) == (8, 1)


def test_a_full_disk_at_the_end_is_reported_and_the_run_can_be_finished(trained_run, tmp_path, monkeypatch, capsys):
    shutil.copytree(trained_run, tmp_path / "run")
    (tmp_path / "run" / "training.json").unlink()
    shutil.rmtree(tmp_path / "run" / "encoder")

    def fail(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(completion, "save_encoder", fail)
    with pytest.raises(ConfigurationError, match=r"cannot be written \(No space .*/step-10"):
        train(tiny(tmp_path / "run"))
    monkeypatch.undo()
    assert not (tmp_path / "run" / "training.json").exists()
    train(tiny(tmp_path / "run"))
    assert_same_run(trained_run, tmp_path / "run")
    printed = capsys.readouterr().out
    assert f'AutoModel.from_pretrained("{tmp_path / "run" / "encoder"}")' in printed
    assert re.search(r"kNN top-1: \d\d\.\d\d % with random weights, \d\d\.\d\d %", printed)
    assert "Next:" in printed
