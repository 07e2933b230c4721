"""Does it run on this GPU as on the CPU, in the memory and time it should?  In under 10 minutes.

    python -m tools.gpu_check                       # one GPU, random weights, no network
    python -m tools.gpu_check --out gpu_check.md    # the table in a file too, as Markdown
    python -m tools.gpu_check --device cpu          # a CPU, small sizes (2 min)
    python -m tools.gpu_check --only memory resume  # some of the checks

Prints a table, check | expected | got | ok; the exit status is 1 if one is not ok. What is left out
is in the table too, with the reason.
"""

import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from tqdm import tqdm

from data import InputError
from plumbing.checks import find_device
from plumbing.cli import Parser, run
from plumbing.files import replacing
from tools.gpu_check import correctness, cost, runs
from tools.gpu_check.common import LeftOut, Row, Setup

# in this order: a later check may need the runs of an earlier one, and the slowest come last
CHECKS = {
    "group": correctness.check_group,
    "start": correctness.check_start,
    "bf16": correctness.check_bf16,
    "dtypes": correctness.check_dtypes,
    "recompute": correctness.check_recompute,
    "attention": correctness.check_attention,
    "memory": cost.check_memory,
    "fragments": cost.check_fragments,
    "fp32-run": runs.check_fp32_run,
    "resume": runs.check_resume,
    "time": cost.check_time,
    "recompilations": runs.check_recompilations,
}
SECONDS = {"cuda": 570, "cpu": 170}     # all of it; what does not fit any more is left out
HEAD = "| check | expected | got | ok |\n|---|---|---|---|"


def rows_of(name: str, check: Callable, setup: Setup) -> Iterator[Row]:
    """Yield a check's rows. An exception becomes a row: a check that fails stops no other."""
    claim = (check.__doc__ or "").split("\n")[0]
    try:
        setup.free()
        yield from check(setup)
    except LeftOut as e:
        yield Row(name, claim, str(e), None)
    except Exception as e:  # whatever a GPU can do wrong
        fault = str(e).strip().splitlines()
        yield Row(name, claim, f"{type(e).__name__}: {fault[0][:300] if fault else ''}", False)


def line(row: Row) -> str:
    """Return a row as Markdown."""
    verdict = {True: "yes", False: "NO", None: "left out"}[row.ok]
    cells = [" ".join(cell.split()).replace("|", "\\|") for cell in row[:3]]
    return f"| {' | '.join([*cells, verdict])} |"


def run_checks(names: list[str], setup: Setup) -> list[Row]:
    """Run checks; print each row as soon as it is measured."""
    rows = []
    for name in tqdm(names, leave=False, disable=None):
        for row in rows_of(name, CHECKS[name], setup):
            rows.append(row)
            tqdm.write(line(row))
            sys.stdout.flush()
    return rows


def versions(device: str) -> str:
    """Return a line that describes the device."""
    machine = f"a CPU with {os.cpu_count()} cores"
    if device == "cuda":
        card = torch.cuda.get_device_properties(0)
        machine = (f"{card.name} ({card.total_memory / 1e9:.1f} GB, compute capability "
                   f"{card.major}.{card.minor}), CUDA {torch.version.cuda}, cuDNN "
                   f"{torch.backends.cudnn.version()}")
    return f"`python -m tools.gpu_check` on {machine}, torch {torch.__version__}:"


def main(argv: list[str] | None = None) -> None:
    """Run all checks, or those that are named."""
    parser = Parser(__doc__)
    parser.prog = "python -m tools.gpu_check"
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto",
                        help="default: a GPU if there is one")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the table there too")
    parser.add_argument("--only", nargs="+", choices=CHECKS, default=list(CHECKS), metavar="CHECK",
                        help=f"some of: {', '.join(CHECKS)}")
    args = parser.parse_args(argv)
    # before CUDA is first used: the sizes of steps vary
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    device = find_device(args.device)
    if device == "mps":  # the checks are about CUDA
        device = "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch finds no GPU here; --device cpu checks what it can")
    if args.out and not args.out.parent.is_dir():
        raise InputError(f"--out {args.out}: no such folder {args.out.parent}")
    heading = f"{versions(device)}\n\n{HEAD}"
    print(heading)
    torch.manual_seed(0)
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="gpu_check-") as folder:
        setup = Setup(device, Path(folder), start + SECONDS[device])
        rows = run_checks([name for name in CHECKS if name in args.only], setup)
    verdicts = [row.ok for row in rows]
    summary = (f"{verdicts.count(True)} ok, {verdicts.count(False)} not ok, "
               f"{verdicts.count(None)} left out; {time.monotonic() - start:.0f} s")
    print(summary)
    if args.out:
        with replacing(args.out) as temporary:
            text = "\n".join([heading, *map(line, rows), "", summary])
            temporary.write_text(f"{text}\n", encoding="utf-8")
    if False in verdicts:
        sys.exit(1)


if __name__ == "__main__":
    run(main)
