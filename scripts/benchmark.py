"""Measure how fast your images reach the device on this machine, compared with the usual pipeline.

python scripts/benchmark.py data --dataset FOLDER

The views are those of recipe 8x2080Ti-b256-100ep unless you give another one. Run it without accelerate launch.
"""

import argparse

from m2t_accel.config.command_line import errors_in_one_line, parse_command_line
from m2t_accel.config.fields import check_limits
from m2t_accel.config.pretrain import check_inputs


def main() -> None:
    options = argparse.ArgumentParser(add_help=False)
    options.add_argument("what", choices=["data"], metavar="data", help="measure the data path (the only choice)")
    options.add_argument("--json", metavar="FILE", help="also write the figures to this file")
    options.add_argument("--images", type=int, default=240, metavar="N", help="images to measure (default: 240)")
    options.add_argument("--repeats", type=int, default=7, metavar="N", help="interleaved repeats (default: 7)")
    options.add_argument(
        "--seconds", type=float, default=5.0, metavar="X", help="duration for each number of workers (default: 5)"
    )
    with errors_in_one_line():
        config, given = parse_command_line(__doc__, options=options, recipe="8x2080Ti-b256-100ep")
        check_inputs(config)
        check_limits("images", given.images, {"at_least": 16})
        check_limits("repeats", given.repeats, {"at_least": 1})
        check_limits("seconds", given.seconds, {"above": 0})
        from m2t_accel.data import benchmark  # late: torch and torchvision take seconds to import

        if given.json:
            benchmark.check_json(given.json)
        result = benchmark.benchmark_data(config, given.images, given.repeats, given.seconds)
        if given.json:
            benchmark.write_json(result, given.json)
        print(benchmark.table(result))


if __name__ == "__main__":
    main()
