"""The loop, in process, on runs of seconds."""

import contextlib
import io
import json
import math
import os
import re
import signal

import cv2
import numpy as np
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from helpers import tiny, write_image, write_parquet
from safetensors.torch import load_file
from torch import nn

from m2t_accel import pretrain as pretraining
from m2t_accel.config.fields import ConfigurationError, Interrupted
from m2t_accel.config.recipes import build_config
from m2t_accel.data import requests, views
from m2t_accel.data.order import permuted
from m2t_accel.data.photometry import photometry
from m2t_accel.data.sources import load_images
from m2t_accel.evaluation import features
from m2t_accel.model import create_encoder, create_student, embed, embedding_std
from m2t_accel.momentum_norm import MomentumBatchNorm
from m2t_accel.pretrain import Run, pretrain
from m2t_accel.progress import duration
from m2t_accel.run import checkpoint, completion
from m2t_accel.run.checkpoint import list_checkpoints, read_tensors, verify
from m2t_accel.run.report import COLLAPSED, Report


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def without_clock(rows):
    return [{k: v for k, v in row.items() if k not in ("seconds", "images_per_second")} for row in rows]


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


# --- a second implementation of the whole method: slow, plain, sharing only the pixels and the random weights


class PlainNorm(nn.Module):
    """Momentum statistics as the paper writes them, on tensors of any shape (N, C, ...)."""

    def __init__(self, norm):
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps
        self.mean, self.var = torch.zeros(norm.num_features), torch.ones(norm.num_features)
        self.alpha, self.seen = 1.0, []

    def forward(self, x):
        values = x.transpose(0, 1).flatten(1)
        mean = values.mean(dim=1)
        var = ((values - mean[:, None]) ** 2).sum(dim=1) / (values.shape[1] - 1)
        self.seen.append((mean, var))
        mean, var = self.alpha * mean + (1 - self.alpha) * self.mean, self.alpha * var + (1 - self.alpha) * self.var
        shape = (1, -1) + (1,) * (x.dim() - 2)
        scaled = (x - mean.view(shape)) / (var.view(shape) + self.eps).sqrt()
        return scaled * self.weight.view(shape) + self.bias.view(shape)

    def commit(self):
        mean, var = (torch.stack(part).mean(dim=0) for part in zip(*self.seen, strict=True))
        self.mean = self.alpha * mean + (1 - self.alpha) * self.mean
        self.var = self.alpha * var + (1 - self.alpha) * self.var
        self.seen = []


def with_plain_norms(module):
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm1d | nn.BatchNorm2d):
            setattr(module, name, PlainNorm(child))
        else:
            with_plain_norms(child)
    return module


def losses_of_a_second_implementation(config, defect=None):
    def build():
        torch.manual_seed(config.seed)
        encoder = create_encoder(config.encoder)
        return create_student(encoder, config.image_size, config.hidden_size, config.projection_size)

    student, teacher = build(), with_plain_norms(build()).requires_grad_(False)
    del teacher.predictor
    norms = [module for module in teacher.modules() if isinstance(module, PlainNorm)]
    student.train()
    images = load_images(config).train
    views_of = views.TwoViews(images, config)
    steps = len(images) // config.batch_size
    total = steps * config.epochs
    warmup = config.warmup_epochs * steps
    buffers = [torch.zeros_like(p) for p in student.parameters()]
    losses = []
    for k in range(total):
        epoch, place = divmod(k, steps)
        positions = np.arange(place * config.batch_size, (place + 1) * config.batch_size)
        batch = permuted(positions, len(images), (0, config.seed, epoch))
        rate = 1e-6 + (config.learning_rate - 1e-6) * k / warmup
        if k > warmup:
            rate = config.learning_rate * (1 + math.cos(math.pi * (k - warmup) / (total - warmup))) / 2
        for norm in norms:
            norm.alpha = (1 + math.cos(math.pi * k / total)) / 2
        student.zero_grad()
        loss_of_step = 0.0
        sub_batches = batch.reshape(config.num_virtual_devices, -1)
        for sub_batch in sub_batches:
            crops, parameters, *_ = views_of.__getitems__(requests.Request(epoch, sub_batch, None))
            one, two = photometry(crops, parameters, config).double().chunk(2)
            q = [student.predictor(student.projector(embed(student.encoder, view))) for view in (one, two)]
            with torch.no_grad():
                t = [teacher.projector(embed(teacher.encoder, view)) for view in (one, two)]
            cosine = torch.nn.functional.cosine_similarity
            loss = (4 - 2 * (cosine(q[0], t[1]) + cosine(q[1], t[0]))).mean() / len(sub_batches)
            loss.backward()
            loss_of_step += loss.item()
        losses.append(loss_of_step)
        with torch.no_grad():
            for parameter, buffer in zip(student.parameters(), buffers, strict=True):
                buffer.mul_(0.9).add_(parameter.grad + config.weight_decay * parameter)
                parameter.sub_(rate * buffer)
            m = 1 - (1 - config.weight_momentum) * (1 + math.cos(math.pi * (k + 1) / total)) / 2
            if defect == "weight momentum of this step":
                m = 1 - (1 - config.weight_momentum) * (1 + math.cos(math.pi * k / total)) / 2
            theirs = dict(student.named_parameters())
            for name, parameter in teacher.named_parameters():
                parameter.copy_(m * parameter + (1 - m) * theirs[name])
        for norm in norms:
            norm.commit()
    return losses


