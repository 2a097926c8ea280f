"""Compare runs: a table of what differs in their settings and results, and their curves over each other.

python scripts/compare.py runs/digits runs/digits-seed1 runs/other

Runs under way, stopped, finished and of earlier versions are all welcome. Runs that differ by seed only are one group,
with a mean and a standard deviation. The curves are in comparison.html and comparison.png.
"""

from argparse import RawDescriptionHelpFormatter
from dataclasses import replace
from pathlib import Path

from m2t_accel.config.command_line import OneLineParser, errors_in_one_line
from m2t_accel.config.fields import ConfigurationError, check_writable, write_errors_in_one_line


def main() -> None:
    parser = OneLineParser(description=__doc__, allow_abbrev=False, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("runs", metavar="RUN", nargs="+", help="folder of a run")
    parser.add_argument(
        "--output",
        metavar="FILE.html",
        default="comparison.html",
        help="page; the picture is beside it, FILE.png (default: comparison.html)",
    )
    with errors_in_one_line():
        given = parser.parse_args()
        if not given.output.endswith(".html"):
            raise ConfigurationError(f"--output {given.output}: a page is written, so its name must end in .html")
        check_writable("output", given.output)
        from m2t_accel.pages.comparison import (
            comparison_table,
            group_runs,
            protocol_notes,
            text_table,
            write_comparison,
        )
        from m2t_accel.pages.record import read_run

        folders = {Path(run).resolve(): run for run in given.runs}  # a run that is given twice is one
        groups = group_runs([replace(read_run(Path(run)), name=run.rstrip("/")) for run in folders.values()])
        print(text_table(*comparison_table(groups)), *protocol_notes(groups), sep="\n")
        with write_errors_in_one_line("output", given.output):
            write_comparison(groups, Path(given.output))
        print(f"\nCurves: {given.output}, {Path(given.output).with_suffix('.png')}")


if __name__ == "__main__":
    main()
