"""Alarms: each with its fault planted in a short run, and none without."""

import math
import re
import shutil
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import concatenate_datasets
from helpers import stop_in_step, tiny
from survive import metrics

from m2t_accel import model
from m2t_accel import step as training
from m2t_accel.config.fields import Interrupted
from m2t_accel.config.recipes import build_config
from m2t_accel.data.sources import load_digits
from m2t_accel.data.views import TwoViews
from m2t_accel.evaluation import features
from m2t_accel.model import Teacher
from m2t_accel.pretrain import pretrain
from m2t_accel.run import completion, monitor, report
from m2t_accel.run.monitor import DataWait, Monitor, chance_level


@pytest.fixture
def train(tmp_path, monkeypatch, capsys):
    """Train a tiny run with a fault. Return the warnings that it printed."""
    monkeypatch.setattr(completion, "draw_curves", lambda *arguments, **options: None)  # takes as long as a small run

    def run(dataset=None, **settings):
        pretrain(build_config(tiny(tmp_path / "run", **{"evaluate_every": 0, **settings})), dataset)
        printed = [
            line[line.index("warning") :] for line in capsys.readouterr().out.splitlines() if "warning: step" in line
        ]
        recorded = [alarm for row in metrics(tmp_path / "run") for alarm in row.get("alarms", ())]
        assert [f"warning: {alarm}" for alarm in recorded] == printed
        return printed

    return run


def test_a_run_without_a_fault_has_no_alarm(train, tmp_path):
    assert train(evaluate_every=1) == []
    names = ["gradient_norm", "update_norm", "update_ratio", "teacher_distance", "effective_rank"]
    rows = metrics(tmp_path / "run")[1:]
    assert all(row["agreement"] == 1 - row["loss"] / 4 for row in rows)
    rows = [row for row in rows if "layers" in row]
    assert [row["step"] for row in rows] == [1, 2, 4, 8, 10]
    for row in rows:
        assert set(row) >= {*names, "statistics_distance"}
        assert row["statistics_distance"] == max(row["layers"].values())
        assert 1 <= row["effective_rank"] <= 16
    assert len(row["layers"]) == 13
    assert "projector.1" in row["layers"]


def test_a_teacher_that_stays_is_an_alarm(train, monkeypatch):
    follow = Teacher.follow

    def stay(self, student, weight_momentum):
        if weight_momentum == 0:  # the start
            follow(self, student, weight_momentum)

    monkeypatch.setattr(Teacher, "follow", stay)
    (line,) = train()
    assert "the teacher moved by 0 of its way to the student, although its weight momentum 0.9" in line


@pytest.mark.parametrize(("stuck", "step"), [(0.0, 1), (1.0, 2)])
def test_a_stuck_statistics_momentum_is_an_alarm(train, monkeypatch, stuck, step):
    set_momentum = model.set_statistics_momentum
    monkeypatch.setattr(model, "set_statistics_momentum", lambda layers, momentum: set_momentum(layers, stuck))
    (line,) = train()
    assert f"warning: step {step}: the history of the teacher's BatchNorm moved by {stuck:g}" in line


def test_features_that_overflow_leave_a_line_without_knn(train, monkeypatch, tmp_path):
    embed = features.embed
    monkeypatch.setattr(features, "embed", lambda *arguments: embed(*arguments) * float("inf"))
    lines = train(evaluate_every=1)
    assert re.match("warning: step 0: teacher kNN is not measured: the encoder's features are not finite", lines[0])
    rows = metrics(tmp_path / "run")
    assert len(lines) == sum(row["step"] % 5 == 0 for row in rows)
    assert not any("knn_top1" in row for row in rows)


def test_equal_views_are_an_alarm(train):
    (line,) = train(crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), rotation=0.0, jitter_probability=0.0)
    assert "warning: step 1: the two views are equal for 100 % of the images" in line
    assert "--crop_scale" in line


def test_views_with_the_same_random_numbers_are_an_alarm(train, monkeypatch):
    chunk = training.TrainingStep.forward_backward
    monkeypatch.setattr(training.TrainingStep, "forward_backward", lambda self, one, two: chunk(self, one, one))
    assert "the two views are equal for 100 %" in train()[0]


def test_a_learning_rate_100_times_too_high_is_an_alarm(train):
    (line,) = train(learning_rate_per_256=40)
    assert "one update changed the student's weights by" in line
    assert "try a --learning_rate_per_256 below 40" in line


def test_embeddings_on_a_line_are_an_alarm(train, monkeypatch):
    forward = Teacher.forward

    def on_a_line(self, *views):
        directions = torch.eye(16)[0]
        return tuple(torch.sign(out[:, :1] - out[:, :1].median()) * directions for out in forward(self, *views))

    monkeypatch.setattr(Teacher, "forward", on_a_line)
    lines = train()
    assert any("embeddings use only about 1.00 dimensions" in line for line in lines), lines