@pytest.mark.slow
def test_the_loop_equals_a_second_implementation(tmp_path, float64):
    config = build_config(
        tiny(
            tmp_path / "run",
            batch_size=128,
            device_batch_size=64,
            image_size=16,
            epochs=1,
            warmup_epochs=0.3,
            weight_momentum=0.9,
            weight_decay=1e-2,
            evaluate_every=0,
        )
    )
    pretrain(config)
    ours = [row["loss"] for row in metrics(tmp_path / "run")]
    expected = losses_of_a_second_implementation(config)
    assert len(ours) == len(expected) == 11
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-9)
    defective = losses_of_a_second_implementation(config, defect="weight momentum of this step")
    assert np.abs(np.subtract(ours, defective)).max() > 1e-7, "the comparison cannot see a shifted schedule"


# --- what a run leaves behind


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of digits, its folder and what it printed."""
    folder = tmp_path_factory.mktemp("runs") / "digits"
    config = build_config(tiny(folder))
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        pretrain(config)
    return folder, config, shown.getvalue()


def test_the_folder_of_a_run(run):
    folder, _, _ = run
    names = [".lock", "checkpoints", "config.yaml", "curves.png", "encoder", "metrics.jsonl", "training.json"]
    assert sorted(path.name for path in folder.iterdir()) == names
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-10"]
    files = {path.name for path in (folder / "encoder").iterdir()}
    assert files == {"README.md", "config.json", "model.safetensors", "preprocessor_config.json"}


def test_metrics_have_a_line_a_step_and_all_figures(run):
    folder, config, _ = run
    rows = metrics(folder)
    assert [row["step"] for row in rows] == list(range(11))
    assert list(rows[0]) == ["step", "epoch", "knn_top1", "seconds"]
    figures = {"step", "epoch", "loss", "embedding_std", "images_per_second", "learning_rate", "statistics_momentum"}
    figures |= {"weight_momentum", "seconds"}
    for row in rows[1:]:
        assert figures <= row.keys() <= figures | {"knn_top1"}
        assert 0 < row["loss"] < 8
        assert 0 < row["embedding_std"] < 1.1
    assert [row["step"] for row in rows if "knn_top1" in row] == [0, 5, 10]
    assert rows[1]["statistics_momentum"] == 1.0
    assert rows[-1]["weight_momentum"] == 1.0
    assert rows[-1]["learning_rate"] < config.learning_rate / 10


def test_the_summary_says_where_things_are(run):
    folder, _, shown = run
    assert f"Encoder:  {folder / 'encoder'}" in shown
    assert f'AutoModel.from_pretrained("{folder / "encoder"}")' in shown
    assert re.search(r"Teacher kNN top-1: \d\d\.\d\d % with random weights, \d\d\.\d\d % now\.", shown)
    assert "Next:" in shown


def test_the_resolved_configuration_reproduces_the_run(run, tmp_path):
    folder, _, _ = run
    settings = yaml.safe_load((folder / "config.yaml").read_text())
    assert settings["evaluate_every"] == 1, "config.yaml holds what was used, not what was asked"
    pretrain(build_config({**settings, "output_dir": str(tmp_path / "again")}))
    assert without_clock(metrics(tmp_path / "again")) == without_clock(metrics(folder))


def test_a_complete_run_is_left_as_it_is(run, capsys):
    folder, config, _ = run
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert pretrain(config) is None
    assert capsys.readouterr().out == f"{folder} is complete: {folder}/encoder\n"
    with pytest.raises(ConfigurationError, match="holds another run"):
        pretrain(build_config({**vars(config), "resume": "never"}))
    with pytest.raises(ConfigurationError, match=r"of a run with other settings \(seed 0 there, 1 here\)"):
        pretrain(build_config({**vars(config), "seed": 1}))
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_the_number_of_workers_does_not_change_the_run(run, tmp_path):
    folder, _, _ = run
    pretrain(build_config(tiny(tmp_path / "workers", num_workers=2)))
    assert without_clock(metrics(tmp_path / "workers")) == without_clock(metrics(folder))


def test_accumulation_of_the_environment_is_not_ours(run, tmp_path, monkeypatch):
    """Accelerate lets this variable override a program's number; virtual devices would lose steps in silence."""
    folder, _, _ = run
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "5")
    pretrain(build_config(tiny(tmp_path / "run")))
    assert without_clock(metrics(tmp_path / "run")) == without_clock(metrics(folder))


