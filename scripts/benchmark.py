"""Measure the data path or the optimizer step on this machine, beside the usual ones; or count a step on paper.

python scripts/benchmark.py data --dataset FOLDER
python scripts/benchmark.py step --device_batch_size 8
python scripts/benchmark.py estimate

Each has its own --help.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from m2t_accel.config.command_line import errors_in_one_line, parse_command_line, view_settings
from m2t_accel.config.fields import ConfigurationError, check_limits, check_writable, write_errors_in_one_line
from m2t_accel.config.pretrain import PretrainConfig, check_inputs
from m2t_accel.config.recipes import build_config

RECIPE = "8x2080Ti-b256-100ep"
OF_STEP = {"recipe", "encoder", "hidden_size", "projection_size", "optimizer", "image_size", "device_batch_size"}
VARIANTS = ("plain", "peer", "eager", "compiled", "monitored", "floor")


def create_options(what: str) -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(add_help=False)
    options.add_argument("what", choices=[what], metavar=what, help=argparse.SUPPRESS)
    options.add_argument("--json", metavar="FILE", help="also write the figures to this file")
    return options


def measure_data() -> None:
    """Measure how fast your images reach the device on this machine, compared with the usual pipeline.

    python scripts/benchmark.py data --dataset FOLDER

    The views are those of recipe 8x2080Ti-b256-100ep unless you give another one. Run it without accelerate launch.
    """
    options = create_options("data")
    options.add_argument("--images", type=int, default=240, metavar="N", help="images to measure (default: 240)")
    options.add_argument("--repeats", type=int, default=7, metavar="N", help="interleaved repeats (default: 7)")
    options.add_argument(
        "--seconds", type=float, default=5.0, metavar="X", help="duration for each number of workers (default: 5)"
    )
    config, given = parse_command_line(describe(measure_data), options=options, recipe=RECIPE, shown=view_settings())
    check_inputs(config)
    check_limits("images", given.images, {"at_least": 16})
    check_limits("repeats", given.repeats, {"at_least": 1})
    check_limits("seconds", given.seconds, {"above": 0})
    check_writable("json", given.json)
    from m2t_accel.benchmark import data  # late: torch and torchvision take seconds to import

    finish(data.benchmark_data(config, given.images, given.repeats, given.seconds), given.json, data.table)


def measure_step() -> None:
    """Measure an optimizer step of pretraining beside others, in turns, on a batch of random pixels.

    python scripts/benchmark.py step --device_batch_size 8
    accelerate launch --config_file accelerate_configs/1gpu.yaml scripts/benchmark.py step

    plain     the method as the paper writes it: float32, contiguous tensors, loops over layers and parameters
    peer      lightly's BYOL step on torchvision's encoder (pip install lightly)
    eager     the step of pretraining, from the crops to the moved teacher
    compiled  the same, with the networks compiled (on a CPU only if it is named)
    monitored eager with a measurement of its health, as about 100 steps of a run have it (only if it is named)
    floor     two forwards and backwards of a student, two forwards of a teacher in evaluation mode, nothing else

    The precision is that of the launch. With --dataset the wait for its images is measured, too.
    """
    options = create_options("step")
    options.add_argument("--variants", metavar="NAME,NAME", help=f"of {','.join(VARIANTS)} (default: all that fit)")
    options.add_argument("--steps", type=int, metavar="N", help="steps in a turn (default: 10 on a GPU, else 1)")
    options.add_argument("--repeats", type=int, default=7, metavar="N", help="turns of each variant (default: 7)")
    options.add_argument("--profile", metavar="FILE", help="write a trace for Perfetto, and print where the time goes")
    config, given = parse_command_line(
        describe(measure_step),
        options=options,
        recipe=RECIPE,
        shown=OF_STEP | {"dataset", "num_workers"},
        build=build_for_device,
        dataset="random",
    )
    names = tuple(given.variants.split(",")) if given.variants else ()
    check_limits("variants", names, {"choices": VARIANTS})
    check_limits("steps", given.steps, {"at_least": 1})
    check_limits("repeats", given.repeats, {"at_least": 1})
    check_inputs(config, check_images=config.dataset != "random")
    check_writable("json", given.json)
    check_writable("profile", given.profile)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler reports that a CPU has no GPU
    from m2t_accel.benchmark import step
    from m2t_accel.distributed.processes import destroy_process_group

    result = step.benchmark_step(config, names, given.steps, given.repeats, given.profile)
    if destroy_process_group():
        finish(result, given.json, step.table)


def count_step() -> None:
    """Count the floating-point operations and bytes of a step, and the least time that GPUs need for them.

    python scripts/benchmark.py estimate

    Nothing is computed: the step of pretraining in bf16 runs on tensors without memory.
    """
    options = create_options("estimate")
    config, given = parse_command_line(
        describe(count_step),
        options=options,
        recipe=RECIPE,
        shown=OF_STEP,
        build=build_for_device,
        dataset="random",
    )
    check_inputs(config, check_images=False)
    check_writable("json", given.json)
    from m2t_accel.benchmark import estimate

    finish(estimate.estimate_step(config), given.json, estimate.table)


def build_for_device(given: Mapping[str, object]) -> PretrainConfig:
    """Return the configuration for one sub-batch; the given --device_batch_size need not divide the recipe's batch."""
    size = given.get("device_batch_size")
    return build_config(given if size is None else {**given, "batch_size": size})


def describe(command: Callable) -> str:
    """Return the docstring of a command without its indentation."""
    return command.__doc__.replace("\n    ", "\n").rstrip()


def finish(result: Mapping[str, object], path: str | None, table: Callable[[Mapping[str, object]], str]) -> None:
    """Print the figures, and write them to a file if one is given."""
    print(table(result))
    if path is not None:
        with write_errors_in_one_line("json", path):
            Path(path).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


COMMANDS = {"data": measure_data, "step": measure_step, "estimate": count_step}


def main() -> None:
    with errors_in_one_line():
        what = sys.argv[1] if len(sys.argv) > 1 else ""
        if what in ("-h", "--help"):
            print(f"usage: benchmark.py {{{','.join(COMMANDS)}}} [FLAGS]\n\n{__doc__.strip()}")
        elif what in COMMANDS:
            COMMANDS[what]()
        else:
            raise ConfigurationError(f"{what or 'nothing'} to measure: type one of {', '.join(COMMANDS)} first")


if __name__ == "__main__":
    main()