@pytest.mark.parametrize("shuffled", [False, True])
def test_shuffled_labels_are_an_alarm(train, shuffled):
    images = concatenate_datasets(list(load_digits().values())).select(range(600))
    labels = np.array(images["label"])
    if shuffled:
        labels = np.random.default_rng(0).permutation(labels)
        images = images.remove_columns("label").add_column("label", labels)
    lines = train(images, evaluate_every=2)
    assert (len(lines) == 1 and "no better than chance" in lines[0]) if shuffled else lines == []


def test_a_slow_loader_is_an_alarm(train, monkeypatch):
    late = [0.0]
    clock = SimpleNamespace(perf_counter=lambda: time.perf_counter() + late[0])
    monkeypatch.setattr(monitor, "time", clock)
    monkeypatch.setattr(report, "time", clock)
    read = TwoViews.__getitems__

    def read_slowly(self, request):
        late[0] += 20.0
        return read(self, request)

    monkeypatch.setattr(TwoViews, "__getitems__", read_slowly)
    (line,) = train()
    assert "training waited for images in" in line
    assert "--num_workers" in line


@pytest.mark.parametrize(
    ("log_every", "total_steps"), [(1, 10), (10, 1760), (10, 500_000), (7, 1000), (50, 20), (100, 12_345)]
)
def test_about_a_hundred_steps_are_measured(log_every, total_steps):
    config = SimpleNamespace(log_every=log_every, total_steps=lambda steps_per_epoch: total_steps)
    accelerator, step = SimpleNamespace(device=torch.device("cpu")), SimpleNamespace(teacher=torch.nn.Linear(1, 1))
    is_due = Monitor(config, accelerator, step, progress=None, steps_per_epoch=1).is_due
    due = [step for step in range(1, total_steps + 1) if is_due(step)]
    assert all(step % log_every == 0 or step == total_steps for step in due)
    assert due[-1] == total_steps
    assert due[0] == min(log_every, total_steps)
    assert len(due) <= 100 + 2 + math.log2(max(20, total_steps / 100) / log_every + 1)
    assert len(due) >= min(50, total_steps // max(20, log_every))


def test_a_health_line_is_the_same_after_a_stop(train, tmp_path):
    """The step before a stop is measured, but its line is written by the run that resumes."""
    train(evaluate_every=1)
    shutil.move(tmp_path / "run", tmp_path / "whole")
    with pytest.MonkeyPatch.context() as patch:
        stop_in_step(patch, 4)
        with pytest.raises(Interrupted):
            train(evaluate_every=1)
    train(evaluate_every=1)
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")
    assert ["layers" in row for row in metrics(tmp_path / "run")[3:6]] == [False, True, False]


@pytest.mark.parametrize(
    ("labels", "level"),
    [
        (np.arange(1000) % 10, 0.1 + 3 * math.sqrt(0.09 / 1000)),
        (np.arange(100) % 2, 0.5 + 3 * math.sqrt(0.25 / 100)),
        (np.arange(30) % 2, None),  # too few
        (np.arange(1000) % 4 // 3, None),  # three quarters are of one class
    ],
)
def test_level_of_chance(labels, level):
    assert chance_level(labels) == pytest.approx(level)


def test_the_wait_for_batches_is_added_up(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(monitor.time, "perf_counter", lambda: clock[0])

    def batches():
        for i in range(3):
            clock[0] += 10.0 + i
            yield i

    wait = DataWait(torch.device("cpu"))
    for _ in wait.watch(batches()):
        clock[0] += 1000.0
    assert wait.seconds == 33.0


class FakeEvent:
    """An event of a GPU that computes until `busy_until`, in milliseconds."""

    clock = busy_until = 0.0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = max(FakeEvent.clock, FakeEvent.busy_until)

    def query(self):
        return FakeEvent.clock >= self.at

    def elapsed_time(self, other):
        return other.at - self.at


def test_the_wait_of_a_gpu_is_the_time_in_which_it_has_no_work(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)

    def batches():
        for seconds in (0, 30, 80):  # in milliseconds; the GPU computes 50 for each batch
            FakeEvent.clock += seconds
            yield seconds

    FakeEvent.clock = FakeEvent.busy_until = 0.0
    wait = DataWait(torch.device("cuda"))
    for _ in wait.watch(batches()):
        FakeEvent.busy_until = max(FakeEvent.clock, FakeEvent.busy_until) + 50.0
    FakeEvent.clock = FakeEvent.busy_until
    wait.add_completed()
    assert wait.seconds == pytest.approx(0.010)  # the third batch came at 110, and the GPU was idle from 100 on
