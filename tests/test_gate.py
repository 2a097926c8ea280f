"""The accuracy gate: two short trainings must reach the accuracy and the loss of unchanged code.

`python tests/test_gate.py` prints its figures, `--defect "teacher not updated"` those with a planted defect, and
`--seeds $(seq 0 19)` the spread from which the bounds are set. docs/architecture.md has the figures.
"""

import argparse
import contextlib
import io
import itertools
import os
import statistics
import tempfile
from pathlib import Path

import pytest

os.environ["ACCELERATE_USE_CPU"] = "true"
os.environ.setdefault("OMP_NUM_THREADS", "1")

from transformers import ResNetConfig

from m2t_accel.config.evaluation import build_knn, build_linear_probe
from m2t_accel.config.recipes import build_config
from m2t_accel.evaluation.knn import evaluate_knn
from m2t_accel.evaluation.linear import evaluate_linear
from m2t_accel.files import read_metrics
from m2t_accel.pretrain import pretrain

# A small encoder that is not trained to the end: a defect that only slows the training then changes the figures, too.
ENCODER = {"depths": [1, 1], "hidden_sizes": [32, 64], "embedding_size": 16, "layer_type": "basic"}
SETTINGS = {"image_size": 16, "hidden_size": 256, "projection_size": 64, "epochs": 20, "warmup_epochs": 6}
STEPS_PER_EPOCH = 22
SEEDS = (0, 1)
# Smallest and largest mean of two seeds: four standard deviations of such a mean away from the mean of 20 seeds.
BOUNDS = {
    "knn": (0.852, 1.0),  # seeds 0 to 19: 0.912 ± 0.021, from 0.875 to 0.950
    "linear": (0.845, 1.0),  # 0.920 ± 0.026, from 0.864 to 0.958
    "loss": (0.219, 0.330),  # 0.274 ± 0.020, from 0.230 to 0.310
}


def measure(folder, seed):
    """Train on 1437 digits.

    Return the shares of the 360 other digits that kNN (k = 200) and a linear probe get right, and the loss of the last
    epoch.
    """
    encoder, run = str(folder / "random"), str(folder / "run")
    ResNetConfig(**ENCODER).save_pretrained(encoder)
    settings = {**SETTINGS, "encoder": encoder, "output_dir": run, "seed": seed, "num_workers": 0}
    pretrain(build_config({**settings, "evaluate_every": 0, "log_every": STEPS_PER_EPOCH}))
    given = {"encoder": run, "dataset": "digits", "num_workers": 0}
    return {
        "knn": evaluate_knn(build_knn({**given, "k": [200]}))["figures"]["top1_k200"],
        "linear": evaluate_linear(build_linear_probe({**given, "epochs": 10}))["figures"]["top1"],
        "loss": list(read_metrics(folder / "run" / "metrics.jsonl"))[-1]["loss"],
    }


def combine(function, rows):
    """Apply a function to the values of each figure."""
    return {name: function([row[name] for row in rows]) for name in rows[0]}


@pytest.mark.slow
def test_short_trainings_reach_their_accuracy_and_loss(tmp_path):
    figures = combine(statistics.mean, [measure(tmp_path / str(seed), seed) for seed in SEEDS])
    outside = {name: value for name, value in figures.items() if not BOUNDS[name][0] <= value <= BOUNDS[name][1]}
    assert outside == {}


def main():
    parser = argparse.ArgumentParser(description="Print the figures of the accuracy gate.")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--defect", help="plant this defect of tests/test_planted_defects.py")
    given = parser.parse_args()
    rows = []

    def show(name, figures):
        print(f"{name}: {', '.join(f'{figure} {value:.4f}' for figure, value in figures.items())}", flush=True)

    with pytest.MonkeyPatch.context() as patch:
        if given.defect is not None:
            from test_planted_defects import DEFECTS

            next(defect for defect in DEFECTS if defect.name == given.defect).plant(patch)
        for seed in given.seeds:
            with contextlib.ExitStack() as stack:
                stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
                stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
                folder = stack.enter_context(tempfile.TemporaryDirectory())
                rows.append(measure(Path(folder), seed))
            show(f"seed {seed}", rows[-1])
    show("mean", combine(statistics.mean, rows))
    if len(rows) > 2:
        pairs = [combine(statistics.mean, pair) for pair in itertools.combinations(rows, 2)]
        for name, values in (("seeds", rows), ("pairs of seeds", pairs)):
            show(f"smallest of {len(values)} {name}", combine(min, values))
            show(f"largest of {len(values)} {name}", combine(max, values))
        means, spreads = combine(statistics.mean, rows), combine(statistics.stdev, rows)
        show("standard deviation of the seeds", spreads)
        show("lower bound", {name: means[name] - 4 * spreads[name] / 2**0.5 for name in means})
        show("upper bound", {name: means[name] + 4 * spreads[name] / 2**0.5 for name in means})


if __name__ == "__main__":
    main()
