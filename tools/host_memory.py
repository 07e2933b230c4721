"""The peak of a run's memory on this machine (not its GPUs'), over all of its processes.

    python -m tools.host_memory --full --data-root D --max-steps 1      # any flag of train.py

Proportional: what several processes share, such as a file that all read, counts once. For Linux.
"""

import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TextIO

from plumbing.cli import InputError, Parser, run

PROC = Path("/proc")
INTERVAL = 0.05  # seconds


def tree(root: int) -> list[int]:
    """The ids of a process and of all that it has started, directly or not."""
    parents = {}
    for stat in PROC.glob("[0-9]*/stat"):
        try:
            after_name = stat.read_text(encoding="utf-8").rpartition(")")[2].split()
        except OSError:
            continue  # it has ended
        parents[int(stat.parent.name)] = int(after_name[1])
    found = [root]
    for process in found:
        found += [child for child, parent in parents.items() if parent == process]
    return found


def proportional_kb(process: int) -> tuple[int, int]:
    """(all of a process's memory, what no file stands behind) in kB; 0 if it has ended."""
    sizes = {"Pss:": 0, "Pss_Anon:": 0}
    try:
        lines = (PROC / str(process) / "smaps_rollup").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    for line in lines:
        name, *rest = line.split()
        if name in sizes:
            sizes[name] = int(rest[0])
    return sizes["Pss:"], sizes["Pss_Anon:"]


def require_proportions() -> None:
    """Raise InputError where the system does not say what processes share."""
    if not (PROC / "self/smaps_rollup").exists():
        raise InputError("the system does not say what processes share; this is for Linux")


class Forward(threading.Thread):
    """Reads, and passes on, what a run prints; `training` once its first stage has begun."""

    def __init__(self, lines: TextIO, show: bool = True):
        super().__init__()
        self.lines = lines
        self.show = show
        self.training = False

    def run(self) -> None:
        for line in self.lines:
            if self.show:
                print(line, end="", flush=True)
            self.training = self.training or line.startswith("stage ")


def main(argv: list[str] | None = None) -> None:
    """Run train.py with the flags, and print the peaks."""
    parser = Parser(__doc__)
    _, flags = parser.parse_known_args(argv)
    require_proportions()
    script = Path(__file__).parent.parent / "train.py"
    child = subprocess.Popen([sys.executable, str(script), *flags], stdout=subprocess.PIPE,
                             encoding="utf-8")
    forward = Forward(child.stdout)
    forward.start()
    peaks = {"before the first step": [0, 0], "after": [0, 0]}
    while child.poll() is None:
        peak = peaks["after" if forward.training else "before the first step"]
        sizes = [proportional_kb(process) for process in tree(child.pid)]
        for i, column in enumerate(zip(*sizes)):
            peak[i] = max(peak[i], sum(column))
        time.sleep(INTERVAL)
    forward.join()
    for when, (whole, anonymous) in peaks.items():
        if not whole:
            continue  # the run ended before
        print(f"peak memory of all processes {when}: {whole / 1024:,.0f} MB, "
              f"{anonymous / 1024:,.0f} MB of them with no file behind")
    sys.exit(child.returncode)


if __name__ == "__main__":
    run(main)
