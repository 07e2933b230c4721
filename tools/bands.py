"""The bands that `train.py --tiny` holds its log against, made of finished runs of other seeds.

    python -m tools.compare --arms movekd           # five runs of --tiny, seeds 0 to 4
    python -m tools.bands runs/compare/movekd/*     # plumbing/tiny_bands.json, and a table of it

Per stage, term and block of steps: the lowest and the highest mean of a few logged lines in any of
the runs, with a margin.
"""

from pathlib import Path

from data import write_json
from plumbing.cli import InputError, Parser, run
from plumbing.flags import load_config
from plumbing.run_folder import read_log
from plumbing.watch import BANDS, WINDOW, is_reference

TERMS = ("L_text", "L_kd", "L_balance", "L_total", "kd_clip", "kd_eva", "kd_convnext")
SHOWN = tuple(term for term in TERMS if term != "L_total")
BLOCKS = {1: 5, 2: 6}           # of so many steps each stage is cut into
RANGE, SHARE = 0.25, 0.05       # the margin: of the range of the runs, and of the number itself
ABOUT = (f"per stage and term: [first step, end, lowest, highest] of the mean of {WINDOW} logged "
         "lines, over seeds 0 to 4 of `train.py --tiny`, with a margin of a quarter of their range "
         "and 5 %; made by tools.bands")


def read_lines(folder: Path) -> list[dict]:
    """The log of a finished run of `--tiny`. Raises InputError."""
    if not (folder / "result.json").exists():
        raise InputError(f"{folder}: is no finished run")
    if not is_reference(load_config(folder / "config.json")):
        raise InputError(f"{folder}: is no run of `train.py --tiny` as it is, with any --seed")
    return read_log(folder)


def means(lines: list[dict], stage: int, term: str) -> list[tuple[int, float]]:
    """(step of the last line, mean) of every WINDOW neighbouring lines of a stage."""
    rows = [line for line in lines if line["stage"] == stage]
    found = []
    for end in range(WINDOW, len(rows) + 1):
        values = [line[term] for line in rows[end - WINDOW:end]]
        found.append((rows[end - 1]["step"], sum(values) / WINDOW))
    return found


def make_bands(logs: list[list[dict]]) -> dict[str, dict[str, list]]:
    """Stage -> term -> [first step, end, lowest, highest] of each block."""
    bands = {}
    for stage, count in BLOCKS.items():
        steps = 1 + max(line["step"] for line in logs[0] if line["stage"] == stage)
        size = -(-steps // count)
        bands[str(stage)] = {}
        for term in TERMS:
            found = [pair for lines in logs for pair in means(lines, stage, term)]
            blocks = []
            for first in range(0, steps, size):
                values = [mean for step, mean in found if first <= step < first + size]
                low, high = min(values), max(values)
                margin = RANGE * (high - low)
                low, high = low - margin - SHARE * low, high + margin + SHARE * high
                blocks.append([first, first + size, round(max(0.0, low), 3), round(high, 3)])
            bands[str(stage)][term] = blocks
    return bands


def table(bands: dict[str, dict[str, list]]) -> str:
    """The first and the last block of each stage, for docs/lesson.md."""
    lines = ["| | " + " | ".join(SHOWN) + " |", "|---" * (1 + len(SHOWN)) + "|"]
    for stage, terms in bands.items():
        first, end, *_ = terms["L_text"][0]
        for block, when in ((0, f"steps {first} to {end}"), (-1, f"its last {end - first}")):
            cells = [f"{terms[term][block][2]:.2f} .. {terms[term][block][3]:.2f}"
                     for term in SHOWN]
            lines.append(f"| stage {stage}, {when} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Make the bands of runs, write and show them."""
    parser = Parser(__doc__)
    parser.add_argument("runs", type=Path, nargs="+", help="folders of finished runs")
    parser.add_argument("--out", type=Path, default=BANDS)
    args = parser.parse_args(argv)
    bands = make_bands([read_lines(folder) for folder in args.runs])
    write_json(args.out, {"about": ABOUT, "bands": bands})
    print(table(bands))


if __name__ == "__main__":
    run(main)
