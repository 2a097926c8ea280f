"""Publish a run on the Hub: encoder, card, metrics, curves, settings, results, and weights under torchvision's names.

hf auth login
python scripts/push_to_hub.py --run runs/imagenet --repo_id USER/NAME

A second push updates the files and, in the card, the figures and the text between m2t_accel's two marks. It keeps
everything that you have written outside the marks.
"""

from argparse import RawDescriptionHelpFormatter
from pathlib import Path

from m2t_accel.config.command_line import OneLineParser, errors_in_one_line


def main() -> None:
    parser = OneLineParser(description=__doc__, allow_abbrev=False, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--run", metavar="DIR", required=True, type=Path, help="folder of a run that has ended")
    parser.add_argument(
        "--repo_id", metavar="USER/NAME", required=True, help="repository on the Hub, created if it does not exist"
    )
    parser.add_argument("--private", action="store_true", help="create the repository as a private one")
    parser.add_argument("--revision", metavar="NAME", help="branch (default: main), created if it does not exist")
    with errors_in_one_line():
        given = parser.parse_args()
        from m2t_accel.hub.publish import publish

        print(f"Published: {publish(given.run, given.repo_id, given.private, given.revision)}")


if __name__ == "__main__":
    main()
