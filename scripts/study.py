"""Run a study: a grid of pretraining runs with a linear probe of each, and collect their results.

python scripts/study.py results/statistics/study.yaml --dataset /data/cifar10 --jobs 2

The file holds
    title: Weight momentum on digits
    settings: {recipe: digits}           # of every run
    grid:                                # a run for each combination, in this order
      seed: [0, 1]
      weight_momentum: [0.9, 0.95]
    linear_probe: {protocol: digits}     # of each trained encoder and of random weights; may be left out

What is complete is not run again, and the same command continues what was stopped. The results are written beside the
file: results.json and figure.png. Exit status 1: a run has failed.
"""

import sys
from argparse import RawDescriptionHelpFormatter
from pathlib import Path

from m2t_accel.config.command_line import OneLineParser, errors_in_one_line
from m2t_accel.config.fields import ConfigurationError, check_limits, check_writable, write_errors_in_one_line
from m2t_accel.study.plan import MAY_CHANGE, read_study
from m2t_accel.study.results import Results, different_images, read_results


def main() -> None:
    parser = OneLineParser(description=__doc__, allow_abbrev=False, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("study", metavar="STUDY.yaml", help="file of the study")
    parser.add_argument("--dataset", metavar="SOURCE", help="images of every run, instead of the study's")
    parser.add_argument(
        "--runs_dir", metavar="DIR", help="folder of the runs (default: runs/NAME_OF_THE_FILE'S_FOLDER)"
    )
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time (default: 1)")
    parser.add_argument("--collect", action="store_true", help="only collect the results of the runs that are complete")
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=VALUE",
        help="settings of every run for a trial, such as epochs=2; its results are written to --runs_dir",
    )
    with errors_in_one_line():
        given = parser.parse_args()
        check_limits("jobs", given.jobs, {"at_least": 1})
        file = Path(given.study)
        runs_dir = Path(given.runs_dir or Path("runs") / file.resolve().parent.name)
        for word in given.set:
            if "=" not in word:
                raise ConfigurationError(f"--set {word}: needs NAME=VALUE, such as epochs=2")
        flags = dict(word.split("=", 1) for word in given.set)
        is_trial = not flags.keys() <= set(MAY_CHANGE)
        study = read_study(given.study, flags | ({"dataset": given.dataset} if given.dataset else {}), runs_dir)
        folder = runs_dir if is_trial else file.parent
        check_writable("study", None if is_trial else str(folder / "results.json"))
        stored = read_results(folder / "results.json", study)

        from m2t_accel.study.report import markdown_table, report

        def write() -> Results:
            with write_errors_in_one_line("runs_dir" if is_trial else "study", folder / "results.json"):
                return report(study, stored, folder)

        failures = 0
        if not given.collect:
            from m2t_accel.study.driver import run_study

            failures = run_study(study, stored, runs_dir, Path(sys.argv[0]).parent, given.jobs, write)
        results = write()
        print(markdown_table(results))
        if warning := different_images(results):
            print(f"\n{warning}")
        if results["runs"]:
            print(f"\nResults: {folder / 'results.json'}, {folder / 'figure.png'}")
        if failures:
            raise SystemExit(1)


if __name__ == "__main__":
    main()
