"""Start the processes of a run on this machine, pass signals on to them, and end with them."""

import functools
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable

import torch
from torch.distributed.elastic.utils.distributed import get_free_port
from torch.multiprocessing import ProcessExitedException, get_context, start_processes

from plumbing.cli import run
from plumbing.config import Config
from plumbing.signals import SIGNALS, STOPPED, listen, listen_while_loading


def launched() -> bool:
    """Return whether torchrun, or `launch`, started this process."""
    return "RANK" in os.environ


def wanted_processes(c: Config) -> int:
    """Return how many processes this one should start in its place; 1: none."""
    if launched():
        return 1
    return c.processes or (torch.cuda.device_count() if c.device == "cuda" else 1)


def launch(work: Callable, arguments: tuple, processes: int) -> int:
    """Run `work(*arguments)` in so many processes of this machine; return the exit status.

    A signal is passed on to each, and they may take as long as they need to save. If one fails, the
    others are ended, by SIGTERM and after 30 s by SIGKILL, and its status is returned.
    """
    # Libraries read these when they load; without the second, batches that differ in length leave
    # gaps in a GPU's memory.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)
    received = []
    listen(lambda number, _: received.append(number))
    stopped = get_context("spawn").Event()
    # A process inherits that signals are blocked. It lets them through when it listens.
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    context = start_processes(run_one, (work, arguments, processes, get_free_port(), stopped),
                              processes, join=False)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    try:
        while not context.join(timeout=0.1):
            while received:
                number = received.pop(0)
                for process in context.processes:
                    if process.is_alive():
                        os.kill(process.pid, number)
    except ProcessExitedException as e:
        if e.exit_code > 0:
            return e.exit_code
        hint = "; the machine's memory may have run out" if e.signal_name == "SIGKILL" else ""
        print(f"error: process {e.error_index} was ended by {e.signal_name}{hint}", file=sys.stderr)
        return 1
    return STOPPED if stopped.is_set() else 0


def run_one(rank: int, work: Callable, arguments: tuple, processes: int, port: int,
            stopped) -> None:
    """Run `work` as one of the processes, which are told who they are as torchrun tells it."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes),
                      LOCAL_WORLD_SIZE=str(processes), MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port))
    os.setsid()  # else a terminal's Ctrl-C would reach it twice
    listen_while_loading()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    status = 1
    try:
        run(functools.partial(work, *arguments))
        status = 0
    except SystemExit as e:
        status = e.code
    except Exception:
        traceback.print_exc()
    if status == STOPPED:
        stopped.set()
        status = 0  # another status would make `launch` end those that still save
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # not by the interpreter's end, at which a thread of gloo's may abort it
