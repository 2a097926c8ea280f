"""Tests of the page that a run keeps up to date, and of its pictures."""

import base64
import itertools
import json
import os
import re

import cv2
import numpy as np
import pytest
import torch
from helpers import settings, tiny, write_deep_images, write_run

import m2t_accel
from m2t_accel.config.recipes import build_config
from m2t_accel.data.sources import load_images
from m2t_accel.evaluation.knn import KnnResult
from m2t_accel.run import page as module
from m2t_accel.run.page import EVERY, FIRST_AFTER, MAX_SHARE, RunPage, data_uri


@pytest.fixture
def lines():
    return []


@pytest.fixture
def page(tmp_path, image_net, lines):
    config = settings(image_net)
    write_run(tmp_path / "run", finished=False)
    return RunPage(tmp_path / "run", config, load_images(config), lines.append)


def pixels(uri):
    content = np.frombuffer(base64.b64decode(uri.partition(",")[2]), np.uint8)
    return cv2.cvtColor(cv2.imdecode(content, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)


def test_a_small_image_is_kept_exactly_and_a_large_one_is_made_small():
    small = np.random.default_rng(0).integers(0, 256, (8, 6, 3), np.uint8)
    assert (pixels(data_uri(small, 80)) == small).all()
    large = np.full((300, 400, 3), (200, 100, 50), np.uint8)
    found = pixels(data_uri(large, 80))
    assert found.shape == (60, 80, 3)
    assert np.abs(found.astype(int) - large[0, 0]).max() < 4


def result(samples, neighbours):
    """Return a result with the neighbours of some queries; the cosines fall from 0.9."""
    cosines = torch.linspace(0.9, 0.5, len(neighbours[0])).repeat(len(neighbours), 1)
    return KnnResult(
        {20: 0.5}, 12, len(samples), (set(), set()), ("", ""), torch.tensor(samples), torch.tensor(neighbours), cosines
    )


def test_neighbours_of_the_first_and_of_the_newest_evaluation_are_kept(page, lines):
    bank, queries = page.data.bank, page.data.validation
    for epoch, nearest in enumerate(([0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11], [1, 2, 3, 4, 5, 6])):
        page.save_neighbours(epoch, bank, queries, result([0, 5], [nearest, nearest[::-1]]))
    moments = json.loads((page.folder / "pictures" / "neighbours.json").read_text())
    assert {name: moment["epoch"] for name, moment in moments.items()} == {"first": 0, "latest": 2}
    first, last = moments["first"]["queries"]
    assert [first["label"], last["label"]] == ["n01", "n02"]
    assert [near["label"] for near in first["neighbours"]] == ["n01"] * 5
    assert [near["cosine"] for near in first["neighbours"]] == [0.9, 0.82, 0.74, 0.66, 0.58]
    # The images are JPEG files of one value: 100 times the class, plus the number in the class.
    assert [pixels(near["image"])[-1, -1, 0] for near in moments["latest"]["queries"][0]["neighbours"]] == [
        1,
        2,
        3,
        4,
        5,
    ]
    page.save_neighbours(0.0, bank, queries, result([0], [[3, 2, 1]]))
    assert set(json.loads((page.folder / "pictures" / "neighbours.json").read_text())) == {"first"}, (
        "another run starts"
    )
    assert lines == []


def test_views_are_saved_once(page, lines):
    page.save_views()
    file = page.folder / "pictures" / "views.json"
    pairs = json.loads(file.read_text())["pairs"]
    assert len(pairs) == 12
    assert all(len(pair["images"]) == len(pair["words"]) == 3 for pair in pairs)
    assert pixels(pairs[0]["images"][1]).shape == (page.config.image_size, page.config.image_size, 3)
    file.write_text("{}")
    page.save_views()
    assert file.read_text() == "{}"
    assert lines == []


def test_a_run_on_images_that_are_nearly_black_warns_at_its_start(page, lines, tmp_path):
    write_deep_images(tmp_path / "dark", 1023)
    page.data = load_images(settings(tmp_path / "dark"))
    page.save_views()
    (line,) = lines
    assert line.startswith("warning: 4 of 4 images of more than 8 bits have no value above 3 of 255")


def test_the_outline_of_the_crops_is_drawn(page):
    page.save_views()
    pairs = json.loads((page.folder / "pictures" / "views.json").read_text())["pairs"]
    for pair in pairs:
        original = pixels(pair["images"][0]).astype(int)
        assert original.shape == (144, 120, 3)
        assert (original.max(axis=2) - original.min(axis=2)).max() > 50, "the images are grey, the outlines are not"


def test_the_page_is_written_at_intervals_that_its_cost_sets(page, monkeypatch):
    clock, written = [0.0], []
    monkeypatch.setattr(module.time, "perf_counter", lambda: clock[0])

    def write(record, path):
        written.append(clock[0])
        clock[0] += 2.0

    monkeypatch.setattr(module, "write_run_page", write)
    page = RunPage(page.folder, page.config, page.data, print)
    while clock[0] < 2000:
        page.write_if_due()
        clock[0] += 1
    assert written[0] == FIRST_AFTER
    assert {later - before for before, later in itertools.pairwise(written)} == {2 / MAX_SHARE + 2}
    assert 2 / MAX_SHARE > EVERY


def test_the_state_of_the_run_is_that_of_its_end(page):
    page.write(module.RUNNING)
    assert "Running</span>" in (page.folder / "report.html").read_text()
    page.close()
    assert "Stopped</span>" in (page.folder / "report.html").read_text()
    (page.folder / "training.json").write_text('{"seconds": 3.0}')
    page.close()
    assert "Finished</span>" in (page.folder / "report.html").read_text()


def test_what_fails_is_one_warning_and_no_end_of_a_run(tmp_path, monkeypatch, capsys):
    def fail(*arguments, **options):
        raise OSError(28, "No space left on device")

    for name in ("write_run_page", "collect_pairs", "data_uri"):
        monkeypatch.setattr(module, name, fail)
    monkeypatch.setattr(module, "EVERY", 0.0)
    monkeypatch.setattr(module, "MAX_SHARE", 1e9)
    assert m2t_accel.pretrain(build_config(tiny(tmp_path / "run"))) is not None
    printed = "".join(capsys.readouterr())
    assert (tmp_path / "run" / "training.json").exists()
    assert not (tmp_path / "run" / "report.html").exists()
    warnings = re.findall(r"warning: \S+/(\S+) cannot be written \(OSError: .*No space.*\); the run continues", printed)
    assert sorted(warnings) == ["neighbours.json", "report.html", "views.json"]
    assert "Report:" not in printed
    assert m2t_accel.pretrain(build_config(tiny(tmp_path / "run"))) is None
    assert "Finished</span>" in (tmp_path / "run" / "report.html").read_text(), "the same command writes it"


def test_only_a_page_that_is_older_than_the_end_of_its_run_is_written_again(page):
    file = page.folder / "report.html"
    page.write(module.RUNNING)
    (page.folder / "training.json").write_text('{"seconds": 3.0}')
    os.utime(file, (0, 0))
    module.refresh_old_page(page.folder)
    assert "Finished</span>" in file.read_text()
    written = file.stat().st_mtime_ns
    module.refresh_old_page(page.folder)
    assert file.stat().st_mtime_ns == written


def test_a_page_that_cannot_be_made_is_a_warning(page, monkeypatch, capsys):
    (page.folder / "training.json").write_text("{}")
    monkeypatch.setattr(module, "refresh_run_page", lambda folder: [][0])
    module.refresh_old_page(page.folder)
    assert re.match(r"warning: .*report\.html cannot be made \(.*index out of range", capsys.readouterr().out)


def test_a_run_leaves_a_page_with_its_pictures(trained_run):
    text = (trained_run / "report.html").read_text()
    assert "Finished</span> after 10 steps." in text
    body = text[text.index("<body") : text.index('<script id="charts"')]
    assert body.count("<img") == 12 * 3 + 8 * (1 + 2 * 5)
    assert "data-reload" not in body