def test_tensorboard_gets_the_metrics(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    pretrain(build_config(tiny(tmp_path / "run", tracker="tensorboard")))
    events = list((tmp_path / "run").rglob("events.out.tfevents*"))
    accumulators = [EventAccumulator(str(path)) for path in events]
    losses = []
    for accumulator in accumulators:
        accumulator.Reload()
        if "loss" in accumulator.Tags()["scalars"]:
            losses += [(event.step, event.value) for event in accumulator.Scalars("loss")]
    expected = {row["step"]: row["loss"] for row in metrics(tmp_path / "run") if "loss" in row}
    assert dict(losses) == pytest.approx(expected)


# --- other images, other encoders


@pytest.mark.parametrize("labelled", [True, False])
def test_a_folder_of_photographs(tmp_path, labelled, capsys):
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            for i in range(8):
                path = tmp_path / "photos" / split / name / ("" if labelled else "deeper") / f"{i}.jpg"
                path.parent.mkdir(parents=True, exist_ok=True)
                cv2.imwrite(str(path), rng.integers(0, 256, (40, 50, 3), np.uint8))
    config = build_config(
        {
            "recipe": "8x2080Ti-b256-100ep",
            "dataset": str(tmp_path / "photos"),
            "output_dir": str(tmp_path / "run"),
            "encoder": "resnet10-quarter",
            "image_size": 32,
            "batch_size": 8,
            "device_batch_size": 4,
            "epochs": 2,
            "warmup_epochs": 0.5,
            "hidden_size": 16,
            "projection_size": 8,
            "log_every": 1,
        }
    )
    pretrain(config)
    rows = metrics(tmp_path / "run")
    assert rows[-1]["step"] == 4
    assert any("knn_top1" in row for row in rows) == labelled
    assert ("2 classes" in capsys.readouterr().out) == labelled
    assert (tmp_path / "run" / "encoder" / "model.safetensors").exists()


def test_photographs_in_the_recipe_of_digits_get_a_word_of_advice(tmp_path, capsys):
    (tmp_path / "photos").mkdir()
    for i in range(4):
        cv2.imwrite(str(tmp_path / "photos" / f"{i}.jpg"), np.full((40, 50, 3), 60 * i, np.uint8))
    pretrain(build_config(tiny(tmp_path / "run", dataset=str(tmp_path / "photos"), batch_size=4, device_batch_size=4)))
    assert "for photographs give --recipe 8x2080Ti-b256-100ep" in capsys.readouterr().out


def test_evaluation_without_labels_is_refused_before_anything_is_written(tmp_path):
    for i in range(4):
        (tmp_path / "photos").mkdir(exist_ok=True)
        cv2.imwrite(str(tmp_path / "photos" / f"{i}.jpg"), np.zeros((40, 50, 3), np.uint8))
    config = build_config(tiny(tmp_path / "run", dataset=str(tmp_path / "photos"), batch_size=2, device_batch_size=2))
    with pytest.raises(ConfigurationError, match=r"--evaluate_every 1 needs labelled images.*has no labels"):
        pretrain(build_config({**vars(config), "evaluate_every": 1}))
    assert not (tmp_path / "run").exists()


@pytest.fixture
def fresh_accelerator():
    """Accelerate's settings are of the process: forget them before and after."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def test_mixed_precision_trains(tmp_path, monkeypatch, fresh_accelerator):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    seen = set()
    forward = MomentumBatchNorm.forward

    def watch(self, input):
        if self.training:
            seen.add((input.dtype, self.running_mean.dtype, self.pending_var.dtype))
        return forward(self, input)

    monkeypatch.setattr(MomentumBatchNorm, "forward", watch)
    teacher = pretrain(build_config(tiny(tmp_path / "run", epochs=1, warmup_epochs=0.5)))
    assert seen == {(torch.bfloat16, torch.float32, torch.float32)}
    assert "bf16" in (tmp_path / "run" / "config.yaml").read_text().splitlines()[0]
    assert {tensor.dtype for tensor in teacher.state_dict().values()} == {torch.float32, torch.int64}
    assert all(0 < row["loss"] < 8 for row in metrics(tmp_path / "run") if "loss" in row)


@pytest.mark.slow
def test_a_compiled_run_is_the_same_run(tmp_path, monkeypatch, fresh_accelerator, float64):
    """aot_eager takes the compiler's whole way but for the code it writes."""
    losses = []
    for backend in ("NO", "AOT_EAGER"):
        AcceleratorState._reset_state(reset_partial_state=True)
        monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", backend)
        settings = tiny(tmp_path / backend, image_size=16, batch_size=128, device_batch_size=64, evaluate_every=0)
        pretrain(build_config({**settings, "epochs": 1, "warmup_epochs": 0.2}))
        losses.append([row["loss"] for row in metrics(tmp_path / backend)])
    np.testing.assert_allclose(losses[0], losses[1], rtol=0, atol=1e-9)


def test_a_run_that_diverges_ends_with_a_line_and_no_encoder(tmp_path):
    with pytest.raises(ConfigurationError, match=r"the loss is nan .* Try a --learning_rate_per_256 below 1e\+12"):
        pretrain(build_config(tiny(tmp_path / "run", learning_rate_per_256=1e12)))
    assert not (tmp_path / "run" / "encoder").exists()
    for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} in metrics.jsonl"))


