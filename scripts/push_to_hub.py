"""Publish a run on the Hub: encoder, card, metrics, curves, settings, results, and weights under torchvision's names.

hf auth login
python scripts/push_to_hub.py --run runs/imagenet --repo_id USER/NAME

A second push updates figures and files; the text of a card that somebody has edited stays.
"""

from argparse import RawDescriptionHelpFormatter
from pathlib import Path

from m2t_accel.config.command_line import OneLineParser, errors_in_one_line


def main() -> None:
    parser = OneLineParser(description=__doc__, allow_abbrev=False, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--run", metavar="DIR", required=True, type=Path, help="the folder of a run that has ended")
    parser.add_argument(
        "--repo_id", metavar="USER/NAME", required=True, help="where on the Hub; made if it is not there"
    )
    parser.add_argument("--private", action="store_true", help="if it is made, for you alone")
    parser.add_argument("--revision", metavar="NAME", help="the branch (default: main); made if it is not there")
    with errors_in_one_line():
        given = parser.parse_args()
        from m2t_accel.hub.publish import publish

        print(f"Published: {publish(given.run, given.repo_id, given.private, given.revision)}")


if __name__ == "__main__":
    main()
