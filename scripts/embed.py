"""Write the features of a dataset's images to a file, with a map of them and a sheet of nearest neighbours.

python scripts/embed.py --encoder runs/digits --dataset digits
"""

from m2t_accel.command_line import errors_in_one_line, parse_settings
from m2t_accel.protocols import EmbedConfig, build_embed


def main() -> None:
    with errors_in_one_line():
        usage = "--encoder SOURCE --dataset SOURCE [--output_dir DIR]"
        config, _ = parse_settings(__doc__, usage, EmbedConfig, build_embed)
        from m2t_accel.embedding import embed_dataset
        from m2t_accel.launch import leave  # late: torch and transformers take seconds to import

        for line in embed_dataset(config):
            print(line)
        leave()


if __name__ == "__main__":
    main()
