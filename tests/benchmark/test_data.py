import json

import pytest
from helpers import natural_image, write_parquet
from PIL import Image

from m2t_accel.benchmark import data as benchmark
from m2t_accel.config.recipes import build_config


@pytest.mark.parametrize("kind", ["files", "streamed parquet"])
def test_the_benchmark_measures_every_stage(tmp_path, ask, monkeypatch, kind):
    monkeypatch.setattr(benchmark, "WARM_UP", 0.1)
    flags = ["--dataset", tmp_path, "--image_size", 32, "--num_workers", 1, "--json", tmp_path / "figures.json"]
    if kind == "files":
        for i in range(40):
            Image.fromarray(natural_image(80, 100, i)).save(tmp_path / f"{i}.jpg")
        (tmp_path / "broken.jpg").write_text("not an image")
    else:
        write_parquet(tmp_path / "a.parquet", 0, 40, row_group_size=10)
        flags.append("--streaming")
    done = ask("scripts/benchmark.py", "data", *flags, "--repeats", 1, "--seconds", 0.1)
    assert done.status == 0, done.err
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert set(figures["ms"]) == {"read", "decode", "crop", "photometry", "usual"}
    for name, rate in figures["images_per_second"].items():
        assert f"  {name:<24}{rate:8.0f}" in done.out
    assert figures["images_per_second_by_workers"]["1"] > 0
    assert " for 500 images/s, " in done.out


@pytest.mark.parametrize(("flag", "value"), [("--images", 15), ("--repeats", 0), ("--seconds", 0)])
def test_a_number_out_of_range_is_refused(ask, flag, value):
    done = ask("scripts/benchmark.py", "data", "--dataset", "digits", flag, value)
    assert done.status == 2
    assert flag in done.err


def test_interleaved_medians_leave_out_the_warm_up(monkeypatch):
    """With a fake clock: the first calls take long, the others 1, 2 and 30 units."""
    calls, now = [], [0.0]
    seconds = {"a": [100, 1, 30, 2], "b": [100, 10, 300, 20]}

    def stage(name):
        calls.append(name)
        now[0] += seconds[name][calls.count(name) - 1]

    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: now[0])
    times = benchmark.interleaved({"a": lambda: stage("a"), "b": lambda: stage("b")}, repeats=3)
    assert calls == ["a", "b"] * 4
    assert times == {"a": 2, "b": 20}


def test_the_usual_pipeline_makes_two_views_of_each_image():
    config = build_config({"recipe": "8x2080Ti-b256-100ep", "dataset": "digits", "image_size": 48})
    image = Image.fromarray(natural_image(60, 80))
    for view in range(2):
        assert benchmark.usual_transform(config, view)(image).shape == (3, 48, 48)
    blurs, solarizes = (
        [benchmark.usual_transform(config, view).transforms[index].p for view in range(2)] for index in (3, 5)
    )
    assert (tuple(blurs), tuple(solarizes)) == (config.blur_probability, config.solarize_probability)
    assert blurs != blurs[::-1]