@pytest.mark.parametrize(("seconds", "words"), [(45.4, "45 s"), (723, "12 min 3 s"), (18720, "5 h 12 min")])
def test_duration_in_words(seconds, words):
    assert duration(seconds) == words


def folder_with_broken_images(folder, number, broken):
    for i in range(number):
        write_image(folder / f"{i:03}.png", value=i)
    for i in broken:
        (folder / f"{i:03}.png").write_bytes((folder / f"{i:03}.png").read_bytes()[:50])


def test_broken_images_are_told_once_and_written_down(tmp_path, capfd):
    folder_with_broken_images(tmp_path / "images", 40, broken=(3, 17))
    settings = tiny(tmp_path / "run", dataset=str(tmp_path / "images"), batch_size=8, device_batch_size=4, epochs=3)
    pretrain(build_config(settings))
    lines = [json.loads(line) for line in (tmp_path / "run" / "bad_images.jsonl").read_text().splitlines()]
    assert sorted((line["sample"], os.path.basename(line["path"])) for line in lines) == [
        (3, "003.png"),
        (17, "017.png"),
    ]
    assert all(line["reason"] for line in lines)
    told = capfd.readouterr().out
    assert told.count("cannot be decoded, another image is shown instead") == 2
    assert (tmp_path / "run" / "encoder" / "model.safetensors").exists()


