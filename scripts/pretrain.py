"""Pretrain an image encoder by Momentum² Teacher.

accelerate launch --config_file accelerate_configs/cpu.yaml scripts/pretrain.py
accelerate launch --config_file accelerate_configs/8gpu.yaml scripts/pretrain.py \\
    --recipe 8xV100-b1024-100ep --dataset /data/imagenet --output_dir runs/imagenet
"""

import os
from pathlib import Path

from m2t_accel.config.command_line import errors_in_one_line, parse_command_line
from m2t_accel.config.data import check_num_processes
from m2t_accel.config.pretrain import check_inputs
from m2t_accel.run.output_dir import check_output_dir


def main() -> None:
    with errors_in_one_line():
        config, _ = parse_command_line(__doc__)
        num_processes = int(os.environ.get("WORLD_SIZE", "1"))
        check_inputs(config)
        check_num_processes(config, num_processes)
        if num_processes == 1:  # among several, one may already have written; pretrain checks in the right order
            check_output_dir(config)
        from m2t_accel.distributed.processes import destroy_process_group
        from m2t_accel.pretrain import pretrain

        pretrain(config)
        is_main = destroy_process_group()
        if config.push_to_hub and is_main:
            from m2t_accel.hub.publish import publish

            print(f"Published: {publish(Path(config.output_dir), config.push_to_hub, config.hub_private_repo)}")


if __name__ == "__main__":
    main()
