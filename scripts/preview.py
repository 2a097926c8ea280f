"""Draw a dozen of your images with the two views that the model will see of each, and the parameters of the views.

python scripts/preview.py --dataset FOLDER

The views are those of recipe 8x2080Ti-b256-100ep unless you give another one. Run it without accelerate launch.
"""

import argparse
from pathlib import Path

from m2t_accel.config.command_line import errors_in_one_line, parse_command_line, view_settings
from m2t_accel.config.pretrain import check_inputs


def main() -> None:
    options = argparse.ArgumentParser(add_help=False)
    options.add_argument("--output", metavar="FILE", default="preview.png", help="picture (default: preview.png)")
    with errors_in_one_line():
        shown = view_settings() - {"num_workers"}
        config, given = parse_command_line(__doc__, options=options, recipe="8x2080Ti-b256-100ep", shown=shown)
        check_inputs(config)
        from m2t_accel.data.preview import draw_preview

        print("\n".join(draw_preview(config, Path(given.output))))


if __name__ == "__main__":
    main()
