"""Start the processes of a run on this machine, pass signals on to them, and end with them."""

import atexit
import logging
import os
import sys
from collections.abc import Callable

import torch
from torch.distributed.elastic.utils.distributed import get_free_port
from torch.multiprocessing import ProcessExitedException, get_context, start_processes

from plumbing.cli import run
from plumbing.config import Config
from plumbing.signals import STOPPED, block, listen, listen_while_loading


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

    Signals are passed on. If a process fails, the others get SIGTERM, and SIGKILL 30 s later.
    """
    # libraries read these while they load
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    # batches differ in length: without it CUDA's allocator is left with gaps
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)
    received = []
    listen(lambda number, _: received.append(number))
    stopped = get_context("spawn").Event()
    block(True)  # a process that is started inherits it, and lets signals through when it listens
    everyone = (work, arguments, processes, get_free_port(), stopped)
    context = start_processes(run_one, everyone, processes, join=False)
    block(False)
    try:
        while not context.join(timeout=0.1):
            while received:
                number = received.pop(0)
                for process in context.processes:
                    if process.is_alive() and os.name != "nt":  # there Ctrl-C reaches all
                        os.kill(process.pid, number)
    except ProcessExitedException as e:
        if e.exit_code > 0:
            return e.exit_code
        hint = "; the machine's memory may have run out" if e.signal_name == "SIGKILL" else ""
        print(f"error: process {e.error_index} was ended by {e.signal_name}{hint}", file=sys.stderr)
        return 1
    return STOPPED if stopped.is_set() else 0


def run_one(rank: int, work: Callable, arguments: tuple, world: int, port: int, stopped) -> None:
    """Run `work` as one of the processes, which are told who they are as torchrun tells it."""
    os.environ.update(RANK=f"{rank}", LOCAL_RANK=f"{rank}", WORLD_SIZE=f"{world}",
                      LOCAL_WORLD_SIZE=f"{world}", MASTER_ADDR="127.0.0.1", MASTER_PORT=f"{port}")
    if hasattr(os, "setsid"):
        os.setsid()  # a terminal's Ctrl-C reaches it once, through `launch`
    listen_while_loading()
    block(False)
    status = 0
    try:
        run(lambda: work(*arguments))
    except SystemExit as e:
        status = e.code
    if status == STOPPED:
        stopped.set()
        status = 0  # another status would end those that still save
    # the end of the interpreter is left out: a thread of gloo's sometimes aborts it there
    atexit.register(os._exit, status)
