"""The processes that load images: how they are started, and what they need of the machine."""

import atexit
import gc
import multiprocessing
import os
import shutil
import signal
import sys
from pathlib import Path

from plumbing.cli import InputError
from plumbing.config import Config
from plumbing.image_files import image_bytes, training_size
from plumbing.launcher import wanted_processes
from plumbing.signals import SIGNALS

SHARED_MEMORY = Path("/dev/shm")
# a forked worker shares the records with its parent, a spawned one gets a pickled copy; but macOS's
# own libraries may fail in a fork, and Windows has none
START = "fork" if sys.platform == "linux" else "spawn"
PREFETCH = 2  # batches that a worker makes beforehand, torch's default


def loader_options(c: Config) -> dict:
    """Arguments of torch's DataLoader."""
    options = {"num_workers": c.workers, "pin_memory": c.device == "cuda"}
    if c.workers:
        atexit.register(end_workers)
        options["worker_init_fn"] = begin_worker
        options["multiprocessing_context"] = START
    return options


def begin_worker(worker: int) -> None:
    """What a worker does first: leave signals to the run, and what it shares with it as it is.

    torchrun and batch systems signal every process; the run then finishes its step and saves: a
    signal must not take its loader away. A collection of garbage writes into every object that it
    looks at, and so would make a copy of the run's.
    """
    gc.freeze()
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def end_workers() -> None:
    """At exit, before Python waits for them: they do not listen to the signal that it sends."""
    for worker in multiprocessing.active_children():
        worker.kill()


def check_shared_memory(c: Config) -> None:
    """Raise InputError if the workers' batches do not fit in shared memory.

    A worker would be killed in the middle of the run. Docker gives 64 MB.
    """
    if not c.workers or not SHARED_MEMORY.is_dir():
        return
    samples = c.micro_batch or max(c.stage1_batch, c.stage2_batch)
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", wanted_processes(c)))
    wanted = processes * c.workers * PREFETCH * samples * image_bytes(training_size(c))
    free = shutil.disk_usage(SHARED_MEMORY).free
    if free < wanted:
        raise InputError(
            f"{SHARED_MEMORY}: has {free / 1e6:,.0f} MB free, and {processes} x --workers "
            f"{c.workers} want {wanted / 1e6:,.0f} MB; in Docker start the container with "
            f"--shm-size={1 + wanted // 10 ** 9}g or --ipc=host, or give fewer --workers")
