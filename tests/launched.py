"""What test_launcher.py has two processes do. It imports little, as each process imports it."""

import os
import sys
import time
from pathlib import Path

from plumbing.cli import Stopped


def save(statuses: str) -> None:
    """Wait for a signal, save, which takes rank 1 longer, and end with the status of one's rank.

    Rank 0 waits for no signal, but for rank 1, if its status is 2: it fails.
    """
    rank = int(os.environ["RANK"])
    assert os.getsid(0) == os.getpid()  # the terminal's Ctrl-C does not reach it
    try:
        Path(f"ready{rank}").touch()
        while statuses[rank] != "2" or not Path("ready1").exists():
            time.sleep(0.01)
    except Stopped:
        time.sleep((1 + rank) / 2)  # a second signal would raise Stopped here
        Path(f"saved{rank}").touch()
    sys.exit(int(statuses[rank]))
