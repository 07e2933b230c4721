"""Check a LLaVA-format set before training: every bad row is named.

    python -m tools.check_data runs/world/train.json runs/world         # opens every image (5 s)

Exit status 2 if a row is bad.
"""

import sys
from pathlib import Path

from data import row_name
from plumbing.cli import Parser, run
from real.image_files import DiskImages
from real.records import read_list, row_faults


def main(argv: list[str] | None = None) -> None:
    """Print each bad row, then how many there are."""
    parser = Parser(__doc__)
    parser.add_argument("file", type=Path, help="a JSON file, one record a row")
    parser.add_argument("images", type=Path, help="the folder that its images are relative to")
    parser.add_argument("--allow-outside", action="store_true", help="images may lie outside")
    parser.add_argument("--held-out", action="store_true", help="it is for --eval-data")
    args = parser.parse_args(argv)
    records = read_list(args.file)
    get_image = DiskImages(args.images, 16, args.allow_outside)
    found = list(row_faults(records, get_image, args.held_out))
    for row, fault in found:
        print(f"{args.file}: {row_name(row, records[row])} {fault}")
    print(f"{args.file}: {len(records)} rows, {len(found)} bad")
    if found:
        sys.exit(2)


if __name__ == "__main__":
    run(main)
