"""Examine a run before you start it: machine, launch, images, speed, time. It trains nothing and writes nothing.

python scripts/doctor.py
accelerate launch --config_file accelerate_configs/8gpu.yaml scripts/doctor.py \\
    --recipe 8xV100-b1024-100ep --dataset /data/imagenet --output_dir runs/imagenet --hours 48

Give it the flags of scripts/pretrain.py. Exit status 1: the run would fail, and a line says which flag to change.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from m2t_accel.config.command_line import OneLineParser, errors_in_one_line, parse_command_line
from m2t_accel.config.fields import check_limits, check_writable, write_errors_in_one_line
from m2t_accel.config.pretrain import PretrainConfig, check_inputs
from m2t_accel.config.recipes import build_config


def main() -> None:
    options = OneLineParser(add_help=False, allow_abbrev=False)
    options.add_argument("--json", metavar="FILE", help="also write the findings and figures to this file")
    options.add_argument("--hours", type=float, metavar="X", help="advise on settings for a run of so many hours")
    options.add_argument(
        "--price_per_hour", type=float, metavar="X", help="price of all machines together, for the cost"
    )
    with errors_in_one_line():
        given, _ = options.parse_known_args()

        def build(settings: Mapping[str, object]) -> PretrainConfig:
            # Advice needs no recipe: for other images than digits it starts from the one for photographs.
            is_photographs = given.hours is not None and settings.get("dataset", "digits") != "digits"
            return build_config({"recipe": "8x2080Ti-b256-100ep" if is_photographs else "digits", **settings})

        config, _ = parse_command_line(__doc__, options=options, recipe=None, build=build)
        check_inputs(config)
        check_limits("hours", given.hours, {"above": 0})
        check_limits("price_per_hour", given.price_per_hour, {"at_least": 0})
        check_writable("json", given.json)
        from m2t_accel.distributed.processes import destroy_process_group
        from m2t_accel.doctor.examine import examine

        result = examine(config, given.hours, given.price_per_hour)
        destroy_process_group()
        if result is not None and given.json is not None:
            with write_errors_in_one_line("json", given.json):
                Path(given.json).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        if result is not None and result["fails"]:
            raise SystemExit(1)


if __name__ == "__main__":
    main()
