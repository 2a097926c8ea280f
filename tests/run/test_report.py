"""Tests of the report of a run: bad images, collapse."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from helpers import settings
from torch.nn import functional

from m2t_accel.config.pretrain import PretrainConfig
from m2t_accel.config.recipes import build_config
from m2t_accel.data.sources import load_images
from m2t_accel.data.views import BadImage
from m2t_accel.model import create_encoder, embedding_std
from m2t_accel.run import report
from m2t_accel.run.report import COLLAPSED, BadImages, KnnMonitor, TooManyBadImagesError


@pytest.mark.parametrize(("spread", "collapsed"), [(0.0, True), (1e-3, True), (1e3, False)])
def test_embedding_std_distinguishes_collapse_from_spread(spread, collapsed):
    torch.manual_seed(0)
    embeddings = functional.normalize(torch.ones(512, 64) + spread * torch.randn(512, 64), dim=1)
    value = embedding_std(embeddings).item()
    assert value < COLLAPSED if collapsed else value == pytest.approx(1, abs=0.05)


def test_a_bank_of_fewer_than_20_images_is_a_line(image_net, capsys):
    config = settings(image_net)
    monitor = KnnMonitor(load_images(config), config, Accelerator())
    assert "only 12 images to search for neighbours, so these 12 vote instead of k = 20" in capsys.readouterr().out
    encoder = create_encoder("resnet10-quarter")
    (accuracy,) = monitor.measure(encoder, lambda: None).accuracies.values()
    assert 0 <= accuracy <= 1


@pytest.mark.parametrize(
    ("device", "backend", "expected"),
    [
        ("cpu", "no", []),
        ("cuda", "no", ["The first step compiles the colours, which may take minutes."]),
        ("cpu", "INDUCTOR", ["The first step compiles the networks, which may take minutes."]),
        ("cuda", "INDUCTOR", ["The first step compiles the colours and the networks, which may take minutes."]),
    ],
)
def test_a_long_first_step_is_announced(image_net, monkeypatch, device, backend, expected):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", backend)
    monkeypatch.setattr(report, "hardware", lambda accelerator: device)
    config, accelerator = settings(image_net), SimpleNamespace(device=torch.device(device))
    lines = report.introduction(config, load_images(config), torch.nn.Linear(1, 1), 10, accelerator).splitlines()
    assert [line for line in lines if "compiles" in line] == expected


def test_views_of_digits_for_other_images_are_named(image_net):
    given = {"dataset": str(image_net), "output_dir": "runs/own"}
    for config, expected in [
        (build_config(given), True),
        (build_config({**given, "recipe": "8x2080Ti-b256-100ep"}), False),
        (PretrainConfig(**given), False),  # the defaults are for photographs
    ]:
        text = report.introduction(config, load_images(config), torch.nn.Linear(1, 1), 10, Accelerator(cpu=True))
        assert ("Note: recipe digits is for 8-pixel digits" in text) == expected


@pytest.mark.parametrize("kind", ["momentum", "batch"])
def test_statistics_that_are_not_this_methods_are_named(image_net, kind):
    config = dataclasses.replace(settings(image_net), teacher_statistics=kind)
    text = report.introduction(config, load_images(config), torch.nn.Linear(1, 1), 10, Accelerator(cpu=True))
    assert ("--teacher_statistics batch is a method to compare with" in text) == (kind == "batch")


@pytest.mark.parametrize(
    ("num_images", "fraction", "allowed"), [(100, 0.001, 10), (100, 0.5, 50), (1_000_000, 0.0001, 100), (50_000, 0, 10)]
)
def test_number_of_bad_images_that_is_allowed(num_images, fraction, allowed):
    bad = BadImages(build_config({"recipe": "digits", "max_bad_fraction": fraction}), num_images)
    bad.add([BadImage(sample, "a.jpg", "cut") for sample in range(allowed)])
    assert bad.add([BadImage(0, "a.jpg", "cut")]) == []
    bad.check()
    assert len(bad.add([BadImage(allowed, "b.jpg", "cut")])) == 1
    with pytest.raises(TooManyBadImagesError, match=rf"{allowed + 1} of {num_images:,} .*{allowed} .*--max_bad"):
        bad.check()


def test_ten_bad_images_are_described_one_by_one_and_the_others_together():
    bad = BadImages(build_config({"recipe": "digits"}), 1000)
    batches = [[BadImage(sample, f"{sample}.jpg", "cut") for sample in range(first, first + 8)] for first in (0, 8)]
    first, second = (list(bad.describe(bad.add(batch))) for batch in batches)
    assert len(first) == 8
    assert len(second) == 3
    assert "9.jpg" in second[1]
    assert "6 more" in second[2]
    assert "bad_images.jsonl" in second[2]
