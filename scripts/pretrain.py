"""Pretrain an image encoder by Momentum² Teacher.

accelerate launch --config_file accelerate_configs/cpu.yaml scripts/pretrain.py
accelerate launch --config_file accelerate_configs/8gpu.yaml scripts/pretrain.py \\
    --recipe 8xV100-b1024-100ep --dataset /data/imagenet --output_dir runs/imagenet
"""

import os

from m2t_accel.recipes import check_num_processes, check_output_dir, errors_in_one_line, parse_command_line


def main() -> None:
    with errors_in_one_line():
        config = parse_command_line(__doc__)
        check_num_processes(config, int(os.environ.get("WORLD_SIZE", "1")))
        if os.environ.get("RANK", "0") == "0":
            check_output_dir(config.output_dir)
        from m2t_accel.pretrain import pretrain  # late: torch and transformers take seconds to import

        pretrain(config)


if __name__ == "__main__":
    main()
