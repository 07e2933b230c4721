"""Check a LLaVA-format set before training: every bad row is named.

    python -m tools.check_data runs/world/train.json runs/world         # opens every image (5 s)

Exit status 2 if a row is bad.
"""

import sys
from pathlib import Path

from plumbing.cli import Parser, run
from plumbing.records import read_list, row_faults


def main(argv: list[str] | None = None) -> None:
    """Print each bad row, then how many there are."""
    parser = Parser(__doc__)
    parser.add_argument("file", type=Path, help="a JSON file, one record a row")
    parser.add_argument("images", type=Path, help="the folder that its images are relative to")
    args = parser.parse_args(argv)
    records = read_list(args.file)
    found = list(row_faults(records, args.images))
    if found:
        print(f"{args.file}: rows count from 0")
    for row, fault in found:
        print(f"{args.file}: row {row}{id_of(records[row])} {fault}")
    print(f"{args.file}: {len(records)} rows, {len(found)} bad")
    if found:
        sys.exit(2)


def id_of(record) -> str:
    """A record's id in brackets, if it has one: a bad row may be anything."""
    if isinstance(record, dict) and "id" in record:
        return f" (id {record['id']})"
    return ""


if __name__ == "__main__":
    run(main)