def test_too_many_broken_images_stop_the_run_where_it_can_go_on(tmp_path, capfd):
    folder_with_broken_images(tmp_path / "images", 40, broken=range(0, 33, 3))  # 11
    settings = tiny(tmp_path / "run", dataset=str(tmp_path / "images"), batch_size=8, device_batch_size=4)
    with pytest.raises(ConfigurationError, match=r"11 of 40 images cannot be decoded, more than the 10 that --max_bad"):
        pretrain(build_config(settings))
    assert len((tmp_path / "run" / "bad_images.jsonl").read_text().splitlines()) == 11
    assert not (tmp_path / "run" / "encoder").exists()
    AcceleratorState._reset_state(reset_partial_state=True)
    pretrain(build_config({**settings, "max_bad_fraction": 0.3}))
    assert "goes on from step 5 of 10" in capfd.readouterr().out


def test_images_that_were_repaired_are_forgotten_with_the_file(tmp_path):
    folder_with_broken_images(tmp_path / "images", 40, broken=range(0, 33, 3))
    settings = tiny(tmp_path / "run", dataset=str(tmp_path / "images"), batch_size=8, device_batch_size=4)
    with pytest.raises(ConfigurationError, match=r"repair them and remove that file"):
        pretrain(build_config(settings))
    for i in range(0, 33, 3):
        write_image(tmp_path / "images" / f"{i:03}.png", value=i)
    (tmp_path / "run" / "bad_images.jsonl").unlink()
    pretrain(build_config(settings))
    assert (tmp_path / "run" / "encoder").exists()


def test_evaluation_leaves_broken_images_out(tmp_path):
    for name in ("a", "b"):
        folder_with_broken_images(tmp_path / "images" / "train" / name, 20, broken=(1,))
        folder_with_broken_images(tmp_path / "images" / "val" / name, 6, broken=(2,))
    settings = tiny(tmp_path / "run", dataset=str(tmp_path / "images"), batch_size=8, device_batch_size=4, epochs=1)
    pretrain(build_config({**settings, "warmup_epochs": 0.5}))
    accuracy = [row["knn_top1"] for row in metrics(tmp_path / "run") if "knn_top1" in row]
    assert all(
        (10 * value) % 1 == pytest.approx(0, abs=1e-9) or (10 * value) % 1 > 1 - 1e-9 for value in accuracy
    )  # of 10


@pytest.mark.slow
def test_streamed_shards_train_the_same_run_with_any_workers(tmp_path, fresh_accelerator, float64):
    for shard in range(3):
        write_parquet(tmp_path / "set" / f"train-{shard}.parquet", 20 * shard, 20, row_group_size=6)
    settings = {"dataset": str(tmp_path / "set"), "streaming": True, "batch_size": 8, "device_batch_size": 4}
    losses = []
    for num_workers in (0, 1):
        AcceleratorState._reset_state(reset_partial_state=True)
        config = build_config(tiny(tmp_path / str(num_workers), **settings | {"num_workers": num_workers}))
        pretrain(config)
        losses.append([row["loss"] for row in metrics(tmp_path / str(num_workers)) if "loss" in row])
    assert losses[0] == losses[1]
    assert len(losses[0]) > 10


# --- a run that is stopped and goes on


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that was left alone, of eleven steps an epoch."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    pretrain(build_config(stoppable(folder)))
    return folder


def stoppable(folder, **settings):
    return tiny(folder, **{"batch_size": 128, "device_batch_size": 64, "log_every": 4, **settings})


def tensors_of(folder):
    files = read_tensors(verify(list_checkpoints(folder / "checkpoints")[0]))
    files["encoder"] = load_file(folder / "encoder" / "model.safetensors")
    return {f"{file}: {name}": tensor for file, tensors in files.items() for name, tensor in tensors.items()}


def assert_same_run(one, other):
    assert without_clock(metrics(one)) == without_clock(metrics(other))
    mine, theirs = tensors_of(one), tensors_of(other)
    assert mine.keys() == theirs.keys()
    assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == []


