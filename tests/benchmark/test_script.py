import re
import runpy

import pytest
from helpers import ROOT

from m2t_accel.config.fields import ConfigurationError


@pytest.mark.parametrize(
    ("script", "shown", "hidden"),
    [
        (["scripts/benchmark.py", "data"], {"dataset", "hue", "num_workers", "images"}, {"epochs", "encoder"}),
        (["scripts/benchmark.py", "step"], {"encoder", "variants", "profile"}, {"epochs", "hue", "output_dir"}),
        (["scripts/benchmark.py", "estimate"], {"encoder", "image_size"}, {"variants", "num_workers", "output_dir"}),
        (["scripts/preview.py"], {"dataset", "hue", "output"}, {"epochs", "encoder", "num_workers", "output_dir"}),
    ],
)
def test_help_shows_only_the_flags_that_matter(ask, script, shown, hidden):
    flags = set(re.findall(r"^ +--(\w+)", ask(*script, "--help").out, re.MULTILINE))
    assert shown <= flags
    assert not hidden & flags


def test_the_flags_of_a_run_are_accepted(ask):
    done = ask("scripts/benchmark.py", "data", "--dataset", "digits", "--epochs", 20, "--images", 15)
    assert (done.status, "--images 15" in done.err) == (2, True)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "nothing to measure: type one of data, step, estimate first"),
        (["stpe"], "stpe"),
        (["step", "--variants", "eager,flor"], "--variants flor: unknown, did you mean floor"),
        (["step", "--steps", 0], "--steps 0"),
        (["step", "--profile", "/nowhere/trace.json"], "--profile /nowhere/trace.json cannot be written"),
        (["step", "--dataset", "/nowhere"], "--dataset /nowhere"),
    ],
)
def test_wrong_words_are_refused_in_one_line(ask, words, message):
    done = ask("scripts/benchmark.py", *words)
    assert done.status == 2
    assert message in done.err
    assert done.err.count("\n") == 1


def test_the_help_without_a_benchmark_lists_them(ask):
    done = ask("scripts/benchmark.py", "--help")
    assert (done.status, "benchmark.py step" in done.out) == (0, True)


def test_figures_that_cannot_be_written_are_shown():
    finish = runpy.run_path(str(ROOT / "scripts" / "benchmark.py"))["finish"]
    shown = []
    with pytest.raises(ConfigurationError, match=r"--json /dev/full cannot be written \(No space left on device\)"):
        finish({"speed": 1}, "/dev/full", lambda result: shown.append(result))
    assert shown == [{"speed": 1}]
