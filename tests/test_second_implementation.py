"""A second implementation of the whole method, against which the training loop is compared.

It is slow and plain, and shares only the pixels, the order of the samples and the initial weights with the package.
"""

import functools
import json
import math

import numpy as np
import pytest
import torch
from helpers import tiny
from torch import nn

from m2t_accel.config.recipes import build_config
from m2t_accel.data import requests, views
from m2t_accel.data.order import permute
from m2t_accel.data.photometry import photometry
from m2t_accel.data.sources import load_images
from m2t_accel.model import create_encoder, create_student, embed
from m2t_accel.pretrain import pretrain
from m2t_accel.run import completion


class PlainNorm(nn.Module):
    """The teacher's BatchNorm as the papers write it, on tensors (N, C, ...), for each kind of statistics."""

    def __init__(self, norm, kind):
        super().__init__()
        self.kind = kind
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps
        self.mean, self.var = torch.zeros(norm.num_features), torch.ones(norm.num_features)
        self.alpha, self.seen = 1.0, []

    def forward(self, x):
        values = x.transpose(0, 1).flatten(1)
        mean = values.mean(dim=1)
        var = ((values - mean[:, None]) ** 2).sum(dim=1) / (values.shape[1] - 1)
        self.seen.append((mean, var))
        if self.kind == "momentum":
            mean, var = self.alpha * mean + (1 - self.alpha) * self.mean, self.alpha * var + (1 - self.alpha) * self.var
        elif self.kind == "batch":
            var = ((values - mean[:, None]) ** 2).mean(dim=1)
        else:
            mean, var = self.mean, self.var
        shape = (1, -1) + (1,) * (x.dim() - 2)
        scaled = (x - mean.view(shape)) / (var.view(shape) + self.eps).sqrt()
        return scaled * self.weight.view(shape) + self.bias.view(shape)

    def commit(self):
        mean, var = (torch.stack(part).mean(dim=0) for part in zip(*self.seen, strict=True))
        share = self.alpha if self.kind == "momentum" else 0.1
        self.mean = share * mean + (1 - share) * self.mean
        self.var = share * var + (1 - share) * self.var
        self.seen = []


def replace_norms(module, kind):
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm1d | nn.BatchNorm2d):
            setattr(module, name, PlainNorm(child, kind))
        else:
            replace_norms(child, kind)
    return module


def train_again(config, kind):
    """Return the loss of each step, with a kind of teacher's statistics: momentum, batch or running."""

    def build():
        torch.manual_seed(config.seed)
        encoder = create_encoder(config.encoder)
        return create_student(encoder, config.image_size, config.hidden_size, config.projection_size)

    student, teacher = build(), replace_norms(build(), kind).requires_grad_(False)
    del teacher.predictor
    norms = [module for module in teacher.modules() if isinstance(module, PlainNorm)]
    student.train()
    images = load_images(config).train
    make_views = views.TwoViews(images, config)
    steps = len(images) // config.batch_size
    total = steps * config.epochs
    warmup = config.warmup_epochs * steps
    buffers = [torch.zeros_like(p) for p in student.parameters()]
    losses = []
    for k in range(total):
        epoch, place = divmod(k, steps)
        positions = np.arange(place * config.batch_size, (place + 1) * config.batch_size)
        batch = permute(positions, len(images), (0, config.seed, epoch))
        rate = 1e-6 + (config.learning_rate - 1e-6) * k / warmup
        if k > warmup:
            rate = config.learning_rate * (1 + math.cos(math.pi * (k - warmup) / (total - warmup))) / 2
        for norm in norms:
            norm.alpha = (1 + math.cos(math.pi * k / total)) / 2
        student.zero_grad()
        loss_of_step = 0.0
        sub_batches = batch.reshape(config.num_virtual_devices, -1)
        for sub_batch in sub_batches:
            crops, parameters, *_ = make_views.__getitems__(requests.Request(epoch, sub_batch, None))
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
            new = dict(student.named_parameters())
            for name, parameter in teacher.named_parameters():
                parameter.copy_(m * parameter + (1 - m) * new[name])
        for norm in norms:
            norm.commit()
    return losses


def settings(folder, kind):
    """Return the configuration of a run of 11 steps, each of two sub-batches."""
    return build_config(
        tiny(
            folder,
            max_images=352,
            batch_size=32,
            device_batch_size=16,
            image_size=16,
            epochs=1,
            warmup_epochs=0.3,
            weight_momentum=0.9,
            weight_decay=1e-2,
            evaluate_every=0,
            teacher_statistics=kind,
        )
    )


@functools.cache  # tests/test_planted_defects.py runs the test below for many defects
def losses_again(kind):
    return train_again(settings("not written", kind), kind)


@pytest.mark.parametrize("kind", ["momentum", "batch", "running"])
def test_the_loop_equals_a_second_implementation(tmp_path, float64, monkeypatch, kind):
    monkeypatch.setattr(completion, "draw_curves", lambda *arguments, **options: None)  # takes as long as the run
    pretrain(settings(tmp_path / "run", kind))
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    ours, expected = [row["loss"] for row in rows], losses_again(kind)
    assert len(ours) == len(expected) == 11
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-9)
    if kind != "momentum":
        assert {row["statistics_momentum"] for row in rows} == {0.1}
        other = losses_again("running" if kind == "batch" else "batch")
        assert np.abs(np.subtract(ours, other)).max() > 1e-3, "the comparison cannot tell the kinds apart"