@pytest.mark.parametrize("settings", [{}, {"checkpoint_every": "3steps", "keep": (2, 4), "num_workers": 1}])
def test_saving_changes_nothing(whole, tmp_path, settings):
    pretrain(build_config(stoppable(tmp_path / "run", **settings)))
    assert_same_run(whole, tmp_path / "run")
    saved = [path.name for path in list_checkpoints(tmp_path / "run" / "checkpoints")]
    assert saved == (["step-22", "step-21", "step-12"] if settings else ["step-22"])


@pytest.mark.parametrize("step", [1, 8, 10, 21])
def test_a_signal_within_a_step_lets_it_end_and_the_run_goes_on_as_if_nothing_had_been(
    whole, tmp_path, monkeypatch, step
):
    forward_and_backward = Run.forward_and_backward

    def signalled(self, batch):
        if self.step == step - 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        return forward_and_backward(self, batch)

    monkeypatch.setattr(Run, "forward_and_backward", signalled)
    with pytest.raises(Interrupted, match=rf"stopped by SIGUSR1, after step {step} of 22\. .*/step-{step}; the same"):
        pretrain(build_config(stoppable(tmp_path / "run")))
    monkeypatch.undo()
    assert not (tmp_path / "run" / "encoder").exists()
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == [f"step-{step}"]
    pretrain(build_config(stoppable(tmp_path / "run")))
    assert_same_run(whole, tmp_path / "run")
    parts = json.loads((tmp_path / "run" / "training.json").read_text())["parts"]
    assert [part["step"] for part in parts] == [0, step]


@pytest.mark.parametrize("evaluation", [0, 1, 2])
def test_a_signal_during_an_evaluation_ends_it_and_the_run_goes_on_with_it(whole, tmp_path, monkeypatch, evaluation):
    begun = []
    embed_images = features.embed_images

    def signalled(*arguments, **options):
        begun.append(1)
        for number, part in enumerate(embed_images(*arguments, **options)):
            if len(begun) == 2 * evaluation + 1 and number == 2:  # of the bank; the next is of the queries
                os.kill(os.getpid(), signal.SIGTERM)
            yield part

    monkeypatch.setattr(features, "embed_images", signalled)
    with pytest.raises(Interrupted, match="stopped by SIGTERM") as caught:
        pretrain(build_config(stoppable(tmp_path / "run")))
    assert len(begun) == 2 * evaluation + 1, "the evaluation was not let come to its end"
    monkeypatch.undo()
    step = 11 * evaluation
    assert ("before the first step: the same command begins anew" in str(caught.value)) == (step == 0)
    if step:
        assert metrics(tmp_path / "run")[-1]["step"] == step // 4 * 4, "the line of the evaluation waits"
    pretrain(build_config(stoppable(tmp_path / "run")))
    assert_same_run(whole, tmp_path / "run")


