"""Export an encoder's weights to another library, and check that the library computes the same features.

python scripts/export.py --encoder runs/imagenet --format torchvision --output resnet50.safetensors

The file ends in .safetensors or .pth for torchvision and timm, .pkl for detectron2, and .onnx for ONNX, which takes
any encoder. timm and onnx need `pip install -e ".[export]"`.
"""

from argparse import RawDescriptionHelpFormatter
from pathlib import Path

from m2t_accel.config.command_line import OneLineParser, errors_in_one_line
from m2t_accel.config.evaluation import check_encoder


def main() -> None:
    parser = OneLineParser(description=__doc__, allow_abbrev=False, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument(
        "--encoder", metavar="SOURCE", required=True, help="folder of a run or model, Hub id, or file of weights"
    )
    parser.add_argument(
        "--format", required=True, choices=("torchvision", "timm", "detectron2", "onnx"), help="library to export to"
    )
    parser.add_argument("--output", metavar="FILE", required=True, type=Path, help="file to write")
    with errors_in_one_line():
        given = parser.parse_args()
        check_encoder(given.encoder)
        from m2t_accel.hub.encoders import load_encoder
        from m2t_accel.hub.export import export

        print("\n".join(export(load_encoder(given.encoder), given.format, given.output)))


if __name__ == "__main__":
    main()
