"""Write the features of a dataset's images to a file, draw a map of them, and show images with their neighbours.

python scripts/embed.py --encoder runs/digits --dataset digits
"""

from m2t_accel.config.command_line import errors_in_one_line, parse_settings
from m2t_accel.config.evaluation import EmbedConfig, build_embed


def main() -> None:
    with errors_in_one_line():
        usage = "--encoder SOURCE --dataset SOURCE [--output_dir DIR]"
        config, _ = parse_settings(__doc__, usage, EmbedConfig, build_embed)
        from m2t_accel.distributed.processes import destroy_process_group
        from m2t_accel.evaluation.embedding import embed_dataset

        for line in embed_dataset(config):
            print(line)
        destroy_process_group()


if __name__ == "__main__":
    main()
