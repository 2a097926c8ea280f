"""Measure an encoder by weighted k-nearest-neighbour classification of labelled images.

python scripts/knn.py --encoder runs/digits --dataset digits
accelerate launch --config_file accelerate_configs/8gpu.yaml scripts/knn.py \\
    --encoder runs/imagenet --dataset /data/imagenet
"""

from m2t_accel.config.command_line import errors_in_one_line, parse_settings
from m2t_accel.config.evaluation import KnnConfig, build_knn


def main() -> None:
    with errors_in_one_line():
        config, _ = parse_settings(__doc__, "--encoder SOURCE --dataset SOURCE", KnnConfig, build_knn)
        from m2t_accel.distributed.processes import destroy_process_group
        from m2t_accel.evaluation.knn import evaluate_knn

        evaluate_knn(config)
        destroy_process_group()


if __name__ == "__main__":
    main()
