"""The batches of an epoch, in an order that is the same on any number of processes."""

import atexit
import functools
import gc
import itertools
import multiprocessing
import signal
import sys
from collections.abc import Iterator

import torch
from torch.utils.data import DataLoader

from data import Conversations, collate
from plumbing.config import Config
from plumbing.signals import SIGNALS

# A forked worker shares the records with its parent, a spawned one gets a pickled copy. But macOS's
# own libraries may fail after a fork, and Windows has none.
START = "fork" if sys.platform == "linux" else "spawn"
PREFETCH = 2  # batches that a worker makes in advance, torch's default


def batch_order(dataset: Conversations, batch_size: int, seed: int, epoch: int,
                group: int = 1) -> list[list[int]]:
    """Return the rows of each batch of an epoch, a function of the arguments alone.

    A last, smaller batch is dropped, unless it is the only one. group > 1 makes batches with little
    padding: samples with and without an image apart, each shuffled run of `group` batches sorted by
    length. The rows that are left over make mixed batches.
    """
    generator = torch.Generator().manual_seed(seed * 1_000 + epoch)
    order = torch.randperm(len(dataset), generator=generator).tolist()
    if group == 1:
        count = max(1, len(dataset) // batch_size)
        return [order[k * batch_size:(k + 1) * batch_size] for k in range(count)]
    sizes = dataset.sizes()
    batches = []
    left_over = []
    for has_image in (True, False):
        rows = [i for i in order if sizes[i][0] == has_image]
        for k in range(0, len(rows), batch_size * group):
            run = sorted(rows[k:k + batch_size * group], key=lambda i: sizes[i][1])
            whole = len(run) - len(run) % batch_size
            batches += [run[j:j + batch_size] for j in range(0, whole, batch_size)]
            left_over += run[whole:]
    batches += [left_over[j:j + batch_size] for j in range(0, len(left_over), batch_size)]
    if len(batches) > 1 and len(batches[-1]) < batch_size:
        batches.pop()
    # Sorted runs would make long and short batches alternate: shuffle them.
    return [batches[k] for k in torch.randperm(len(batches), generator=generator).tolist()]


def count_steps(rows: int, batch_size: int, epochs: float) -> int:
    """Return the number of steps of a stage."""
    return max(1, round(epochs * max(1, rows // batch_size)))


def micro_batch_rows(dataset: Conversations, batch_size: int, epochs: float, seed: int, group: int,
                     pieces: int, own_pieces: range, start: int) -> Iterator[list[int]]:
    """Yield the rows of this process's micro-batches, one after the other."""
    steps = count_steps(len(dataset), batch_size, epochs)
    step = 0
    for epoch in itertools.count():
        for batch in batch_order(dataset, batch_size, seed, epoch, group):
            if step >= steps:
                return
            if step >= start:
                for k in own_pieces:
                    yield batch[k::pieces]
            step += 1


def make_loader(dataset: Conversations, batch_size: int, epochs: float, seed: int, pad: int,
                group: int = 1, pieces: int = 1, own_pieces: range = range(1), start: int = 0,
                **options) -> DataLoader:
    """Load shuffled batches once from step `start` on; `options` are those of torch's DataLoader.

    Each batch is divided into `pieces` micro-batches, of which this process gets `own_pieces`.
    """
    rows = micro_batch_rows(dataset, batch_size, epochs, seed, group, pieces, own_pieces, start)
    return DataLoader(dataset, batch_sampler=rows, collate_fn=functools.partial(collate, pad=pad),
                      **options)


def loader_options(c: Config) -> dict:
    """Return the arguments of torch's DataLoader that a Config decides."""
    options = {"num_workers": c.workers, "pin_memory": c.device == "cuda"}
    if c.workers:
        atexit.register(end_workers)
        options["worker_init_fn"] = begin_worker
        options["multiprocessing_context"] = START
    return options


def begin_worker(worker: int) -> None:
    """Ignore signals, and keep the memory that is shared with the run as it is.

    Batch systems signal every process. The run then finishes its step and saves: a signal must not
    take its loader away. A garbage collection writes into every object, and so would copy them all.
    """
    gc.freeze()
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def end_workers() -> None:
    """Kill the workers at exit: they ignore the signal that Python sends and then waits for."""
    for worker in multiprocessing.active_children():
        worker.kill()