def test_a_signal_during_a_save_lets_it_end_and_saves_again(whole, tmp_path, monkeypatch):
    save_file = checkpoint.save_file
    written = []

    def signalled(tensors, path):
        written.append(path)
        if len(written) == 6:  # the second file of the second checkpoint
            os.kill(os.getpid(), signal.SIGTERM)
        save_file(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", signalled)
    with pytest.raises(Interrupted, match=r"stopped by SIGTERM, after step (\d+) of 22\. .*/step-\1; the same"):
        pretrain(build_config(stoppable(tmp_path / "run", checkpoint_every="5steps", keep=(9, 0))))
    monkeypatch.undo()
    saved = [path.name for path in list_checkpoints(tmp_path / "run" / "checkpoints")]
    assert saved[1:] == ["step-10", "step-5"]
    for name in saved:
        verify(tmp_path / "run" / "checkpoints" / name)
    pretrain(build_config(stoppable(tmp_path / "run")))
    assert_same_run(whole, tmp_path / "run")


def test_a_damaged_checkpoint_is_told_and_the_one_before_is_taken(whole, tmp_path, monkeypatch, capsys):
    stop_after(17, monkeypatch)
    with pytest.raises(Interrupted):
        pretrain(build_config(stoppable(tmp_path / "run", checkpoint_every="5steps")))
    monkeypatch.undo()
    file = tmp_path / "run" / "checkpoints" / "step-17" / "optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    capsys.readouterr()
    pretrain(build_config(stoppable(tmp_path / "run")))
    told = capsys.readouterr().out
    assert re.search(r"damaged, not used: .*step-17 \(optimizer\.safetensors has [\d,]+ bytes instead of", told)
    assert "step-17 is set aside as set-aside-step-17; remove it when you like" in told
    assert "goes on from step 15 of 22" in told
    assert_same_run(whole, tmp_path / "run")


def stop_after(step, monkeypatch):
    tick = Report.tick
    ticks = []

    def signalled(self):
        ticks.append(1)
        if len(ticks) == step - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        tick(self)

    monkeypatch.setattr(Report, "tick", signalled)


def test_more_epochs_are_for_a_named_checkpoint_and_told(tmp_path, capsys):
    pretrain(build_config(stoppable(tmp_path / "run", epochs=1, warmup_epochs=0.5, checkpoint_every="4steps")))
    longer = stoppable(tmp_path / "run", epochs=2, warmup_epochs=0.5)
    with pytest.raises(ConfigurationError, match=r"epochs 1 there, 2 here\).*name the checkpoint: --resume .*/step-N"):
        pretrain(build_config(longer))
    capsys.readouterr()
    pretrain(build_config({**longer, "resume": str(tmp_path / "run" / "checkpoints" / "step-8")}))
    told = capsys.readouterr().out
    assert re.search(r"note: 2 epochs instead of 1; .* schedules are those of 2: learning_rate 0\.\d+ → 0\.\d+, ", told)
    assert "step-11 is set aside" in told
    assert metrics(tmp_path / "run")[-1]["step"] == 22
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["epochs"] == 2
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["resume"] == "auto"


def test_other_images_are_noticed(tmp_path, monkeypatch):
    for i in range(40):
        write_image(tmp_path / "images" / f"{i:03}.png", value=i)
    settings = stoppable(tmp_path / "run", dataset=str(tmp_path / "images"), batch_size=8, device_batch_size=4)
    stop_after(3, monkeypatch)
    with pytest.raises(Interrupted):
        pretrain(build_config(settings))
    monkeypatch.undo()
    (tmp_path / "images").rename(tmp_path / "elsewhere")  # where images lie does not matter
    moved = {**settings, "dataset": str(tmp_path / "elsewhere")}
    (tmp_path / "elsewhere" / "003.png").rename(tmp_path / "elsewhere" / "3.png")
    with pytest.raises(ConfigurationError, match=r"the images are not those of the run so far .*names or order differ"):
        pretrain(build_config(moved))
    (tmp_path / "elsewhere" / "3.png").rename(tmp_path / "elsewhere" / "003.png")
    pretrain(build_config(moved))
    assert metrics(tmp_path / "run")[-1]["step"] == 10


def test_bad_images_are_told_once_in_all_parts_of_a_run(tmp_path, monkeypatch, capfd):
    folder_with_broken_images(tmp_path / "images", 40, broken=(3, 17))
    settings = tiny(tmp_path / "run", dataset=str(tmp_path / "images"), batch_size=8, device_batch_size=4, epochs=2)
    settings["log_every"] = 100  # no line of metrics tells of them before the run is stopped in its last epoch
    order = permuted(np.arange(40), 40, (0, 0, 1)).tolist()
    stop_after(5 + max(order.index(3), order.index(17)) // 8 + 1, monkeypatch)
    with pytest.raises(Interrupted):
        pretrain(build_config(settings))
    monkeypatch.undo()
    pretrain(build_config(settings))
    assert capfd.readouterr().out.count("cannot be decoded, another image is shown instead") == 2
    assert len((tmp_path / "run" / "bad_images.jsonl").read_text().splitlines()) == 2


# --- numbers that go wrong


def test_a_loss_that_is_not_finite_stops_before_it_reaches_a_weight(whole, tmp_path, monkeypatch):
    loss = pretraining.momentum_teacher_loss
    calls = []

    def broken(*arguments):
        calls.append(1)
        return loss(*arguments) * (float("nan") if len(calls) == 2 * 13 else 1.0)  # the second sub-batch of step 13

    monkeypatch.setattr(pretraining, "momentum_teacher_loss", broken)
    settings = stoppable(tmp_path / "run", checkpoint_every="4steps", keep=(9, 0))
    with pytest.raises(
        ConfigurationError,
        match=r"the loss is nan in step 13 on process 0, at learning rate 0\.\d+; the step is not taken, and its "
        r"samples are in .*not_finite\.json\. The last good checkpoint is .*/step-12\. Try a --learning_rate_per_256",
    ):
        pretrain(build_config(settings))
    monkeypatch.undo()
    saved = json.loads((tmp_path / "run" / "not_finite.json").read_text())
    assert (saved["step"], saved["epoch"], saved["step_of_epoch"], saved["seed"]) == (13, 1, 1, 0)
    ((sub_batch),) = saved["sub_batches"]
    assert (sub_batch["process"], sub_batch["virtual_device"], sub_batch["loss"]) == (0, 1, "nan")
    expected = permuted(np.arange(128 + 64, 128 + 128), 1437, (0, 0, 1))
    assert sub_batch["samples"] == expected.tolist()
    assert len(sub_batch["images"]) == 64
    assert list_checkpoints(tmp_path / "run" / "checkpoints")[0].name == "step-12"
    pretrain(build_config(settings))  # the defect was a passing one
    assert_same_run(whole, tmp_path / "run")


def test_a_weight_that_is_not_finite_reaches_no_checkpoint(tmp_path, monkeypatch):
    follow = pretraining.Teacher.follow
    calls = []

    def broken(self, student, weight_momentum):
        follow(self, student, weight_momentum)
        calls.append(1)
        if len(calls) == 8:  # one is before the first step
            next(self.parameters()).data[0] = float("inf")

    monkeypatch.setattr(pretraining.Teacher, "follow", broken)
    with pytest.raises(ConfigurationError, match=r"holds values .* not finite, and no .* is .*/step-5|the loss is"):
        pretrain(build_config(stoppable(tmp_path / "run", checkpoint_every="5steps", evaluate_every=0)))
    assert [path.name for path in list_checkpoints(tmp_path / "run" / "checkpoints")] == ["step-5"]


@pytest.mark.parametrize("stops", [False, True])
def test_collapse_is_told_or_ends_the_run(tmp_path, monkeypatch, capsys, stops):
    spread = pretraining.embedding_std
    calls = []

    def collapsing(embeddings):
        calls.append(1)
        return spread(embeddings) * (1e-3 if len(calls) > 16 else 1.0)

    monkeypatch.setattr(pretraining, "embedding_std", collapsing)
    config = build_config(stoppable(tmp_path / "run", stop_on_collapse=stops))
    if stops:
        with pytest.raises(
            ConfigurationError, match=r"step 11: the teacher's embeddings have collapsed .*ends the run"
        ):
            pretrain(config)
        assert not (tmp_path / "run" / "encoder").exists()
    else:
        pretrain(config)
        told = capsys.readouterr().out
        assert told.count("warning: step 11: the teacher's embeddings have collapsed (embedding_std 0.00") == 1
        assert told.count("collapsed") == 1


def test_an_encoder_of_equal_numbers_has_no_spread():
    assert embedding_std(torch.ones(8, 4) / 2) < COLLAPSED
    torch.manual_seed(0)
    assert embedding_std(torch.nn.functional.normalize(torch.randn(512, 64), dim=1)) == pytest.approx(1, abs=0.05)


def test_a_disk_that_is_full_at_the_end(whole, tmp_path, monkeypatch):
    def fail(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(completion, "save_encoder", fail)
    with pytest.raises(
        ConfigurationError, match=r"cannot be written \(No space .*step-22: make room, and type the same"
    ):
        pretrain(build_config(stoppable(tmp_path / "run")))
    monkeypatch.undo()
    assert not (tmp_path / "run" / "training.json").exists()
    pretrain(build_config(stoppable(tmp_path / "run")))
    assert_same_run(whole, tmp_path / "run")
