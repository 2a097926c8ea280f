"""Convert a checkpoint of the published Momentum² Teacher code, or a torchvision or timm ResNet, to an encoder folder.

python scripts/import_reference.py last_epoch_ckpt.pth.tar --output encoders/published
"""

from argparse import RawDescriptionHelpFormatter
from pathlib import Path

from m2t_accel.config.command_line import OneLineParser, errors_in_one_line


def main() -> None:
    parser = OneLineParser(description=__doc__, allow_abbrev=False, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=Path, help=".pth.tar, .pth, .pt, .bin or .safetensors")
    parser.add_argument("--output", metavar="DIR", required=True, type=Path, help="folder to create")
    parser.add_argument(
        "--network", choices=("teacher", "student"), default="teacher", help="encoder to convert (default: teacher)"
    )
    with errors_in_one_line():
        given = parser.parse_args()
        from m2t_accel.hub.import_reference import import_reference

        print("\n".join(import_reference(given.checkpoint, given.network, given.output)))


if __name__ == "__main__":
    main()
