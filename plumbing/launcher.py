"""Start the processes of a run on this machine, pass signals on to them, and end with them."""

import os
import signal
import socket
import subprocess
import sys
import time

import torch

from plumbing.config import Config
from plumbing.signals import STOPPED, listen

PATIENCE = 30  # seconds that the others have to end when one process has failed


def launched() -> bool:
    """Whether torchrun, or `launch`, started this process."""
    return "RANK" in os.environ


def wanted_processes(c: Config) -> int:
    """How many processes this one should start in its place; 1: none."""
    if launched():
        return 1
    return c.processes or (torch.cuda.device_count() if c.device == "cuda" else 1)


def launch(script: str, argv: list[str], processes: int) -> int:
    """Run `script argv` in so many processes of this machine; returns the exit status.

    A signal is passed on to each, and they may take as long as they need to save. If one fails, the
    others are ended. They are told who they are as torchrun tells it.
    """
    received = []
    former = listen(lambda number, _: received.append(number))
    children = start(script, argv, processes)
    try:
        failed = watch(children, received)
    finally:
        end(children)
        for number, handler in former.items():
            signal.signal(number, handler)
    if failed is not None:
        return explain(children.index(failed), failed.returncode, received)
    stopped = any(child.returncode == STOPPED for child in children)
    return STOPPED if stopped else 0


def start(script: str, argv: list[str], processes: int) -> list[subprocess.Popen]:
    """The processes, each in a session of its own: the terminal's Ctrl-C reaches them once."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // processes)),
        # batches differ in length: without it CUDA's allocator is left with gaps
        "PYTORCH_ALLOC_CONF": "expandable_segments:True",
        **os.environ,
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes),
    }
    if os.name == "nt":  # torch's builds for Windows ask for libuv, and have none
        environment.setdefault("USE_LIBUV", "0")
    children = []
    for rank in range(processes):
        own = {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        children.append(subprocess.Popen([sys.executable, script, *argv], env=own,
                                         start_new_session=True))
    return children


def watch(children: list[subprocess.Popen], received: list[int]) -> subprocess.Popen | None:
    """Wait until all have ended, or one has failed, which is returned; pass signals on."""
    passed_on = 0
    while True:
        running = [child for child in children if child.poll() is None]
        for child in children:
            if child.returncode not in (None, 0, STOPPED):
                return child
        if not running:
            return None
        for number in received[passed_on:]:
            passed_on += 1
            if os.name == "nt":
                continue  # Ctrl-C has reached them: Windows has no sessions, and can send none
            for child in running:
                child.send_signal(number)
        time.sleep(0.1)


def end(children: list[subprocess.Popen]) -> None:
    """End what still runs: it may wait for one that has failed."""
    for child in children:
        if child.poll() is None:
            child.terminate()
    deadline = time.monotonic() + PATIENCE
    for child in children:
        try:
            child.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def explain(rank: int, status: int, received: list[int]) -> int:
    """The exit status of a run whose process `rank` failed; a word if it could not say why."""
    if status > 0:
        return status
    number = signal.Signals(-status)
    if number in received:  # it had not begun to listen
        print(f"stopped by {number.name} before the first step: nothing is lost", file=sys.stderr)
        return STOPPED
    hint = "; the machine's memory may have run out" if number.name == "SIGKILL" else ""
    print(f"error: process {rank} was ended by {number.name}{hint}", file=sys.stderr)
    return 1
