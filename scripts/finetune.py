"""Fine-tune an encoder with the labels of all images, or of a few of each class, and measure it.

python scripts/finetune.py --encoder runs/digits --dataset digits
accelerate launch --config_file accelerate_configs/8gpu.yaml scripts/finetune.py \\
    --encoder runs/imagenet --dataset /data/imagenet --protocol 1percent
"""

import os

from m2t_accel.config.command_line import errors_in_one_line, parse_settings
from m2t_accel.config.data import check_num_processes
from m2t_accel.config.evaluation import FinetuneConfig, build_finetune, check_publishing, finetune_table, run_folder


def main() -> None:
    with errors_in_one_line():
        usage = "--encoder SOURCE --dataset SOURCE [--protocol NAME] [--output_dir DIR]"
        config, _ = parse_settings(
            __doc__, usage, FinetuneConfig, build_finetune, preset="protocol", table=finetune_table
        )
        check_publishing(config)
        check_num_processes(config, int(os.environ.get("WORLD_SIZE", "1")))
        from m2t_accel.distributed.processes import destroy_process_group
        from m2t_accel.evaluation.finetune import evaluate_finetuned

        evaluate_finetuned(config)
        is_main = destroy_process_group()
        if config.push_to_hub and is_main:
            from m2t_accel.hub.publish import publish

            print(f"Published: {publish(run_folder(config.encoder), config.push_to_hub, config.hub_private_repo)}")


if __name__ == "__main__":
    main()
